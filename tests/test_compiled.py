"""Laws of programs compiled from a caller's functions: used again, and gone with them."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wspace import average, fit, merge, negative, soup
from wspace._compiled import compiled

KEY = jax.random.key(0)
SGD = optax.sgd(0.1)
SIZE = 12_345  # of an array that nothing else in the tests is as large as


def held():
    """How many of the large arrays are alive."""
    gc.collect()
    return sum(x.size == SIZE for x in jax.live_arrays())


def losses():
    """Two losses that close over data of their own."""
    data = jnp.ones(SIZE), jnp.zeros(SIZE)
    return [lambda w, x=x: jnp.mean((w - x[:2]) ** 2) for x in data]


def adapted(first, _, optimizer):
    return fit.adapt(KEY, first, jnp.zeros(2), optimizer=optimizer, steps=2)


def through_rank(first, _, optimizer):
    return fit.adapt(KEY, first, jnp.zeros(2), rank=1, optimizer=optimizer, steps=2)


def inverted(first, _, optimizer):
    return fit.invert(KEY, first, jnp.zeros(2), optimizer=optimizer, steps=2)


def learned(first, _, optimizer):
    tuned = [jnp.ones(2)]
    return fit.coefficients(KEY, first, jnp.zeros(2), tuned, optimizer=optimizer, steps=2)


def guarded(first, second, optimizer):
    points, away = [jnp.zeros(2)] * 2, fit.clipped(second, 3.0)
    both = [first, second]
    return fit.guard(KEY, both, points, [0.5, 0.5], away, optimizer=optimizer, steps=2)


def guarded_by_draws(first, second, optimizer):
    def rows(key):
        return jax.random.dirichlet(key, jnp.ones(2) + 0 * jnp.ones(SIZE)[:2], (3,))

    points, both = [jnp.zeros(2)] * 2, [first, second]
    return fit.guard(KEY, both, points, rows, second, optimizer=optimizer, steps=2)


def halved(data):
    """An optimizer that closes over data of its own."""
    return optax.chain(SGD, optax.stateless(lambda u, _: jax.tree.map(lambda g: g * data[0], u)))


RUNS = [adapted, through_rank, inverted, learned, guarded, guarded_by_draws]


@pytest.mark.parametrize("run", RUNS)
def test_a_run_keeps_nothing_that_its_losses_and_optimizer_close_over(run):
    before = held()
    for _ in range(2):
        run(*losses(), SGD)
        run(*losses(), halved(jnp.full(SIZE, 0.5)))
    assert held() == before


def test_a_run_keeps_no_progress_even_while_its_loss_is_kept():
    loss, told = losses()[0], []

    def progress(step, _):
        told.append(step)

    fit.adapt(KEY, loss, jnp.zeros(2), optimizer=SGD, steps=2, progress=progress)
    assert told == [0, 1, 2]
    gone = weakref.ref(progress)
    del progress
    gc.collect()
    assert gone() is None


class Log:
    """Listeners of several kinds."""

    __slots__ = ("__weakref__", "told")

    def __init__(self):
        """One that has been told nothing."""
        self.told = []

    def listen(self, step, _):
        """Notes a step."""
        self.told.append(step)


class Bare:
    """A listener without weak references."""

    __slots__ = ("told",)
    __init__, __call__ = Log.__init__, Log.listen


def test_progress_is_told_to_methods_and_objects():
    loss, log, bare = losses()[0], Log(), Bare()
    for progress in (log.listen, log.listen, bare):
        fit.adapt(KEY, loss, jnp.zeros(2), optimizer=SGD, steps=2, progress=progress)
    assert log.told == [0, 1, 2, 0, 1, 2]
    assert bare.told == [0, 1, 2]


@pytest.mark.parametrize("run", [adapted, through_rank, inverted, learned])
def test_the_same_losses_compile_once(run, programs):
    first, second = losses()
    found = run(first, second, SGD)
    before = programs()
    again = run(first, second, SGD)
    assert programs() == before
    jax.tree.map(np.testing.assert_array_equal, again, found)


X, Y = jnp.arange(6.0).reshape(3, 2), jnp.eye(3, 2)
FISHERS = [average.Kronecker(k * jnp.eye(3), jnp.eye(2)) for k in (1.0, 2.0)]


def score(weights):
    """The score of a grid."""
    return -jnp.sum((weights - 1) ** 2)


def mixed(c):
    """The merge of a grid."""
    return average.mean([X, Y], c)


NUMBERS = {
    "geometric_median": lambda i: average.geometric_median([X, Y, -X], max_steps=50 + i),
    "karcher_mean": lambda i: average.karcher_mean([X, Y], max_steps=50 + i),
    "kronecker_mean": lambda i: average.kronecker_mean([X, Y], FISHERS, ridge=1.0, steps=50 + i),
    "guard_normal": lambda i: negative.guard_normal([X, Y], -X, 20.0, steps=10 + i),
    "dare": lambda i: merge.dare(KEY, X, [Y, -X], density=0.5 + i / 10),
    "trim": lambda i: merge.trim(X, 0.4 + i / 5),
    "grid": lambda i: soup.grid(score, mixed, np.eye(2) + i, batch_size=2),
}


@pytest.mark.parametrize("call", NUMBERS.values(), ids=NUMBERS)
def test_a_number_that_decides_no_shape_compiles_nothing(call, programs):
    jax.block_until_ready(jax.tree.leaves(call(0)))
    jax.block_until_ready(jax.tree.leaves(call(1)))
    before = programs()
    jax.block_until_ready(jax.tree.leaves(call(2)))
    assert programs() == before


def test_steps_are_counted_where_they_are_no_part_of_the_program(refuses):
    for few in (0, 1, 2):
        assert average.geometric_median([X, Y, -X - Y], max_steps=few, tol=1e-30).steps <= few
        assert negative.guard_normal([X, Y], -X, 20.0, steps=few, rtol=1e-30).steps <= few
    with refuses(TypeError, match="max_steps must be a plain integer"):
        average.geometric_median([X, Y], max_steps=1.5)


class Model:
    """A model with its loss as a method, which is a function as well."""

    def __init__(self, center):
        """A model at rest at a center."""
        self.center = center

    def loss(self, w):
        """The mean squared distance."""
        return jnp.mean((w - self.center[:1]) ** 2)

    __call__ = loss


def test_a_method_is_one_function_however_often_it_is_taken(programs):
    model, other = Model(jnp.ones(1)), Model(jnp.full(1, 5.0))
    found = adapted(model.loss, None, SGD)
    before = programs()
    adapted(model.loss, None, SGD)
    assert programs() == before
    # Two steps of 0.1 (center - w).
    np.testing.assert_allclose(found.weights, np.full(2, 0.19), rtol=1e-6)
    np.testing.assert_allclose(adapted(other.loss, None, SGD).weights, np.full(2, 0.95), rtol=1e-6)


class Unhashable(Model):
    """A loss without a hash."""

    __hash__ = None


class Slotted:
    """A loss without weak references."""

    __slots__ = ("center",)
    __init__, __call__ = Model.__init__, Model.loss


@pytest.mark.parametrize("kind", [Unhashable, Slotted])
def test_losses_of_any_kind_are_not_kept(kind):
    before = held()
    found = adapted(kind(jnp.ones(SIZE)), None, SGD)
    np.testing.assert_allclose(found.weights, np.full(2, 0.19), rtol=1e-6)
    assert held() == before


class Equal:
    """A function that equals all others of its kind, and has a number."""

    def __init__(self, number):
        """One that adds this number."""
        self.number = number

    def __call__(self, x):
        """The sum."""
        return x + self.number

    def __eq__(self, other):
        return isinstance(other, Equal)

    def __hash__(self):
        return 0


def test_functions_and_settings_are_told_apart_by_what_they_are():
    def body(functions, settings, x):
        return functions[0](x) * settings[0]

    one, two, x = Equal(1), Equal(2), jnp.float32(1)
    assert [compiled(body, (f,), (2,), x) for f in (one, two, one)] == [4, 6, 4]
    assert compiled(body, (one,), (3,), x) == 6
    del one
    assert compiled(body, (two,), (2,), jnp.zeros(3)).tolist() == [4, 4, 4]
    for number in range(20):  # in places in memory where another one was
        assert compiled(body, (Equal(number),), (1,), x) == number + 1


def manifold(scale):
    """Positive numbers under the metric dx^2 / x^2, by functions that close over an array."""
    return (
        lambda x, v: x * jnp.exp(v / x) * scale[:2],
        lambda x, y: x * jnp.log(y / x) * scale[:2],
    )


def test_a_mean_on_a_manifold_compiles_once_for_its_functions(programs):
    exp, log = manifold(jnp.ones(SIZE))
    points = [jnp.array([2.0, 3.0]), jnp.array([8.0, 12.0])]
    found = average.karcher_mean_on(exp, log, points)
    np.testing.assert_allclose(found.weights, [4.0, 6.0], rtol=1e-5)
    others = [2 * x for x in points]
    before = programs()
    again = average.karcher_mean_on(exp, log, others, max_steps=99)
    assert programs() == before
    np.testing.assert_allclose(again.weights, [8.0, 12.0], rtol=1e-5)


def test_a_mean_on_a_manifold_keeps_nothing_that_its_functions_close_over():
    before = held()
    for _ in range(2):
        average.karcher_mean_on(*manifold(jnp.ones(SIZE)), [jnp.array([2.0, 3.0])] * 2)
    assert held() == before
