"""The old package's example: both modes on files like CIFAR-10's, in whose folder it writes nothing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def test_both_modes_say_the_same_and_the_data_are_left_alone(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in ("data_batch_1.bin", "test_batch.bin"):
        rows = random.integers(0, 256, (6, 3073), np.uint8)
        rows[:, 0] = np.arange(6) % 2
        rows.tofile(folder / name)
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "ptif_cifar10.py", folder, "6", "1"], cwd=tmp_path, text=True,
        capture_output=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line.partition("helpful")[2] for line in done.stdout.splitlines() if line.startswith("calc_")]
    assert len(said) == 2
    assert said[0] == said[1] != ""
    assert sorted(os.listdir(folder)) == ["data_batch_1.bin", "test_batch.bin"]
