"""Blocks by the fast way equal those by zarr's, and damage of any kind is an error that names file and rows."""

import numpy as np
import pytest

from infl_cache.disk import reader as reading
from infl_cache.disk.codecs import Codec
from infl_cache.disk.layout import array_layout, blocks
from infl_cache.disk.ledger import BlockRecord
from infl_cache.disk.reader import BlockReader
from infl_cache.disk.store import Store, create_store
from infl_cache.errors import DamagedStore

ROWS, BLOCK = 23, 8


def made(tmp_path, monkeypatch, codec, chunk_bytes=10**6):
    """A store of two arrays, 23 rows in blocks of 8, and a reader of it."""
    monkeypatch.setattr("infl_cache.disk.layout.CHUNK_BYTES", chunk_bytes)
    layouts = [
        array_layout("a/input", ROWS, (3, 5), "float32", BLOCK),
        array_layout("dense", ROWS, (40,), "float64", BLOCK),
    ]
    create_store(tmp_path / "s.zarr", layouts, codec)
    store, generator = Store(tmp_path / "s.zarr", layouts, "r+", codec), np.random.default_rng(0)
    records = {}
    for block in blocks(ROWS, BLOCK):
        data = {each.path: generator.normal(size=(block.rows, *each.row_shape)).astype(each.dtype) for each in layouts}
        files = store.write_block(block, data)
        records[block.index] = BlockRecord("grads", block.index, block.start, block.stop, "", 0, (), 0.0, 0.0, files)
    return store, BlockReader(store, codec, records), records


@pytest.mark.parametrize("codec", [Codec("lz4", 5), Codec("zstd", 1), Codec("none", 1)])
@pytest.mark.parametrize("chunk_bytes", [10**6, 640, 100])
def test_a_block_is_what_zarr_reads(tmp_path, monkeypatch, codec, chunk_bytes):
    store, reader, _ = made(tmp_path, monkeypatch, codec, chunk_bytes)
    for block in (*blocks(ROWS, BLOCK), blocks(ROWS, BLOCK)[0]):
        found, expected = reader.read(block, store.layouts), store.read_block(block)
        assert {path: np.concatenate(pieces).tobytes() for path, pieces in found.items()} == {
            path: values.tobytes() for path, values in expected.items()
        }
        assert {path: pieces[0].dtype for path, pieces in found.items()} == {
            path: values.dtype for path, values in expected.items()
        }


def test_only_plain_chunks_come_in_several_pieces(tmp_path, monkeypatch):
    for codec, pieces in ((Codec("lz4", 5), 1), (Codec("none", 1), 4)):
        store, reader, _ = made(tmp_path / codec.name, monkeypatch, codec, chunk_bytes=640)
        assert len(reader.read(blocks(ROWS, BLOCK)[0], ["dense"])["dense"]) == pieces
        del store


def test_memory_is_used_again_after_as_many_readings_as_there_are_slots(tmp_path, monkeypatch):
    store, _, records = made(tmp_path, monkeypatch, Codec("lz4", 5))
    reader = BlockReader(store, Codec("lz4", 5), records, slots=2)
    every = blocks(ROWS, BLOCK)
    places = [reader.read(every[i], ["dense"])["dense"][0].ctypes.data for i in (0, 1, 0, 1)]
    assert places[0] == places[2] != places[1] == places[3]


@pytest.mark.parametrize("codec", [Codec("lz4", 5), Codec("none", 1)])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "short", "gone", "other", "longer"])
def test_damage_is_an_error_that_names_file_and_rows(tmp_path, monkeypatch, codec, damage):
    _, reader, records = made(tmp_path, monkeypatch, codec)
    record = next(each for each in records[1].files if "dense" in each.path)
    file = tmp_path / record.path
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "other":  # a valid chunk of the same array
        content = bytearray((tmp_path / next(e for e in records[0].files if "dense" in e.path).path).read_bytes())
    content += b"x" if damage == "longer" else b""
    sizes = {"cut": len(content) // 2, "empty": 0, "short": 3}
    file.write_bytes(bytes(content[: sizes.get(damage, len(content))]))
    if damage == "gone":
        file.unlink()
    with pytest.raises(DamagedStore, match=r"dense/c\.1\.0 \(rows 8 to 15\): expected .* found .*--force"):
        reader.read(blocks(ROWS, BLOCK)[1], ["dense"])
    reader.read(blocks(ROWS, BLOCK)[0], ["dense"])


def test_a_file_that_decodes_to_another_number_of_bytes_is_refused(tmp_path, monkeypatch):
    """What a forged ledger would let through: its checksum is right, its content is not of that size."""
    store, _, records = made(tmp_path, monkeypatch, Codec("lz4", 5))
    body, checksum = Codec("lz4", 5).encode(np.zeros(3))
    record = next(each for each in records[1].files if "dense" in each.path)
    (tmp_path / record.path).write_bytes(body + checksum)
    forged = reading.FileRecord(record.path, len(body) + 4, int.from_bytes(checksum, "little"))
    files = tuple(forged if each == record else each for each in records[1].files)
    records[1] = BlockRecord("grads", 1, 8, 16, "", 0, (), 0.0, 0.0, files)
    with pytest.raises(DamagedStore, match="bytes in it"):
        BlockReader(store, Codec("lz4", 5), records).read(blocks(ROWS, BLOCK)[1], ["dense"])


def test_a_chunk_that_the_ledger_does_not_name_is_refused(tmp_path, monkeypatch):
    store, _, records = made(tmp_path, monkeypatch, Codec("lz4", 5))
    block = blocks(ROWS, BLOCK)[1]
    reader = BlockReader(store, Codec("lz4", 5), {1: records[0]})
    with pytest.raises(DamagedStore, match=r"expected c\.1\.0 \(rows 8 to 15\) in the ledger"):
        reader.read(block, ["dense"])


def test_expecting_a_block_needs_no_file(tmp_path, monkeypatch):
    _, reader, records = made(tmp_path, monkeypatch, Codec("lz4", 5))
    (tmp_path / records[1].files[0].path).unlink()
    assert reader.expect(blocks(ROWS, BLOCK)[1]) is None
