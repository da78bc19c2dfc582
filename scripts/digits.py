"""The demo: scikit-learn's handwritten digits, 1,500 to train on and 297 to ask about, and a small network.

infl-cache run --task scripts/digits.py:digits --run runs/digits
infl-cache run --task scripts/digits.py:digits --run runs/logistic --task-args.width 0
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from infl_cache import Task

N_TRAIN, WEIGHT_DECAY = 1500, 1e-3


def digits(width: int = 32, seed: int = 0) -> Task:
    """A network 64-`width`-10, trained here in about a second, always to the same weights; 64-10 for width 0.

    The network is trained anew for `infl-cache validate`; logistic regression (width 0) has no need of that.
    """
    pictures, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = torch.tensor(pictures[order] / 16, dtype=torch.float32), torch.tensor(labels[order], dtype=torch.int64)

    def retrain(keep: torch.Tensor) -> nn.Module:
        return train(x[:N_TRAIN], y[:N_TRAIN], width, seed, keep)

    return Task(
        model=retrain(torch.ones(N_TRAIN, dtype=torch.bool)).float(),
        train=TensorDataset(x[:N_TRAIN], y[:N_TRAIN]),
        test=TensorDataset(x[N_TRAIN:], y[N_TRAIN:]),
        loss=nn.CrossEntropyLoss(reduction="none"),
        weight_decay=WEIGHT_DECAY,
        retrain=retrain if width else None,
    )


def train(x: torch.Tensor, y: torch.Tensor, width: int, seed: int, keep: torch.Tensor) -> nn.Module:
    """LBFGS over the samples to keep, in float64 and one thread; their losses divided by the number of all samples."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    hidden = [nn.Linear(x.shape[1], width), nn.ReLU()] if width else []
    model = nn.Sequential(*hidden, nn.Linear(width or x.shape[1], 10)).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200 if width else 2000, line_search_fn="strong_wolfe")
    part, x, y = keep.double().mean(), x[keep].double(), y[keep]

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        decay = WEIGHT_DECAY / 2 * sum(parameter.square().sum() for parameter in model.parameters())
        loss = nn.functional.cross_entropy(model(x), y) * part + decay
        loss.backward()
        return loss

    optimizer.step(objective)
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    return model
