"""Laws of `wspace.checkpoint.open`, and what it refuses."""

import functools
import json
import os
import struct
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wspace import checkpoint
from wspace.checkpoint import folder as folders
from wspace.checkpoint import header

safetensors = pytest.importorskip("safetensors")
library = pytest.importorskip("safetensors.numpy")

DTYPES = [
    np.dtype(x)
    for x in (
        *(np.float64, jnp.float32, jnp.bfloat16, jnp.float16, np.complex64),
        *(jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3fnuz, jnp.float8_e5m2fnuz),
        *(jnp.float8_e8m0fnu, np.bool_, np.int64, np.int32, np.int16, np.int8),
        *(np.uint64, np.uint32, np.uint16, np.uint8),
    )
]
SHAPES = [(), (0,), (3,), (2, 3), (2, 0), (1, 5, 1)]
TWO = {"x": np.arange(3, dtype=np.float32), "y": np.array([[1, 2]], np.int8)}


@st.composite
def arrays(draw):
    """An array of any dtype of the format, and of any bits that it can have."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))
    count = int(np.prod(shape)) * dtype.itemsize
    data = np.frombuffer(draw(st.binary(min_size=count, max_size=count)), np.uint8)
    return (data % 2 if dtype.kind == "b" else data).view(dtype).reshape(shape)


def names():
    return st.text(st.characters(codec="utf-8"), max_size=4).filter(lambda x: x != "__metadata__")


def same(got, want):
    return (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())


def packed(header, data=b""):
    """A file with this header, whether it tells the truth or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def folder_of(folder, shards, index=None):
    """A folder with these files and an index that says so, or another one."""
    folder.mkdir(exist_ok=True)
    for shard, tensors in shards.items():
        library.save_file(tensors, folder / shard)
    said = {name: shard for shard, tensors in shards.items() for name in tensors}
    text = index if isinstance(index, str) else json.dumps({"weight_map": index or said})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stored")


@given(
    tensors=st.dictionaries(names(), arrays(), max_size=4),
    metadata=st.dictionaries(names(), names(), max_size=2),
)
def test_what_the_library_wrote_is_read_bit_for_bit(folder, tensors, metadata):
    file = folder / "other.safetensors"
    library.save_file(tensors, file, metadata or None)
    with checkpoint.open(file) as opened:
        assert opened.keys() == tensors.keys()
        assert opened.metadata == metadata
        assert opened.files == (file,)
        assert opened.others == ()
        starts = [stored.offset for stored in opened.values()]
        assert starts == sorted(starts)
        for name, want in tensors.items():
            stored, got = opened[name], opened[name].read()
            assert (stored.name, stored.file) == (name, file)
            assert (stored.dtype, stored.shape) == (want.dtype, want.shape)
            assert (stored.size, stored.nbytes) == (want.size, want.nbytes)
            assert same(got, want)
            assert got.flags.aligned
            assert not got.flags.writeable


@given(array=arrays(), cut=st.tuples(st.integers(-1, 7), st.integers(-1, 7)))
def test_rows_are_a_range_of_the_flat_tensor_and_nothing_else(folder, array, cut):
    file = folder / "rows.safetensors"
    library.save_file({"x": array}, file)
    with checkpoint.open(file) as opened:
        if 0 <= cut[0] <= cut[1] <= array.size:
            assert same(opened["x"].rows(*cut), array.reshape(-1)[slice(*cut)])
        else:
            with pytest.raises(ValueError, match=r"elements .* of tensor 'x' of .*rows\.safetens"):
                opened["x"].rows(*cut)


def test_only_a_tensor_that_is_not_aligned_in_the_file_is_copied(folder):
    file, x = folder / "odd.safetensors", np.arange(3, dtype=np.float32)
    header = {"b": entry("U8", [1], 0, 1), "x": entry("F32", [3], 1, 13)}
    for pad in range(4):
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 4 + pad)
        file.write_bytes(packed(text, b"\x07" + x.tobytes()))
        with checkpoint.open(file) as opened:
            got, again = opened["x"].read(), opened["x"].read()
            assert same(got, x)
            assert got.flags.aligned
            assert not got.flags.writeable
            assert np.shares_memory(got, again) == (pad == 3)


def test_a_file_larger_than_memory_is_opened_and_read_where_asked(tmp_path):
    file, size = tmp_path / "large.safetensors", 2**40
    start = packed({"x": entry("F32", [size], 0, 4 * size)})
    with open(file, "wb") as stream:
        stream.write(start)
        stream.seek(len(start) + 4 * (size - 1))
        stream.write(np.float32(7).tobytes())
    with checkpoint.open(file) as opened:
        assert opened["x"].shape == (size,)
        assert opened["x"].rows(size - 2, size).tolist() == [0, 7]


def test_a_closed_checkpoint_reads_no_more_but_its_arrays_stay(folder):
    file = folder / "closed.safetensors"
    library.save_file(TWO, file)
    with checkpoint.open(file) as opened:
        x = opened["x"].read()
    assert same(x, TWO["x"])
    with pytest.raises(ValueError, match=r"closed\.safetensors is closed"):
        opened["y"].read()


def test_a_file_that_changed_since_is_refused(folder):
    file = folder / "changed.safetensors"
    library.save_file(TWO, file)
    opened = checkpoint.open(file)
    library.save_file({"x": TWO["x"]}, file)
    with pytest.raises(ValueError, match=r"changed\.safetensors changed since .* open it again"):
        opened["x"].read()


@pytest.mark.parametrize("change", ["in place", "replaced", "copied", "sampled"])
def test_a_fingerprint_tells_files_apart_that_a_program_dated_alike(tmp_path, monkeypatch, change):
    file, now = tmp_path / "x.safetensors", (10**18, 10**18)
    tensors = {"x": np.zeros(10**5, np.float32)}

    def fingerprint():
        with checkpoint.open(file) as opened:
            return opened.fingerprint()

    library.save_file(tensors, file)
    os.utime(file, ns=now)
    if change == "sampled":  # and nothing of it is seen by the system
        monkeypatch.setattr(header, "state_of", lambda _: (os.path.getsize(file), 1, 1, 1, 1))
    before = fingerprint()
    assert fingerprint() == before
    tensors["x"][:] = change != "copied"
    written = tmp_path / "other" if change in ("replaced", "copied") else file
    library.save_file(tensors, written)
    os.utime(written, ns=now)
    os.replace(written, file)
    assert fingerprint() != before


def test_a_folder_is_read_by_its_index_or_its_only_file(tmp_path):
    (tmp_path / "one").mkdir()
    library.save_file(TWO, tmp_path / "one" / "some.safetensors")
    with checkpoint.open(str(tmp_path / "one")) as opened:
        assert opened.keys() == TWO.keys()
    library.save_file({"w": TWO["x"]}, tmp_path / "one" / "model.safetensors")
    assert list(checkpoint.load(tmp_path / "one")) == ["w"]
    folder = folder_of(
        tmp_path / "sharded",
        {"a.safetensors": {"x": TWO["x"]}, "b.safetensors": {"y": TWO["y"], "z": TWO["x"]}},
    )
    library.save_file(TWO, folder / "not-in-the-index.safetensors")
    with checkpoint.open(folder) as opened:
        assert {name: stored.file.name[0] for name, stored in opened.items()} == {
            "x": "a",
            "y": "b",
            "z": "b",
        }
        assert same(opened["z"].read(), TWO["x"])
        assert [file.name for file in opened.files] == ["a.safetensors", "b.safetensors"]


def test_the_other_files_of_a_folder_are_listed(tmp_path):
    library.save_file(TWO, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.model", "vocab.txt", "README.md", "a"):
        (tmp_path / name).write_text(name)
    for name in (".gitattributes", "pytorch_model.bin", "training_args.BIN", "x.gguf", "m.onnx"):
        (tmp_path / name).write_text(name)
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to-config.json").symlink_to("config.json")
    with open(tmp_path / "large.json", "wb") as stream:
        stream.truncate(2**26 + 1)
    with checkpoint.open(tmp_path) as opened:
        assert [file.name for file in opened.others] == sorted(
            ["README.md", "a", "config.json", "to-config.json", "tokenizer.model", "vocab.txt"]
        )


SHARDS = {"a.safetensors": {"x": TWO["x"]}, "b.safetensors": {"y": TWO["y"]}}
FILES = ("a.safetensors", "b.safetensors", "model.safetensors.index.json", "config.json")


@pytest.mark.parametrize(
    ("snapshot", "blobs", "shared"),
    [
        ("snapshots/0123", "blobs", None),
        ("snapshots/0123/unet", "blobs", None),
        ("snapshots/0123/unet/deep", "blobs", "../blobs/ab"),
        ("snapshots/0123", "blobs", "../blobs/ab"),
        ("mine", "../store", None),
        ("mine", "mine/files", None),
    ],
)
def test_links_are_followed_wherever_they_lead(tmp_path, snapshot, blobs, shared):
    """Caches of the hub, with blobs of a repository or of all of them; folders of one's own."""
    home = tmp_path / "home"
    home.mkdir()
    snapshot, blobs = home / snapshot, home / blobs
    kept = home / shared if shared else blobs
    for made in (snapshot, blobs, kept):
        made.mkdir(parents=True, exist_ok=True)
    folder_of(kept, SHARDS)
    (kept / "config.json").write_text("{}")
    for name in FILES:
        if kept != blobs:
            (blobs / name).symlink_to(os.path.relpath(kept / name, blobs))
        (snapshot / name).symlink_to(os.path.relpath(blobs / name, snapshot))
    with checkpoint.open(snapshot) as opened:
        assert same(opened["y"].read(), TWO["y"])
        assert [file.name for file in opened.others] == ["config.json"]
        assert opened.files == (snapshot / FILES[0], snapshot / FILES[1])
    (kept / "b.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"b\.safetensors is a link to .*b\.safetensors, wh"
    ):
        checkpoint.open(snapshot)


@pytest.mark.parametrize(
    ("files", "path", "name"),
    [
        ({"model.safetensors": TWO}, "", "model"),
        ({"diffusion_pytorch_model.safetensors": TWO}, "", "diffusion_pytorch_model"),
        ({"ae.v2.safetensors": TWO}, "", "ae.v2"),
        ({"ae.safetensors": TWO}, "ae.safetensors", "model"),
        ({"model.fp16.safetensors": TWO}, "model.fp16.safetensors", "model.fp16"),
        ({"model.safetensors.index.json": None}, "", "model"),
        ({"unet.safetensors.index.fp16.json": None}, "", "unet.fp16"),
        ({"a.safetensors.index.json": None}, "a.safetensors.index.json", "a"),
    ],
)
def test_a_checkpoint_is_called_what_its_files_are_called(tmp_path, files, path, name):
    for file, tensors in files.items():
        if tensors:
            library.save_file(tensors, tmp_path / file)
        else:
            folder_of(tmp_path, SHARDS).joinpath("model.safetensors.index.json").rename(
                tmp_path / file
            )
    with checkpoint.open(tmp_path / path) as opened:
        assert opened.name == name
        assert same(opened["y"].read(), TWO["y"])
        assert opened.others == ()


def test_of_several_indices_the_one_that_is_given_is_read(tmp_path):
    folder_of(tmp_path, SHARDS)
    (tmp_path / "config.json").write_text("{}")
    variant = tmp_path / "model.safetensors.index.fp16.json"
    library.save_file({"x": TWO["x"]}, tmp_path / "c.safetensors")
    variant.write_text(json.dumps({"weight_map": {"x": "c.safetensors"}}))
    with pytest.raises(ValueError, match=r"index\.fp16\.json.*give the path of the one"):
        checkpoint.open(tmp_path)
    with checkpoint.open(variant) as opened:
        assert list(opened) == ["x"]
        assert [file.name for file in opened.others] == ["config.json"]


def test_a_link_that_the_user_gives_is_followed(tmp_path):
    library.save_file(TWO, tmp_path / "far.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").symlink_to(tmp_path / "far.safetensors")
    (tmp_path / "link").symlink_to("folder")
    for path in ("link", "folder", "folder/model.safetensors"):
        with checkpoint.open(tmp_path / path) as opened:
            assert same(opened["x"].read(), TWO["x"])


RIGHT = {"x": "a.safetensors", "y": "b.safetensors"}


@pytest.mark.parametrize(
    ("index", "error", "match"),
    [
        (RIGHT | {"y": "../b.safetensors"}, ValueError, r"'y' is in '\.\./b\.safetensors'"),
        (RIGHT | {"y": "/etc/b.safetensors"}, ValueError, "names no .safetensors file there"),
        (RIGHT | {"y": "c\\b.safetensors"}, ValueError, "names no .safetensors file there"),
        (RIGHT | {"y": "b\0.safetensors"}, ValueError, "names no .safetensors file there"),
        (RIGHT | {"y": "b"}, ValueError, "names no .safetensors file there"),
        (RIGHT | {"y": 3}, ValueError, "names no .safetensors file there"),
        (RIGHT | {"z": "c.safetensors"}, FileNotFoundError, r"lacks 1 of the 3 .*c\.safetensors"),
        (RIGHT | {"z": "b.safetensors"}, ValueError, r"b\.safetensors lacks the tensor 'z'"),
        ({"x": "a.safetensors", "z": "b.safetensors"}, ValueError, r"'y', which does not exist"),
        (RIGHT | {"y": "a.safetensors", "z": "b.safetensors"}, ValueError, r"is in a\.safetens"),
        ('{"weight_map": {}}', ValueError, "no weight_map"),
        ('{"weight_map": ["a.safetensors"]}', ValueError, "no weight_map"),
        ('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', ValueError, "'x' twice"),
        ("[]", ValueError, "no index"),
        ('{"weight_map"', ValueError, "no index"),
        ("[" * 10**5, ValueError, "no index"),
        ("\ud800", ValueError, "no index"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, index, error, match):
    if index == "\ud800":
        folder_of(tmp_path, SHARDS)
        (tmp_path / "model.safetensors.index.json").write_bytes(b"\xff")
    else:
        folder_of(tmp_path, SHARDS, index)
    with pytest.raises(error, match=match):
        checkpoint.open(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    both = {"a.safetensors": TWO, "b.safetensors": {"y": TWO["y"]}}
    folder_of(tmp_path / "twice", both, RIGHT)
    with pytest.raises(ValueError, match=r"a\.safetensors has a tensor 'y', which is in b\.safet"):
        checkpoint.open(tmp_path / "twice")


def test_a_folder_that_can_be_read_in_two_ways_is_refused(tmp_path):
    folder = folder_of(tmp_path, SHARDS)
    library.save_file(TWO, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"has both model\.safetensors and .*index\.json"):
        checkpoint.open(folder)
    (folder / "model.safetensors").unlink()
    (folder / "second.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has several indices"):
        checkpoint.open(folder)
    for index in folder.glob("*.json"):
        index.unlink()
    with pytest.raises(ValueError, match=r"2 \.safetensors files and no index: give one of a\.saf"):
        checkpoint.open(folder)


@pytest.mark.parametrize(
    ("suffix", "match"),
    [
        *((suffix, "never read: convert it") for suffix in ("bin", "pt", "pth", "ckpt", "pkl")),
        ("gguf", r"GGUF.*from_pretrained"),
        ("h5", r"HDF5: convert it"),
        ("msgpack", r"Flax: convert it"),
    ],
)
def test_other_formats_are_refused_with_the_way_to_convert_them(tmp_path, suffix, match):
    file = tmp_path / f"model.{suffix}"
    file.write_bytes(b"as it is")
    for path in (file, tmp_path):
        with pytest.raises(ValueError, match=rf"model\.{suffix} is .*{match}"):
            checkpoint.open(path)


ONE = entry("F32", [1], 0, 4)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "header"),
        (b"1234567", "header"),
        (struct.pack("<Q", 2**63) + b"{}", "9223372036854775808 bytes"),
        (struct.pack("<Q", 99_000_000) + b"{}", "should take 99000000 bytes, of 10"),
        (packed(b" {}"), "no JSON object"),
        (packed(b"{"), "Expecting"),
        (packed(b'{"\xff": 1}'), "utf-8"),
        (packed(b'{"\\ud800": 1}'), "surrogates"),
        (packed(b'{"x":' * 10**5), ""),
        (packed(b'{"x":%b,"x":%b}' % ((json.dumps(ONE).encode(),) * 2), b"1234"), "'x' twice"),
        (packed(b'{"x":{"dtype":"U8","dtype":"I8","shape":[],"data_offsets":[0,1]}}', b"1"), "tw"),
        (packed({"x": 1}), "has not dtype"),
        (packed({"x": {"dtype": "F32", "shape": [1]}}, b"1234"), "has not dtype"),
        (packed({"x": entry("F31", [1], 0, 4)}, b"1234"), "unknown dtype 'F31'"),
        (packed({"x": entry(["F32"], [1], 0, 4)}, b"1234"), "unknown dtype"),
        (packed({"x": entry("F32", 1, 0, 4)}, b"1234"), "shape 1"),
        (packed({"x": entry("F32", [True], 0, 4)}, b"1234"), r"shape \[True\]"),
        (packed({"x": entry("F32", [1.0], 0, 4)}, b"1234"), r"number 1\.0"),
        (packed({"x": entry("F32", [-1], 0, 4)}, b"1234"), "number -1"),
        (packed({"x": entry("F32", [float("nan")], 0, 4)}, b"1234"), "number NaN"),
        (packed({"x": entry("F32", [10**4000], 0, 4)}, b"1234"), "number 1000"),
        (packed({"x": entry("F32", [0, 2**40, 2**40], 0, 0)}), "which no array has"),
        (packed({"x": entry("F32", [1] * 65, 0, 4)}, b"1234"), "which no array has"),
        (packed({"x": entry("F32", [2**62, 4], 0, 0)}), "which no array has"),
        (packed({"x": entry("F32", [1], 0, 8)}, b"12345678"), "in 8 bytes"),
        (packed({"x": entry("F32", [1], 4, 0)}, b"1234"), "in -4 bytes"),
        (packed({"x": {**ONE, "data_offsets": [0, 4, 8]}}, b"1234"), "offsets"),
        (packed({"x": ONE}, b"12345"), "tensors end"),
        (packed({"x": ONE}, b"123"), "tensors end"),
        (packed({"x": entry("F32", [1], 4, 8)}, b"12345678"), "starts at byte"),
        (packed({"x": ONE, "y": ONE}, b"1234"), "starts at byte"),
        (packed({"x": ONE, "y": entry("F32", [1], 2, 6)}, b"123456"), "starts at byte"),
        (packed({"x": ONE, "y": entry("F32", [1], 6, 10)}, b"1234567890"), "starts at byte"),
        (packed({"__metadata__": {"a": 1}}), "strings to strings"),
        (packed(b'{"__metadata__":{"a":"\\ud800"}}'), "surrogates"),
        (packed({"__metadata__": ["a"]}), "strings to strings"),
    ],
)
def test_a_header_that_lies_is_refused_with_the_cause(folder, data, cause):
    file = folder / "lie.safetensors"
    file.write_bytes(data)
    with pytest.raises(
        ValueError, match=rf"lie\.safetensors is truncated or no safetensors file \(.*{cause}"
    ):
        checkpoint.open(file)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'a'}\nsize 9\n")
    with pytest.raises(ValueError, match=r"x\.safetensors .*pointer of Git LFS.*download it again"):
        checkpoint.open(file)


@pytest.mark.parametrize("long", [b"n", b"dtype", b"shape", b"offsets", b"twice", b"index"])
def test_no_message_is_as_long_as_what_it_speaks_of(tmp_path, long):
    x = 10**6 * b"x"
    numbers = b"[" + b",".join([b"1"] * 10**5) + b"]"
    one = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    data = {
        b"n": packed(b'{"%b":1}' % x),
        b"dtype": packed(b'{"x":{"dtype":"%b","shape":[1],"data_offsets":[0,4]}}' % x),
        b"shape": packed(b'{"x":{"dtype":"F32","shape":%b,"data_offsets":[0,4]}}' % numbers),
        b"offsets": packed(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":%b}}' % numbers),
        b"twice": packed(b'{"%b":%b,"%b":%b}' % (x, one, x, one)),
    }.get(long)
    if data is None:
        folder_of(tmp_path, SHARDS, {x.decode(): x.decode()})
    else:
        (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="again") as error:
        checkpoint.open(tmp_path)
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize("read", [header.read, folders._index])
def test_one_name_of_many_twice_is_refused_in_linear_time(tmp_path, read):
    names = [f"a{i}" for i in range(50_000)]
    names.append(names[-1])
    said = {
        header.read: b"{%b}" % b",".join(b'"%b":%b' % (x.encode(), b"{}") for x in names),
        folders._index: b'{"weight_map":{%b}}' % b",".join(b'"%b":"b"' % x.encode() for x in names),
    }[read]
    file = tmp_path / "file"
    file.write_bytes(packed(said) if read is header.read else said)
    start = time.process_time()
    with pytest.raises(ValueError, match="'a49999' twice"):
        read(file)
    assert time.process_time() - start < 2


def test_a_long_header_is_refused_unread(tmp_path):
    file = tmp_path / "long.safetensors"
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", 10**12))
        stream.truncate(2 * 10**12)
    with pytest.raises(ValueError, match="takes 1000000000000 bytes, more than 100000000"):
        checkpoint.open(file)


def test_values_narrower_than_a_byte_are_refused_by_name(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(packed({"x": entry("F4", [2], 0, 1)}, b"1"))
    with pytest.raises(ValueError, match=r"tensor 'x' of .*x\.safetensors has dtype F4, whose"):
        checkpoint.open(tmp_path)


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    for path, match in (
        (tmp_path, "no regular file"),
        (tmp_path / "loop.safetensors", "cannot be read"),
        (tmp_path / "a\0b", "cannot be read"),
        ("/dev/zero", "no regular file"),
    ):
        with pytest.raises(ValueError, match=match):
            checkpoint.open(path)


@functools.cache
def sound():
    """Files that are right, to be damaged."""
    half = np.ones((2, 1), jnp.bfloat16)
    return [
        library.save(TWO, {"format": "pt"}),
        library.save({"a": half, "b": half, "c": np.ones((0, 4), np.float64)}),
        packed({"x": entry("U8", [1], 0, 1), "y": entry("F32", [], 1, 5)}, b"12345"),
    ]


@st.composite
def damaged(draw):
    """A file with a few bytes or numbers changed, put in or left out."""
    data = bytearray(draw(st.sampled_from(sound())))
    for _ in range(draw(st.integers(1, 4))):
        end = min(len(data), draw(st.sampled_from((12, len(data)))))
        i = draw(st.integers(0, end))
        j = min(len(data), i + draw(st.integers(0, 4)))
        data[i:j] = draw(
            st.binary(max_size=4) | st.sampled_from((b"0", b"-1", b"9" * 20, b"[", b"}", b'"x"'))
        )
    return bytes(data)


@given(data=damaged())
def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(folder, data):
    file = folder / "damaged.safetensors"
    file.write_bytes(data)
    try:
        opened = checkpoint.open(file)
    except ValueError:
        return
    with opened:
        want = {name: bytes(x["data"]) for name, x in safetensors.deserialize(data)}
        assert {name: stored.read().tobytes() for name, stored in opened.items()} == want
        assert sum(stored.nbytes for stored in opened.values()) <= len(data)


@pytest.mark.parametrize(("name", "count"), [("w", 4), ("w", -1), ("s", 1), ("none", 0)])
def test_rows_that_a_tensor_has_not_are_refused(name, count, tmp_path):
    tensors = {"w": np.arange(6, dtype=np.float32).reshape(3, 2), "s": np.float32(1)}
    checkpoint.save(tmp_path / "a.safetensors", {k: np.asarray(x) for k, x in tensors.items()})
    with checkpoint.open(tmp_path / "a.safetensors") as opened:
        cut = opened.first_rows({"w": 2})
        np.testing.assert_array_equal(cut["w"].read(), tensors["w"][:2])
        assert opened["w"].shape == (3, 2)
        with pytest.raises(ValueError, match="ask for at most as many as it has"):
            opened.first_rows({name: count})
