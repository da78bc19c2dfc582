"""Computing and writing side by side: memory that runs out, blocks in order, times that add up."""

import numpy as np
import pytest
import torch

from infl_cache import BadInput, Run
from infl_cache.stages import blocks as stage
from tests import tasks

QUIET = {"progress": False}


def limited(most, error, seen):
    real = stage.capture

    def capture(task, forms, batch, measure=False):
        seen.append(len(batch.indices))
        if len(batch.indices) > most:
            raise error
        return real(task, forms, batch, measure)

    return capture


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["device", "host", "allocator"],
)
def test_out_of_memory_halves_the_batch_goes_on_and_is_remembered(tmp_path, monkeypatch, error, caplog):
    calm = Run(tmp_path / "calm", tasks.mlp(), block_rows=6, **QUIET)
    calm.grads()
    seen = []
    monkeypatch.setattr(stage, "capture", limited(2, error, seen))
    run = Run(tmp_path / "run", tasks.mlp(), block_rows=6, **QUIET)
    assert run.grads().computed == 10
    assert seen == [6, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert np.allclose(run.grad_z(slice(None)), calm.grad_z(slice(None)), rtol=1e-12)
    assert run.folder.plan("grads")["batch_size"] == 1
    assert "batches of 3 samples" in caplog.text


def test_out_of_memory_with_a_single_sample_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "capture", limited(0, MemoryError("none left"), []))
    with pytest.raises(MemoryError, match="none left"):
        Run(tmp_path / "run", tasks.mlp(), **QUIET).grads()


def test_another_error_is_not_taken_for_it(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(stage, "capture", limited(0, RuntimeError("something else"), seen))
    with pytest.raises(RuntimeError, match="something else"):
        Run(tmp_path / "run", tasks.mlp(), **QUIET).grads()
    assert len(seen) == 1


def test_an_error_of_the_disk_ends_the_computation_soon(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(stage, "capture", limited(99, None, seen))
    run = Run(tmp_path / "run", tasks.mlp(n_train=60), block_rows=1, **QUIET)

    def failing(self, chunks):
        raise OSError("the disk went away")

    monkeypatch.setattr("infl_cache.disk.store.Store.write_encoded", failing)
    with pytest.raises(OSError, match="went away"):
        run.grads()
    assert len(seen) < 10
    assert run.folder.records("grads") == {}


def test_blocks_before_a_bad_sample_are_kept(tmp_path, monkeypatch):
    real = stage.capture

    def broken(task, forms, batch, measure=False):
        found = real(task, forms, batch, measure)
        if 7 in batch.indices:
            found.loss[list(batch.indices).index(7)] = torch.nan
        return found

    monkeypatch.setattr(stage, "capture", broken)
    run = Run(tmp_path / "run", tasks.mlp(), block_rows=2, **QUIET)
    with pytest.raises(BadInput, match=r"train samples 7;"):
        run.grads()
    assert sorted(run.folder.records("grads")) == [0, 1, 2]


def test_timings_say_where_the_seconds_went(tmp_path):
    result = Run(tmp_path / "run", tasks.mlp(), block_rows=2, **QUIET).grads()
    assert {"start", "load", "compute", "copy", "encode", "write", "sync", "commit"} <= set(result.timings)
    assert 0 < result.timings["compute"] < result.seconds
    assert all(seconds >= 0 for seconds in result.timings.values())
    in_turn = ("start", "load", "compute", "copy", "encode", "wait")  # on a CPU all of these are the main thread's
    assert sum(result.timings[name] for name in in_turn) < result.seconds
