"""The command line: `wspace`, or `python -m wspace`."""

import sys
from collections.abc import Sequence

from wspace._cli import commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The words after `wspace`; the arguments of this process if not given.

    Returns:
        The exit code: 0 done, 1 failed, 2 misused.
    """
    return commands.main(sys.argv[1:] if arguments is None else list(arguments))


if __name__ == "__main__":
    sys.exit(main())
