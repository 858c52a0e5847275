"""The command line: `python -m wspace demo`."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

DONE, FAILED, MISUSED = 0, 1, 2
NEEDED = {"matplotlib": "matplotlib", "safetensors": "safetensors", "sklearn": "scikit-learn"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The words after `python -m wspace`; those of this process if not given.

    Returns:
        The exit code: 0 done, 1 failed, 2 misused.
    """
    parser = argparse.ArgumentParser(prog="python -m wspace", description="wspace commands.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = commands.add_parser(
        "demo",
        help="the whole idea on handwritten digits, in three acts",
        description="Trains small networks on handwritten digits and plays three acts: an average "
        "that no member is, the negative weight, and a low-rank term. Report on stdout, progress "
        "on stderr; weights, pictures and results.json in a folder. Takes less than a minute.",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: %(default)s"
    )
    demo.add_argument("--seed", type=_seed, default=0, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return MISUSED

    missing = [name for module, name in NEEDED.items() if find_spec(module) is None]
    if missing:
        return _failed(f'the demo needs {" and ".join(missing)}: pip install "wspace[demo]"')
    from wspace import _demo

    try:
        _demo.run(options.out, options.seed)
    except (OSError, ValueError) as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        return _failed("interrupted: run it again, results.json was not written")
    return DONE


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"give an integer from 0 to {2**32 - 1}, not {text!r}")
    return int(text)


def _failed(message: str) -> int:
    print(f"wspace demo: {message}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
