"""Laws of averages chosen by a score."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wspace import average, interpolate, soup, tree
from wspace.testing import assert_close, points, size, vector


def near(target):
    """A score that falls with the distance."""
    return lambda w: -float(np.linalg.norm((vector(w) - vector(target)).astype(float)))


@given(data=st.data(), xs=st.integers(1, 5).flatmap(points))
def test_greedy_soup_is_at_least_its_best_member_and_keeps_what_helps(data, xs):
    target = average.mean(data.draw(st.lists(st.sampled_from(xs), min_size=1, max_size=3)))
    score = near(target)
    found = soup.greedy_soup(score, xs)
    np.testing.assert_array_equal(found.alone, [score(x) for x in xs])
    assert score(found.weights) == found.scores[-1]
    assert found.scores[0] == found.alone.max()
    assert (np.diff(found.scores) > 0).all()

    # Played again by definition, for all that rounding of the means does not decide.
    slack = 1e-6 * size(*xs)
    order = sorted(range(len(xs)), key=lambda i: (-found.alone[i], i))
    members, scores = [order[0]], [found.scores[0]]
    assert found.members[0] == order[0]
    for i in order[1:]:
        value = score(average.mean([xs[j] for j in (*members, i)]))
        if i in found.members:
            members.append(i)
            scores.append(value)
            assert value > scores[-2] - slack
        else:
            assert value <= scores[-1] + slack
    assert found.members == tuple(members)
    np.testing.assert_allclose(found.scores, scores, rtol=0, atol=slack)
    wanted = tree.cast_like(average.mean([xs[j] for j in members]), xs[0])
    assert_close(found.weights, wanted, units=8, scale=size(*xs))


def test_ties_go_to_the_first_and_do_not_enter_twice():
    a, b = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    found = soup.greedy_soup(lambda w: float(w.sum()), [a, b, a])
    assert found.members == (0,)  # every mean scores the same, so that nothing helps
    assert_close(found.weights, a, units=0)
    # The mean of all is worse than the best member, which the greedy soup never is.
    far = [jnp.array([0.0]), jnp.array([10.0])]
    score = near(far[0])
    assert score(average.mean(far)) < soup.greedy_soup(score, far).scores[-1] == 0


def test_half_precision_soups_are_rounded_once():
    rng = np.random.default_rng(0)
    xs = [jnp.asarray(100 + rng.normal(size=200), jnp.bfloat16) for _ in range(7)]
    steps = itertools.count()
    found = soup.greedy_soup(lambda _: float(next(steps)), xs)
    assert found.members == (6, 5, 4, 3, 2, 1, 0)  # every score is above those before
    exact = np.mean([vector(x) for x in xs], 0).astype(np.float32)
    assert (found.weights != jnp.asarray(exact).astype(jnp.bfloat16)).mean() < 0.01


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_a_grid_finds_the_best_of_its_rows(batch_size):
    xs = [{"w": jnp.array(row)} for row in np.eye(3, dtype=np.float32)]
    rows = soup.simplex(3, 6)
    target = {"w": jnp.asarray(rows[11], jnp.float32)}

    def score(w):
        return -tree.norm(tree.combine((1.0, -1.0), (w, target)))

    merge = functools.partial(average.mean, xs)
    found = soup.grid(score, merge, rows, batch_size=batch_size)
    assert found.best == 11
    np.testing.assert_array_equal(found.coefficients, rows)
    wanted = -np.linalg.norm(rows - rows[11], axis=1)
    np.testing.assert_allclose(found.scores, wanted, rtol=1e-6, atol=1e-6)
    assert_close(found.weights, target, units=2)

    path = functools.partial(interpolate.lerp, xs[0], xs[1])
    line = soup.grid(lambda w: w["w"][1], path, [0.5, 2.0, 2.0, -1.0], batch_size=batch_size)
    assert line.best == 1  # the first of the best
    assert_close(line.weights, {"w": jnp.array([-1.0, 2.0, 0.0], jnp.float32)}, units=0)


@given(count=st.integers(1, 4), steps=st.integers(1, 6))
def test_simplex_is_every_lattice_point_once(count, steps):
    rows = soup.simplex(count, steps)
    parts = itertools.product(range(steps + 1), repeat=count)
    wanted = [p for p in parts if sum(p) == steps]
    np.testing.assert_array_equal(rows, np.array(wanted) / steps)
    assert len(rows) == math.comb(steps + count - 1, count - 1)


def test_what_cannot_be_compared_is_refused_by_name(refuses):
    xs = [jnp.ones(2), jnp.zeros(2)]

    def broken(w):
        return jnp.nan if w[0] == 0 else 1.0

    with refuses(ValueError, match=r"the score of points\[1\] is NaN"):
        soup.greedy_soup(broken, xs)
    with refuses(ValueError, match=r"the score of the mean of points \[0, 1\] is NaN"):
        soup.greedy_soup(lambda w: math.nan if w[0] == 0.5 else 1.0, xs)
    merge = functools.partial(interpolate.lerp, *xs)
    for batch_size in (None, 2):
        with refuses(ValueError, match=r"the score of coefficients\[1\] = 0.25 is NaN"):
            soup.grid(
                lambda w: jnp.where(w[0] == 0.75, jnp.nan, w[0]),
                merge,
                [0.0, 0.25],
                batch_size=batch_size,
            )
        with refuses(TypeError, match=r"score must return one number, got shape \(2,\)"):
            soup.grid(lambda w: w, merge, [0.0], batch_size=batch_size)
    with refuses(ValueError, match="coefficients is empty"):
        soup.grid(lambda w: w[0], merge, [])
    with refuses(ValueError, match="batch_size must be at least 1"):
        soup.grid(lambda w: w[0], merge, [0.0], batch_size=0)
    with refuses(ValueError, match="count and steps must be at least 1, got 0 and 3"):
        soup.simplex(0, 3)
    with refuses(ValueError, match=r"leaf \(root\) has shape \(2,\) in points\[0\]"):
        soup.greedy_soup(lambda _: 0.0, [jnp.ones(2), jnp.ones(3)])


def test_a_choice_by_score_is_not_traced():
    with pytest.raises(TypeError, match="a choice by score needs its value: call it outside"):
        jax.jit(lambda x: soup.greedy_soup(lambda w: w[0], [x]).weights)(jnp.ones(2))
