"""A script as the old package's README shows it, in a process of its own, with its import changed: both modes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BEFORE = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def get_my_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))

def get_my_dataloaders():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(28, 4, generator=generator), torch.arange(28) % 3
    train, test = TensorDataset(x[:24], y[:24]), TensorDataset(x[24:], y[24:])
    return DataLoader(train, batch_size=4, shuffle=True), DataLoader(test, batch_size=4)
"""
SCRIPT = """
import infl_cache.ptif as ptif

# Supplied by the user:
model = get_my_model()
trainloader, testloader = get_my_dataloaders()

ptif.init_logging()
config = ptif.get_default_config()

influences, harmful, helpful = ptif.MODE(config, model, trainloader, testloader)

# do something with influences/harmful/helpful
"""
AFTER = """
import json
json.dump([influences, harmful, helpful], open("found.json", "w"))
"""


@pytest.mark.parametrize("mode", ["calc_img_wise", "calc_all_grad_then_test"])
def test_a_script_of_the_old_package_runs_after_changing_its_import(mode, tmp_path):
    code = BEFORE + SCRIPT.replace("MODE", mode) + AFTER
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "influences on 4 test samples are in outdir/influence_results_0_all.json" in done.stdout
    influences, harmful, helpful = json.loads((tmp_path / "found.json").read_text())
    assert len(influences) == 4
    assert sorted(helpful) == sorted(harmful) == list(range(24))
    assert json.loads((tmp_path / "outdir" / "influence_results_0_all.json").read_text()) == influences
    assert (tmp_path / "outdir" / "run").exists() is (mode == "calc_all_grad_then_test")
