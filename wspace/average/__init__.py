r"""Averages of models: of several at once, weighted by data, or along a run.

Coefficients are divided by their sum, so an average of points on a hyperplane stays on it and
moving all points moves the average along. A negative coefficient pushes the average away from its
point, at the price of the amplification $\sum_i |c_i| / |\sum_i c_i|$ by which rounding and noise
in the points grow; each function says whether it takes one.
"""

from wspace._records import Solution
from wspace.average.fisher import Kronecker, fisher_mean, kronecker_mean
from wspace.average.linear import mean
from wspace.average.median import geometric_median
from wspace.average.posthoc import (
    Profile,
    Reconstruction,
    exponent_of,
    reconstruct,
    width_of,
)
from wspace.average.regression import Regression, regression_mean
from wspace.average.spherical import karcher_mean, karcher_mean_on
from wspace.average.stock import model_stock
from wspace.average.streaming import Average, ema, power_ema, running_mean, window

__all__ = [
    "Average",
    "Kronecker",
    "Profile",
    "Reconstruction",
    "Regression",
    "Solution",
    "ema",
    "exponent_of",
    "fisher_mean",
    "geometric_median",
    "karcher_mean",
    "karcher_mean_on",
    "kronecker_mean",
    "mean",
    "model_stock",
    "power_ema",
    "reconstruct",
    "regression_mean",
    "running_mean",
    "width_of",
    "window",
]
