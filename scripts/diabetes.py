"""Regression: scikit-learn's diabetes data, ten measurements of 442 patients and how ill they were a year later.

infl-cache run --task scripts/diabetes.py:diabetes --run runs/diabetes
infl-cache validate --task scripts/diabetes.py:diabetes --run runs/diabetes
infl-cache run --task scripts/diabetes.py:diabetes --task-args.width 16 --run runs/diabetes-network
"""

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from training import trained

from infl_cache import Task

N_TRAIN = 400


def diabetes(width: int = 0) -> Task:
    """Least squares of the standardised data, or a network 10-`width`-1; the loss is half the squared error."""
    data = load_diabetes()
    inputs, ill = data.data, data.target
    order = np.random.default_rng(0).permutation(len(ill))
    x = torch.tensor(inputs[order] / inputs.std(0), dtype=torch.float32)
    y = torch.tensor((ill[order] - ill.mean()) / ill.std(), dtype=torch.float32)
    train, test = TensorDataset(x[:N_TRAIN], y[:N_TRAIN]), TensorDataset(x[N_TRAIN:], y[N_TRAIN:])
    model = network(width, train) if width else line(x[:N_TRAIN].double(), y[:N_TRAIN].double())
    return Task(
        model=model, train=train, test=test, loss=half_square,
        render=lambda sample: dict(zip(data.feature_names, sample[0].tolist(), strict=True)),
    )  # fmt: skip


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error of each sample, (B,)."""
    return (outputs.squeeze(1) - targets).square() / 2


def line(x: Tensor, y: Tensor) -> nn.Module:
    """The line of least squares, exactly."""
    model = nn.Linear(x.shape[1], 1)
    found = torch.linalg.lstsq(torch.cat((x, torch.ones(len(x), 1)), dim=1), y[:, None]).solution
    with torch.no_grad():
        model.weight.copy_(found[:-1].T)
        model.bias.copy_(found[-1])
    return model


def network(width: int, train: TensorDataset) -> nn.Module:
    """One hidden layer, trained on one thread, always to the same weights."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 1))

    return trained(make, train, lambda model, batch: half_square(model(batch[0]), batch[1]).mean(), epochs=50)
