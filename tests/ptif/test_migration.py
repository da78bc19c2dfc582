"""The page on migration: every code block runs, in order, and every key and function stands in its tables."""

import dataclasses
import re
from importlib import resources

import numpy as np
import torch

import infl_cache.ptif as ptif
from tests.ptif.conftest import old
from tests.ptif.test_calculating import dense_influences, matrix

PAGE = resources.files("infl_cache").joinpath("pages/migration.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_code_block_runs_in_the_order_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ptif, "init_logging", lambda: None)
    given = old()
    names = {"model": given.model, "trainloader": given.trainloader, "testloader": given.testloader}
    assert len(BLOCKS) == 7
    exec("\n".join(BLOCKS[:3]), names)
    # The old system's damping, and its values.
    expected = dense_influences(given, 0.25)
    as_before = matrix(names["as_before"])
    assert np.abs(as_before - expected).max() < 0.02 * np.abs(expected).max()
    assert names["old_values"] == (25 * as_before[0]).tolist()
    exec("\n".join(BLOCKS[3:5]), names)
    assert "damp" in capsys.readouterr().out
    assert (tmp_path / "second" / "run" / "grad_z.zarr").is_dir()
    exec(BLOCKS[5], names)
    assert list(names["influences"]) == list("012345")
    exec(BLOCKS[6], names)
    assert list(names["found"]) == ["0", "3"]


def test_the_old_recursion_has_the_limit_that_the_page_says():
    h = torch.tensor([[0.5, 0.1], [0.1, 0.3]], dtype=torch.float64)
    v = torch.tensor([1.0, -2.0], dtype=torch.float64)
    damp, scale = 0.01, 25.0
    then, now = v, v
    for _ in range(20_000):
        then = v + (1 - damp) * then - h @ then / scale
        now = v + (1 - damp / scale) * now - h @ now / scale
    eye = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(then, scale * torch.linalg.solve(h + damp * scale * eye, v))
    torch.testing.assert_close(now / scale, torch.linalg.solve(h + damp * eye, v))


def test_every_key_and_every_function_is_on_the_page():
    keys = [each.name for each in dataclasses.fields(ptif.Config)]
    assert [key for key in (*keys, "r_averaging", "test_start_index") if f"`{key}`" not in PAGE] == []
    functions = [name for name in ptif.__all__ if name != "Config"]
    assert [name for name in functions if not re.search(rf"`{name}[`(]", PAGE)] == []
