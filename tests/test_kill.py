"""SIGKILL at random moments: nothing committed is lost or done again, and the final files are those of a calm run."""

import json
import os
import random
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from infl_cache import Run, Task
from infl_cache.disk.matrix import MatrixFile
from infl_cache.disk.run import RunFolder
from infl_cache.disk.store import Store
from tests.killing import killed, note, started, wait_for_lines

KILLS = 20


def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))
    x, y = torch.randn(360, 12), torch.randint(0, 4, (360,))
    return Task(
        model=model,
        train=TensorDataset(x[:320], y[:320]),
        test=TensorDataset(x[320:], y[320:]),
        loss=nn.CrossEntropyLoss(reduction="none"),
    )


def all_stages(path, log):
    """A whole run that writes down every block it computes, before the block is on the disk."""
    torch.set_num_threads(1)
    original_block, original_tile = Store.write_block, MatrixFile.write

    def write_block(self, block, data):
        note(log, json.dumps([self.folder.stem, block.index]))
        return original_block(self, block, data)

    def write(self, start, column, values):
        note(log, json.dumps(["influence", [start, column]]))
        return original_tile(self, start, column, values)

    Store.write_block, MatrixFile.write = write_block, write
    Run(path, task(), block_rows=16, test_block_rows=4, tile_rows=8, damping=1.0,
        tolerance=0.05, progress=False).all()  # fmt: skip


def committed(path):
    """What the ledger calls done, in the words of the log."""
    if not (path / "ledger.sqlite").exists():
        return set()
    folder = RunFolder(path)
    done = {json.dumps(["grad_z", index]) for index in folder.records("grads")}
    done |= {json.dumps(["s_test", index]) for index in folder.records("stest")}
    return done | {json.dumps(["influence", [8 * index, 0]]) for index in folder.records("influence")}


def data_files(path):
    kept = [p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix in (".npy", ".npz")]
    kept += [p for name in ("grad_z.zarr", "s_test.zarr") for p in sorted((path / name).rglob("*")) if p.is_file()]
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in kept}


def test_twenty_sigkills_lose_nothing_repeat_nothing_and_change_nothing(tmp_path: Path):
    calm = tmp_path / "calm"
    child = started(all_stages, calm, tmp_path / "calm.log")
    child.join()
    assert child.exitcode == 0
    expected = data_files(calm)
    assert len(expected) > 50

    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    moments = random.Random(seed)
    kills, runs, hit = 0, 0, {"grad_z": 0, "s_test": 0, "influence": 0}
    while kills < KILLS:
        path, before = tmp_path / f"killed{runs}", set()
        runs += 1
        finished = False
        while not finished:
            log = tmp_path / "part.log"
            log.unlink(missing_ok=True)
            child = started(all_stages, path, log)
            if kills < KILLS:
                # Some blocks further on, at any instant of computing, writing, syncing or committing.
                wait_for_lines(child, log, moments.randrange(1, 12))
                time.sleep(moments.uniform(0, 0.03))
            else:
                child.join(120)
            finished = not killed(child)
            kills += not finished
            computed = log.read_text().splitlines() if log.exists() else []
            assert len(computed) == len(set(computed)), "a block was computed twice in one run"
            assert before.isdisjoint(computed), f"committed blocks were computed again (seed {seed})"
            if computed and not finished:
                hit[json.loads(computed[-1])[0]] += 1
            before = committed(path)
        found = data_files(path)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == [], f"files differ (seed {seed})"
    print(f"{kills} kills over {runs} runs; last block before the kill: {hit}")
