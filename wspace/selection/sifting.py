"""The k-th largest magnitude of lazy leaves, in one reading of most of them.

A sample says between which two magnitudes it must lie, and which of these are common, as zero and
the least steps are in differences of bfloat16. One pass over all entries counts
those above and the common ones, and takes out the others in between; these few are sorted out in
NumPy. A guess that failed is replaced by bounds from counting passes.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from wspace import tree
from wspace._numerics import accumulator
from wspace.selection import bracket
from wspace.selection.bracket import Count
from wspace.selection.keys import Keys, codes_of, first_place
from wspace.typing import Lazy

FEW = 2**24  # entries between two magnitudes that are taken out of the leaves
HELD = 2**25  # entries up to which the codes of all are held in memory
SAMPLE = 2**14  # of these, entries that the guess is made from
RUN = 256  # of more, entries read at one place
APART = 2**19  # and from one place to the next
RUNS = 32  # runs that are computed at once
INDEPENDENT = 64  # entries that a run is taken for
DEVIATIONS = 4  # by which the share of larger entries may differ from that of the sample
COMMON = 1 / 64  # share of the sample from which a magnitude is counted and not taken out


class _Range(NamedTuple):
    """Codes from `low` to below `high`, and which of these are common."""

    low: int
    high: int
    common: list[int]


class _Part(NamedTuple):
    """A leaf by index, the place of a run's first entry in it, and what reads the run."""

    leaf: int
    start: int
    read: Callable[[], np.ndarray]


def last_by_sifting(leaves: Sequence[Any], need: Count) -> Keys:
    """The last entry selected of leaves of which some are lazy."""
    wide, size = accumulator(*(leaf.dtype for leaf in leaves)), sum(leaf.size for leaf in leaves)
    if not size:
        return Keys(np.asarray(0).astype(codes_of(wide).dtype), np.uint32(0), np.uint32(0))
    code, leaf, place = _last_sifted(
        [tree.lazily(leaf, wide) for leaf in leaves], bracket.known(need)
    )
    return Keys(
        np.asarray(code).astype(codes_of(wide).dtype),
        np.uint32(len(leaves) - 1 - leaf),
        np.uint32(first_place(leaves[leaf].size) - place),
    )


def _last_sifted(leaves: Sequence[Lazy], need: int) -> tuple[int, int, int]:
    """The code of the last of the `need` largest entries, its leaf by index, its place there."""
    size = sum(leaf.size for leaf in leaves)
    parts = [
        _Part(i, span.start if span else 0, functools.partial(x.read, span))
        for i, x in enumerate(leaves)
        if x.size
        for span in x.pieces()
    ]
    with Lazy.threads() as pool:
        if size <= HELD or not all(leaf.in_pieces for leaf in leaves):
            held = list(pool.map(lambda part: _codes(part.read()), parts))
            sample = np.concatenate([codes[:: max(size // SAMPLE, 1)] for codes in held])
            read, independent = held.__getitem__, len(sample)
        else:
            sample, independent = _sampled_runs(leaves)

            def read(k: int) -> np.ndarray:
                return _codes(parts[k].read())

        among = _guess(sample, need / size, independent, codes_of(leaves[0].dtype).nan + 1)
        found = _sifted(pool, read, len(parts), need, among)
        if found is None:
            low, high = _bounds(pool, read, len(parts), need, size)
            common = [low] if high == low + 1 else []
            found = _sifted(pool, read, len(parts), need, _Range(low, high, common))
    assert found is not None  # the bounds are sure
    code, k, place = found
    return code, parts[k].leaf, place + parts[k].start


def _bounds(
    pool: ThreadPoolExecutor,
    read: Callable[[int], np.ndarray],
    count: int,
    need: int,
    size: int,
) -> tuple[int, int]:
    """Two codes with the code of the entry for sure between them, and few other codes."""
    dtype = read(0).dtype.type
    asked, total = bracket.count_of(need), bracket.count_of(size)
    state = bracket.begun(
        dtype(codes_of(np.dtype(f"f{dtype().itemsize}")).nan + 1), total, asked, None, True
    )
    while state.unfinished and bracket.known(bracket.inside(state.bracket, asked)[1]) > FEW:
        pivots = np.asarray(state.pivots)

        def counted(k: int, pivots: np.ndarray = pivots) -> list[int]:
            codes = read(k)
            return [int(np.count_nonzero(codes >= pivot)) for pivot in pivots]

        counts = np.sum(list(pool.map(counted, range(count))), axis=0).tolist()
        reached = np.array([[c >> 16, c & 0xFFFF] for c in counts], np.uint32)
        state = bracket.step(state, reached, asked, True)
    return int(state.bracket.low), int(state.bracket.high)


def _sampled_runs(leaves: Sequence[Any]) -> tuple[np.ndarray, int]:
    """The codes of runs of entries from everywhere, and how many of them count as independent."""
    samples, count = [], 0
    for x in leaves:
        number = -(-x.size // APART)
        # Always as many in one array, which is one program for all.
        for k in range(0, number, RUNS):
            places = np.arange(k, min(k + RUNS, number)) * x.size // number
            starts = np.resize(np.minimum(places, max(x.size - RUN, 0)), RUNS)
            length = min(RUN, x.size)
            codes = _codes(x.sample(starts.tolist(), length))
            samples.append(codes[: len(places) * length])
            count += len(places)
    return np.concatenate(samples), min(INDEPENDENT, RUN) * count


def _guess(sample: np.ndarray, share: float, independent: int, top: int) -> _Range:
    """Two codes that most likely enclose the k-th largest, for k as a share of all."""
    sample = np.sort(sample)
    spread = DEVIATIONS * np.sqrt(share * (1 - share) / independent)
    below, above = ((1 - share + x) * len(sample) for x in (-spread, spread))
    low = int(sample[int(below)]) if below >= 1 else 0
    high = int(sample[int(np.ceil(above))]) + 1 if above < len(sample) - 1 else top
    # In order, a common code is where it was as many places before.
    before = max(int(COMMON * len(sample)), 1)
    common = np.unique(sample[before:][sample[before:] == sample[:-before]]).tolist()
    return _Range(low, high, [code for code in common if low <= code < high])


def _sifted(
    pool: ThreadPoolExecutor,
    read: Callable[[int], np.ndarray],
    count: int,
    need: int,
    among: _Range,
) -> tuple[int, int, int] | None:
    """The code of the last entry selected, its piece, and its place there, if it is in a range."""

    def sifted(k: int) -> tuple[int, list[int], np.ndarray, np.ndarray]:
        codes = read(k)
        above = codes >= codes.dtype.type(among.high)
        inside = (codes >= codes.dtype.type(among.low)) ^ above
        places = np.flatnonzero(inside).astype(np.uint32)
        codes = codes[places]
        counts = []
        for common in among.common:
            rest = codes != common
            counts.append(len(codes) - int(np.count_nonzero(rest)))
            codes, places = codes[rest], places[rest]
        return int(np.count_nonzero(above)), counts, codes, places

    above, counts, kept, places = zip(*pool.map(sifted, range(count)), strict=True)
    codes, left = np.concatenate(kept), need - sum(above)
    totals = np.sum(counts, axis=0, dtype=int).tolist()
    if not 0 < left <= len(codes) + sum(totals):
        return None
    before = 0
    for j in reversed(range(len(totals))):
        last = among.common[j]
        larger = before + int(np.count_nonzero(codes > last))
        if left <= larger:
            break
        if left <= larger + totals[j]:
            ends = np.cumsum([row[j] for row in counts])
            k = int(np.searchsorted(ends, left - larger))
            equal = np.flatnonzero(read(k) == last)
            return last, k, int(equal[left - larger - ends[k] - 1])  # from the end of the piece
        before += totals[j]
    left -= before
    last = int(np.partition(codes, len(codes) - left)[len(codes) - left])
    index = int(np.flatnonzero(codes == last)[left - np.count_nonzero(codes > last) - 1])
    ends = np.cumsum([len(x) for x in kept])
    k = int(np.searchsorted(ends, index, "right"))
    return last, k, int(places[k][index - ends[k]])  # from the end of the piece


def _codes(x: np.ndarray) -> np.ndarray:
    """The codes of entries in float32 or float64."""
    dtype, nan = codes_of(x.dtype)
    codes = x.reshape(-1).view(dtype) & (~dtype(0) >> dtype(1))
    return np.minimum(codes, dtype(nan), out=codes)
