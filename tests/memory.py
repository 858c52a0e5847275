"""The most memory that an eager call takes beside its arguments, without a clock or a process."""

import gc
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

import wspace

ROOT = str(pathlib.Path(wspace.__file__).parent)
INLINED = ("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>")
"""Frames that some versions of Python have and others do not."""


def peak(function: Callable[..., Any], arguments: Sequence[Any]) -> int:
    """The most bytes of arrays that are alive beside those before the call, its result included.

    They are added up whenever a function of the library is entered or left: every large array is
    made by one, and is alive when that one returns. An array counts, on whatever device, from when
    its program is started until nothing refers to it, so neither the time that programs take nor
    the allocator matters. What is in a cycle stays until it is collected, so it counts to the end.
    What programs take inside is not seen; what is kept for later calls is if this is the first.
    """
    held = jax.live_arrays()  # and not let go, so that no new array is where one of them was
    before, most = set(map(id, held)), 0

    def look() -> None:
        nonlocal most
        most = max(most, sum(x.nbytes for x in jax.live_arrays() if id(x) not in before))

    def entered_or_left(frame: Any, event: str, _: Any) -> None:
        if event in ("call", "return"):
            code = frame.f_code
            if code.co_filename.startswith(ROOT) and code.co_name not in INLINED:
                look()

    earlier, collects = sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.setprofile(entered_or_left)
    try:
        result = function(*arguments)
    finally:
        sys.setprofile(earlier)
        if collects:
            gc.enable()
    look()
    del result
    return most
