"""A small classification task as the old package's users have it: a model and two loaders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import infl_cache.ptif as ptif
from tests.tasks import built, labels, normal


@dataclass
class Old:
    """What a script of the old package begins with."""

    model: nn.Module
    trainloader: DataLoader
    testloader: DataLoader

    @property
    def given(self) -> tuple[Any, ...]:
        """Arguments after the config."""
        return self.model, self.trainloader, self.testloader


def old(dtype: torch.dtype = torch.float64, n_train: int = 30, n_test: int = 12, **loader: Any) -> Old:
    """Logistic regression; test labels are 0, 1, 2, 0, 1, 2, ..."""
    x = normal(n_train + n_test, 4, dtype=dtype)
    train = TensorDataset(x[:n_train], labels(n_train))
    test = TensorDataset(x[n_train:], torch.arange(n_test) % 3)
    loader = {"batch_size": 8, "shuffle": True, **loader}
    return Old(built(lambda: nn.Linear(4, 3), dtype), DataLoader(train, **loader), DataLoader(test, **loader))


@pytest.fixture
def given() -> Old:
    return old()


@pytest.fixture
def config(tmp_path):
    """The default config with more damping, in a folder of the test's own."""
    return {**ptif.get_default_config(), "outdir": str(tmp_path / "out"), "damp": 0.1, "display_progress": False}
