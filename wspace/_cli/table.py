"""The methods of the command line: what signatures do not say of them.

What they take is in their signatures, which `wspace._cli.signatures` writes into `options.json`.
"""

from typing import NamedTuple


class Entry(NamedTuple):
    """A method.

    Attributes:
        function: Where it is, such as `"merge.ties"`.
        whole: Whether what becomes of a tensor depends on the others, whatever the options are.
        lazy: Whether it can be computed in pieces, by `checkpoint.stream(..., lazy=True)`; else it
            treats every tensor by itself.
        per_tensor: Whether the command has a choice that the function has not, the scope: of the
            whole model, or of every tensor by itself, as `tree.per_leaf` of the function.
        like: Systems that do the latter, and are presets of the command.
        aim: The parameter that takes a direction, which a model gives by itself, or by where it
            lies as seen from the one to avoid.
    """

    function: str
    whole: bool = False
    lazy: bool = True
    per_tensor: bool = False
    like: tuple[str, ...] = ()
    aim: str = ""


MERGE = {
    "linear": Entry("average.mean"),
    "lerp": Entry("interpolate.lerp"),
    "slerp": Entry("interpolate.slerp", per_tensor=True, like=("mergekit-0.1.5",)),
    "karcher": Entry("average.karcher_mean", per_tensor=True, like=("mergekit-0.1.5",)),
    "median": Entry("average.geometric_median", per_tensor=True),
    "model_stock": Entry("average.model_stock"),
    "task_arithmetic": Entry("merge.task_arithmetic"),
    "ties": Entry("merge.ties"),
    "dare": Entry("merge.dare"),
    "dare_ties": Entry("merge.dare_ties"),
    "della": Entry("merge.della"),
    "breadcrumbs": Entry("merge.breadcrumbs"),
    "breadcrumbs_ties": Entry("merge.breadcrumbs_ties"),
    "sce": Entry("merge.sce", whole=True),
    "ram": Entry("merge.ram", whole=True),
    "pcb": Entry("merge.pcb", whole=True),
    "magmax": Entry("merge.magmax"),
    "negmerge": Entry("merge.negmerge"),
    "nearswap": Entry("merge.nearswap"),
    "arcee_fusion": Entry("merge.arcee_fusion", lazy=False),
    "ext_sub": Entry("merge.ext_sub", lazy=False),
    "tsv_m": Entry("merge.tsv_m", lazy=False),
    "iso_c": Entry("merge.iso_c", lazy=False),
    "iso_cts": Entry("merge.iso_cts", lazy=False),
    "knots": Entry("merge.knots", lazy=False),
}

STEER = {
    "repel": Entry("negative.repel"),
    "retarget": Entry("negative.retarget"),
    "exit": Entry("negative.exit_ball", whole=True, aim="direction"),
    "guard": Entry("negative.guard_hull", whole=True, aim="normal"),
}

ENTRIES = {"merge": MERGE, "steer": STEER}

ALIASES = {
    "mean": "linear",
    "karcher_mean": "karcher",
    "geometric_median": "median",
    "dare_linear": "dare",
    "exit_ball": "exit",
    "guard_hull": "guard",
}

WORDS = {
    "boost": "how much entries that one model changed are raised",
    "cap": "most that they are raised by",
    "coefficients": "one number for each model",
    "common": "share of the common part",
    "costs": "one positive number for each model: what moving it costs",
    "density": "share of the entries that are kept",
    "divide": "what a sum is divided by",
    "floor": "least cosine to take, in [-1, 1]",
    "kept": "how the count is rounded",
    "layout": "how layers store their matrices, as torch does: out_in",
    "least": "least relative singular value to divide by",
    "max_steps": "most steps",
    "mode": "which averages are kept away",
    "normalize": "whether to divide by the sum of the coefficients",
    "outliers": "share of the largest entries that is dropped",
    "radius": "radius of the ball around the model to avoid",
    "relative": "whether the threshold is relative",
    "rescale": "how what is kept is scaled up",
    "rtol": "relative size below which singular values count as zero",
    "scale": "factor of the merged displacement",
    "scope": "among which entries a method chooses or measures",
    "statistic": "what is averaged over pairs",
    "strength": "how far",
    "t": "position on the path, 0 at the first model",
    "threshold": "size from which a change counts, or the largest step",
    "tol": "relative residual to stop at",
    "vote": "what elects the sign",
    "weighted": "whether coefficients vote",
    "width": "spread of the probabilities around the density",
    "zero": "the sign where the votes cancel",
}
"""What options are, in the words of the help."""
