"""The k-th largest magnitude of lazy leaves, in one reading of most of them.

A sample says between which two magnitudes it must lie, and which of these are common, as zero and
the least steps are in differences of bfloat16. One pass over all entries counts
those above and the common ones, and takes out the others in between; these few are sorted out in
NumPy. A guess that failed is replaced by bounds from counting passes.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from wspace import _lazy
from wspace._numerics import accumulator

HELD = 2**25  # entries up to which the codes of all are held in memory
SAMPLE = 2**14  # of these, entries that the guess is made from
RUN = 256  # of more, entries read at one place
APART = 2**19  # and from one place to the next
RUNS = 32  # runs that are computed at once
INDEPENDENT = 64  # entries that a run is taken for
DEVIATIONS = 4  # by which the share of larger entries may differ from that of the sample
COMMON = 1 / 64  # share of the sample from which a magnitude is counted and not taken out


class Codes(NamedTuple):
    """The integers that magnitudes of a dtype are: an unsigned dtype, and the largest, of NaN."""

    dtype: type
    nan: int


def codes_of(wide: type) -> Codes:
    """The integers of float32 or float64."""
    if wide == np.float64:
        return Codes(np.uint64, 0x7FF0000000000001)
    return Codes(np.uint32, 0x7F800001)


class _Range(NamedTuple):
    """Codes from `low` and below `high`, and those of them that are common."""

    low: int
    high: int
    common: list[int]


class _Piece(NamedTuple):
    """A span of a leaf, and the index of the leaf."""

    leaf: int
    x: Any
    span: _lazy.Span

    @property
    def start(self) -> int:
        """The place of its first entry in the leaf."""
        return _lazy.start_of(self.span)


class Last(NamedTuple):
    """The last entry selected: the code of its magnitude, its leaf by index, its place there."""

    code: int
    leaf: int
    place: int


def last_of(leaves: Sequence[Any], need: int, bounds: Callable[[], tuple[int, int]]) -> Last:
    """The last of the `need` largest entries, of equal ones the first ones coming first.

    `bounds` gives two codes that are sure to have that of the entry between them, and few others.
    """
    wide, size = accumulator(*(leaf.dtype for leaf in leaves)), sum(leaf.size for leaf in leaves)
    leaves = [leaf.astype(wide) for leaf in leaves]
    pieces = [_Piece(i, x, span) for i, x in enumerate(leaves) for span in _lazy.spans(x)]
    with _lazy.threads() as pool:
        if size <= HELD or not all(leaf.in_pieces for leaf in leaves):
            held = list(pool.map(_codes, pieces))
            sample = np.concatenate([codes[:: max(size // SAMPLE, 1)] for codes in held])
            read, independent = held.__getitem__, len(sample)
        else:
            sample, independent = _runs(leaves)

            def read(k: int) -> np.ndarray:
                return _codes(pieces[k])

        among = _guess(sample, need / size, independent, codes_of(wide).nan + 1)
        found = _sifted(pool, read, len(pieces), need, among)
        if found is None:
            low, high = bounds()
            common = [low] if high == low + 1 else []
            found = _sifted(pool, read, len(pieces), need, _Range(low, high, common))
    assert found is not None  # the bounds are sure
    code, k, place = found
    return Last(code, pieces[k].leaf, place + pieces[k].start)


def _runs(leaves: Sequence[Any]) -> tuple[np.ndarray, int]:
    """The codes of runs of entries from everywhere, and how many of them count as independent."""
    samples, count = [], 0
    for i, x in enumerate(leaves):
        number = -(-x.size // APART)
        # Always as many in one array, which is one program for all.
        for k in range(0, number, RUNS):
            places = np.arange(k, min(k + RUNS, number)) * x.size // number
            starts = np.resize(np.minimum(places, max(x.size - RUN, 0)), RUNS)
            runs = _lazy.Runs(tuple(starts.tolist()), min(RUN, x.size))
            samples.append(_codes(_Piece(i, x, runs))[: len(places) * runs.length])
            count += len(places)
    return np.concatenate(samples), min(INDEPENDENT, RUN) * count


def _guess(sample: np.ndarray, share: float, independent: int, top: int) -> _Range:
    """The codes among which that of the k-th largest most likely is, for k as a share of all."""
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


def _codes(piece: _Piece) -> np.ndarray:
    """The codes of a piece of a leaf of float32 or float64."""
    x = np.asarray(piece.x.entries(piece.span)).reshape(-1)
    dtype, nan = codes_of(piece.x.dtype)
    codes = x.view(dtype) & (~dtype(0) >> dtype(1))
    return np.minimum(codes, dtype(nan), out=codes)
