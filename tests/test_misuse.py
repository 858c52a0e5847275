"""A law of all public functions: what is given in the wrong place is named, and never printed."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wspace
from tests.arguments import trees
from tests.catalog import CASES, NOT_ON_TREES
from wspace import average, fit, interpolate, lowrank, merge, soup, tree

PI = 3.14159274


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Net:
    """A model whose own `repr` prints all of it."""

    layers: list


LARGE = {f"layer{i}": jnp.full(4, PI) for i in range(24)}
WRONG = {
    "tree": LARGE,
    "model": Net([jnp.full(4, PI)] * 24),
    "matrix": jnp.full((20, 20), PI),
    "trees": [LARGE, LARGE],
    "numbers": [0.5] * 300,
    "text": "word " * 200,
}
X, Y, Z = trees(3)
W = X["w"]
KEY = jax.random.key(0)
SGD = optax.sgd(0.1)


@pytest.fixture(autouse=True)
def _own_checks(pytestconfig):
    if pytestconfig.getoption("jaxtyping_packages"):
        pytest.skip("a checked signature refuses before the function does")


def loss(x):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x))


CALLS = {
    "average.karcher_mean_on": ((merge.task_vector, merge.task_vector, [X, Y]), {}),
    "average.exponent_of": ((0.1,), {}),
    "average.width_of": ((2.0,), {}),
    "fit.adapt": ((KEY, loss, X), {"optimizer": SGD, "steps": 1}),
    "fit.ascent": ((loss,), {}),
    "fit.clipped": ((loss, 1.0), {}),
    "fit.coefficients": ((KEY, loss, X, [Y, Z]), {"optimizer": SGD, "steps": 1}),
    "fit.entropy": ((lambda x: x["w"],), {}),
    "fit.guard": (
        (KEY, [loss, loss], [X, Y], (0.5, 0.5), fit.clipped(loss, 1.0)),
        {"optimizer": SGD, "steps": 1},
    ),
    "fit.hinge": ((X, 1.0), {}),
    "fit.invert": ((KEY, loss, W[0]), {"optimizer": SGD, "steps": 1, "table": W, "rows": 1}),
    "fit.npo": ((lambda x: x["w"], X), {"beta": 0.1}),
    "lowrank.as_matrix": ((W,), {}),
    "lowrank.from_lora": ((jnp.ones((2, 3)), jnp.ones((4, 2))), {"alpha": 2.0}),
    "lowrank.materialize": ((lowrank.LowRank(W, W),), {}),
    "lowrank.rank_for": ((jnp.ones(3),), {"energy": 0.5}),
    "lowrank.to_lora": ((lowrank.LowRank(W, W),), {}),
    "merge.consensus_mask": (([jax.tree.map(lambda x: x > 0, X)] * 2,), {}),
    "merge.report": ((X, [Y, Z], Y), {}),
    "negative.audit": (([X, Y], (0.5, 0.5), Z, 1.0), {}),
    "negative.damped_inputs": ((W,), {"damping": 0.1}),
    "negative.free_inputs": ((W,), {"rtol": 0.1}),
    "negative.strength_of": ((0.3,), {}),
    "plot.audit": ((None,), {}),
    "plot.gram": ((np.eye(2), ["a", "b"]), {}),
    "plot.plane": (([0, 1], [0, 1], np.eye(2), {"a": (0, 1)}), {"hollow": ("a",)}),
    "plot.segment": (([0, 1], [2, 3], {"a": 0.5}), {}),
    "plot.spectrum": (([2.0, 1.0],), {}),
    "soup.greedy_soup": ((loss, [X, Y]), {}),
    "soup.grid": ((loss, lambda c: average.mean([X, Y], c), soup.simplex(2, 2)), {}),
    "soup.simplex": ((2, 2), {}),
    "tree.by_depth": (({"layers": [X, Y]}, [0.0, 1.0]), {}),
    "tree.by_name": ((X, {"*": 0.5}), {}),
    "tree.elementwise": ((lambda _, arrays: arrays[0],), {}),
    "tree.reduction": ((lambda _, arrays: arrays[0],), {}),
    "tree.join": ((X, X), {}),
    "tree.partition": ((X,), {}),
    "tree.per_leaf": ((interpolate.lerp,), {}),
    "tree.split_key_like": ((KEY, X), {}),
}
"""Calls of the functions that the catalog does not call on trees."""


def function_of(name):
    room, _, own = name.partition(".")
    return getattr(getattr(wspace, room), own)


class _CalledError(Exception):
    """Raised in place of a call that is looked at."""


def call_of(case, monkeypatch):
    """The function of a case of the catalog, and what the case calls it with."""
    name = case.name.split(",")[0]
    given, function = (X, Y, Z)[: case.trees], function_of(name)
    if case.function is function:
        return name, given, {}
    called = []

    def note(*args, **kwargs):
        called.append((args, kwargs))
        raise _CalledError

    room, _, own = name.partition(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(wspace, room), own, note)
        with pytest.raises(_CalledError):
            case.function(*given)
    return (name, *called[0])


def check(name, args, kwargs):
    """Every argument is replaced by everything that is wrong there: the error is one to read."""
    function = function_of(name)
    signature = inspect.signature(function)
    for parameter in signature.parameters:
        for what, value in WRONG.items():
            bound = signature.bind(*args, **kwargs)

            def call(wrong, bound=bound, parameter=parameter):
                bound.arguments[parameter] = wrong
                function(*bound.args, **bound.kwargs)

            where = f"{name}({parameter}={what})"
            told = [told_by(call, value, eager=name == "merge.report")]
            if what == "tree":
                told.append(told_by(lambda x, call=call: jax.eval_shape(call, x), value))
            for text in told:
                assert len(text) <= 500, where
                assert "\n" not in text, where
                assert not PRINTED.search(text.lower()), where
                names = (*signature.parameters, "mask")
                assert not text or any(re.search(rf"\b{x}\b", text) for x in names), where


PRINTED = re.compile(r"array\(|array\[|tracer|traced<|3\.14|0\.5, 0\.5")


def told_by(call, value, eager=True):
    """What a call says that is refused."""
    try:
        call(value) if eager else jax.eval_shape(lambda: call(value))
    except (TypeError, ValueError, FileNotFoundError) as error:
        return str(error)
    return ""


CATALOG = {x.name.split(",")[0]: x for x in CASES if x.name != "tree.per_leaf"}
"""One case of each function: all of its parameters are looked at, given or not."""


@pytest.mark.parametrize("case", CATALOG.values(), ids=str)
def test_wrong_arguments_of_the_catalog_are_named_and_not_printed(case, monkeypatch):
    check(*call_of(case, monkeypatch))


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_of_the_other_functions_are_named_and_not_printed(name):
    check(name, *CALLS[name])


def test_every_public_function_is_looked_at():
    seen = {*CALLS, *(case.name.split(",")[0] for case in CASES)}
    missing = {name for name in NOT_ON_TREES if inspect.isfunction(function_of(name))} - seen
    assert not missing


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lowrank.singular_values(LARGE), "x must be one array, got a dict of 24 leaves: "),
        (
            lambda: lowrank.as_matrix(LARGE),
            "leaf must be one array, got a dict of 24 leaves: give",
        ),
        (
            lambda: lowrank.materialize(LARGE),
            "x must be one edit in factors, a lowrank.LowRank, got",
        ),
        (
            lambda: interpolate.lerp(X, Y, LARGE),
            "t has no number for leaf ['b'][0]: give one number for all, or",
        ),
        (
            lambda: interpolate.lerp(X, Y, WRONG["model"]),
            "t has no number for leaf ['b'][0]: give one number for all, or",
        ),
        (
            lambda: merge.task_arithmetic(X, [Y, Z], [LARGE, LARGE]),
            "coefficients[0] has no number for leaf ['b'][0]: give one number for all",
        ),
        (lambda: merge.ties(X, [Y], LARGE), "coefficients must be a sequence of numbers, such as"),
        (
            lambda: average.mean(LARGE),
            "points must be a sequence of trees, got a dict of 24 leaves",
        ),
        (
            lambda: average.mean(WRONG["model"]),
            "points must be a sequence of trees, got a Net of 24",
        ),
        (
            lambda: merge.ties(X, Y),
            "tuned must be a sequence of trees, got a dict of 5 leaves: give a",
        ),
        (
            lambda: merge.task_vector(X, [Y, Z]),
            "tuned is a list of 10 leaves, each of its parts a tree like base, where one tree is",
        ),
        (
            lambda: interpolate.lerp([X, Y], Z, 0.5),
            "start is a list of 10 leaves, each of its parts",
        ),
        (
            lambda: interpolate.lerp(LARGE, X, 0.5),
            "both must be trees of one structure, and start is a dict of 24 leaves, end a dict",
        ),
        (
            lambda: tree.norm({"w": {"v": 1}}),
            "leaf ['w']['v'] of x is a <class 'int'>; weights are",
        ),
        (
            lambda: tree.vdot({"a": [jnp.ones(2)]}, {"a": (jnp.ones(2),)}),
            "different containers: at ['a'] a list of 1 leaf and a tuple of 1 leaf",
        ),
        (lambda: lowrank.truncate(X["w"], LARGE), "rank must be a plain integer, since it decides"),
        (lambda: average.mean([W[0]] * 300, [0.0] * 300), "[0.0, 0.0, 0.0, 0.0,"),
        (
            lambda: merge.ties(X, [Y], scope=np.ones(3)),
            "scope must be one of 'tree', 'leaf', 'row'",
        ),
    ],
)
def test_the_likeliest_slips_are_answered_with_the_mend(call, words):
    with pytest.raises((TypeError, ValueError), match=re.escape(words)) as raised:
        call()
    assert len(str(raised.value)) <= 350
