r"""Exact selection by magnitude: the k-th largest entry of a leaf or of a whole tree, in O(n).

Entries are ordered by magnitude and, where magnitudes are equal, by their place in the tree, leaf
by leaf and within a leaf by flat index; the first comes first. So there is exactly one set of the
k largest. Zero is the smallest magnitude, an infinity is larger than every finite one, and NaN
larger still, as NumPy sorts it, so that it is never dropped unseen.

Only small leaves are sorted. The bits of a magnitude are an integer of the same order, and the
k-th largest integer is found by counting: a pass counts how many entries reach each of seven
pivots, and the pivots of the next pass lie between the two that the k-th is between. Four or five
passes are usual, each at the speed of memory. Sharded leaves are counted where they lie, and only
counts travel. Counters hold $2^{48}$ entries, a leaf up to $2^{32}$.
"""

from wspace.selection.top import kth_magnitude, top_mask

__all__ = ["kth_magnitude", "top_mask"]
