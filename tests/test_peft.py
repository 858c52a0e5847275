"""Laws of `wspace.checkpoint.adapter` against PEFT itself, where that is installed."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from wspace import checkpoint, lowrank
from wspace.lowrank import LowRank

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

UNIT = float(np.finfo(np.float32).eps)
# Whatever PEFT and torch warn of is theirs, and much of it depends on their versions.
pytestmark = pytest.mark.filterwarnings("ignore")
EVERY = r"(.*\.)?query|block\.value|embed"
FAN = pytest.mark.parametrize("fan_in_fan_out", [False, True])


def model(fan_in_fan_out=False, seed=0):
    """A model with two layers called query, one square, an embedding and a norm."""
    torch.manual_seed(seed)

    def layer(inputs, outputs):
        return Conv1D(outputs, inputs) if fan_in_fan_out else torch.nn.Linear(inputs, outputs)

    block = torch.nn.ModuleDict({"query": layer(8, 12), "value": layer(8, 8)})
    return torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(11, 8),
            "query": layer(8, 6),
            "block": block,
            "norm": torch.nn.LayerNorm(6),
        }
    )


def weights_of(net):
    return {name: jnp.asarray(x.detach().float().numpy()) for name, x in net.state_dict().items()}


def wide(x):
    return np.asarray(x, np.float64)


def trained(net, *, seed=1, name="default", **options):
    """An adapter of PEFT with factors drawn at random, as if it were trained."""
    options = {"r": 3, "lora_alpha": 8, "target_modules": ["query"], **options}
    adapted = peft.get_peft_model(net, peft.LoraConfig(**options), adapter_name=name)
    return drawn(adapted, seed)


def drawn(adapted, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter, x in adapted.named_parameters():
        if "lora_" in parameter:
            x.data = torch.randn(x.shape, generator=generator).to(x.dtype)
    return adapted


def merged(adapted):
    return weights_of(adapted.merge_and_unload())


def assert_merged(got, wanted, base, edit, units=16):
    """Asserts that weights agree to roundings of what was added up."""
    assert got.keys() == wanted.keys()
    for name, x in got.items():
        added = edit[name]
        size = np.abs(wide(base[name])).max(initial=0)
        size += (np.abs(wide(added.left)) @ np.abs(wide(added.right)).T).max(initial=0)
        np.testing.assert_allclose(x, wanted[name], rtol=0, atol=units * UNIT * size, err_msg=name)


@FAN
@pytest.mark.parametrize(
    "options",
    [
        {"r": 2, "lora_alpha": 3},
        {"r": 3, "lora_alpha": 5, "use_rslora": True},
        {
            "r": 2,
            "lora_alpha": 16,
            "rank_pattern": {"^embed": 3, "block.query": 5, "query": 4},
            "alpha_pattern": {"^query": 1, "val.*": 7.5},
        },
        {
            "r": 4,
            "lora_alpha": 4,
            "use_rslora": True,
            "rank_pattern": {"lock.query": 5, "value": 1},
            "alpha_pattern": {"block": 9, "query": 2},
        },
    ],
)
def test_what_peft_saved_adds_what_it_merges(tmp_path, fan_in_fan_out, options):
    net = model(fan_in_fan_out)
    base = weights_of(net)
    adapted = trained(net, target_modules=EVERY, fan_in_fan_out=fan_in_fan_out, **options)
    adapted.save_pretrained(tmp_path)
    edit = checkpoint.load_adapter(tmp_path, base)
    edited = {name for name, x in edit.items() if x.rank}
    assert edited == {"embed.weight", "query.weight", "block.query.weight", "block.value.weight"}
    assert_merged(lowrank.apply(base, edit), merged(adapted), base, edit)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_merged_to_its_rounding(tmp_path, dtype):
    net = model().to(getattr(torch, dtype))
    base = weights_of(net)
    adapted = trained(net)
    adapted.save_pretrained(tmp_path)
    edit = checkpoint.load_adapter(tmp_path, base)
    unit = float(jnp.finfo(dtype).eps) / UNIT
    assert_merged(lowrank.apply(base, edit), merged(adapted), base, edit, units=2 * unit)


def factors(seed, shape, rank):
    rng = np.random.default_rng(seed)
    return LowRank(*(jnp.asarray(rng.normal(size=(n, rank)), jnp.float32) for n in shape))


@FAN
@pytest.mark.parametrize(
    "ranks",
    [
        {"query.weight": 2},
        {"block.query.weight": 2},
        {
            "embed.weight": 3,
            "query.weight": 5,
            "block.query.weight": 2,
            "block.value.weight": 2,
        },
    ],
)
def test_what_was_saved_peft_merges(tmp_path, fan_in_fan_out, ranks):
    net = model(fan_in_fan_out)
    base = weights_of(net)
    edit = {name: factors(i, base[name].shape, r) for i, (name, r) in enumerate(ranks.items())}
    embeddings = ["embed.weight"] if "embed.weight" in edit else []
    checkpoint.save_adapter(tmp_path, edit, fan_in_fan_out=fan_in_fan_out, embeddings=embeddings)
    with warnings.catch_warnings():
        # PEFT warns of keys that are missing or unexpected, and of patterns that match nothing.
        warnings.filterwarnings("error", message=".*(missing|unexpected|did not match).*")
        adapted = peft.PeftModel.from_pretrained(net, tmp_path)
    loaded = checkpoint.load_adapter(tmp_path, base)
    for name, x in loaded.items():
        assert x.rank == ranks.get(name, 0)
    assert_merged(lowrank.apply(base, loaded), merged(adapted), base, loaded)


def test_peft_saves_again_what_was_saved(tmp_path):
    net = model()
    base = weights_of(net)
    ranks = {"embed.weight": 2, "query.weight": 5, "block.value.weight": 2}
    edit = {name: factors(i, base[name].shape, r) for i, (name, r) in enumerate(ranks.items())}
    checkpoint.save_adapter(tmp_path / "ours", edit, embeddings=["embed.weight"])
    peft.PeftModel.from_pretrained(net, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (checkpoint.load_adapter(tmp_path / x, base) for x in ("ours", "theirs"))
    for name, x in ours.items():
        np.testing.assert_array_equal(x.left, theirs[name].left)
        np.testing.assert_array_equal(x.right, theirs[name].right)


def test_an_embedding_must_be_named(tmp_path):
    net = model()
    edit = {"embed.weight": factors(0, (11, 8), 2)}
    checkpoint.save_adapter(tmp_path, edit)
    base = weights_of(net)
    adapted = peft.PeftModel.from_pretrained(net, tmp_path)
    # PEFT finds no factors by the names that it looks for, and merges what it started with.
    gap = np.abs(wide(merged(adapted)["embed.weight"]) - wide(base["embed.weight"])).max()
    assert gap < 0.1 * np.abs(wide(edit["embed.weight"].left @ edit["embed.weight"].right.T)).max()


def several(tmp_path, ranks, targets=("query", "embed")):
    """One model with adapters of these ranks, their edits, and the weights of the model."""
    base, edits = weights_of(model()), []
    adapted = None
    for i, rank in enumerate(ranks):
        options = {"r": rank, "lora_alpha": 3 + i, "target_modules": list(targets)}
        config = peft.LoraConfig(init_lora_weights=False, **options)
        if adapted is None:
            adapted = peft.get_peft_model(model(), config, adapter_name=str(i))
        else:
            adapted.add_adapter(str(i), config)
    drawn(adapted, 2)
    adapted.save_pretrained(tmp_path)
    edits = [checkpoint.load_adapter(tmp_path / str(i), base) for i in range(len(ranks))]
    return adapted, edits, base


def combined_by_peft(adapted, weights, combination):
    adapters = [str(i) for i in range(len(weights))]
    adapted.add_weighted_adapter(adapters, list(weights), "sum", combination_type=combination)
    adapted.set_adapter("sum")
    return merged(adapted)


def exact_sum(weights, edits):
    return {
        name: sum(
            w * wide(x[name].left) @ wide(x[name].right).T
            for w, x in zip(weights, edits, strict=True)
        )
        for name in ("query.weight", "block.query.weight", "embed.weight")
    }


def off(got, base, exact):
    """How far an edited model is from the exact sum of edits, relative to that sum."""
    gaps = [np.linalg.norm(wide(got[name]) - wide(base[name]) - x) for name, x in exact.items()]
    return np.linalg.norm(gaps) / np.linalg.norm([np.linalg.norm(x) for x in exact.values()])


def test_a_sum_is_exact_and_that_of_cat(tmp_path):
    weights = (1.0, -0.7, 0.3)
    adapted, edits, base = several(tmp_path, (2, 5, 9))
    total = lowrank.combine(weights, edits)
    exact = exact_sum(weights, edits)
    assert all(total[name].rank == 16 for name in exact)
    edited = lowrank.apply(base, total)
    assert off(edited, base, exact) <= 16 * UNIT
    assert_merged(edited, combined_by_peft(adapted, weights, "cat"), base, total, units=32)

    checkpoint.save_adapter(tmp_path / "sum", total, embeddings=["embed.weight"])
    ours = merged(peft.PeftModel.from_pretrained(model(), tmp_path / "sum"))
    assert_merged(ours, edited, base, total, units=32)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, -0.7)])
def test_the_linear_combination_of_peft_is_no_sum(tmp_path, weights):
    adapted, edits, base = several(tmp_path, (4, 4))
    exact = exact_sum(weights, edits)
    theirs = off(combined_by_peft(adapted, weights, "linear"), base, exact)
    ours = off(lowrank.apply(base, lowrank.combine(weights, edits)), base, exact)
    print(
        f"PEFT {peft.__version__}, weights {weights}: linear off by {theirs:.2f} of the sum, ",
        end="",
    )
    print(f"lowrank.combine by {ours:.1e}")
    assert theirs > 0.1
    assert ours <= 16 * UNIT


def test_norms_of_a_loaded_edit_are_those_of_what_peft_adds(tmp_path):
    adapted, (edit,), base = several(tmp_path, (3,))
    after = merged(adapted)
    added = [np.linalg.norm(wide(after[name]) - wide(base[name])) for name in base]
    np.testing.assert_allclose(lowrank.norm(edit), np.linalg.norm(added), rtol=64 * UNIT)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, "has use_dora True"),
        ({"bias": "all"}, "has bias 'all'"),
        ({"modules_to_save": ["norm"]}, r"has modules_to_save \['norm'\]"),
        ({"lora_bias": True}, "has lora_bias True"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa'"),
        ({"init_lora_weights": "olora"}, "has init_lora_weights 'olora'"),
        ({"exclude_modules": ["block.query"]}, None),
        ({"init_lora_weights": "gaussian"}, None),
        ({"init_lora_weights": "orthogonal", "r": 2}, None),
        ({"init_lora_weights": "mica"}, None),
    ],
)
def test_what_peft_saves_is_read_or_refused_by_field(tmp_path, options, match):
    net = model()
    base = weights_of(net)
    adapted = trained(net, **options)
    adapted.save_pretrained(tmp_path)
    if match is None:
        edit = checkpoint.load_adapter(tmp_path, base)
        assert_merged(lowrank.apply(base, edit), merged(adapted), base, edit)
    else:
        with pytest.raises(ValueError, match=match):
            checkpoint.load_adapter(tmp_path, base)


def test_other_methods_of_peft_are_refused(tmp_path):
    net = model()
    config = peft.IA3Config(target_modules=["query"], feedforward_modules=[])
    peft.get_peft_model(net, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has peft_type 'IA3'"):
        checkpoint.load_adapter(tmp_path, weights_of(model()))


def test_the_way_out_of_a_pickle_works(tmp_path):
    net = model()
    base = weights_of(net)
    adapted = trained(net)
    adapted.save_pretrained(tmp_path, safe_serialization=False)
    if (tmp_path / "adapter_model.safetensors").exists():
        # A version that writes no pickles may still read them.
        state = peft.get_peft_model_state_dict(adapted)
        torch.save(state, tmp_path / "adapter_model.bin")
        (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is a pickle.*save_pretrained\(folder\)"):
        checkpoint.load_adapter(tmp_path, base)
    peft.PeftModel.from_pretrained(model(), tmp_path).save_pretrained(tmp_path)
    edit = checkpoint.load_adapter(tmp_path, base)
    assert_merged(lowrank.apply(base, edit), merged(adapted), base, edit)
