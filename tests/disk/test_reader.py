"""Blocks by the fast way equal those by zarr's, and damage of any kind is an error that names file and rows."""

import threading

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
    monkeypatch.setattr("infl_cache.disk.layout.CHUNK_COLUMNS", 10)
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
@pytest.mark.parametrize("columns", [slice(0, 40), slice(13, 14), slice(7, 33)])
def test_a_block_is_what_zarr_reads(tmp_path, monkeypatch, codec, chunk_bytes, columns):
    store, reader, _ = made(tmp_path, monkeypatch, codec, chunk_bytes)
    for block in (*blocks(ROWS, BLOCK), blocks(ROWS, BLOCK)[0]):
        expected = store.read_block(block)
        for given in ({}, {"dense": columns}):
            found = reader.read(block, store.layouts, given)
            assert np.array_equal(assembled(found["a/input"], expected["a/input"]), expected["a/input"])
            whole = assembled(found["dense"], expected["dense"])
            at = given.get("dense", slice(None))
            assert np.array_equal(whole[:, at], expected["dense"][:, at])
            assert np.isnan(np.delete(whole, np.arange(40)[at], axis=1)).all()


@pytest.mark.parametrize("codec", [Codec("lz4", 5), Codec("none", 1)])
def test_each_chunk_is_handed_on_by_the_thread_that_decoded_it(tmp_path, monkeypatch, codec):
    store, _, records = made(tmp_path, monkeypatch, codec, 640)
    begun = []
    reader = BlockReader(store, codec, records, threads=3, begin=lambda: begun.append(threading.get_ident()))
    assert len(set(begun)) == 3
    block, expected = blocks(ROWS, BLOCK)[1], store.read_block(blocks(ROWS, BLOCK)[1])["dense"]
    found = list(
        reader.each(
            block, "dense", slice(7, 33), lambda each: (each.columns, each.values.copy(), threading.get_ident())
        )
    )
    assert [columns for columns, _, _ in found] == [slice(7, 10), slice(10, 20), slice(20, 30), slice(30, 33)]
    assert all(np.array_equal(values, expected[:, columns]) for columns, values, _ in found)
    assert {thread for _, _, thread in found} <= set(begun)


def test_no_more_results_wait_than_there_are_threads(tmp_path, monkeypatch):
    store, _, records = made(tmp_path, monkeypatch, Codec("lz4", 5), 100)
    reader, begun = BlockReader(store, Codec("lz4", 5), records, threads=2), []
    for taken, _ in enumerate(reader.each(blocks(ROWS, BLOCK)[1], "dense", None, begun.append)):
        assert len(begun) <= taken + 3
    assert len(begun) == taken + 1 > 20


def assembled(pieces, like):
    """Pieces where they belong, each place of a block taken at most once, NaN where none is."""
    whole = np.full(like.shape, np.nan, like.dtype)
    for piece in pieces:
        assert piece.values.dtype == like.dtype
        assert np.isnan(whole[piece.rows, piece.columns]).all()
        whole[piece.rows, piece.columns] = piece.values
    return whole


def test_what_does_not_lie_together_comes_in_pieces(tmp_path, monkeypatch):
    """Whole rows are decoded into one place; chunks without compression, and columns, have places of their own."""
    for codec, path, chunk_bytes, count in (
        ("lz4", "a/input", 240, 1),
        ("none", "a/input", 240, 2),
        ("lz4", "dense", 640, 4),
        ("none", "dense", 640, 4),
    ):
        _, reader, _ = made(tmp_path / codec / path, monkeypatch, Codec(codec, 1), chunk_bytes)
        assert len(reader.read(blocks(ROWS, BLOCK)[0], [path])[path]) == count


def test_columns_that_are_not_asked_for_are_not_read(tmp_path, monkeypatch):
    store, reader, records = made(tmp_path, monkeypatch, Codec("lz4", 5), chunk_bytes=640)
    block, width = blocks(ROWS, BLOCK)[0], store.layouts["dense"].chunk_row_shape[0]
    expected = store.read_block(block)["dense"]
    for record in records[0].files:
        if "dense" in record.path and not record.path.endswith("c.0.1"):
            (tmp_path / record.path).unlink()
    (piece,) = reader.read(block, ["dense"], {"dense": slice(width, 2 * width)})["dense"]
    assert np.array_equal(piece.values, expected[:, width : 2 * width])


def test_memory_is_used_again_after_as_many_readings_as_there_are_slots(tmp_path, monkeypatch):
    store, _, records = made(tmp_path, monkeypatch, Codec("lz4", 5))
    reader = BlockReader(store, Codec("lz4", 5), records, slots=2)
    every = blocks(ROWS, BLOCK)
    places = [reader.read(every[i], ["dense"])["dense"][0].values.ctypes.data for i in (0, 1, 0, 1)]
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
    assert reader.expect(blocks(ROWS, BLOCK)[1], ["a/input", "dense"]) is None
