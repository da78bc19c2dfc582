"""Gradients in the store: every type, shared inputs once, indices as integers, and back again."""

import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
import zarr
from torch import nn

from infl_cache import Run
from tests import tasks
from tests.tasks import TASKS, built, classified, normal
from tests.twins import gradient_rows

QUIET = {"progress": False}
ERROR = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


class Projections(nn.Module):
    """Query, key and value projections of one input."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
        self.out = nn.Linear(24, 3)

    def forward(self, x):
        return self.out(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).mean(1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted(TASKS))
def test_16_bit_rows_are_right_up_to_their_rounding(name, dtype, tmp_path):
    task = TASKS[name]()
    run = Run(tmp_path / "run", task, dtype=dtype, block_rows=4, **QUIET)
    run.grads()
    expected = gradient_rows(task, range(len(task.train))).numpy()
    found = run.grad_z(slice(None))
    # A product of two rounded factors carries the errors of both.
    assert np.linalg.norm(found - expected) <= 2 * ERROR[dtype] * np.linalg.norm(expected)
    assert np.abs(found - expected).max() > 0


def test_the_scale_of_a_row_does_not_matter(tmp_path):
    task = tasks.mlp(torch.float32)
    small = tasks.mlp(torch.float32)
    object.__setattr__(small, "loss", lambda outputs, targets: 1e-12 * task.loss(outputs, targets))
    rows = []
    for name, each in (("one", task), ("tiny", small)):
        run = Run(tmp_path / name, each, dtype="float16", **QUIET)
        run.grads()
        rows.append(run.grad_z(slice(None)))
    assert np.allclose(rows[1] * 1e12, rows[0], rtol=5e-3, atol=1e-3 * np.abs(rows[0]).max())
    assert np.abs(rows[1]).max() > 0


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_an_input_that_three_layers_share_is_stored_once(tmp_path, dtype):
    task = classified(built(Projections, torch.float32), normal(12, 5, 24).float(), 10)
    run = Run(tmp_path / "run", task, dtype=dtype, **QUIET)
    run.grads()
    store = zarr.open_group(tmp_path / "run" / "grad_z.zarr", mode="r")
    assert sorted(path for path, _ in store.members(max_depth=None) if path.endswith("/input")) == [
        "out/input",
        "q/input",
    ]
    assert {"q/output_grad", "k/output_grad", "v/output_grad"} <= {path for path, _ in store.members(max_depth=None)}
    expected = gradient_rows(task, range(10)).numpy()
    bound = 1e-5 if dtype == "auto" else 2 * ERROR[dtype]
    assert np.linalg.norm(run.grad_z(slice(None)) - expected) <= bound * np.linalg.norm(expected)


def test_another_reader_is_told_how_16_bit_rows_are_scaled(tmp_path):
    task = classified(built(lambda: nn.Linear(30, 20), torch.float32), normal(12, 30).float(), 10, 20)
    run = Run(tmp_path / "run", task, dtype="bfloat16", **QUIET)
    run.grads()
    group = zarr.open_group(tmp_path / "run" / "grad_z.zarr", mode="r")
    key = next(iter(group.group_keys()))
    array = group[f"{key}/input"]
    assert array.dtype == np.uint16
    assert array.attrs["element_type"] == "bfloat16"
    exponent = group[f"{key}/input_exponent"][:]
    bits = array[:].astype(np.uint32) << 16
    read = bits.view(np.float32)[:, 0] * 2.0 ** exponent[:, None].astype(float)
    assert np.allclose(read, torch.stack([x for x, _ in task.train]).numpy(), rtol=2**-8)


@pytest.mark.parametrize("name", ["dense", "dense_exponent", "loss", "target", "digest"])
def test_a_layer_may_have_the_name_of_an_array(name, tmp_path):
    layers = OrderedDict({name: nn.Linear(24, 24), "norm": nn.LayerNorm(24), "out": nn.Linear(24, 3)})
    task = classified(built(lambda: nn.Sequential(layers), torch.float32), normal(12, 24).float(), 10)
    run = Run(tmp_path / "run", task, dtype="bfloat16", **QUIET)
    run.grads()
    paths = {path for path, _ in zarr.open_group(tmp_path / "run" / "grad_z.zarr", mode="r").members(max_depth=None)}
    assert {"dense", "dense_exponent", "out/input"} <= paths
    expected = gradient_rows(task, range(10)).numpy()
    assert np.linalg.norm(run.grad_z(slice(None)) - expected) <= 2 * ERROR["bfloat16"] * np.linalg.norm(expected)


def test_token_ids_are_stored_as_integers(tmp_path):
    task = TASKS["tied"](torch.float32)
    run = Run(tmp_path / "run", task, layer_forms="*=factored", **QUIET)
    run.grads()
    group = zarr.open_group(tmp_path / "run" / "grad_z.zarr", mode="r")
    kinds = {path: member.dtype for path, member in group.members(max_depth=None) if path.endswith("/input")}
    assert np.dtype(np.int32) in kinds.values()
    expected = gradient_rows(task, range(len(task.train))).numpy()
    assert np.linalg.norm(run.grad_z(slice(None)) - expected) <= 1e-5 * np.linalg.norm(expected)


def test_forms_of_another_version_are_refused_with_the_remedy(tmp_path):
    from infl_cache import DamagedStore
    from infl_cache.disk.manifest import Manifest

    run = Run(tmp_path / "run", tasks.mlp(), **QUIET)
    run.grads()
    path = tmp_path / "run" / "manifest.json"
    manifest = Manifest.read(path)
    del manifest.stages["grads"]["plan"]["forms"]["spread"]
    manifest.write(path)
    assert "spread" not in json.dumps(manifest.stages["grads"]["plan"]["forms"])
    with pytest.raises(DamagedStore, match="grads --force"):
        Run(tmp_path / "run", tasks.mlp(), **QUIET).grads()
    assert Run(tmp_path / "run", tasks.mlp(), **QUIET).grads(force=True).computed == 10
