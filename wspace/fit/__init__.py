r"""Training loops in one call: fine-tune, learn merge coefficients, train a guard, fit an input.

Everything here is one loop, a compiled scan over the steps of an optimizer of optax, and returns a
[`Fit`][wspace.fit.Fit]: what was found, and the history of the losses. A loss is a function of the
weights, or, if `keyed`, of the weights and a random key, from which it draws its batch. Runs with
the same loss, optimizer and number of steps share one compilation, which is kept as long as these
are: a sweep over new losses leaves nothing behind.
"""

from wspace.fit.away import Away, ascent, clipped, entropy, hinge, npo
from wspace.fit.guarding import Weightings, guard
from wspace.fit.inversion import invert
from wspace.fit.learning import Learned, coefficients
from wspace.fit.training import Fit, History, KeyedLoss, Progress, adapt

__all__ = [
    "Away",
    "Fit",
    "History",
    "KeyedLoss",
    "Learned",
    "Progress",
    "Weightings",
    "adapt",
    "ascent",
    "clipped",
    "coefficients",
    "entropy",
    "guard",
    "hinge",
    "invert",
    "npo",
]
