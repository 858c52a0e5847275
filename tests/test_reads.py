"""Values that decide whether to refuse are waited for once, not once a leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.strategies import FLOAT
from wspace import _checks, average, merge, tree

RANDOM = np.random.default_rng(0)


def model():
    """Twelve matrices and twelve vectors."""
    shapes = {f"w{i}": (6, 5) for i in range(12)} | {f"b{i}": (5,) for i in range(12)}
    return {name: jnp.asarray(RANDOM.normal(size=shape), FLOAT) for name, shape in shapes.items()}


@pytest.fixture
def reads(monkeypatch):
    """How often a value was taken from a device."""
    count, kind = [0], type(jnp.zeros(()))

    def counted(name, read):
        def called(self, *args, **kwargs):
            count[0] += 1
            return read(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, called)

    for name in ("__array__", "__bool__", "__float__", "__int__", "__index__", "item", "tolist"):
        counted(name, getattr(kind, name))
    return lambda: count[0]


def test_entries_of_fishers_are_looked_at_together(reads):
    points, fishers = [model(), model()], [jax.tree.map(jnp.abs, model()) for _ in range(2)]
    before = reads()
    average.fisher_mean(points, fishers)
    assert reads() - before <= 4
    for i, name in ((1, "b3"), (0, "w7")):
        fishers[i][name] = fishers[i][name].at[1].set(-2.0)
        with pytest.raises(
            ValueError, match=rf"leaf \['{name}'\] of fishers\[{i}\] has the entry -2"
        ):
            average.fisher_mean(points, fishers)


@pytest.mark.parametrize("method", [merge.tsv_m, merge.iso_cts])
def test_the_directions_of_no_matrix_are_waited_for(method, reads, monkeypatch):
    monkeypatch.setattr(_checks, "finite", lambda **_: None)  # which has reads of its own
    base, *tuned = (model() for _ in range(3))
    before = reads()
    method(base, tuned)
    assert reads() == before


def test_leaves_on_several_devices_are_looked_at_where_they_are():
    devices = jax.devices()[:2]
    points, fishers = (
        [
            {n: jax.device_put(jnp.full(2, x), d) for n, d in zip("ab", devices, strict=True)}
            for x in xs
        ]
        for xs in ((1.0, 5.0), (3.0, 1.0))
    )
    found = average.fisher_mean(points, fishers)
    for name, device in zip("ab", devices, strict=True):
        np.testing.assert_allclose(found[name], [2.0, 2.0], rtol=1e-6)
        assert found[name].devices() == {device}
    fishers[1]["b"] = -fishers[1]["b"]
    with pytest.raises(ValueError, match=r"leaf \['b'\] of fishers\[1\] has the entry -1"):
        average.fisher_mean(points, fishers)


def test_numbers_of_leaves_are_read_once_for_all_models(reads):
    points = [model() for _ in range(4)]
    rows = {name: jnp.arange(4.0) for name in points[0]}
    before = reads()
    tree.combine(rows, points)
    assert reads() - before <= len(rows)
