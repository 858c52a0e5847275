"""Frames of differences are orthonormal to rounding, and the differences again."""

import jax.numpy as jnp
import numpy as np
import pytest

from wspace import _frames as frames

SHAPES = ((3, 4), (5,), ())
EPS = float(np.finfo(np.float32).eps)


def split(vector):
    """A vector as a tree of float32 leaves."""
    ends = np.cumsum([int(np.prod(shape)) for shape in SHAPES])
    parts = np.split(np.float32(vector), ends[:-1])
    return [jnp.asarray(x.reshape(s)) for x, s in zip(parts, SHAPES, strict=True)]


def vector(tree):
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in tree])


def drawn(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 18))


def inverse(_, left):
    return jnp.where(left > 1e-5, 1 / jnp.where(left > 1e-5, left, 1), 0)


def framed(points):
    pairs = [(x, points[0]) for x in points[1:]]
    frame, columns = frames.of_differences(pairs, inverse)
    gap = vector(frame.first) - vector(frame.start)
    vectors = np.stack([float(frame.inverse) * gap, *map(vector, frame.others)], axis=1)
    rows = np.zeros((len(columns),) * 2)
    for j, column in enumerate(columns):
        rows[: len(column), j] = column
    return frame, vectors, rows


def nearly_dependent(size):
    """Points whose differences are one direction, and something small beside it."""
    start, way, *rest = drawn(5)
    return [split(x) for x in (start, *(start + k * way + size * r for k, r in enumerate(rest, 1)))]


@pytest.mark.parametrize(
    "points",
    [[split(x) for x in drawn(4)], nearly_dependent(1e-2), nearly_dependent(1e-3)],
    ids=["any", "nearly dependent", "more nearly dependent"],
)
def test_frames_are_orthonormal_and_make_the_differences(points):
    _, vectors, rows = framed(points)
    differences = np.stack([vector(x) - vector(points[0]) for x in points[1:]], axis=1)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(rows)), atol=16 * EPS)
    np.testing.assert_allclose(
        vectors @ rows, differences, atol=16 * EPS * np.abs(differences).max()
    )
    q, r = np.linalg.qr(differences)
    signs = np.sign(np.diag(r))
    scale = np.linalg.norm(differences, axis=0).max()
    np.testing.assert_allclose(rows, signs[:, None] * r, atol=16 * EPS * scale)
    # As far as rounding of the differences lets a direction be known.
    least = np.abs(np.diag(r)).min()
    np.testing.assert_allclose(vectors, q * signs, atol=64 * EPS * scale / least)


def test_dependent_vectors_are_zero():
    start, way, other = (split(x) for x in drawn(3))
    twice = [a + 2 * (b - a) for a, b in zip(start, way, strict=True)]
    frame, vectors, rows = framed([start, way, twice, start, other])
    np.testing.assert_array_equal(vectors[:, 1:3], 0)
    np.testing.assert_allclose(vectors.T @ vectors, np.diag([1, 0, 0, 1]), atol=16 * EPS)
    assert (np.abs(np.diag(rows)) > 0.1).tolist() == [True, False, False, True]
    # Equal points are a frame of nothing.
    nothing, columns = frames.of_differences([(start, start)], inverse)
    assert float(nothing.inverse) == float(columns[0][0]) == 0
    assert frame.trees[:2] == [start, way]


@pytest.mark.parametrize("distance", [1.0, 1e-3])
def test_components_and_what_is_left(distance):
    points = [split(x) for x in drawn(4)]
    frame, vectors, _ = framed(points)
    inside = vectors @ [0.5, -1.0, 2.0]
    beside = drawn(1, seed=9)[0]
    beside -= vectors @ (vectors.T @ beside)
    origin = split(np.zeros(18))
    x = split(inside + distance * beside / np.linalg.norm(beside))
    coefficients, rest = frames.components(frame, x, origin)
    np.testing.assert_allclose(coefficients, [0.5, -1.0, 2.0], atol=32 * EPS)
    np.testing.assert_allclose(vectors.T @ vector(rest), 0, atol=16 * EPS * distance + 1e-12)
    measured, left = frames.measured(frame, x, origin)
    np.testing.assert_allclose(measured, [0.5, -1.0, 2.0], atol=32 * EPS)
    exact = vector(x) - vectors @ np.linalg.lstsq(vectors, vector(x), rcond=None)[0]
    np.testing.assert_allclose(left, np.linalg.norm(exact), atol=32 * EPS)
    np.testing.assert_allclose(vector(rest), exact, atol=32 * EPS)
    again = frames.combination(jnp.float32(2), (x, points[0]), list(jnp.float32([3, 4, 5])), frame)
    wanted = 2 * (vector(x) - vector(points[0])) + vectors @ [3.0, 4.0, 5.0]
    np.testing.assert_allclose(vector(again), wanted, atol=64 * EPS * np.abs(wanted).max())
    once = frames.gap_times(jnp.float32(-2), (x, points[0]))
    np.testing.assert_allclose(vector(once), -2 * (vector(x) - vector(points[0])), rtol=4 * EPS)
    apart = np.linalg.norm(vector(x) - vector(points[0]))
    np.testing.assert_allclose(frames.distance(x, points[0]), apart, rtol=8 * EPS)


def test_the_inverse_is_asked_for_by_the_index_of_the_difference():
    asked = []
    points = [split(x) for x in drawn(4)]
    frame, _ = frames.of_differences(
        [(x, points[0]) for x in points[1:]],
        lambda i, left: asked.append(i) or inverse(i, left) * (i + 1),
    )
    assert asked == [0, 1, 2]
    np.testing.assert_allclose(np.linalg.norm(vector(frame.others[0])), 2, rtol=1e-5)
