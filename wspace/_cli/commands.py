"""The commands: their options, and what each of them calls."""

import contextlib
import dataclasses
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wspace._cli.methods import TABLES, add_options, found, given
from wspace._cli.words import (
    DONE,
    FAILED,
    MISUSED,
    Misuse,
    Parser,
    add_choice,
    add_run_options,
    add_traceback,
    choice,
    count,
    near,
    number,
    printable,
    seed,
    size,
)

_LONGEST = 4000
"""Characters that an error may have."""

NEEDED = {"matplotlib": "matplotlib", "sklearn": "scikit-learn"}


def main(words: Sequence[str]) -> int:
    """Runs a command.

    Args:
        words: The words after `wspace`.

    Returns:
        The exit code: 0 done, 1 failed, 2 misused.
    """
    if not words:
        _help(sys.stderr)
        return MISUSED
    name, *rest = words
    if name in ("-h", "--help"):
        _help(sys.stdout)
        return DONE
    if name == "--version":
        from wspace import __version__

        print(f"wspace {__version__}")
        return DONE
    prog = f"wspace {name}"
    try:
        if name not in COMMANDS:
            prog = "wspace"
            raise Misuse(f"there is no command {name!r}{near(name, COMMANDS)}")
        with _terminated(), _warned(prog):
            COMMANDS[name][0](rest)
        sys.stdout.flush()
    except Misuse as error:
        _tell(prog, error, rest)
        return MISUSED
    except KeyboardInterrupt:
        again = ", results.json was not written" if name == "demo" else " to go on"
        print(f"{prog}: interrupted: run it again{again}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        _tell(prog, error, rest)
        return FAILED
    return DONE


def _tell(prog: str, error: BaseException, words: Sequence[str]) -> None:
    if "--traceback" in words:
        traceback.print_exception(error)
    notes = getattr(error, "__notes__", [])
    said = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        said = f"{error.filename}: {error.strerror}"
    text = printable(" ".join("; ".join([said or type(error).__name__, *notes]).split()))
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    expected = isinstance(error, Misuse | OSError | ValueError | TypeError)
    print(f"{prog}: {text if expected else f'{type(error).__name__}: {text}'}", file=sys.stderr)


def _help(stream: Any) -> None:
    print("usage: wspace COMMAND ...\n       wspace --version\n\ncommands:", file=stream)
    for name, (_, text) in COMMANDS.items():
        print(f"  {name:<10}{text}", file=stream)
    print(
        "\nA model is a .safetensors file or a folder of them. wspace COMMAND --help says more.\n"
        "Exit codes: 0 done, 1 failed or interrupted, 2 a command or recipe that means nothing.",
        file=stream,
    )


@contextlib.contextmanager
def _terminated() -> Generator[None]:
    """Takes the signal to end as an interruption, so that what is finished is kept."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread, which gets the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _warned(prog: str) -> Generator[None]:
    """Says warnings in a line, as errors are said, and each once."""
    said = set()

    def tell(message: Warning | str, *_: Any) -> None:
        text = " ".join(str(message).split())
        if text not in said:
            print(f"{prog}: {printable(text)}", file=sys.stderr)
        said.add(text)

    module: Any = warnings
    with warnings.catch_warnings():
        module.showwarning = tell
        yield


def _run(command: str, words: Sequence[str]) -> None:
    """`merge` and `steer`."""
    if not words:
        raise Misuse(f"give a method (see wspace {command} --help)")
    if command == "merge" and words[0].startswith("-"):
        recipe, options = _from_file(words)
    elif words[0] in ("-h", "--help"):
        print(f"usage: wspace {command} METHOD MODEL ... -o OUT\n\n{_methods(command)}")
        return
    else:
        recipe, options = _from_words(command, words)
    from wspace._cli import jobs

    jobs.run(
        recipe(),
        jobs.Output(
            options.output,
            options.force,
            options.shard_size,
            options.dry_run,
            options.quiet,
            options.full_hash,
            options.remove_partial,
            options.allow_nonfinite,
        ),
    )


def _methods(command: str) -> str:
    lines = []
    for name, method in TABLES[command].items():
        trees = "".join(f" --{tree} MODEL" for tree in method.named)
        lines.append(f"  {name:<18}{method.entry.function}{trees}")
    return "methods, and the functions that they are:\n" + "\n".join(lines)


def _from_file(words: Sequence[str]) -> tuple[Callable[[], Any], Any]:
    parser = Parser(
        prog="wspace merge",
        usage="wspace merge METHOD MODEL ... -o OUT\n       wspace merge --recipe FILE -o OUT",
        description="Merges models, by a method or by a recipe in TOML or of mergekit.",
        epilog=f"{_methods('merge')}\n\nwspace merge METHOD --help lists the options of a method.",
    )
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="required")
    _add_weights_options(parser)
    parser.add_argument("--seed", type=seed, metavar="N", help="instead of that of the recipe")
    options = parser.parse(words)

    def recipe() -> Any:
        from wspace._cli import recipes

        read = recipes.read(options.recipe, options.seed)
        return dataclasses.replace(
            read,
            common_rows=read.common_rows or options.common_rows,
            choice=read.choice.joined(choice(options)),
        )

    return recipe, options


def _from_words(command: str, words: Sequence[str]) -> tuple[Callable[[], Any], Any]:
    name = found(command, words[0])
    method = TABLES[command][name]
    parser = Parser(
        prog=f"wspace {command} {words[0]}",
        description=f"The function wspace.{method.entry.function}; options that are not given are "
        "as in Python.",
    )
    models = parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    models.help = "in order"
    add_options(parser, method)
    if method.seeded:
        parser.add_argument("--seed", type=seed, default=0, metavar="N", help="default: 0")
    _add_weights_options(parser)
    options = parser.parse(words[1:])
    aims = [aim for aim in method.aims if getattr(options, aim) is not None]
    if len(aims) > 1:
        one, two, *_ = (f"--{aim.replace('_', '-')}" for aim in aims)
        raise Misuse(f"{one} and {two} each say where models move: give one of them")

    def recipe() -> Any:
        from wspace._cli.calls import Recipe

        return Recipe(
            command,
            name,
            tuple(options.models),
            {tree: Path(getattr(options, tree)) for tree in (*method.named, *aims)},
            given(method, options),
            seed=getattr(options, "seed", 0),
            common_rows=options.common_rows,
            choice=choice(options),
        )

    return recipe, options


def _add_weights_options(parser: Parser) -> None:
    add_run_options(parser)
    add_choice(parser)
    parser.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="write entries that are infinite or NaN and finite in all models, which is refused",
    )
    parser.add_argument(
        "--common-rows",
        action="store_true",
        help="of tensors with different numbers of rows, such as embeddings of vocabularies that "
        "were extended, combine the rows that all models have, and keep the others of the model "
        "that the output is like",
    )
    parser.add_argument(
        "--shard-size",
        type=size,
        metavar="SIZE",
        help="how large a file of a folder may be, such as 2GB; default: 5GB",
    )


def _adapter(command: str, words: Sequence[str]) -> None:
    """`offset` and `extract`."""
    parser = Parser(
        prog=f"wspace {command}",
        description="Writes the low-rank adapter, in a folder of PEFT, that brings a model nearest "
        "to another one, and prints what it leaves out of every tensor.",
    )
    if command == "offset":
        parser.add_argument("start", type=Path, metavar="MODEL", help="where it starts")
        parser.add_argument("--target", type=Path, required=True, metavar="MODEL", help="required")
    else:
        parser.add_argument("start", type=Path, metavar="BASE", help="the base")
        parser.add_argument("target", type=Path, metavar="TUNED", help="what was tuned from it")
    parser.add_argument("--rank", type=count, metavar="N", help="the rank, or the most of --energy")
    parser.add_argument(
        "--energy",
        type=number,
        metavar="X",
        help="the least rank that keeps this share of the squared norm of each difference",
    )
    parser.add_argument(
        "--tail",
        type=number,
        metavar="X",
        help="the least rank that leaves no more than this distance in each tensor",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="by all singular values, also where the randomized method is much faster",
    )
    parser.add_argument(
        "--fan-in-fan-out",
        action="store_true",
        help="for layers that keep weights as (in, out), as those of GPT-2 do",
    )
    parser.add_argument(
        "--embeddings",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="the tensors that are embeddings, which PEFT keeps by other names; default: those "
        "with usual names of embeddings, which are told",
    )
    parser.add_argument(
        "--base-name",
        metavar="NAME",
        help="what the adapter says that it is of: a name on the hub, or a folder",
    )
    parser.add_argument(
        "--task-type",
        metavar="TYPE",
        help="what the adapter says that the model is for, such as CAUSAL_LM",
    )
    add_run_options(parser)
    add_choice(parser)
    options = parser.parse(words)
    if options.energy is not None and options.tail is not None:
        raise Misuse("--energy and --tail each choose the rank: give one of them")
    if options.rank is None and options.energy is None and options.tail is None:
        raise Misuse("give --rank, --energy or --tail: one of them says how large the adapter is")
    if options.energy is not None and not 0 < options.energy <= 1:
        raise Misuse(f"--energy must be in (0, 1], got {options.energy:g}")
    if options.tail is not None and options.tail < 0:
        raise Misuse(f"--tail must be at least 0, got {options.tail:g}")
    from wspace._cli import adapters

    told, chosen = vars(options), choice(options)
    for name in ("traceback", *chosen._fields):
        told.pop(name)
    adapters.run(adapters.Adapter(command=command, choice=chosen, **told))


def _inspect(words: Sequence[str]) -> None:
    parser = Parser(prog="wspace inspect", description="Prints what is in a checkpoint.")
    parser.add_argument("model", type=Path, metavar="MODEL")
    _add_table_options(parser)
    options = parser.parse(words)
    from wspace._cli import tables

    tables.inspect(options.model, options.json)


def _distance(words: Sequence[str]) -> None:
    parser = Parser(
        prog="wspace distance",
        description="Prints norms, distances, angles and inner products of models, and of every "
        "tensor, which is read alone.",
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    _add_table_options(parser)
    add_choice(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse(words)
    from wspace._cli import tables

    tables.distance(options.models, options.json, options.quiet, choice(options))


def _audit(words: Sequence[str]) -> None:
    parser = Parser(
        prog="wspace audit",
        description="Prints what stands between the average of models and a ball around a model "
        "to avoid. All models are in memory at once.",
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--avoid", type=Path, required=True, metavar="MODEL", help="required")
    parser.add_argument("--radius", type=number, required=True, metavar="R", help="required")
    parser.add_argument(
        "--coefficients",
        type=number,
        nargs="+",
        metavar="X",
        help="one number for each model; equal if not given",
    )
    _add_table_options(parser)
    add_choice(parser)
    options = parser.parse(words)
    from wspace._cli import tables

    tables.audit(
        options.models,
        options.avoid,
        options.radius,
        options.coefficients,
        options.json,
        choice(options),
    )


def _add_table_options(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON; what is infinite is null")
    add_traceback(parser)


def _demo(words: Sequence[str]) -> None:
    parser = Parser(
        prog="wspace demo",
        description="Trains small networks on handwritten digits and plays three acts: an average "
        "that no member is, the negative weight, and a low-rank term. Report on stdout, progress "
        "on stderr; weights, pictures and results.json in a folder. Takes less than a minute.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="default: %(default)s")
    add_traceback(parser)
    options = parser.parse(words)
    missing = [name for module, name in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise OSError(f'the demo needs {" and ".join(missing)}: pip install "wspace[demo]"')
    from wspace import _demo as demo

    demo.run(options.out, options.seed)


Command = Callable[[Sequence[str]], None]

COMMANDS: dict[str, tuple[Command, str]] = {
    "merge": (lambda words: _run("merge", words), "one model made of several"),
    "steer": (lambda words: _run("steer", words), "models moved away from another one, or to it"),
    "offset": (lambda words: _adapter("offset", words), "the adapter that leads to a target"),
    "extract": (lambda words: _adapter("extract", words), "what tuning did, as an adapter"),
    "audit": (_audit, "what a guard around a model is worth"),
    "distance": (_distance, "norms, distances and angles of models"),
    "inspect": (_inspect, "what is in a checkpoint"),
    "demo": (_demo, "the whole idea on handwritten digits, in three acts"),
}
