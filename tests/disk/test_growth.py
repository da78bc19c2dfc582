"""A store that gets more rows: whenever it is killed, what it held is intact and the growth is finished later."""

import json
import os

import numpy as np
import pytest
import zarr

from infl_cache.disk.growth import metadata_of
from infl_cache.disk.layout import Block
from infl_cache.disk.run import RunFolder
from infl_cache.errors import DamagedStore, IncompleteStore

# Ten rows are there, in blocks of four; four more start at the next multiple of four.
GROWN = {"spans": [[0, 10], [12, 16]], "samples": [[0, 10, 1], [20, 24, 1]]}
NEW = Block(3, 12, 16)


class Killed(BaseException):
    """Nobody catches it: what is on the disk then is what a kill leaves."""


def grow(folder):
    with folder.writing():
        folder.grow("grads", 16, **GROWN)


def shapes(path):
    return {name: array.shape[0] for name, array in zarr.open_group(path / "grad_z.zarr", mode="r").arrays()}


@pytest.fixture
def folder(tmp_path, sample):
    return sample.make(tmp_path / "run")


def test_a_grown_store_has_its_rows_and_its_new_ones_and_nothing_between(folder, sample):
    grow(folder)
    with folder.writing():
        sample.commit(folder, NEW)
    again = RunFolder(folder.path)
    assert [(b.index, b.start, b.stop) for b in again.stage_blocks("grads")] == [
        (0, 0, 4), (1, 4, 8), (2, 8, 10), (3, 12, 16),
    ]  # fmt: skip
    assert again.samples("grads").tolist() == [*range(10), -1, -1, *range(20, 24)]
    store = again.store("grads")
    for block in (*sample.blocks, NEW):
        for path, values in sample.data(block).items():
            np.testing.assert_array_equal(store.read_block(block)[path], values, strict=True)
    assert np.isnan(zarr.open_group(folder.path / "grad_z.zarr", mode="r")["dense"][10:12]).all()
    assert set(shapes(folder.path).values()) == {16}
    assert len(again.require_complete("grads")) == 4


def test_a_grown_store_is_unfinished_until_its_new_rows_are_there(folder):
    grow(folder)
    with pytest.raises(IncompleteStore, match="found 3 of 4 blocks"):
        RunFolder(folder.path).require_complete("grads")


def test_a_kill_at_any_moment_of_growing_loses_nothing_and_is_finished_by_the_next_writer(
    tmp_path, sample, monkeypatch
):
    replace, count = os.replace, 0
    moment = 0
    while True:
        moment += 1
        folder, count = sample.make(tmp_path / str(moment)), 0

        def counted(source, target, moment=moment):
            nonlocal count
            count += 1
            if count == moment:
                raise Killed
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            try:
                grow(folder)
            except Killed:
                pass
            else:
                break
        killed = RunFolder(folder.path)
        read = killed.store("grads")
        for block in sample.blocks:
            for path, values in sample.data(block).items():
                np.testing.assert_array_equal(read.read_block(block)[path], values)
        for each in metadata_of(folder.path, killed.plan("grads")):
            assert (folder.path / each.path).stat().st_size == each.size
        if "spans" in killed.plan("grads"):
            with killed.writing():
                sample.commit(killed, NEW)
        else:
            grow(killed)
            with killed.writing():
                sample.commit(killed, NEW)
        finished = RunFolder(folder.path)
        assert set(shapes(folder.path).values()) == {16}
        assert "metadata_before" not in finished.plan("grads")
        assert len(finished.require_complete("grads")) == 4
    assert moment > 4, "manifest, three arrays, manifest"


def test_growing_twice_and_to_no_more_rows_than_there_are(folder):
    grow(folder)
    before = {path: path.read_bytes() for path in folder.path.rglob("zarr.json")}
    grow(folder)
    with folder.writing():
        folder.grow("grads", 10, spans=[[0, 10]], samples=[[0, 10, 1]])
    assert {path: path.read_bytes() for path in folder.path.rglob("zarr.json")} == before
    assert [block.stop for block in RunFolder(folder.path).stage_blocks("grads")] == [4, 8, 10]


def test_metadata_that_are_neither_old_nor_new_are_named_and_not_rewritten(folder):
    path = folder.path / "grad_z.zarr" / "dense" / "zarr.json"
    path.write_bytes(path.read_bytes().replace(b"float32", b"float64"))
    before = path.read_bytes()
    with pytest.raises(DamagedStore, match=r"dense/zarr\.json: expected"):
        grow(folder)
    assert path.read_bytes() == before


def test_a_reader_that_knows_the_manifest_of_before_reads_the_grown_store(folder, sample):
    reader = RunFolder(folder.path)
    grow(folder)
    np.testing.assert_array_equal(reader.store("grads").read_block(sample.blocks[0])["digest"],
                                  sample.data(sample.blocks[0])["digest"])  # fmt: skip


def test_rows_beyond_the_end_are_damage_and_no_short_answer(folder, sample):
    path = folder.path / "grad_z.zarr" / "digest" / "zarr.json"
    metadata = json.loads(path.read_bytes())
    store = folder.store("grads")
    metadata["shape"] = [9]
    path.write_text(json.dumps(metadata))
    with pytest.raises(DamagedStore, match=r"zarr\.json: expected"):
        folder.store("grads")
    shorter = type(store)(folder.path / "grad_z.zarr", folder.array_layouts("grads"))
    with pytest.raises(DamagedStore, match="digest: expected rows 8 to 9, found 1 of them"):
        shorter.read_block(sample.blocks[2], ["digest"])
