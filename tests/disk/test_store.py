"""The door to zarr: what is put in comes out, and damage is an error that names its place and never a crash."""

import dataclasses
import json
import math
from unittest import mock

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from infl_cache.disk import layout as layout_module
from infl_cache.disk.codecs import Codec
from infl_cache.disk.durable import crc32c, crc32c_of_file
from infl_cache.disk.layout import ArrayLayout, Block, array_layout, blocks, chunk_keys
from infl_cache.disk.store import METADATA, Store, create_store
from infl_cache.errors import DamagedStore

LZ4 = Codec("lz4", 5)
DTYPES = ["float32", "float64", "int64", "uint64", "bool"]


def random_values(dtype, shape, seed=0):
    """Any bit pattern of the type: NaN with payloads, infinities, denormals, extremes."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    return np.frombuffer(rng.bytes(math.prod(shape) * np.dtype(dtype).itemsize), dtype).reshape(shape)


def bits(values):
    return np.ascontiguousarray(values).view(np.uint8)


def chunk_files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {METADATA}


@given(
    n_rows=st.integers(1, 31),
    block_rows=st.integers(1, 13),
    row_shape=st.lists(st.integers(1, 7), max_size=2).map(tuple),
    dtype=st.sampled_from(DTYPES),
    codec=st.sampled_from([LZ4, Codec("zstd", 1), Codec("none", 5)]),
    limit=st.integers(8, 500),
)
@settings(max_examples=25, deadline=None)
def test_what_is_written_block_by_block_is_read_back_bit_by_bit(
    tmp_path_factory, n_rows, block_rows, row_shape, dtype, codec, limit
):
    with mock.patch.object(layout_module, "CHUNK_BYTES", limit):
        layouts = [array_layout("x", n_rows, row_shape, dtype, block_rows)]
    values = random_values(dtype, (n_rows, *row_shape))
    folder = tmp_path_factory.getbasetemp() / "round_trip"
    create_store(folder, layouts, codec)
    store = Store(folder, layouts, "r+", codec)
    cut = blocks(n_rows, block_rows)
    for block in reversed(cut):
        records = store.write_block(block, {"x": values[block.start : block.stop]})
        assert [record.path for record in records] == [f"round_trip/x/{key}" for key in chunk_keys(layouts[0], block)]
    assert chunk_files(folder / "x") == {key for block in cut for key in chunk_keys(layouts[0], block)}
    for block in cut:
        read = Store(folder, layouts).read_block(block)["x"]
        assert read.dtype == np.dtype(dtype)
        assert_array_equal(bits(read), bits(values[block.start : block.stop]))


@pytest.fixture
def store(tmp_path, sample):
    create_store(tmp_path / "grad_z.zarr", sample.layouts, sample.codec)
    return Store(tmp_path / "grad_z.zarr", sample.layouts, "r+", sample.codec)


@pytest.fixture
def full(store, sample):
    for block in sample.blocks:
        store.write_block(block, sample.data(block))
    return store


def test_records_hold_the_size_and_the_checksum_that_ends_each_file(store, sample):
    block = sample.blocks[0]
    records = store.write_block(block, sample.data(block))
    expected = [f"grad_z.zarr/{each.path}/{key}" for each in sample.layouts for key in chunk_keys(each, block)]
    assert [record.path for record in records] == expected
    for record in records:
        data = (store.folder.parent / record.path).read_bytes()
        assert record.size == len(data)
        assert record.crc == crc32c(data[:-4]) == int.from_bytes(data[-4:], "little")


def test_the_metadata_files_are_recorded_with_their_checksums(tmp_path, sample):
    records = create_store(tmp_path / "s.zarr", sample.layouts, sample.codec)
    folders = ("", "dense/", "digest/", "layer/", "layer/input/")
    assert {record.path for record in records} == {f"s.zarr/{each}{METADATA}" for each in folders}
    for record in records:
        file = tmp_path / record.path
        assert (record.size, record.crc) == (file.stat().st_size, crc32c_of_file(file))


def test_any_zarr_library_can_open_the_store(full, sample):
    group = zarr.open_group(full.folder, mode="r", zarr_format=3)
    for layout in sample.layouts:
        expected = np.concatenate([sample.data(block)[layout.path] for block in sample.blocks])
        assert_array_equal(group[layout.path][:], expected, strict=True)


def test_the_metadata_keep_the_rules_of_the_format(full, sample):
    for layout in sample.layouts:
        stored = json.loads((full.folder / layout.path / METADATA).read_text())
        assert stored["zarr_format"] == 3
        assert [codec["name"] for codec in stored["codecs"]] == ["bytes", "blosc", "crc32c"]
        assert stored["fill_value"] == ("NaN" if layout.dtype.startswith("float") else 0)
        assert tuple(stored["shape"]) == layout.shape
        assert tuple(stored["chunk_grid"]["configuration"]["chunk_shape"]) == layout.chunks
        assert stored["dimension_names"][0] == "sample"


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_blocks_of_one_value_leave_their_files_also_after_opening_again(tmp_path, value):
    layouts = [
        ArrayLayout("floats", 8, (3,), "float32", 4, (3,)),
        ArrayLayout("ints", 8, (3,), "int64", 4, (3,)),
        ArrayLayout("flags", 8, (), "bool", 4, ()),
    ]
    create_store(tmp_path / "s", layouts, LZ4)
    for block in blocks(8, 4):
        store = Store(tmp_path / "s", layouts, "r+", LZ4)
        data = {
            "floats": np.full((4, 3), value, np.float32),
            "ints": np.zeros((4, 3), np.int64),
            "flags": np.zeros(4, bool),
        }
        assert len(store.write_block(block, data)) == 3
        for layout in layouts:
            assert (tmp_path / "s" / layout.path / chunk_keys(layout, block)[0]).stat().st_size > 0
            assert_array_equal(store.read_block(block, [layout.path])[layout.path], data[layout.path], strict=True)


def test_rows_that_were_never_written_read_as_nan_and_never_as_a_zero_gradient(store, sample):
    read = store.read_block(sample.blocks[1], ["dense", "layer/input"])
    assert all(np.isnan(values).all() for values in read.values())


def test_the_named_arrays_are_read_and_no_others(full, sample):
    assert list(full.read_block(sample.blocks[0], ["digest"])) == ["digest"]
    assert set(full.read_block(sample.blocks[0])) == {layout.path for layout in sample.layouts}


@pytest.mark.parametrize("left", [b"", b"torn", None])
def test_what_a_killed_writer_left_does_not_disturb_writing_the_block_again(store, sample, left):
    block = sample.blocks[2]  # the short last one, whose edge chunks zarr would read before writing
    for layout in sample.layouts:
        for key in chunk_keys(layout, block):
            file = store.folder / layout.path / key
            file.write_bytes(b"\0" * 200 if left is None else left)
            (file.parent / f"{key}.partial").write_bytes(b"left over")
    store.write_block(block, sample.data(block))
    for path, values in sample.data(block).items():
        assert_array_equal(store.read_block(block)[path], values)


def test_writing_one_block_touches_no_file_of_another(full, sample, contents):
    before = contents(full.folder)
    block = sample.blocks[1]
    full.write_block(block, {path: values + 1 for path, values in sample.data(block).items()})
    after = contents(full.folder)
    own = {f"{layout.path}/{key}" for layout in sample.layouts for key in chunk_keys(layout, block)}
    assert {name for name in after if after[name] != before[name]} == own
    assert after.keys() == before.keys()


def test_a_store_opened_for_reading_refuses_to_write_and_keeps_what_it_has(full, sample, contents):
    before = contents(full.folder)
    with pytest.raises(Exception, match="read-only"):
        Store(full.folder, sample.layouts).write_block(sample.blocks[0], sample.data(sample.blocks[0]))
    assert contents(full.folder) == before


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_data_of_another_number_of_rows_than_the_block_are_refused(store, sample, rows):
    data = sample.data(sample.blocks[0])
    wrong = np.zeros((rows, *data["dense"].shape[1:]), np.float32)
    with pytest.raises(Exception, match=r"shape|broadcast|rows"):
        store.write_block(sample.blocks[0], {**data, "dense": wrong})


def test_a_half_made_store_is_replaced(tmp_path, sample):
    folder = tmp_path / "grad_z.zarr"
    (folder / "dense").mkdir(parents=True)
    (folder / METADATA).write_text("{")
    (folder / "dense" / "c.0.0").write_bytes(b"old")
    create_store(folder, sample.layouts, sample.codec)
    assert chunk_files(folder / "dense") == set()
    Store(folder, sample.layouts)


def test_an_array_that_is_a_group_is_said(tmp_path, sample):
    create_store(tmp_path / "s", sample.layouts, sample.codec)
    with pytest.raises(DamagedStore, match="layer: a group"):
        Store(tmp_path / "s", [ArrayLayout("layer", 10, (), "float32", 4, ())])


READ_DAMAGED = """
import json
from pathlib import Path
from infl_cache.disk.layout import ArrayLayout, Block
from infl_cache.disk.store import Store
from infl_cache.errors import DamagedStore
folder, start, stop = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
layout = ArrayLayout("x", 8, (50,), sys.argv[4], 4, (50,))
file = folder / "x" / "c.1.0"
whole = file.read_bytes()
n = len(whole)
cases = {f"cut to {size}": whole[:size] for size in (0, 1, 3, 4, 5, n // 2, n - 5, n - 1)}
cases.update({f"bit {at % 8} of byte {at}": whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:]
              for at in range(0, n, max(1, n // 100))})
cases["longer"] = whole + b"\\0"
cases["zeros"] = bytes(n)
for name, data in cases.items():
    file.write_bytes(data)
    try:
        Store(folder, [layout]).read_block(Block(1, start, stop))
        told = "was read as if it were whole"
    except DamagedStore as error:
        told = str(error)
    print(json.dumps([name, told]), flush=True)
"""


@pytest.mark.parametrize("dtype", ["float32", "uint64"])
@pytest.mark.parametrize("codec", [LZ4, Codec("zstd", 5), Codec("none", 5)], ids=str)
def test_truncated_and_flipped_chunks_are_errors_and_never_crash_the_interpreter(tmp_path, start_child, codec, dtype):
    layouts = [ArrayLayout("x", 8, (50,), dtype, 4, (50,))]
    create_store(tmp_path / "s", layouts, codec)
    values = random_values(dtype, (8, 50)).copy()
    values[:, ::2] = 0
    for block in blocks(8, 4):
        Store(tmp_path / "s", layouts, "r+", codec).write_block(block, {"x": values[block.start : block.stop]})
    child = start_child(READ_DAMAGED, tmp_path / "s", 4, 8, dtype)
    told = [json.loads(line) for line in child.communicate(timeout=60)[0].splitlines()]
    assert child.returncode == 0, f"the interpreter died after {told[-1:]}"
    assert len(told) > 100
    for name, message in told:
        assert "s/x: rows 4 to 7 cannot be read" in message, f"{name}: {message}"
        assert "--force" in message


def test_axes_are_named_in_the_metadata_and_change_nothing_else(tmp_path):
    named = [array_layout("a/x", 8, (3, 2), "float32", 4, rows="train"), array_layout("y", 8, (5,), "float32", 4)]
    older = [dataclasses.replace(each, axes=()) for each in named]
    content = {}
    for name, layouts in (("named", named), ("older", older)):
        create_store(tmp_path / name, layouts, LZ4)
        store = Store(tmp_path / name, layouts, "r+", LZ4)
        store.write_block(Block(0, 0, 4), {"a/x": np.ones((4, 3, 2), "f4"), "y": np.ones((4, 5), "f4")})
        files = {each.relative_to(tmp_path / name): each for each in (tmp_path / name).rglob("*") if each.is_file()}
        content[name] = {path: file.read_bytes() for path, file in files.items()}
    metadata = {
        name: {p: json.loads(data) for p, data in files.items() if p.name == METADATA}
        for name, files in content.items()
    }
    named_axes = {str(p.parent): each.pop("dimension_names", None) for p, each in metadata["named"].items()}
    assert named_axes == {".": None, "a": None, "a/x": ["train", "x_1", "x_2"], "y": ["sample", "y_1"]}
    older_axes = {str(p.parent): each.pop("dimension_names", None) for p, each in metadata["older"].items()}
    assert older_axes["a/x"] == ["sample", "axis1", "axis2"]
    assert metadata["named"] == metadata["older"]
    chunks = [{p: data for p, data in files.items() if p.name != METADATA} for files in content.values()]
    assert chunks[0] == chunks[1]
    assert len(chunks[0]) == 2
