"""Chunk bytes: lossless, checked, and readable by any zarr."""

import numpy as np
import pytest
import zarr

from infl_cache.disk.codecs import CRC_BYTES, Codec, stored_checksum
from infl_cache.disk.durable import crc32c
from infl_cache.disk.layout import ArrayLayout, Block
from infl_cache.disk.store import Store, create_store

CODECS = [Codec("lz4", 5), Codec("zstd", 1), Codec("zstd", 9), Codec("none", 5)]


def written(folder, codec, values):
    layouts = [ArrayLayout("x", len(values), values.shape[1:], values.dtype.name, len(values), values.shape[1:])]
    create_store(folder, layouts, codec)
    Store(folder, layouts, "r+", codec).write_block(Block(0, 0, len(values)), {"x": values})
    return folder / "x" / ("c" + ".0" * values.ndim)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_the_checksum_is_the_outermost_codec_and_covers_the_whole_file(tmp_path, codec):
    data = written(tmp_path / "s", codec, np.arange(60, dtype=np.float32).reshape(6, 10)).read_bytes()
    assert stored_checksum(data) == crc32c(data[:-CRC_BYTES])
    assert stored_checksum(data[-CRC_BYTES:]) == stored_checksum(data)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_plain_zarr_reads_the_same_bits(tmp_path, codec):
    bits = np.random.default_rng(0).integers(0, 2**32, (8, 33), dtype=np.uint32)
    values = bits.view(np.float32)
    written(tmp_path / "s", codec, values)
    read = zarr.open_array(tmp_path / "s" / "x", mode="r", zarr_format=3)[:]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read.view(np.uint32), bits)


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_gradients_of_dead_units_and_like_numbers_get_much_smaller(tmp_path, name):
    values = np.zeros((64, 1000), np.float32)
    values[:, :500] = 1 + np.random.default_rng(0).random((64, 500), np.float32)
    plain = written(tmp_path / "plain", Codec("none", 5), values).stat().st_size
    packed = written(tmp_path / "packed", Codec(name, 5), values).stat().st_size
    assert plain == values.nbytes + CRC_BYTES
    assert packed < 0.6 * plain


def test_codecs_of_one_name_and_level_are_equal():
    assert Codec("lz4", 5) == Codec("lz4", 5) != Codec("lz4", 6)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "uint16", "int32", "uint64"])
@pytest.mark.parametrize("rows", [6, 8])
def test_a_chunk_file_holds_the_very_bytes_that_zarr_would_write(tmp_path, codec, dtype, rows):
    values = np.random.default_rng(1).integers(0, 50, (rows, 33)).astype(dtype)
    layouts = [ArrayLayout("x", rows, (33,), dtype, 8, (20,))]
    for name in ("ours", "zarr"):
        create_store(tmp_path / name, layouts, codec)
    Store(tmp_path / "ours", layouts, "r+", codec).write_block(Block(0, 0, rows), {"x": values})
    zarr.open_group(tmp_path / "zarr", mode="r+")["x"][:] = values
    for key in ("c.0.0", "c.0.1"):
        assert (tmp_path / "ours" / "x" / key).read_bytes() == (tmp_path / "zarr" / "x" / key).read_bytes()
