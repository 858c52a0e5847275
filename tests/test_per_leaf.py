"""Laws of `tree.per_leaf`: which arguments are trees, which are points, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wspace import average, interpolate, merge, tree

pytestmark = pytest.mark.exact

A = [jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])]
B = [jnp.array([10.0, 20.0]), jnp.array([30.0, 40.0])]
ZERO = [jnp.zeros(2), jnp.zeros(2)]


class Pair(NamedTuple):
    """A tree of two leaves, which is no list of two points."""

    left: Any
    right: Any


def mixed(points: Sequence[Any], t):
    return average.mean(points, (1 - t, t))


def listed(points: list, t):
    return average.mean(points, (1 - t, t))


def bare(points, t):
    return average.mean(points, (1 - t, t))


def between(t):
    return [
        (1 - t) * a + t * b for a, b in zip(map(np.asarray, A), map(np.asarray, B), strict=True)
    ]


def same(found, wanted):
    found, wanted = jax.tree.leaves(found), jax.tree.leaves(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("function", [mixed, listed, bare])
def test_functions_of_points_are_asked_for_whatever_their_annotations_say(function, refuses):
    with refuses(ValueError, match=r"the first argument of .* is 2 trees of one layout.*many=1"):
        tree.per_leaf(function)([A, B], 0.25)
    same(tree.per_leaf(function, many=1)([A, B], 0.25), between(0.25))
    same(tree.per_leaf(function, many=1)((A, B), t=0.25), between(0.25))


def test_what_is_ambiguous_is_refused_and_what_is_not_is_taken(refuses):
    def total(x):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(x))

    with refuses(ValueError, match=r"many=1 if they are points, or many=0 if together"):
        tree.per_leaf(total)([A, B])
    with refuses(ValueError, match=r"the first argument of total is 2 trees"):
        tree.per_leaf(total)(A)  # two arrays of one shape
    same(tree.per_leaf(total, many=0)([A, B]), [[3, 7], [30, 70]])
    same(tree.per_leaf(total, many=1)([A, B]), [33, 77])
    # One tree, leaves of two shapes, and a named tuple are one tree each.
    same(tree.per_leaf(total)([A[0]]), [3])
    same(tree.per_leaf(total)([A[0], jnp.ones(3)]), [3, 3])
    same(tree.per_leaf(total)(Pair(*A)), [3, 7])
    same(tree.per_leaf(total)([Pair(*A), jnp.ones(3)]), [3, 7, 3])
    same(tree.per_leaf(total)({"a": A, "b": B[0]}), [3, 7, 30])
    # The functions of the library say which they are.
    assert tree.per_leaf(tree.norm)([A, A])[0][1] == 5.0
    same(tree.per_leaf(average.mean)([A, B]), between(0.5))


def test_a_bare_model_is_no_sequence_of_points(refuses):
    for function in (tree.per_leaf(average.mean), tree.per_leaf(bare, many=1)):
        for model in ({"w": jnp.ones(2)}, jnp.ones((2, 3)), Pair(*A)):
            with refuses(TypeError, match="must be a sequence of trees, got"):
                function(model)
        with refuses(ValueError, match="is empty"):
            function([])


def test_a_model_in_place_of_several_is_refused_by_averages(refuses):
    for model, what in (
        ({"w": jnp.ones(2)}, "a dict of 1 leaf: give a list"),
        (Pair(*A), "the named tuple Pair of"),
        (jnp.ones((2, 3)), "an array.*list"),
        (np.ones((2, 3)), "an array.*list"),
        ("text", "'text'"),
    ):
        with refuses(TypeError, match=f"points must be a sequence of trees, got {what}"):
            average.mean(model)
    same(average.mean(list(np.float32([[1, 2], [3, 6]]))), np.array([2, 4]))


def test_lists_of_numbers_that_may_be_one_a_leaf_are_refused(refuses):
    words = r"is a list of 2 numbers, and so many leaves.*give an array for one number a point"
    with refuses(ValueError, match=f"argument 2 of mean {words}"):
        tree.per_leaf(average.mean)([A, B], [0.75, 0.25])
    with refuses(ValueError, match=f"coefficients of task_arithmetic {words}"):
        tree.per_leaf(merge.task_arithmetic)(ZERO, [A, B], coefficients=[1.0, 10.0])
    for c in ((0.75, 0.25), np.array([0.75, 0.25]), jnp.array([0.75, 0.25])):
        same(tree.per_leaf(average.mean)([A, B], c), between(0.25))
    # With another number of leaves, or another container, nothing is ambiguous.
    base, *tuned = ({"w": x[0]} for x in (ZERO, A, B))
    found = tree.per_leaf(merge.task_arithmetic)(base, tuned, coefficients=[1.0, 10.0])
    same(found, [np.array([101.0, 202.0])])


def test_one_scalar_a_leaf_is_a_tree_of_arrays():
    ts = [jnp.float32(0.25), jnp.float32(0.75)]
    wanted = [between(0.25)[0], between(0.75)[1]]
    same(tree.per_leaf(interpolate.lerp)(A, B, ts), wanted)
    same(tree.per_leaf(interpolate.lerp)(A, B, t=ts), wanted)


def test_partial_and_wrapped_functions_are_what_they_are_made_of(refuses):
    @functools.wraps(average.mean)
    def wrapped(*args, **kwargs):
        return average.mean(*args, **kwargs)

    half = functools.partial(average.mean, coefficients=(0.5, 0.5))
    for function in (wrapped, half, functools.partial(half)):
        same(tree.per_leaf(function)([A, B]), between(0.5))
    same(tree.per_leaf(functools.partial(interpolate.lerp, t=0.25))(A, B), between(0.25))
    with refuses(ValueError, match="the first argument of bare is 2 trees of one layout"):
        tree.per_leaf(functools.partial(bare, t=0.25))([A, B])
    solved = tree.per_leaf(functools.partial(average.karcher_mean, tol=1e-6))
    eager, compiled = solved([A, B]), jax.jit(lambda a, b: solved([a, b]))(A, B)
    same(compiled.weights, eager.weights)


def test_leaves_of_several_dtypes_are_solved_each_in_its_own():
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        a, b = (
            {
                "v": jnp.asarray(random.normal(size=3) + 2),
                "w": jnp.asarray(random.normal(size=4) + 2, jnp.float32),
                "u": jnp.asarray(random.normal(size=(2, 2)) + 2, jnp.float32),
            }
            for _ in range(2)
        )
        solved = tree.per_leaf(average.karcher_mean)
        eager, compiled = solved([a, b]), jax.jit(lambda a, b: solved([a, b]))(a, b)
        assert jax.tree.map(jax.typeof, eager) == jax.tree.map(jax.typeof, compiled)
        dtypes = {key: leaf.dtype for key, leaf in compiled.residual.items()}
        assert dtypes == {"v": jnp.float64, "w": jnp.float32, "u": jnp.float32}
        turned = jax.jit(tree.per_leaf(interpolate.slerp))(a, b, 0.5)
        for key, leaf in turned.items():
            x, y = (np.asarray(p[key], np.float64) for p in (a, b))
            norms = [np.linalg.norm(p) for p in (x, y)]
            angle = np.arccos((x * y).sum() / norms[0] / norms[1])
            wanted = np.sin(angle / 2) / np.sin(angle) * (x + y)
            assert leaf.dtype == a[key].dtype
            np.testing.assert_allclose(leaf, wanted, rtol=1e-5)
            np.testing.assert_allclose(compiled.weights[key], eager.weights[key], rtol=1e-5)


def test_trees_without_leaves_and_leaves_that_fail(refuses):
    assert tree.per_leaf(tree.norm)({}) == {}
    assert tree.per_leaf(average.mean)([{}, {}]) == {}
    with refuses(ValueError, match="shape") as caught:
        tree.per_leaf(interpolate.lerp)({"a": A[0]}, {"a": jnp.ones(3)}, 0.5)
    assert caught.value.__notes__ == ["where (root) is leaf ['a'], taken by itself"]
