"""Laws of the records that functions return: their `repr` is short, whatever is in them."""

import dataclasses
import html
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wspace
from tests.catalog import NOT_ON_TREES
from wspace import average, fit, lowrank, merge, negative, soup

PI = 3.14159274
LARGE = {
    f"layer{i}": {"w": np.full((10, 50), PI, np.float32), "b": np.ones(10)} for i in range(100)
}


def classes():
    """All classes of the catalog that have fields."""
    for name in NOT_ON_TREES:
        room, _, own = name.partition(".")
        kind = getattr(getattr(wspace, room), own)
        if inspect.isclass(kind) and (hasattr(kind, "_fields") or dataclasses.is_dataclass(kind)):
            yield pytest.param(kind, id=name)


CLASSES = list(classes())


def names_of(kind):
    return getattr(kind, "_fields", None) or [x.name for x in dataclasses.fields(kind)]


def filled(kind, value):
    """A record with one value in all fields."""
    record = kind.__new__(
        kind, *([value] * len(names_of(kind)) if hasattr(kind, "_fields") else ())
    )
    if not hasattr(kind, "_fields"):
        for name in names_of(kind):
            object.__setattr__(record, name, value)
    return record


VALUES = {
    "tree": LARGE,
    "trees": [LARGE] * 3,
    "vector": np.full(200, PI),
    "matrix": jnp.full((3, 4), PI),
    "number": jnp.float32(PI),
    "key": jax.random.key(0),
    "none": None,
    "text": "word " * 100,
    "functions": np.linalg.svd,
    "records": [average.Profile(100, 2.0)] * 300,
    "factors": [lowrank.LowRank(jnp.ones((3, 1)), jnp.ones((2, 1)))] * 200,
    "unread": jax.ShapeDtypeStruct((3,), jnp.float32),
    "unordered": {1: np.ones(100), "a": np.ones(100)},
    "numbers": tuple(range(1000)),
}


def check(record):
    text = repr(record)
    assert len(text) <= 400
    assert text.startswith(type(record).__name__ + "(")
    assert text.endswith(")")
    assert "\n" not in text
    assert "array(" not in text.lower()
    return text


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_record_of_anything_is_short(kind, value):
    text = check(filled(kind, value))
    first = names_of(kind)[0]
    assert f"{first}=" in text
    if "__str__" not in vars(kind):
        page = filled(kind, value)._repr_html_()
        assert page.startswith("<table>")
        assert len(page) < 5000
        assert all(f"<th>{name}</th>" in page for name in names_of(kind) if name[0] != "_")
        assert not re.search(r"style|script|http", page)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_record_of_traced_values_is_short(kind):
    seen = []

    def look(x):
        for value in (x, x["layer0"]["w"], jnp.sum(x["layer0"]["w"])):
            seen.append(check(filled(kind, value)))
        return x["layer0"]["b"]

    jax.eval_shape(look, LARGE)
    jax.eval_shape(jax.vmap(look), jax.tree.map(lambda x: np.ones((2, *x.shape)), LARGE))
    assert len(seen) == 6
    assert not any("Tracer" in text or "Traced" in text for text in seen)


def test_records_say_what_is_in_them():
    scores = np.array([0.1, 0.25])
    found = soup.Soup(weights=LARGE, members=(2, 0), scores=scores, alone=np.ones(100))
    assert repr(found) == (
        "Soup(weights=<200 leaves, 50,000 float32, 1,000 float64>, members=(2, 0), "
        "scores=[0.1, 0.25], alone=<(100,) float64>)"
    )
    solved = average.Solution(LARGE, jnp.float32(1.5e-7), jnp.int32(12), jnp.array(True))
    assert repr(solved).endswith("residual=1.5e-07, steps=12, converged=True)")
    assert repr(average.Solution(jnp.full(2, PI, jnp.float32), PI, 1, True)).startswith(
        "Solution(weights=<(2,) float32>, residual=3.14"
    )
    assert repr(average.ema(0.9)).startswith("Average(init=<function init>, update=<function ")
    history = fit.History(np.ones(300), np.ones((300, 2)), np.ones(300), 299)
    assert "history=History(loss=<(300,) float64>" in repr(fit.Fit(LARGE, history))
    edit = lowrank.LowRank(jnp.ones((30, 2), jnp.float32), jnp.ones((20, 2), jnp.float32))
    cut = lowrank.Truncation(
        {"w": edit, "b": jnp.ones(3, jnp.float32)}, jnp.float32(0.5), jnp.array(False)
    )
    assert repr(cut) == (
        "Truncation(factors=<2 leaves, 1 of them LowRank, 103 float32>, tail=0.5, "
        "approximate=False)"
    )
    assert repr(edit) == "LowRank(left=<(30, 2) float32>, right=<(20, 2) float32>)"


def test_states_of_streaming_averages_are_short():
    for run in (average.ema(0.9), average.running_mean(), average.window(3), average.power_ema(2)):
        state = run.init({"w": jnp.full((30, 40), PI)})
        assert len(repr(state)) <= 400
        assert "3.14" not in repr(state)


def test_values_in_a_notebook_are_escaped():
    told = fit.Away(loss=len, least=0.0, name="<b>&")
    assert "<td>&#x27;&lt;b&gt;&amp;&#x27;</td>" in told._repr_html_()
    assert "<b>" not in told._repr_html_()


def test_an_audit_and_a_report_show_their_table_in_a_notebook():
    base, x, y = ({"<w>": jnp.eye(3) * c} for c in (1.0, 2.0, 3.0))
    for told in (
        negative.audit([x, y], (0.5, 0.5), base, 1.0),
        merge.report(base, [x, y], x),
    ):
        check(told)
        assert told._repr_html_() == f"<pre>{html.escape(str(told))}</pre>"
        assert "&lt;w&gt;" in told._repr_html_()
        assert "<w>" not in told._repr_html_()
        assert str(told).count("\n") > 4


def test_an_audit_that_is_traced_or_many_prints_as_its_repr(pytestconfig):
    if pytestconfig.getoption("jaxtyping_packages"):
        pytest.skip("a checked record is of one audit")
    base, x = jnp.eye(3), jnp.stack([2 * jnp.eye(3), 3 * jnp.eye(3)])
    seen = []

    def radius(y):
        told = negative.audit([y, 2 * y], (0.5, 0.5), base, 1.0)
        seen.append((str(told), repr(told)))
        assert told._repr_html_() == f"<pre>{html.escape(repr(told))}</pre>"
        return told

    many = jax.eval_shape(jax.vmap(radius), x)
    assert seen[0][0] == seen[0][1]
    assert str(many) == repr(many)
    check(many)
