"""Peak memory of each stage, in a process of its own, over a store of more than ten times the budget."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from infl_cache import Run, Task

BUDGET = 50_000_000
# Of which Python and PyTorch alone take 240 MB.
ALLOWANCE = {"grads": 400_000_000, "stest": 400_000_000, "influence": 300_000_000}
N_TRAIN, N_TEST, WIDTH = 525, 6, 1000


class Noise:
    """Random samples by index, none of them kept."""

    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.seed + index)
        return torch.randn(WIDTH, generator=generator), index % 250


def task():
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss(reduction="none")
    return Task(model=nn.Linear(WIDTH, 250), train=Noise(N_TRAIN, 0), test=Noise(N_TEST, 10**6), loss=loss)


def run_stage(path, stage):
    getattr(Run(path, task(), form="dense", damping=1.0, tolerance=0.05, memory=BUDGET, progress=False), stage)()


def peak_of(path, stage):
    """The high-water mark of a process that runs one stage, in bytes."""
    # VmHWM and not ru_maxrss: the latter remembers the process that started this one.
    code = (
        f"from tests.test_memory import run_stage; run_stage({str(path)!r}, {stage!r})\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.split()[-1])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc to see a peak")
def test_every_stage_keeps_to_its_budget_over_ten_times_as_large_a_store(tmp_path):
    peaks = {stage: peak_of(tmp_path / "run", stage) for stage in ALLOWANCE}
    rows = 4 * N_TRAIN * (250 * WIDTH + 250)
    print({stage: f"{peak / 1e6:.0f} MB" for stage, peak in peaks.items()}, f"rows {rows / 1e6:.0f} MB")
    assert rows >= 10 * BUDGET
    assert Run(tmp_path / "run").folder.store("grads").layouts["dense"].shape == (N_TRAIN, 250 * WIDTH + 250)
    assert {stage: peak for stage, peak in peaks.items() if peak > BUDGET + ALLOWANCE[stage]} == {}
