"""Tiles in slabs give the same matrix; sums that were kept are gone on with, to the bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from infl_cache import Interrupted, Run
from infl_cache.disk.reader import BlockReader
from infl_cache.disk.state import read_header
from infl_cache.stages import contraction
from infl_cache.stages import influence as stage
from infl_cache.stages.schedule import Order
from tests.stages.test_influence import expected_matrix, relative, wide
from tests.tasks import TASKS

QUIET = {"progress": False}
OPTIONS = {"damping": 0.1, "block_rows": 4, **QUIET}
ACCUMULATOR = "influence.tile"


@pytest.fixture
def slabs_of(monkeypatch):
    """`slabs_of(rows, columns, slab_bytes)`: the order that every run from now on takes."""

    def chosen(rows, columns, slab_bytes):
        monkeypatch.setattr(stage, "best_order", lambda *given: Order(rows, columns, slab_bytes, 0))

    return chosen


@pytest.mark.parametrize("form", ["auto", "dense"])
@pytest.mark.parametrize("name", sorted(set(TASKS) - {"branching"}))
def test_slabs_give_the_matrix(name, form, slabs_of, tmp_path):
    slabs_of(3, 8, 900)
    run = Run(tmp_path / "r", TASKS[name](torch.float64), form=form, **OPTIONS)
    run.all()
    assert run.folder.plan("influence")["slab_bytes"] == 900
    assert relative(run.scores(), expected_matrix(run)) <= 1e-6


@pytest.mark.parametrize(
    "given", [{}, {"dtype": "bfloat16"}, {"codec": "none"}, {"product_dtype": "bfloat16"}, {"matrix": False}]
)
@pytest.mark.parametrize("form", ["auto", "dense"])
def test_slabs_change_nothing_for_any_kind_of_store(form, given, slabs_of, monkeypatch, tmp_path):
    monkeypatch.setattr("infl_cache.disk.layout.CHUNK_BYTES", 2000)
    monkeypatch.setattr("infl_cache.disk.layout.CHUNK_COLUMNS", 50)
    runs = [Run(tmp_path / name, wide(), form=form, **given, **OPTIONS) for name in ("rows", "slabs")]
    runs[0].all()
    slabs_of(4, 30, 10_000)
    runs[1].all()
    assert ["slab_bytes" in run.folder.plan("influence") for run in runs] == [False, True]
    if given.get("matrix", True):
        assert relative(runs[1].scores(), runs[0].scores()) <= (2e-2 if "product_dtype" in given else 1e-6)
    else:
        first, second = (np.load(run.path / "rankings.npz") for run in runs)
        assert np.array_equal(first["helpful_ids"], second["helpful_ids"])


def test_little_memory_is_enough_for_the_matrix_and_not_for_s_test(monkeypatch, tmp_path):
    """The order is chosen by itself: 7 x 30 numbers fit, 7 rows of s_test do not; these are cut into columns."""
    monkeypatch.setattr("infl_cache.disk.layout.CHUNK_BYTES", 1400)
    monkeypatch.setattr("infl_cache.disk.layout.CHUNK_COLUMNS", 50)
    run = Run(tmp_path / "r", wide(), memory="80KB", **OPTIONS)
    run.all()
    assert run.folder.plan("influence")["slab_bytes"] == 20_000
    assert relative(run.scores(), expected_matrix(run)) <= 1e-6


def test_each_store_is_read_once(slabs_of, monkeypatch, tmp_path):
    """Plain rows cut into columns: no chunk file is opened twice."""
    monkeypatch.setattr("infl_cache.disk.layout.CHUNK_BYTES", 2000)
    monkeypatch.setattr("infl_cache.disk.layout.CHUNK_COLUMNS", 50)
    slabs_of(7, 30, 7 * 4 * 500)
    run = Run(tmp_path / "r", wide(), form="dense", test_block_rows=7, **OPTIONS)
    run.grads(), run.stest()
    opened, plain = [], BlockReader._content
    monkeypatch.setattr(
        BlockReader,
        "_content",
        lambda self, record, block: opened.append(record.path) or plain(self, record, block),
    )
    run.influence()
    assert relative(run.scores(), expected_matrix(run)) <= 1e-6
    gradients = [path for path in opened if "grad_z.zarr/dense/" in path]
    assert len(gradients) == len(set(gradients)) > 30
    # A chunk of s_test that two slabs share is read for both.
    solutions = [path for path in opened if "s_test.zarr/s_test/" in path]
    assert len(solutions) <= 1.5 * len(set(solutions))


def steps_of(run, monkeypatch, stop=None, error=RuntimeError):
    """The steps that are added from now on; step `stop` raises."""
    plain, seen = contraction.Sums.add, []

    def add(self, slab, block, piece, asked):
        step = (self._tile.index, slab.part.names, slab.part.start, slab.start, block.index)
        if not seen or seen[-1] != step:
            if stop is not None and len(seen) == stop:
                raise error("stopped")
            seen.append(step)
        plain(self, slab, block, piece, asked)

    monkeypatch.setattr(contraction.Sums, "add", add)
    return seen


@pytest.mark.parametrize("matrix", [True, False])
@pytest.mark.parametrize("stop", [1, 5, 12, 30])
def test_a_killed_tile_goes_on_from_its_sums_with_the_same_bits(matrix, stop, slabs_of, monkeypatch, tmp_path):
    slabs_of(4, 30, 10_000)
    calm = Run(tmp_path / "calm", wide(), matrix=matrix, **OPTIONS)
    calm.all()
    run = Run(tmp_path / "r", wide(), matrix=matrix, **OPTIONS)
    run.grads(), run.stest()
    monkeypatch.setattr(contraction, "KEEP_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        before = steps_of(run, patched, stop)
        with pytest.raises(RuntimeError, match="stopped"):
            run.influence()
    assert read_header(run.path / ACCUMULATOR).facts["steps"] > 0
    after = steps_of(run, monkeypatch)
    again = Run(run.path, wide(), **QUIET)
    again.influence()
    assert len(before) == stop
    assert not set(before) & set(after), "no step is done twice"
    assert not (run.path / ACCUMULATOR).exists()
    name = "influence.npy" if matrix else "rankings.npz"
    assert (run.path / name).read_bytes() == (calm.path / name).read_bytes()


@pytest.mark.parametrize(("worth", "there"), [(1e9, False), (-1.0, True)])
def test_an_interrupted_tile_is_kept_if_it_is_worth_it(worth, there, slabs_of, monkeypatch, tmp_path):
    slabs_of(4, 30, 10_000)
    run = Run(tmp_path / "r", wide(), **OPTIONS)
    run.grads(), run.stest()
    monkeypatch.setattr(contraction, "WORTH_KEEPING_SECONDS", worth)
    plain = contraction.Sums.keep

    def stopping():
        raise Interrupted("stopped", 2)

    def keep(self, steps):
        self._run = replace(self._run, check=stopping) if steps == 3 else self._run
        plain(self, steps)

    monkeypatch.setattr(contraction.Sums, "keep", keep)
    with pytest.raises(Interrupted):
        run.influence()
    assert (run.path / ACCUMULATOR).exists() == there


@pytest.mark.parametrize("damage", ["flip", "cut", "other"])
def test_sums_that_are_damaged_or_of_another_tile_are_left_alone(damage, slabs_of, monkeypatch, tmp_path, caplog):
    slabs_of(4, 30, 10_000)
    run = Run(tmp_path / "r", wide(), **OPTIONS)
    run.grads(), run.stest()
    monkeypatch.setattr(contraction, "KEEP_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        steps_of(run, patched, 7)
        with pytest.raises(RuntimeError, match="stopped"):
            run.influence()
    file = run.path / ACCUMULATOR
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "cut":
        content = content[:-7]
    else:  # sums of the same shape that belong to another matrix
        other = Run(tmp_path / "other", wide(), **{**OPTIONS, "damping": 0.2})
        other.grads(), other.stest()
        with monkeypatch.context() as patched:
            steps_of(other, patched, 9)
            with pytest.raises(RuntimeError, match="stopped"):
                other.influence()
        content = (other.path / ACCUMULATOR).read_bytes()
    file.write_bytes(bytes(content))
    again = Run(run.path, wide(), **QUIET)
    again.influence()
    assert relative(again.scores(), expected_matrix(again)) <= 1e-6
    assert ("starts at its beginning" in caplog.text) == (damage != "other")


def test_sums_do_not_outlive_the_tile_that_a_kill_left_them_with(slabs_of, monkeypatch, tmp_path):
    """Killed between the ledger and the removal of the sums: nothing is left to do but to remove them."""
    slabs_of(7, 30, 10_000)
    run = Run(tmp_path / "r", wide(), **OPTIONS)
    run.grads(), run.stest()
    monkeypatch.setattr(contraction, "KEEP_SECONDS", 0.0)

    def stopping(self):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(contraction.Sums, "forget", stopping)
        with pytest.raises(RuntimeError, match="stopped"):
            run.influence()
    assert (run.path / ACCUMULATOR).exists()
    Run(run.path, wide(), **QUIET).influence()
    assert not (run.path / ACCUMULATOR).exists()


@pytest.mark.parametrize("slab_bytes", [0, 10_000])
def test_test_samples_that_come_later_have_tiles_as_large_as_memory_allows(slab_bytes, monkeypatch, tmp_path):
    """The plan was made for one of them: the others do not pass one by one."""
    if slab_bytes:
        monkeypatch.setattr(stage, "best_order", lambda *given: Order(1, 30, slab_bytes, 0))
    for test in ("0", "all"):
        run = Run(tmp_path / "r", wide(), test=test, **OPTIONS)
        run.all()
    assert len(run.folder.plan("influence")["tests"]) == 2
    assert relative(run.scores(), expected_matrix(run)) <= 1e-6
