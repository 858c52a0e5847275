r"""Merges: models tuned from one base, brought together as displacements from it.

A *task vector* $\tau_i = \theta_i - \theta_0$ is what training added to the base. Every method
here is a formula on task vectors, and what it returns are weights, $\theta_0$ plus the merged
displacement. Coefficients $c_i$ have one meaning everywhere: the displacement is made from the
terms $c_i\,\tau_i$, which are never divided by the sum of the coefficients, so that a negative
coefficient moves away from a model.

Systems that merge models disagree about what a method of one name does. Here the clean form is
the default and the others are presets, tables of options in `wspace.merge.presets`: the code is
the same.
"""

from wspace.merge.bases import in_core_space, in_shared_space, knots
from wspace.merge.competition import magmax, pcb, ram, sce
from wspace.merge.consensus import disjoint_merge, elect
from wspace.merge.extraction import arcee_fusion, ext_sub, lines, nearswap, negmerge
from wspace.merge.interference import (
    cancellation,
    cosines,
    gram,
    overlap,
    sign_conflict,
    sign_disagreement,
    singular_interference,
)
from wspace.merge.masks import Unified, consensus_mask, emr, emr_model, tall_mask
from wspace.merge.methods import breadcrumbs, breadcrumbs_ties, dare, dare_ties, della, ties
from wspace.merge.reporting import Report, Tally, report
from wspace.merge.sparsify import drop, trim
from wspace.merge.spectral import SpectralMerge, iso_c, iso_cts, tsv_m
from wspace.merge.task import task_arithmetic, task_vector
from wspace.merge.thinning import band, magprune

__all__ = [
    "Report",
    "SpectralMerge",
    "Tally",
    "Unified",
    "arcee_fusion",
    "band",
    "breadcrumbs",
    "breadcrumbs_ties",
    "cancellation",
    "consensus_mask",
    "cosines",
    "dare",
    "dare_ties",
    "della",
    "disjoint_merge",
    "drop",
    "elect",
    "emr",
    "emr_model",
    "ext_sub",
    "gram",
    "in_core_space",
    "in_shared_space",
    "iso_c",
    "iso_cts",
    "knots",
    "lines",
    "magmax",
    "magprune",
    "nearswap",
    "negmerge",
    "overlap",
    "pcb",
    "ram",
    "report",
    "sce",
    "sign_conflict",
    "sign_disagreement",
    "singular_interference",
    "tall_mask",
    "task_arithmetic",
    "task_vector",
    "ties",
    "trim",
    "tsv_m",
]
