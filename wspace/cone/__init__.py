r"""Cones of allowed edits, and the one lemma behind every guard, audit and adapter.

A cone $K$ holds with an edit $D$ every multiple $tD$, of either sign: the edits of low rank, in a
subspace, on a mask, with few entries, or those of a [`Cone`][wspace.cone.Cone] of your own, which
may also hold positive multiples alone. Of an edit $E$ let $P E$ be the nearest in $K$,
$e_K = \lVert P E \rVert$ its norm and $\operatorname{tail} = \lVert E - P E \rVert$ what is left,
so that $\lVert E \rVert^2 = e_K^2 + \operatorname{tail}^2$. These two numbers decide everything:

$$
\begin{aligned}
\max \{ \langle E, D \rangle : D \in K,\ \lVert D \rVert \le d \} &= d\, e_K
    && \text{support} \\
\min \{ \lVert E - D \rVert : D \in K,\ \lVert D \rVert \le d \}
    &= \sqrt{\operatorname{tail}^2 + \max(e_K - d, 0)^2} && \text{reach} \\
\min \{ \lVert D \rVert : D \in K,\ \lVert E + D \rVert \le \rho \}
    &= e_K - \sqrt{\rho^2 - \operatorname{tail}^2} && \text{entry} \\
\min \{ \lVert D \rVert : D \in K,\ \lVert E + D \rVert \ge \rho \}
    &= -e_K + \sqrt{e_K^2 + \rho^2 - \lVert E \rVert^2} && \text{exit}
\end{aligned}
$$

Entry is meant from outside the ball and exit from inside it; both are $0$ otherwise, and entry is
infeasible if and only if $\operatorname{tail} > \rho$. In a cone that does not hold $-D$ with $D$,
entry takes $e_K$ and the tail of $-E$. The proof is on the page *Low-rank edits* of the docs. A
distance in weight space is what is certified here, not what a model does.
"""

from wspace.cone.budgets import SpectralMove, nuclear_entry, project_capped, spectral_entry
from wspace.cone.cones import (
    Cone,
    Mask,
    PooledRank,
    Projection,
    Rank,
    Sparse,
    Subspace,
    project,
)
from wspace.cone.lemma import Move, entry, exit, reach, support

__all__ = [
    "Cone",
    "Mask",
    "Move",
    "PooledRank",
    "Projection",
    "Rank",
    "Sparse",
    "SpectralMove",
    "Subspace",
    "entry",
    "exit",
    "nuclear_entry",
    "project",
    "project_capped",
    "reach",
    "spectral_entry",
    "support",
]
