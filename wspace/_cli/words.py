"""Words of the command line: options, numbers, sizes, and the nearest of what could be meant."""

import argparse
import contextlib
import difflib
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

DONE, FAILED, MISUSED = 0, 1, 2

SHARD = 5 * 10**9
_NUMBER = re.compile(r"-?([\d.]+(e[-+]\d+)?( [kMGT]?B|%)?|nan|inf)?")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class Misuse(Exception):
    """A command or a recipe that means nothing."""


class Parser(argparse.ArgumentParser):
    """A parser that names the nearest option, and answers in a paragraph."""

    def __init__(
        self,
        prog: str,
        description: str,
        usage: str | None = None,
        epilog: str | None = None,
    ) -> None:
        """Without abbreviations: a script should not break when an option is added."""
        self.names: list[str] = []
        raw = argparse.RawDescriptionHelpFormatter
        text = textwrap.fill(description, 90)
        super().__init__(prog, usage, text, epilog, formatter_class=raw, allow_abbrev=False)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As of `argparse`; remembers the names."""
        self.names += [name for name in names if name.startswith("--")]
        if settings.get("action") is argparse.BooleanOptionalAction:
            self.names += [f"--no-{name[2:]}" for name in names]
        return super().add_argument(*names, **settings)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """What `parse_args` gives, with the nearest option to one that is unknown."""
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in (*self.names, "--help"):
                self.error(f"there is no option {name}{near(name, self.names)}")
        found, extra = self.parse_known_args(plain(words))
        if extra:
            self.error(f"{' '.join(extra)} has no meaning here: models come before the options")
        return found

    def error(self, message: str) -> NoReturn:
        """Says what is wrong, and where the help is."""
        self.exit(MISUSED, f"{self.prog}: {message} (see {self.prog} --help)\n")


def printable(text: str) -> str:
    """A text of one line without what a terminal takes for a command: files are not trusted."""
    if text.isprintable():
        return text
    return "".join(
        x if x.isprintable() else x.encode("unicode_escape", "surrogatepass").decode() for x in text
    )


def near(word: str, words: Iterable[str]) -> str:
    """A hint at the nearest of the words that are known, or at all of them."""
    words = list(words)
    found = difflib.get_close_matches(word, words, 1, 0.5)
    if found:
        return f": did you mean {found[0]}?"
    return f"; there are {', '.join(words)}" if words else ""


def plain(words: Sequence[str]) -> list[str]:
    """Negative numbers with an exponent written out, which argparse takes for options."""

    def written(word: str) -> str:
        with contextlib.suppress(ValueError):
            if word.startswith("-") and math.isfinite(float(word)):
                return format(Decimal(word), "f")
        return word

    return [written(word) for word in words]


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number")
    return value


def count(text: str) -> int:
    """A positive integer."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"give an integer of at least 1, not {text!r}")
    return int(text)


def seed(text: str) -> int:
    """An integer that a random key is made from."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"give an integer from 0 to {2**32 - 1}, not {text!r}")
    return int(text)


def size(text: str) -> int:
    """A number of bytes, such as 5GB or 512MiB."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if parts is None or parts[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"give a size such as 5GB or 512MiB, not {text!r}")
    nbytes = int(Decimal(parts[1]) * UNITS[parts[2].upper()])
    if nbytes < 1:
        raise argparse.ArgumentTypeError(f"give a size of at least a byte, not {text!r}")
    return nbytes


def in_bytes(nbytes: int) -> str:
    """A number of bytes as people read it."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{nbytes} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def add_run_options(parser: Parser) -> None:
    """The options of every command that writes."""
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="required")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an output that exists: weights of any format in it go, with their indices, "
        "configuration and tokenizer; other files stay",
    )
    parser.add_argument(
        "--remove-partial",
        action="store_true",
        help="remove what interrupted runs of other commands left of this output",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument(
        "--hash",
        action="store_true",
        dest="full_hash",
        help="hash all bytes of the inputs for the record, which reads them once more",
    )
    add_traceback(parser)


class Choice(NamedTuple):
    """Which tensors are combined, as `checkpoint.stream` takes it.

    Attributes:
        carry: Names or globs of tensors that are those of the first model.
        skip: Names or globs of tensors that are left out.
        common_tensors: Whether tensors that not all models have are let pass.
    """

    carry: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    common_tensors: bool = False

    def joined(self, other: "Choice") -> "Choice":
        """What either of two says."""
        return Choice(
            self.carry + other.carry,
            self.skip + other.skip,
            self.common_tensors or other.common_tensors,
        )

    def said(self) -> dict[str, Any]:
        """What differs from the usual, for a record."""
        said = {
            "carry": list(self.carry),
            "skip": list(self.skip),
            "common_tensors": self.common_tensors,
        }
        return {name: value for name, value in said.items() if value}


def add_choice(parser: Parser) -> None:
    """The options of every command that takes several models."""
    for name, text in (
        (
            "carry",
            "tensors, such as statistics, that are not combined but those of the first model",
        ),
        ("skip", "tensors that are left out everywhere"),
    ):
        parser.add_argument(f"--{name}", nargs="+", action="extend", metavar="GLOB", help=text)
    parser.add_argument(
        "--common-tensors",
        action="store_true",
        help="combine the tensors that all models have, and keep the others of the first",
    )


def choice(options: argparse.Namespace) -> Choice:
    """What was given of these options."""
    return Choice(tuple(options.carry or ()), tuple(options.skip or ()), options.common_tensors)


def add_traceback(parser: Parser) -> None:
    """The option of every command."""
    parser.add_argument("--traceback", action="store_true", help="show where an error is raised")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns: the first is the heading; numbers are aligned at the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    body = rows[1:] or rows

    def is_number(i: int) -> bool:
        return all(_NUMBER.fullmatch(row[i]) is not None for row in body)

    aligned = [str.rjust if is_number(i) else str.ljust for i in range(len(widths))]
    return "\n".join(
        "  ".join(
            align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)
        ).rstrip()
        for row in rows
    )
