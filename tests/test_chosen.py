"""Which tensors are combined, carried over, left out or refused, in Python and in every command."""

import json
import pathlib
import re
import shutil
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from wspace import average, checkpoint, tree
from wspace.__main__ import main
from wspace._cli import progress

RNG = np.random.default_rng(5)
W = [RNG.normal(size=(4, 3)).astype(np.float32) for _ in range(2)]


def saved(path, tensors):
    with checkpoint.create(path, tensors, force=True) as writer:
        for name, array in tensors.items():
            writer.write(name, np.asarray(array))
    return checkpoint.open(path)


def read(path):
    with checkpoint.open(path) as opened:
        return {name: np.array(x.read()) for name, x in opened.items()}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(a, c, weights=True):
    """Two models with weights that all have, and what else is given."""
    for name, w, own in (("a", W[0], a), ("c", W[1], c)):
        saved(pathlib.Path(name), ({"q.weight": w} if weights else {}) | own)


def run(words):
    try:
        return main(words.split())
    except SystemExit as stop:
        return stop.code


COMMANDS = {
    "merge": "merge linear a c -o out",
    "steer": "steer repel a --avoid c --strength 0.5 -o out",
    "distance": "distance a c --quiet",
    "audit": "audit a c --avoid a --radius 1",
    "extract": "extract a c --rank 1 -o out",
    "offset": "offset a --target c --rank 1 -o out",
}

IDS = {"ids": np.arange(7)}
OTHERS = {
    "a buffer of one model": (IDS, {}, "a has a tensor 'ids' that c lacks"),
    "a buffer of the other": ({}, IDS, "c has a tensor 'ids' that a lacks"),
    "integers that differ": (IDS, {"ids": np.arange(7) + 1}, "'ids' is of int64.* differs"),
    "integers of two lengths": (IDS, {"ids": np.arange(9).reshape(3, 3)}, "'ids' is of int64"),
    "a dtype that is no weight": (IDS, {"ids": np.ones(7, np.float32)}, "only weights are merged"),
    "heads of two shapes": (
        {"ids": np.ones((2, 3), np.float32)},
        {"ids": np.ones((2, 4), np.float32)},
        r"'ids' has shape \(2, 3\) in a and \(2, 4\) in c",
    ),
    "complex numbers that differ": (
        {"ids": np.exp(1j * np.arange(3)).astype(np.complex64)},
        {"ids": np.exp(2j * np.arange(3)).astype(np.complex64)},
        "'ids' is of complex64.* differs",
    ),
    "codes": (
        {"ids": np.ones(3, ml_dtypes.float8_e4m3fn)},
        {"ids": np.ones(3, ml_dtypes.float8_e4m3fn)},
        "'ids' of a is float8_e4m3fn, .*convert it",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("command", ["merge", "distance"])
def test_what_differs_is_refused_with_the_options_that_let_it_pass(kind, command, capsys):
    a, c, message = OTHERS[kind]
    put(a, c)
    assert run(COMMANDS[command]) == 1
    told = capsys.readouterr().err
    assert "--carry" in told
    assert "--skip" in told
    assert re.search(message, told), told
    for option in ("carry", "skip"):
        assert run(f"{COMMANDS[command]} --{option} id*") == 0
        if command == "merge":
            found = read("out")
            assert sorted(found) == (["ids"] * (option == "carry" and bool(a)) + ["q.weight"])
            np.testing.assert_allclose(found["q.weight"], (W[0] + W[1]) / 2, rtol=1e-6)
            if "ids" in found:
                assert found["ids"].tobytes() == np.asarray(a["ids"]).tobytes()
                said = json.loads(pathlib.Path("out/wspace.json").read_text())
                assert said["recipe"]["carry"] == ["id*"]
            shutil.rmtree("out")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_the_same_options(command, capsys):
    put({"bn.running_var": np.ones(2, np.float32), "head": np.ones((2, 2), np.float32)}, {})
    assert run(COMMANDS[command]) == 1
    assert "--common-tensors" in capsys.readouterr().err
    for option in ("--common-tensors", "--carry bn.* head", "--skip bn.running_var --skip head"):
        assert run(f"{COMMANDS[command]} {option}") == 0, capsys.readouterr().err
        if pathlib.Path("out").exists():
            shutil.rmtree("out")
    assert run(f"{COMMANDS[command]} --common-tensors --carry nothing.*") == 1
    assert "carry has 'nothing.*', which is the name of no tensor" in capsys.readouterr().err


def test_a_carried_tensor_has_no_part_in_a_measure(capsys):
    put({"bn.mean": np.full(2, 3.0, np.float32)}, {"bn.mean": np.full(2, 9.0, np.float32)})
    assert run("distance a c --json --quiet --carry bn.*") == 0
    said = json.loads(capsys.readouterr().out)
    wanted = np.linalg.norm((W[0] - W[1]).astype(float))
    assert said["distances"][0][1] == pytest.approx(wanted, rel=1e-6)
    assert list(said["tensors"]) == ["q.weight"]


def test_common_tensors_keeps_the_others_of_the_model_that_the_output_is_like():
    put({"own": np.full(2, 4.0, np.float32)}, {"other": np.ones(3, np.float32)})
    assert run("merge linear a c -o out --common-tensors") == 0
    found = read("out")
    assert sorted(found) == ["own", "q.weight"]
    assert found["own"].tolist() == [4, 4]


def test_each_of_several_outputs_keeps_what_is_its_own():
    put({"own": np.full(2, 4.0, np.float32)}, {"other": np.ones(3, np.float32)})
    saved(pathlib.Path("p"), {"q.weight": W[0] * 0})
    assert run("steer exit a c --avoid p --radius 30 -o moved --common-tensors") == 0
    assert sorted(read("moved/a")) == ["own", "q.weight"]
    assert sorted(read("moved/c")) == ["other", "q.weight"]


def test_a_recipe_says_the_same(folder):
    put(IDS | {"bn.var": np.ones(2, np.float32)}, {"bn.var": np.full(2, 3.0, np.float32)})
    (folder / "r.toml").write_text(
        'method = "linear"\nmodels = ["a", "c"]\ncarry = ["bn.*"]\nskip = ["ids"]\n'
    )
    assert run("merge --recipe r.toml -o out") == 0
    found = read("out")
    assert sorted(found) == ["bn.var", "q.weight"]
    assert found["bn.var"].tolist() == [1, 1]
    (folder / "r.toml").write_text(
        'method = "linear"\nmodels = ["a", "c"]\ncommon_tensors = true\n'
    )
    assert run("merge --recipe r.toml -o both --carry bn.*") == 0
    assert sorted(read("both")) == ["bn.var", "ids", "q.weight"]
    for text in ('carry = "bn.*"', "skip = [1]", "common_tensors = 1"):
        (folder / "r.toml").write_text(f'method = "linear"\nmodels = ["a", "c"]\n{text}\n')
        assert run("merge --recipe r.toml -o three") == 2


def test_counters_of_steps_are_kept_and_it_is_said(capsys):
    put({"n": np.array(100)}, {"n": np.array(117)})
    assert run("merge linear a c -o out") == 0
    assert read("out")["n"] == 100
    assert "'n', one integer, differs" in capsys.readouterr().err
    assert run("distance a c --quiet") == run("audit a c --avoid a --radius 1") == 0


def test_complex_tables_that_are_equal_are_carried_whole():
    table = {"freqs": np.exp(1j * np.arange(5)).astype(np.complex64)}
    put(table, table)
    assert run("merge linear a c -o out") == run("distance a c --quiet") == 0
    assert read("out")["freqs"].tobytes() == table["freqs"].tobytes()


def test_a_tied_head_is_named_and_not_left_behind(capsys):
    put({"head": W[0]}, {})
    assert run("merge linear a c -o out") == 1
    assert "it has the values of 'q.weight', as a tied head has" in capsys.readouterr().err
    assert run("merge linear a c -o out --common-tensors") == 1
    told = capsys.readouterr().err
    assert "--skip head" in told
    assert "--carry head" in told
    assert run("distance a c --quiet --common-tensors") == 0
    assert run("merge linear a c -o out --skip head") == 0
    assert sorted(read("out")) == ["q.weight"]


FACTORS = [
    "base_model.model.q.lora_A.weight",
    "base_model.model.q.lora_B.default.weight",
    "base_model.model.wte.lora_embedding_A",
    "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
    "unet.up_blocks.0.attn1.processor.to_q_lora.down.weight",
    "unet.down_blocks.0.to_q.lora.up.weight",
    "text_encoder.q_proj.lora_linear_layer.down.weight",
    "lycoris_blocks_0_attn.hada_w1_a",
    "lora_unet_mid.lokr_w2_b",
    "lora_unet_mid.lokr_w1",
    "lycoris_blocks_0.oft_blocks",
    "base_model.model.q.ia3_l.weight",
    "lora_unet_mid.dora_scale",
]


@pytest.mark.parametrize("name", FACTORS)
def test_factors_of_adapters_are_no_models(name, capsys):
    put({name: W[0]}, {name: W[1]}, weights=False)
    assert run(COMMANDS["merge"]) == 1
    told = capsys.readouterr().err
    assert repr(name) in told
    assert "adapter" in told
    assert ("load_adapter" in told) == ("lora_A" in name or "lora_B" in name or "emb" in name)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_an_adapter(command, capsys):
    put({FACTORS[0]: W[0]}, {FACTORS[0]: W[1]}, weights=False)
    assert run(COMMANDS[command]) == 1
    assert "is a factor of an adapter" in capsys.readouterr().err


def test_a_folder_that_says_it_is_an_adapter_is_no_model(folder, capsys):
    for name in ("a", "c"):
        (folder / name).mkdir()
        saved(folder / name / "adapter_model.safetensors", {"prompt_embeddings": W[0]})
        (folder / name / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    assert run(COMMANDS["merge"]) == 1
    assert "is of an adapter" in capsys.readouterr().err


def test_a_model_with_an_adapter_is_no_path(folder, capsys):
    put({}, {})
    (folder / "r.yml").write_text(
        "merge_method: linear\nmodels:\n  - model: a+lora\n    parameters: {weight: 1}\n"
        "  - model: c\n    parameters: {weight: 1}\n"
    )
    for words in ("--recipe r.yml", "linear a+lora c"):
        assert run(f"merge {words} -o out") == 2
        assert "load_adapter('lora', base)" in capsys.readouterr().err


def test_names_of_weights_that_look_like_factors_are_weights():
    names = ["q_a_proj", "rwkv.w_lora.lora.0", "flora.weight", "explora_bias", "model.scale"]
    put(dict.fromkeys(names, W[0]), dict.fromkeys(names, W[1]))
    assert run(COMMANDS["merge"]) == 0


I8, U8, I32, F = (np.ones((2, 2), x) for x in (np.int8, np.uint8, np.int32, np.float16))
QUANTIZED = {
    "bitsandbytes (8 bits)": {"q.weight": I8, "q.SCB": F},
    "bitsandbytes (4 bits)": {"q.weight": U8, "q.weight.absmax": F, "q.weight.quant_map": F},
    "GPTQ": {"q.qweight": I32, "q.qzeros": I32, "q.scales": F, "q.g_idx": I32},
    "AWQ": {"q.qweight": I32, "q.qzeros": I32, "q.scales": F},
    "compressed-tensors": {"q.weight_packed": I32, "q.weight_scale": F},
    "MXFP4": {"experts_blocks": U8, "experts_scales": U8},
    "MLX": {"q.weight": I32.astype(np.uint32), "q.scales": F, "q.biases": F},
    "scales": {"q.weight": F.astype(ml_dtypes.float8_e4m3fn), "q.weight_scale_inv": F},
}


@pytest.mark.parametrize("system", QUANTIZED)
def test_codes_of_quantized_weights_are_named_as_such(system, capsys):
    put(QUANTIZED[system], QUANTIZED[system], weights=False)
    name = next(iter(QUANTIZED[system]))
    for command in ("merge", "distance"):
        assert run(COMMANDS[command]) == 1
        told = capsys.readouterr().err
        assert repr(name) in told
        assert system in told
        assert "dequantize" in told


def test_stream_takes_the_same_options(folder):
    put(IDS | {"bn.var": np.ones(2, np.float32)}, {"bn.var": np.full(2, 3.0, np.float32)})
    sources = [checkpoint.open("a"), checkpoint.open("c")]
    seen = []

    def mean(points):
        seen.extend(map(list, points))
        return average.mean(points)

    for lazy in (True, False):
        with checkpoint.create(folder / f"{lazy}", sources[0].without(["ids"])) as writer:
            checkpoint.stream(mean, sources, writer, lazy=lazy, carry=["bn.*"], skip=["ids"])
        found = read(folder / f"{lazy}")
        assert sorted(found) == ["bn.var", "q.weight"]
        assert found["bn.var"].tolist() == [1, 1]
    assert set(map(tuple, seen)) == {("q.weight",)}
    with checkpoint.create(folder / "common", sources[0]) as writer:
        checkpoint.stream(average.mean, sources, writer, common_tensors=True)
    assert sorted(read(folder / "common")) == ["bn.var", "ids", "q.weight"]
    for wrong, error in ((["x"], ValueError), ("bn.*", TypeError)):
        with (
            pytest.raises(error, match="carry"),
            checkpoint.create(folder / "wrong", sources[0]) as writer,
        ):
            checkpoint.stream(average.mean, sources, writer, carry=wrong)


def test_carried_tensors_may_have_other_rows():
    put({"e": np.ones((3, 2), np.float32)}, {"e": np.ones((5, 2), np.float32)})
    assert run("merge linear a c -o out --carry e") == 0
    assert read("out")["e"].shape == (3, 2)


NOTED = {
    "task_arithmetic c --base a --coefficients -1": True,
    "task_arithmetic c --base a --coefficients 0.5": False,
    "task_arithmetic c c --base a": True,
    "task_arithmetic c c --base a --normalize": False,
    "linear a c --coefficients 1.5 -0.5": True,
    "linear a c": False,
    "lerp a c --t 1.5": True,
    "negmerge c --base a": True,
    "task_arithmetic c --base a --scale -1": True,
}


@pytest.mark.parametrize("words", NOTED)
def test_it_is_said_once_that_variances_are_subtracted(words, capsys):
    names = ("bn1.running_var", "bn2.running_var", "bn.moving_variance")
    put(*({name: np.ones(2, np.float32) for name in names} for _ in range(2)))
    assert run(f"merge {words} -o out") == 0
    told = capsys.readouterr().err
    assert told.count("variances") == NOTED[words]
    if NOTED[words]:
        assert "--carry '*running_var'" in told
    assert run(f"merge {words} -o out2 --carry *running_var *.moving_variance") == 0
    assert "variances" not in capsys.readouterr().err


def test_one_shard_of_several_is_no_model(folder, capsys):
    for name in ("a", "c"):
        (folder / name).mkdir()
        saved(folder / name / "model-00001-of-00003.safetensors", {"w": W[0]})
    assert run("merge linear a c -o out") == 1
    assert "a has 1 of the 3 files" in capsys.readouterr().err
    shard = "model-00001-of-00003.safetensors"
    assert run(f"distance a/{shard} c/{shard}") == 1
    assert "is one of the 3 files of a model" in capsys.readouterr().err
    assert run(f"inspect a/{shard}") == 0
    one = folder / "one"
    one.mkdir()
    saved(one / "model-00001-of-000001.safetensors", {"w": W[0]})
    assert list(checkpoint.load(one)) == ["w"]


def test_entries_that_become_infinite_are_refused_and_counted(capsys):
    put({"h": np.full(4, 30000, np.float16)}, {"h": np.full(4, 60000, np.float16)})
    words = "merge task_arithmetic c --base a --coefficients 2"
    assert run(f"{words} -o out") == 1
    told = capsys.readouterr().err
    assert "4 of 'h'" in told
    assert "--allow-nonfinite" in told
    assert sorted(x.name for x in pathlib.Path().iterdir()) == ["a", "c"]
    assert run(f"{words} -o out --allow-nonfinite") == 0
    assert "of 'h' that are infinite or NaN: 4, of which 0 are" in capsys.readouterr().err
    said = json.loads(pathlib.Path("out/wspace.json").read_text())
    assert said["nonfinite"] == {"h": {"made": 4, "given": 0}}


def test_entries_of_a_model_that_are_not_finite_are_let_pass_and_counted(capsys):
    h = np.array([1, np.nan, np.inf, 2], np.float16)
    put(
        {"h": h, "mask": np.full(3, -np.inf, np.float32)},
        {"h": np.ones(4, np.float16)} | {"mask": np.zeros(3, np.float32)},
    )
    assert run("merge linear a c -o out --carry mask") == 0
    told = capsys.readouterr().err
    assert "of 'h' that are infinite or NaN: 2, of which 2 are so in a model" in told
    assert "of 'mask' that are infinite or NaN: 3" in told
    said = json.loads(pathlib.Path("out/wspace.json").read_text())
    assert said["nonfinite"]["h"] == {"made": 0, "given": 2}


@pytest.mark.parametrize("start", ["", "--recipe r.yml"])
def test_slerp_of_mergekit_goes_straight_where_ends_are_in_line(folder, start, capsys):
    gate, near = np.array([0.8], np.float32), W[0] + 0.01 * W[1]
    put(
        {"gate": gate, "near": W[0], "back": W[0]}, {"gate": -gate / 2, "near": near, "back": -near}
    )
    (folder / "r.yml").write_text(
        "merge_method: slerp\nbase_model: a\nmodels:\n  - model: a\n  - model: c\n"
        "parameters: {t: 0.25}\n"
    )
    words = start or "slerp a c --t 0.25 --preset mergekit-0.1.5"
    assert run(f"merge {words} -o out") == 0
    found = read("out")
    for name, x, y in (("gate", gate, -gate / 2), ("near", W[0], near), ("back", W[0], -near)):
        np.testing.assert_allclose(found[name], 0.75 * x + 0.25 * y, rtol=1e-5, atol=1e-7)
    x, y = (w.astype(float).ravel() for w in W)
    angle = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    arc = (np.sin(0.75 * angle) * x + np.sin(0.25 * angle) * y) / np.sin(angle)
    np.testing.assert_allclose(found["q.weight"].ravel(), arc, rtol=1e-5)
    assert run("merge slerp a c --t 0.25 --scope leaf -o leaf") == 1
    assert "['gate']" in capsys.readouterr().err


def test_a_rate_is_told_of_bytes_that_were_timed(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.Progress(3_000_000, False) as told:
        clock[0] = 30.0
        told.advance(1_000_000)
        clock[0] = 40.0
        told.advance(1_000_000)
    first, second = capsys.readouterr().err.splitlines()
    assert "/s" not in first
    assert "100 kB/s  10 s left" in second


def test_angles_of_models_of_very_different_size_keep_their_digits(folder, capsys):
    tensors = RNG.normal(size=(3, 2, 40))
    a = {f"{i}.w": x[0].astype(np.float32) for i, x in enumerate(tensors)}
    c = {f"{i}.w": (1e-5 * (x[0] + 0.3 * x[1])).astype(np.float32) for i, x in enumerate(tensors)}
    saved(folder / "a", a)
    saved(folder / "c", c)
    assert run("distance a c --json --quiet") == 0
    said = json.loads(capsys.readouterr().out)

    def degrees(x, y):
        x, y = (v.astype(float) / np.linalg.norm(v.astype(float)) for v in (x, y))
        return np.degrees(2 * np.arctan2(np.linalg.norm(x - y), np.linalg.norm(x + y)))

    for name in a:
        own = said["tensors"][name]["angles_in_degrees"][0][1]
        assert own == pytest.approx(degrees(a[name], c[name]), rel=1e-5)
    whole = degrees(*(np.concatenate(list(x.values())) for x in (a, c)))
    assert said["angles_in_degrees"][0][1] == pytest.approx(whole, rel=1e-5)


def test_an_adapter_of_what_is_not_finite_is_refused_by_name(capsys):
    put({"p.weight": W[0]}, {"p.weight": W[1] * np.where(np.arange(3) == 1, np.nan, 1)})
    assert run("extract a c --rank 1 -o out") == 1
    told = capsys.readouterr().err
    assert "c holds NaN or an infinity" in told
    assert "at tensor 'p.weight'" in told
    assert run("extract a c --rank 1 -o out --skip p.weight") == 0
    assert run("extract a c --rank 1 -o two --skip *.weight") == 1
    assert "nothing is left to combine" in capsys.readouterr().err


@tree.elementwise
def undefined_at_three(_, arrays):
    return jnp.where(arrays[0] == 3, jnp.nan, arrays[0])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("lazy", [True, False])
def test_stream_counts_by_tensor_what_is_new(folder, dtype, lazy):
    x = np.array([1, np.nan, 3, np.inf, 5], dtype)
    sources = [saved(folder / f"{i}", {"w": x * (1 + i), "v": x[:1]}) for i in range(2)]

    def streamed(**options):
        with checkpoint.create(folder / "out", sources[0]) as writer:
            return checkpoint.stream(
                lambda xs: undefined_at_three((), xs[:1]), sources, writer, lazy=lazy, **options
            )

    message = r"entries of the result are .*, 1 of 'w', so nothing .*allow_nonfinite"
    with pytest.raises(ValueError, match=message):
        streamed()
    assert not (folder / "out").exists()
    assert streamed(allow_nonfinite=True) == {"w": checkpoint.Nonfinite(1, 2)}


def test_what_was_written_before_an_interruption_is_counted(monkeypatch, capsys):
    put({"h": np.full(4, 30000, np.float16)}, {"h": np.full(4, 60000, np.float16)}, weights=False)
    for name in "ac":
        saved(pathlib.Path(name), read(name) | {"z": np.ones(3, np.float16)})
    words = "merge task_arithmetic c --base a --coefficients 2 -o out --quiet"
    write = checkpoint.Writer.write_part

    def interrupted(self, name, start, array):
        if name == "z":
            while "h" not in self.finished:
                time.sleep(0.01)
            raise KeyboardInterrupt
        write(self, name, start, array)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Writer, "write_part", interrupted)
        assert run(words) == 1
    assert run(words) == 1
    assert "4 of 'h'" in capsys.readouterr().err
