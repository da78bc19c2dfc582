"""SIGKILL at random moments: nothing committed is lost or done again, and the final files are those of a calm run.

`pytest -s` shows the seed of each job; `INFL_CACHE_SEED=17` repeats one.
"""

import json
import os
import random
import time

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from infl_cache import Run, Task
from infl_cache.disk.ledger import Ledger
from infl_cache.disk.run import RunFolder
from infl_cache.disk.sweep import OUTPUTS
from infl_cache.stages import contraction, fisher, keeping, tally
from tests.faults import times
from tests.faults.killing import killed, note, started, wait_for_lines

KILLS = times(4, 16)
COMMON = {"block_rows": 16, "test_block_rows": 4, "tile_rows": 8, "damping": 1.0, "progress": False}
# What is run, and with which options.
JOBS = {
    "cg": {"tolerance": 0.05},
    "pcg": {"solver": "pcg", "preconditioner": "none", "tolerance": 1e-3},
    "lissa": {"solver": "lissa", "depth": 40, "sample_batch": 16, "by_layer": True},
    "fisher": {"solver": "fisher", "memory": 200_000},
    "ekfac": {"solver": "ekfac", "matrix": False},
    "dense rows": {"form": "dense", "solver": "identity", "by_layer": True},
    "no cache": {"cache": False, "tolerance": 0.05},
}


def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))
    x, y = torch.randn(200, 12), torch.randint(0, 4, (200,))
    return Task(
        model=model,
        train=TensorDataset(x[:160], y[:160]),
        test=TensorDataset(x[160:], y[160:]),
        loss=nn.CrossEntropyLoss(reduction="none"),
    )


def all_stages(job, path, log):
    """A whole run that writes down every block before it is committed; states are kept all the time."""
    torch.set_num_threads(1)
    commit = Ledger.commit

    def noted(self, record):
        note(log, json.dumps([record.stage, record.index]))
        return commit(self, record)

    Ledger.commit = noted
    keeping.CHECKPOINT_SECONDS = contraction.KEEP_SECONDS = tally.KEEP_SECONDS = 0.0
    run = Run(path, task(), **COMMON, **JOBS[job])
    run.all()
    if JOBS[job].get("cache", True):
        run.self_influence()


def committed(path):
    """What the ledger calls done, in the words of the log."""
    if not (path / "ledger.sqlite").exists():
        return set()
    folder = RunFolder(path)
    return {json.dumps([stage, index]) for stage in OUTPUTS if stage in folder.manifest.stages
            for index in folder.records(stage)}  # fmt: skip


def data_files(path):
    """Every file that holds numbers."""
    kept = [p for p in sorted(path.rglob("*")) if p.is_file() and (p.suffix in (".npy", ".npz") or ".zarr" in str(p))]
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in kept}


@pytest.mark.parametrize("job", [*JOBS] if times(0, 1) else ["cg", "lissa", "no cache"])
def test_sigkills_lose_nothing_repeat_nothing_and_change_nothing(job, tmp_path):
    calm = tmp_path / "calm"
    child = started(all_stages, job, calm, tmp_path / "calm.log")
    child.join()
    assert child.exitcode == 0
    expected, lines = data_files(calm), len((tmp_path / "calm.log").read_text().splitlines())
    assert len(expected) > 20
    seed = int(os.environ.get("INFL_CACHE_SEED") or int.from_bytes(os.urandom(3), "little"))
    moments, kills, runs, hit = random.Random(seed), 0, 0, {}
    while kills < KILLS:
        path, before, finished = tmp_path / f"killed{runs}", set(), False
        runs += 1
        while not finished:
            log = tmp_path / "part.log"
            log.unlink(missing_ok=True)
            child = started(all_stages, job, path, log)
            if kills < KILLS:
                # Some blocks further on, at any instant of computing, writing, syncing or committing.
                wait_for_lines(child, log, moments.randrange(0, 1 + lines // 3))
                time.sleep(moments.uniform(0, 0.05))
            else:
                child.join(120)
            finished = not killed(child)
            kills += not finished
            computed = log.read_text().splitlines() if log.exists() else []
            assert len(computed) == len(set(computed)), f"a block was committed twice in one run (seed {seed})"
            assert before.isdisjoint(computed), f"committed blocks were computed again (seed {seed})"
            before = committed(path)
            last = json.loads(computed[-1])[0] if computed else "none"
            hit[last] = hit.get(last, 0) + (not finished)
        found = data_files(path)
        assert found.keys() == expected.keys(), f"other files (seed {seed})"
        assert [name for name in found if found[name] != expected[name]] == [], f"files differ (seed {seed})"
        assert len(before) == lines
    print(f"{job}: seed {seed}, {kills} kills over {runs} runs; last commit before the kill: {hit}")


def test_the_tiles_of_fisher_are_on_the_disk(tmp_path):
    made = []
    original = fisher.TileFolder
    try:
        fisher.TileFolder = lambda *given: made.append(given) or original(*given)
        run = Run(tmp_path / "run", task(), **COMMON, **JOBS["fisher"])
        run.grads()
        run.stest()
    finally:
        fisher.TileFolder = original
    assert made
