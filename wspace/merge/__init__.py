r"""Merges: models tuned from one base, brought together as displacements from it.

A *task vector* $\tau_i = \theta_i - \theta_0$ is what training added to the base. Every method
here is a formula on task vectors, and what it returns are weights, $\theta_0$ plus the merged
displacement. Coefficients $c_i$ have one meaning everywhere: the displacement is made from the
terms $c_i\,\tau_i$, which are never divided by the sum of the coefficients, so that a negative
coefficient moves away from a model.

Libraries that merge models disagree about what a method of one name does. The defaults here are
the variant in which the sign of a coefficient has one meaning. A preset sets every option to what
another library does, and is spread into the call:
`merge.ties(base, tuned, **merge.presets.mergekit["ties"])`.

A method is a file of its name, and the parts that it is made of are in `parts`.
"""

from wspace.merge import presets
from wspace.merge.arcee import arcee_fusion
from wspace.merge.breadcrumbs import breadcrumbs, breadcrumbs_ties
from wspace.merge.core_space import in_core_space
from wspace.merge.dare import dare, dare_ties
from wspace.merge.della import della
from wspace.merge.emr import Unified, emr, emr_model
from wspace.merge.ext_sub import ext_sub
from wspace.merge.interference import (
    cancellation,
    cosines,
    gram,
    overlap,
    sign_conflict,
    sign_disagreement,
    singular_interference,
)
from wspace.merge.iso import iso_c, iso_cts
from wspace.merge.knots import in_shared_space, knots
from wspace.merge.lines import lines
from wspace.merge.magmax import magmax
from wspace.merge.nearswap import nearswap
from wspace.merge.negmerge import negmerge
from wspace.merge.parts.band import band
from wspace.merge.parts.drop import drop
from wspace.merge.parts.elect import Election, disjoint_merge, elect
from wspace.merge.parts.magprune import magprune
from wspace.merge.parts.spectra import SpectralMerge
from wspace.merge.parts.trim import trim
from wspace.merge.pcb import pcb
from wspace.merge.ram import ram
from wspace.merge.reporting import Report, Tally, report
from wspace.merge.sce import sce
from wspace.merge.tall_mask import consensus_mask, tall_mask
from wspace.merge.task import task_arithmetic, task_vector
from wspace.merge.ties import ties
from wspace.merge.tsv import tsv_m

__all__ = [
    "Election",
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
    "presets",
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
