"""What `checkpoint.open` does with damaged files and indices: refuse, or read what is there.

Run: python benchmarks/checkpoint_fuzz.py [--count 100000] [--seed 0]

Each of the files is a sound one with some bytes, numbers or words changed, put in, left out or
said twice, in the header and around it; every fourth time the index of a folder with two files,
beside which lies one that the index must not reach. A file may be refused by `ValueError` or, of
an index, `FileNotFoundError`, and by nothing else. What opens is read whole: every tensor must lie
inside of its file, no file outside of the folder, and the tensors be those that the package
safetensors finds in the same bytes. Printed are the counts, the time, and by how much the memory
of the process grew. Files are in memory where `/dev/shm` is.
"""

import argparse
import collections
import json
import random
import re
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from wspace import checkpoint

TENSORS = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "h": np.ones((2, 1), jnp.bfloat16),
    "e": np.zeros((0, 4)),
    "b": np.array([True, False]),
}
NUMBERS = (0, 1, 2, 3, 4, 8, 24, 28, -1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30)
WORDS = (b'"F32"', b'"F4"', b'"U8"', b'"w"', b'"h"', b"null", b"true", b"[]", b"{}", b"[", b"}")
NAMES = ("../out.safetensors", "/etc/passwd", "a.safetensors", "b.safetensors", ".", "a/../../x")


def numbers(text: bytes, draw: random.Random) -> bytes:
    """Another number in place of one."""
    found = list(re.finditer(rb"-?\d+", text))
    if not found:
        return text
    one = draw.choice(found)
    near = int(one[0][:18]) + draw.choice((-4, -1, 1, 4))
    number = draw.choice((*NUMBERS, near, near, near))
    return text[: one.start()] + str(number).encode() + text[one.end() :]


def words(text: bytes, draw: random.Random) -> bytes:
    """Another word in place of one."""
    found = list(re.finditer(rb'"[^"]*"|[\[\]{}:,]', text))
    if not found:
        return text
    one = draw.choice(found)
    word = draw.choice((*WORDS, draw.choice(found)[0], json.dumps(draw.choice(NAMES)).encode()))
    return text[: one.start()] + word + text[one.end() :]


def pieces(text: bytes, draw: random.Random) -> bytes:
    """A piece that is left out, said twice or moved."""
    i, j, k = sorted(draw.randint(0, len(text)) for _ in range(3))
    return draw.choice((text[:i] + text[j:], text[:j] + text[i:], text[:i] + text[j:k] + text[i:]))


def noise(text: bytes, draw: random.Random) -> bytes:
    """Some bytes that are anything."""
    i = draw.randint(0, len(text))
    return text[:i] + draw.randbytes(draw.randint(0, 3)) + text[i + draw.randint(0, 3) :]


CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(numbers, numbers, words, words, pieces, noise),
)


def changed(text: bytes, draw: random.Random) -> bytes:
    """A text after one to three changes."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        text = draw.choice(CHANGES)(text, draw)
    return text


def damaged(sound: bytes, draw: random.Random) -> bytes:
    """A file with another header, of the length that it says or not, or other bytes anywhere."""
    length = int.from_bytes(sound[:8], "little")
    header, data = sound[8 : 8 + length], sound[8 + length :]
    kind = draw.random()
    if kind < 0.1:
        return noise(sound, draw)
    if kind < 0.2:
        return sound[: draw.randint(0, len(sound))] + draw.randbytes(draw.randint(0, 2))
    header = changed(header, draw)
    length = len(header)
    if kind < 0.3:
        length = draw.choice((*NUMBERS[:8], *NUMBERS[9:13], length - 1, length + 1))
    return (length % 2**64).to_bytes(8, "little") + header + data


def cause(said: str) -> str:
    """What was wrong, in words without names and numbers."""
    said = said.partition("(")[2].rpartition(")")[0] or said
    return re.sub(r"'.*'|\".*\"|\[.*\]|\{.*\}|[-\d]+", "*", said)[:50]


def attempt(path: Path, folder: Path) -> str:
    """What became of one: refused, and why, or read."""
    try:
        opened = checkpoint.open(path)
    except FileNotFoundError:
        return "refused: a file that the index names is missing"
    except ValueError as error:
        said = str(error).replace(str(folder), "")
        return f"refused: {cause(said)}"
    with opened:
        found = {}
        for file in opened.files:
            assert file.parent == folder, f"{file} is outside of {folder}"
            found |= {
                name: (x["dtype"], tuple(x["shape"]), bytes(x["data"]))
                for name, x in safetensors.deserialize(file.read_bytes())
            }
        assert found.keys() == opened.keys()
        for name, stored in opened.items():
            assert 0 <= stored.offset <= stored.offset + stored.nbytes <= stored.file.stat().st_size
            assert found[name][1:] == (stored.shape, stored.read().tobytes())
    return "read"


def main() -> None:
    """Runs the attempts and prints what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, counts = random.Random(options.seed), collections.Counter[tuple[str, str]]()
    sound = safetensors.numpy.save(TENSORS, {"format": "pt"})
    half = {"a.safetensors": ("w", "h"), "b.safetensors": ("e", "b")}
    shards = {name: file for file, names in half.items() for name in names}
    index = json.dumps({"metadata": {"total_size": 30}, "weight_map": shards}).encode()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as home:
        folder, single = Path(home, "folder"), Path(home, "single")
        folder.mkdir()
        single.mkdir()
        safetensors.numpy.save_file(TENSORS, Path(home, "out.safetensors"))
        for file, names in half.items():
            safetensors.numpy.save_file({name: TENSORS[name] for name in names}, folder / file)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        for i in range(options.count):
            if i % 4:
                file = single / "x.safetensors"
                file.write_bytes(damaged(sound, draw))
                counts["file", attempt(file, single)] += 1
            else:
                (folder / "model.safetensors.index.json").write_bytes(changed(index, draw))
                counts["index", attempt(folder, folder)] += 1
        seconds = time.perf_counter() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for what in ("file", "index"):
        of = {said: n for (kind, said), n in counts.items() if kind == what}
        refused = sum(of.values()) - of.get("read", 0)
        print(f"{what}: {of.pop('read', 0)} read as the package reads them, {refused} refused")
        for said, n in sorted(of.items(), key=lambda item: -item[1])[:8]:
            print(f"  {n:6} {said.removeprefix('refused: ')}")
    print(f"{options.count} attempts in {seconds:.1f} s; memory grew by {grown:.1f} MiB")
    print("nothing else was raised, and nothing outside was read")


if __name__ == "__main__":
    main()
