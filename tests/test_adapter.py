"""Laws of `wspace.checkpoint.adapter`: LoRA adapters read as edits and written."""

import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import FLOAT
from wspace import checkpoint, lowrank
from wspace.lowrank import LowRank
from wspace.testing import assert_close, vector

SHAPES = {
    "query.weight": (3, 4),
    "query.bias": (3,),
    "layers.0.query.weight": (6, 4),
    "layers.0.value.weight": (4, 4),
    "embed.weight": (11, 4),
    "conv.weight": (8, 4, 3, 3),
    "stack.weight": (2, 3, 4),
    "scale": (),
}
BASE = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
MATRICES = ("query.weight", "layers.0.query.weight", "layers.0.value.weight", "embed.weight")
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none"}
FACTORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
seeds = st.integers(0, 2**16)


def drawn(seed, *shapes, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def edit_of(ranks, seed=0, shapes=SHAPES, dtype=jnp.float32):
    """An edit with these ranks at these names."""
    edit = {}
    for i, (name, rank) in enumerate(ranks.items()):
        m, n = shapes[name]
        edit[name] = LowRank(*drawn(seed + i, (m, rank), (n, rank), dtype=dtype))
    return edit


def tensors_of(layer, a, b, kinds=("lora_A.weight", "lora_B.weight")):
    return {
        f"base_model.model.{layer}.{kind}": factor
        for kind, factor in zip(kinds, (a, b), strict=True)
    }


def embedding(layer, a, b):
    return tensors_of(layer, a, b, ("lora_embedding_A", "lora_embedding_B"))


def query(rank=2):
    return tensors_of("query", *drawn(0, (rank, 4), (3, rank)))


def put(folder, config=None, tensors=None):
    """A folder as PEFT writes one, with the fields of `config` beside those it needs."""
    merged = {**CONFIG, **({} if config is None else config)}
    merged = {name: value for name, value in merged.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(merged))
    checkpoint.save(folder / FACTORS, query() if tensors is None else tensors)
    return folder


def config_in(folder):
    return json.loads((folder / "adapter_config.json").read_bytes())


def wide(x):
    return np.asarray(x, np.float64)


def value(x):
    return wide(x.left) @ wide(x.right).T


def same(got, wanted):
    """Asserts that two edits have the same factors, bit for bit."""
    assert_close((got.left, got.right), (wanted.left, wanted.right), units=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapter")


@given(
    seed=seeds,
    ranks=st.dictionaries(st.sampled_from(MATRICES), st.sampled_from([1, 2, 4, 5]), min_size=1),
    fan_in_fan_out=st.booleans(),
    marked=st.booleans(),
)
def test_what_was_saved_comes_back_bit_for_bit(folder, seed, ranks, fan_in_fan_out, marked):
    edit = edit_of(ranks, seed)
    embeddings = ["embed.weight"] if marked and "embed.weight" in ranks else []
    checkpoint.save_adapter(folder, edit, fan_in_fan_out=fan_in_fan_out, embeddings=embeddings)
    loaded = checkpoint.load_adapter(folder, BASE)
    assert list(loaded) == list(BASE)
    for name, x in loaded.items():
        assert isinstance(x, LowRank)
        if name in edit:
            same(x, edit[name])
        else:
            assert x.rank == 0
    assert sorted(os.listdir(folder)) == ["adapter_config.json", FACTORS]


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_a_layer_is_the_scaled_product_with_the_settings_of_its_patterns(tmp_path, rank_stabilized):
    # By name: the rank and the alpha that the first matching pattern gives it.
    settings = {
        "query": (3, -0.5),
        "layers.0.query": (2, -0.5),
        "layers.0.value": (5, 6),
        "embed": (2, 6),
    }
    patterns = {
        "rank_pattern": {"layers": 7, "alue": 8, "^query": 3, "val.*": 5, ".*": 2},
        "alpha_pattern": {"query": -0.5, "^query": 9},
    }
    tensors, products = {}, {}
    for i, (layer, (rank, _)) in enumerate(settings.items()):
        out, ins = SHAPES[f"{layer}.weight"]
        if layer == "embed":
            a, b = drawn(i, (rank, out), (ins, rank))
            products[layer] = (wide(b) @ wide(a)).T
            tensors |= embedding(layer, a, b)
        else:
            a, b = drawn(i, (rank, ins), (out, rank))
            products[layer] = wide(b) @ wide(a)
            tensors |= tensors_of(layer, a, b)
    put(tmp_path, {"lora_alpha": 6, "use_rslora": rank_stabilized, **patterns}, tensors)
    edit = checkpoint.load_adapter(tmp_path, BASE)
    for layer, (rank, alpha) in settings.items():
        s = alpha / (np.sqrt(rank) if rank_stabilized else rank)
        got, wanted = edit[f"{layer}.weight"], s * products[layer]
        assert got.rank == rank
        np.testing.assert_allclose(value(got), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_pattern_ends_where_the_name_ends_and_begins_at_a_dot(tmp_path):
    # Neither the start of a name nor the end of a word of it is spoken of.
    patterns = {"layers.0": 7, "que": 7, "uery": 7, "ers.0.query": 7}
    tensors = query() | tensors_of("layers.0.query", *drawn(1, (2, 4), (6, 2)))
    put(tmp_path, {"rank_pattern": patterns, "alpha_pattern": patterns}, tensors)
    edit = checkpoint.load_adapter(tmp_path, BASE)
    for i, name in enumerate(("query.weight", "layers.0.query.weight")):
        a, b = drawn(i, (2, 4), (SHAPES[name][0], 2))
        np.testing.assert_array_equal(edit[name].left, b)
        np.testing.assert_array_equal(edit[name].right, a.T)


def test_a_pattern_that_matches_nothing_may_be_a_name(tmp_path):
    tensors = tensors_of("a+b", *drawn(0, (3, 4), (3, 3)))
    put(tmp_path, {"rank_pattern": {"a+b": 3}}, tensors)
    edit = checkpoint.load_adapter(tmp_path, {"a+b.weight": jnp.ones((3, 4))})
    assert edit["a+b.weight"].rank == 3


def test_patterns_speak_of_one_layer_each(tmp_path):
    ranks = {"layers.0.query.weight": 4, "layers.0.value.weight": 2, "query.weight": 3}
    checkpoint.save_adapter(tmp_path, edit_of(ranks | {"embed.weight": 4}))
    config = config_in(tmp_path)
    patterns = {r"^layers\.0\.value": 2, "^query": 3}
    assert config["rank_pattern"] == config["alpha_pattern"] == patterns
    assert config["r"] == config["lora_alpha"] == 4
    assert not config["use_rslora"]
    for layer in ("layers.0.query", "layers.0.value", "query", "embed"):
        assert re.fullmatch(config["target_modules"], layer)
    for layer in ("layers.1.query", "layers.0", "value", "layersx0xquery", "my.query"):
        assert not re.fullmatch(config["target_modules"], layer)
    loaded = checkpoint.load_adapter(tmp_path, BASE)
    assert {name: loaded[name].rank for name in ranks} == ranks


def test_names_are_no_patterns(tmp_path):
    shapes = {"a.b.weight": (3, 4), "axb.weight": (3, 4), "a+.weight": (3, 4), "(.weight": (3, 4)}
    edit = edit_of({name: i + 1 for i, name in enumerate(shapes)}, shapes=shapes)
    edit["axb.weight"] = edit["a+.weight"]
    checkpoint.save_adapter(tmp_path, edit)
    base = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    loaded = checkpoint.load_adapter(tmp_path, base)
    for name, x in edit.items():
        same(loaded[name], x)
    assert not re.fullmatch(config_in(tmp_path)["target_modules"], "aab")


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_weights_stored_as_in_out_are_transposed_and_embeddings_always(tmp_path, fan_in_fan_out):
    edit = edit_of({"query.weight": 2, "embed.weight": 2})
    checkpoint.save_adapter(
        tmp_path, edit, fan_in_fan_out=fan_in_fan_out, embeddings=["embed.weight"]
    )
    tensors = checkpoint.load(tmp_path / FACTORS)
    x, y = edit["query.weight"], edit["embed.weight"]
    inputs, outputs = (x.left, x.right) if fan_in_fan_out else (x.right, x.left)
    wanted = tensors_of("query", inputs.T, outputs) | embedding("embed", y.left.T, y.right)
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, wanted[name])
    assert config_in(tmp_path)["fan_in_fan_out"] == fan_in_fan_out
    same(checkpoint.load_adapter(tmp_path, BASE)["query.weight"], x)
    same(checkpoint.load_adapter(tmp_path, BASE)["embed.weight"], y)


def test_the_edit_is_added_to_the_base(tmp_path):
    put(tmp_path, {"lora_alpha": 3})
    base = {
        name: x
        for name, x in zip(SHAPES, drawn(7, *SHAPES.values()), strict=True)
        if name != "conv.weight"
    }
    edited = lowrank.apply(base, checkpoint.load_adapter(tmp_path, base))
    a, b = drawn(0, (2, 4), (3, 2))
    wanted = wide(base["query.weight"]) + 1.5 * wide(b) @ wide(a)
    np.testing.assert_allclose(edited["query.weight"], wanted, rtol=0, atol=1e-5)
    for name in base.keys() - {"query.weight"}:
        assert_close(edited[name], base[name], units=0)


def test_only_names_and_shapes_of_the_base_are_used(tmp_path):
    checkpoint.save_adapter(tmp_path, edit_of({"query.weight": 2}))
    half = {name: jnp.full(x.shape, jnp.nan, jnp.bfloat16) for name, x in BASE.items()}
    numpy = {name: np.zeros(x.shape, np.float64) for name, x in BASE.items()}
    wanted = checkpoint.load_adapter(tmp_path, BASE)
    for base in (half, numpy):
        for name, x in checkpoint.load_adapter(tmp_path, base).items():
            same(x, wanted[name])
    for name, x in wanted.items():
        matrix = lowrank.as_matrix(half[name]).shape
        assert x.shape == matrix
        assert x.left.dtype == x.right.dtype == jnp.float32


@pytest.mark.parametrize("ranks", [(2, 5, 1), (4, 4, 4)])
def test_a_sum_of_adapters_is_an_adapter(tmp_path, ranks):
    edits = []
    for i, rank in enumerate(ranks):
        put(tmp_path, {"r": rank, "lora_alpha": 3 - i}, query(rank))
        edits.append(checkpoint.load_adapter(tmp_path, BASE))
    total = lowrank.combine((1, -0.7, 0.3), edits)
    checkpoint.save_adapter(tmp_path / "sum", total)
    loaded = checkpoint.load_adapter(tmp_path / "sum", BASE)
    same(loaded["query.weight"], total["query.weight"])
    each = [value(x["query.weight"]) for x in edits]
    wanted = each[0] - 0.7 * each[1] + 0.3 * each[2]
    np.testing.assert_allclose(value(loaded["query.weight"]), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_factors_are_read_in_float32(tmp_path, dtype):
    tensors = {name: x.astype(dtype) for name, x in query().items()}
    put(tmp_path, tensors=tensors)
    x = checkpoint.load_adapter(tmp_path, BASE)["query.weight"]
    np.testing.assert_array_equal(x.left, wide(list(tensors.values())[1]))
    assert x.left.dtype == x.right.dtype == jnp.float32


def test_double_precision_comes_back_or_is_refused(tmp_path):
    edit = edit_of({"query.weight": 2}, dtype=FLOAT)
    checkpoint.save_adapter(tmp_path, edit)
    same(checkpoint.load_adapter(tmp_path, BASE)["query.weight"], edit["query.weight"])
    put(tmp_path, tensors={name: wide(x) for name, x in query().items()})
    if jax.config.jax_enable_x64:
        assert checkpoint.load_adapter(tmp_path, BASE)["query.weight"].left.dtype == jnp.float64
    else:
        with pytest.raises(ValueError, match=r"lora_[AB]\.weight' .* is float64.*jax_enable_x64"):
            checkpoint.load_adapter(tmp_path, BASE)


def test_zeros_are_left_out_and_nothing_else_dense_is_saved(tmp_path):
    edit = edit_of({"query.weight": 2, "embed.weight": 0}) | {
        "query.bias": jnp.zeros(3),
        "conv.weight": np.zeros((8, 4, 3, 3), np.float32),
        "stack.weight": LowRank(jnp.zeros((2, 3, 0)), jnp.zeros((2, 4, 0))),
        "scale": jnp.zeros(()),
    }
    checkpoint.save_adapter(tmp_path / "one", edit)
    assert sorted(checkpoint.load(tmp_path / "one" / FACTORS)) == sorted(query())
    loaded = checkpoint.load_adapter(tmp_path / "one", BASE)
    assert not vector({name: x for name, x in loaded.items() if name != "query.weight"}).size
    # What cancels in a sum is not zero entry by entry.
    for leaf in (jnp.array([1.0, -1.0]), jnp.array([-1.0, 0.0]), jnp.array([jnp.nan, 0.0])):
        with pytest.raises(ValueError, match=r"edit\['query\.bias'\] is dense and not zero"):
            checkpoint.save_adapter(tmp_path / "none", edit | {"query.bias": leaf})
    assert not (tmp_path / "none").exists()


ONE = edit_of({"query.weight": 1})["query.weight"]


def test_an_adapter_says_which_model_it_is_of(tmp_path):
    edit = {"query.weight": ONE}

    def said(name, **options):
        checkpoint.save_adapter(tmp_path / name, edit, **options)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        loaded = checkpoint.load_adapter(tmp_path / name, BASE)["query.weight"]
        assert_close(lowrank.materialize(loaded), lowrank.materialize(ONE), units=0)
        return config["base_model_name_or_path"], config["task_type"], len(config)

    assert said("none")[:2] == (None, None)
    assert said("hub", base="org/model", task_type="CAUSAL_LM")[:2] == ("org/model", "CAUSAL_LM")
    folder = tmp_path / "base"
    assert said("folder", base=folder)[:2] == (str(folder), None)
    assert said("task", task_type="SEQ_CLS") == (None, "SEQ_CLS", said("none")[2])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"base": {"query.weight": jnp.ones(2)}}, TypeError, "base must be the name or the folder"),
        ({"base": 3}, TypeError, "base must be the name or the folder .* got <class 'int'>"),
        ({"base": ""}, ValueError, "base is empty"),
        ({"task_type": "causal"}, ValueError, "task_type must be one of .*'CAUSAL_LM'.*'causal'"),
        ({"task_type": ""}, ValueError, "task_type must be one of"),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path, refuses, options, error, match
):
    with refuses(error, match=match):
        checkpoint.save_adapter(tmp_path / "adapter", {"query.weight": ONE}, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("edit", "error", "match"),
    [
        (3, TypeError, "edit must be a mapping from names"),
        ([ONE], TypeError, "edit must be a mapping from names"),
        ({1: ONE}, TypeError, "names of tensors are strings"),
        ({"x.weight": jnp.ones(2, jnp.int32)}, TypeError, r"x\.weight.* of edit has dtype int32"),
        ({"x.weight": None}, TypeError, r"edit\['x\.weight'\] is a .*None.*flat mapping"),
        ({"x.weight": 0.0}, TypeError, r"\['x\.weight'\] of edit is a .*float"),
        ({"x": {"weight": ONE}}, TypeError, "LowRank edit, not weights"),
        ({"x": {"weight": jnp.zeros(1)}}, TypeError, r"edit\['x'\] is a .*dict.*flat mapping"),
        ({"x.weight": jnp.ones((3, 4))}, ValueError, "dense and not zero.*lowrank.truncate"),
        (
            {"x.bias": jnp.ones(3)},
            ValueError,
            "x.bias.*vectors=False of lowrank.extract or lowrank",
        ),
        ({"x.scale": np.ones(())}, ValueError, "x.scale.*vectors=False of lowrank.extract or lowr"),
        (
            {"x.weight": LowRank(jnp.ones((2, 3, 1)), jnp.ones((2, 4, 1)))},
            ValueError,
            r"edit\['x\.weight'\] is of a stack of matrices \(2, 3, 4\).*a name of its own",
        ),
        ({"weight": ONE}, ValueError, "edit has 'weight'.*weights of layers"),
        ({"query.bias": ONE}, ValueError, "edit has 'query.bias'.*weights of layers"),
        ({".weight": ONE}, ValueError, "edit has '.weight'.*weights of layers"),
        ({}, ValueError, "edit is zero at every leaf: leave it unsaved"),
        (edit_of({"query.weight": 0}), ValueError, "edit is zero at every leaf"),
    ],
)
def test_what_no_adapter_holds_is_refused(tmp_path, refuses, edit, error, match):
    with refuses(error, match=match):
        checkpoint.save_adapter(tmp_path / "adapter", edit)
    assert not list(tmp_path.iterdir())


def test_factors_that_do_not_match_are_refused_by_name(tmp_path, refuses):
    def save(left, right):
        checkpoint.save_adapter(tmp_path, {"query.weight": LowRank(left, right)})

    with refuses(ValueError, match=r"edit\['query\.weight'\]: left \(3, 2\) and right \(4, 1\)"):
        save(jnp.ones((3, 2)), jnp.ones((4, 1)))
    with refuses(TypeError, match=r"edit\['query\.weight'\]: .*int32"):
        save(jnp.ones((3, 2), jnp.int32), jnp.ones((4, 2)))
    assert not list(tmp_path.iterdir())


def test_an_embedding_that_edit_lacks_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(
        ValueError, match=r"embeddings has a name 'embd' that edit lacks: .*'embed\.weight'"
    ):
        checkpoint.save_adapter(tmp_path, edit_of({"embed.weight": 2}), embeddings=["embd"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "gaussian", "task_type": "CAUSAL_LM", "lora_dropout": 0.1},
        {"init_lora_weights": False, "target_modules": ["value"], "megatron_core": "core"},
        {"init_lora_weights": True, "exclude_modules": ["x"], "layers_to_transform": [0]},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "peft_version": "0.9"},
        {"init_lora_weights": "orthogonal", "bias": None, "use_rslora": None},
        {"rank_pattern": None, "alpha_pattern": None, "loftq_config": {}, "fan_in_fan_out": None},
        {"of_a_later_version": None, "and_another": [], "use_dora": False, "third": ""},
    ],
)
def test_how_an_adapter_was_trained_changes_nothing(tmp_path, config):
    put(tmp_path, config)
    x = checkpoint.load_adapter(tmp_path, BASE)["query.weight"]
    a, b = drawn(0, (2, 4), (3, 2))
    np.testing.assert_array_equal(x.left, b)
    np.testing.assert_array_equal(x.right, a.T)


@pytest.mark.parametrize(
    ("field", "setting"),
    [
        ("peft_type", "IA3"),
        ("peft_type", ...),
        ("peft_type", ["LORA"]),
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["score"]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", 2),
        ("use_rslora", "false"),
        ("fan_in_fan_out", "no"),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["experts"]),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1]),
        ("kasa_config", {"beta": 1e-4}),
        ("ensure_weight_tying", True),
        ("of_a_later_version", 0.5),
    ],
)
def test_what_is_more_than_lora_is_refused_by_field(tmp_path, field, setting):
    put(tmp_path, {field: setting})
    with pytest.raises(ValueError, match=rf"adapter_config\.json has {field} .*merge_and_unload"):
        checkpoint.load_adapter(tmp_path, BASE)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"r": 0}, "has 0 in r or rank_pattern for layer 'query': it must be a positive integer"),
        ({"r": 2.0}, r"has 2\.0 in r .*positive integer"),
        ({"r": True}, "has True in r .*positive integer"),
        ({"r": ...}, "has None in r .*positive integer"),
        ({"lora_alpha": "16"}, "has '16' in lora_alpha or alpha_pattern .*finite number"),
        ({"lora_alpha": float("nan")}, "has nan in lora_alpha .*finite number"),
        ({"lora_alpha": 10**400}, "in lora_alpha .*finite number"),
        ({"lora_alpha": True}, "has True in lora_alpha .*finite number"),
        ({"lora_alpha": ...}, "has None in lora_alpha .*finite number"),
        ({"rank_pattern": {"query": 0}}, "has 0 in r or rank_pattern .*positive integer"),
        ({"alpha_pattern": {"query": []}}, r"has \[\] in lora_alpha .*finite number"),
        ({"alpha_pattern": ["query"]}, "alpha_pattern .*must map from patterns"),
        ({"rank_pattern": {"que(ry": 2}}, r"'que\(ry' .*is no regular expression"),
        ({"r": 3}, r"'query' .*shapes \(2, 4\) and \(3, 2\).*says rank 3"),
        ({"rank_pattern": {"query": 4}}, "says rank 4.*restore the two files"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, config, match):
    put(tmp_path, config)
    with pytest.raises(ValueError, match=match):
        checkpoint.load_adapter(tmp_path, BASE)


A, B = query().items()
OF_QUERY = r"of layer 'query', but a layer has either lora_A\.weight and lora_B\.weight or"
UNFIT = [
    ({}, r"adapter_model\.safetensors has no factors"),
    (dict([A]), rf"has lora_A\.weight {OF_QUERY}"),
    (dict([B]), rf"has lora_B\.weight {OF_QUERY}"),
    (
        query() | {"base_model.model.query.lora_embedding_A": jnp.ones((2, 3))},
        rf"has lora_A\.weight and lora_B\.weight and lora_embedding_A {OF_QUERY}",
    ),
    (
        query() | {"base_model.model.query.lora_magnitude_vector": jnp.ones(3)},
        r"a tensor 'base_model\.model\.query\.lora_magnitude_vector' that is no factor",
    ),
    (
        {A[0]: A[1], "base_model.model.query.lora_embedding_B": B[1]},
        rf"has lora_A\.weight and lora_embedding_B {OF_QUERY}",
    ),
    (
        {B[0]: B[1], "base_model.model.query.lora_embedding_A": A[1]},
        rf"has lora_B\.weight and lora_embedding_A {OF_QUERY}",
    ),
    ({"base_model.model.embed.base_layer.weight": jnp.ones((11, 4))}, "is no factor of LoRA"),
    ({"base_model.model.score.weight": jnp.ones((3, 4))}, "is no factor of LoRA"),
    ({"base_model.model.lora_A.weight": A[1]}, r"has lora_A\.weight of layer 'base_model\.model'"),
    ({"base_model.model.query.lora_A.weight.x": A[1]}, "is no factor of LoRA"),
    ({"base_model.model.query.lora_B.bias": jnp.ones(3)}, "is no factor of LoRA"),
    (
        tensors_of("conv", jnp.ones((2, 4, 3, 3)), jnp.ones((8, 2, 1, 1))),
        r"\(2, 4, 3, 3\) and \(8, 2, 1, 1\).*convolutions are not read",
    ),
    (tensors_of("stack", jnp.ones((2, 2, 4)), jnp.ones((2, 3, 2))), "says rank 2"),
    (tensors_of("query", jnp.ones((2, 4)), jnp.ones((3, 3))), r"\(2, 4\) and \(3, 3\).*rank 2"),
    (tensors_of("query", jnp.ones((3, 4)), jnp.ones((3, 2))), r"\(3, 4\) and \(3, 2\).*rank 2"),
    (tensors_of("query", jnp.ones(0), jnp.ones(0)), r"\(0,\) and \(0,\).*rank 2"),
    (
        tensors_of("query", jnp.ones((2, 5)), jnp.ones((3, 2))),
        r"edit of shape \(3, 5\), but base has 'query\.weight' of shape \(3, 4\)",
    ),
    (
        tensors_of("query", jnp.ones((2, 3)), jnp.ones((4, 2))),
        r"shape \(4, 3\), but base has 'query\.weight' of shape \(3, 4\).*fan_in_fan_out",
    ),
    (
        tensors_of("conv", jnp.ones((2, 4)), jnp.ones((8, 2))),
        r"shape \(8, 4\), but base has 'conv\.weight' of shape \(8, 4, 3, 3\)",
    ),
    (
        tensors_of("layer.0.query", jnp.ones((2, 4)), jnp.ones((6, 2))),
        r"of layer 'layer\.0\.query', .* base lacks: the nearest .*'layers\.0\.query\.weight'",
    ),
]


def renamed(tensors, change):
    return {change(name): x for name, x in tensors.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda x: f"{x}.default" if "embedding" in x else x.replace(".weight", ".default.weight"),
        lambda x: f"{x}.my_own" if "embedding" in x else x.replace(".weight", ".my_own.weight"),
        lambda x: x.removeprefix("base_model.model."),
        lambda x: f"base_model.model.{x}",
    ],
)
def test_names_with_an_adapter_or_other_prefixes_are_those_of_their_layers(tmp_path, change):
    tensors = query() | embedding("embed", *drawn(3, (2, 11), (4, 2)))
    wanted = checkpoint.load_adapter(put(tmp_path, tensors=tensors), BASE)
    found = checkpoint.load_adapter(put(tmp_path, tensors=renamed(tensors, change)), BASE)
    for name in BASE:
        same(found[name], wanted[name])


def test_two_adapters_in_a_file_are_refused_by_name(tmp_path):
    other = renamed(query(), lambda x: x.replace("_A.", "_A.two.").replace("_B.", "_B.two."))
    own = renamed(tensors_of("layers.0.value", *drawn(1, (2, 4), (4, 2))), lambda x: x)
    put(tmp_path, tensors=own | other)
    with pytest.raises(ValueError, match=r"several adapters, '', 'two': save one adapter"):
        checkpoint.load_adapter(tmp_path, BASE)
    put(tmp_path, tensors=query() | other)
    with pytest.raises(ValueError, match=r"has lora_A\.weight of layer 'query' twice"):
        checkpoint.load_adapter(tmp_path, BASE)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_copies_of_the_base_beside_the_factors_are_left_out_if_they_are_equal(tmp_path, dtype):
    (own,) = drawn(5, (11, 4), dtype=dtype)
    base = BASE | {"embed.weight": own}
    factors = embedding("embed", *drawn(3, (2, 11), (4, 2)))
    copies = {
        "base_model.model.embed.base_layer.weight": own.astype(jnp.float32),
        "base_model.model.lm_head.weight": own,  # tied, so that base has none
    }
    wanted = checkpoint.load_adapter(put(tmp_path, tensors=factors), base)
    found = checkpoint.load_adapter(put(tmp_path, tensors=factors | copies), base)
    same(found["embed.weight"], wanted["embed.weight"])
    with pytest.raises(ValueError, match=r"give base with its values"):
        checkpoint.load_adapter(tmp_path, BASE)
    for name, copy in copies.items():
        moved = copies | {name: copy.at[3, 2].add(1)}
        put(tmp_path, tensors=factors | moved)
        with pytest.raises(ValueError, match=r"is no factor of LoRA, (and differs|nor a copy)"):
            checkpoint.load_adapter(tmp_path, base)
    put(tmp_path, tensors=factors | {next(iter(copies)): jnp.ones((12, 4))})
    with pytest.raises(ValueError, match=r"'embed\.weight' of base, so it was trained"):
        checkpoint.load_adapter(tmp_path, base)


@pytest.mark.parametrize(("tensors", "match"), UNFIT)
def test_factors_that_do_not_fit_are_refused_by_layer(tmp_path, tensors, match):
    put(tmp_path, tensors=tensors)
    with pytest.raises(ValueError, match=match):
        checkpoint.load_adapter(tmp_path, BASE)


def test_a_base_that_is_no_mapping_of_weights_is_refused(tmp_path, refuses):
    put(tmp_path)
    with refuses(TypeError, match="base must be a mapping from names"):
        checkpoint.load_adapter(tmp_path, [jnp.ones((3, 4))])
    with refuses(TypeError, match=r"\['query\.weight'\] of base has dtype int32"):
        checkpoint.load_adapter(tmp_path, {"query.weight": jnp.ones((3, 4), jnp.int32)})
    with refuses(TypeError, match=r"base\['query'\] is a .*dict.*flat mapping"):
        checkpoint.load_adapter(tmp_path, {"query": {"weight": jnp.ones((3, 4))}})
    with pytest.raises(ValueError, match="base lacks: it has none like it"):
        checkpoint.load_adapter(tmp_path, {})


def test_missing_and_broken_files_are_named(tmp_path):
    def load(error, match):
        with pytest.raises(error, match=match):
            checkpoint.load_adapter(tmp_path, BASE)

    load(FileNotFoundError, r"there is no file .*adapter_config\.json")
    put(tmp_path)
    whole = (tmp_path / FACTORS).read_bytes()
    (tmp_path / FACTORS).write_bytes(whole[:-1])
    load(ValueError, r"adapter_model\.safetensors is truncated")
    (tmp_path / FACTORS).unlink()
    load(FileNotFoundError, r"there is no file .*adapter_model\.safetensors")
    put(tmp_path)
    for text in (b"", b'{"r": 2', b"\xff\xfe", b"[" * 200_000):
        (tmp_path / "adapter_config.json").write_bytes(text)
        load(ValueError, r"adapter_config\.json is no JSON .*copy or download it again")
    for text in (b"[1]", b"null", b'"LORA"'):
        (tmp_path / "adapter_config.json").write_bytes(text)
        load(ValueError, r"adapter_config\.json holds a .*a configuration maps from fields")
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").mkdir()
    load(ValueError, r"adapter_config\.json is a folder")


def test_a_pickle_is_never_opened(tmp_path):
    put(tmp_path)
    (tmp_path / PICKLE).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    # Beside the tensors it is ignored, and in their place refused with the way out.
    assert checkpoint.load_adapter(tmp_path, BASE)["query.weight"].rank == 2
    (tmp_path / FACTORS).unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle.*save_pretrained"):
        checkpoint.load_adapter(tmp_path, BASE)


@pytest.mark.parametrize("where", ["file", "file/adapter", "none/adapter"])
def test_where_no_folder_can_be_nothing_is_left(tmp_path, where):
    (tmp_path / "file").write_bytes(b"as it was")
    with pytest.raises(OSError, match=r"cannot write .*give a path in a folder that exists"):
        checkpoint.save_adapter(tmp_path / where, {"query.weight": ONE})
    assert [x.name for x in tmp_path.rglob("*")] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"as it was"


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("there", [False, True])
def test_a_failure_while_writing_leaves_the_folder_as_it_was(tmp_path, monkeypatch, failing, there):
    folder, edit = tmp_path / "adapter", edit_of({"query.weight": 2})
    if there:
        checkpoint.save_adapter(folder, edit)
    calls = []

    def full(_):
        calls.append(1)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*adapter_.* \(No space left"):
        checkpoint.save_adapter(folder, edit_of({"query.weight": 1, "embed.weight": 3}))
    assert folder.exists() == there
    if there:
        assert sorted(os.listdir(folder)) == ["adapter_config.json", FACTORS]
        loaded = checkpoint.load_adapter(folder, BASE)
        same(loaded["query.weight"], edit["query.weight"])


def test_an_adapter_is_replaced_whole_and_nothing_else(tmp_path):
    checkpoint.save_adapter(tmp_path, edit_of({"query.weight": 2, "embed.weight": 3}))
    (tmp_path / "README.md").write_text("of another")
    checkpoint.save_adapter(tmp_path, edit_of({"query.weight": 1}))
    ranks = {name: x.rank for name, x in checkpoint.load_adapter(tmp_path, BASE).items()}
    assert ranks == dict.fromkeys(BASE, 0) | {"query.weight": 1}
    assert (tmp_path / "README.md").read_text() == "of another"
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert checkpoint.load_adapter(str(tmp_path / "copy"), BASE)["query.weight"].rank == 1
