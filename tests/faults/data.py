"""A small task over data that do what they are told at the samples they are told, and digests of what a run left."""

import hashlib
import multiprocessing
import os

import torch
from torch import nn

from infl_cache import Task

N_TRAIN, N_TEST = 24, 6


class Listed:
    """Samples one by one; `at` maps an index to what is done before it is given."""

    def __init__(self, inputs, targets, at=()):
        self.inputs, self.targets, self.at = inputs, targets, dict(at)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        if index in self.at:
            self.at[index]()
        return self.inputs[index], self.targets[index]


def changed(data, **at):
    """The same samples, doing something else."""
    return Listed(data.inputs, data.targets, **at)


def loss(outputs, targets):
    """Cross-entropy of each sample."""
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def small_task(**changes):
    """Logistic regression in float64 on three classes."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(N_TRAIN + N_TEST, 4, generator=generator, dtype=torch.float64)
    targets = torch.arange(N_TRAIN + N_TEST) % 3
    model = nn.Linear(4, 3, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 4, generator=generator, dtype=torch.float64) / 3)
        model.bias.zero_()
    train, test = Listed(inputs[:N_TRAIN], targets[:N_TRAIN]), Listed(inputs[N_TRAIN:], targets[N_TRAIN:])
    return Task(**{"model": model, "train": train, "test": test, "loss": loss, **changes})


def die():
    """End the worker process that fetches this, at once."""
    if multiprocessing.parent_process() is not None:
        os._exit(3)


def contents(folder):
    """Name and digest of every file below a folder, but for those that any opening may touch."""
    return {
        str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith((".lock", "ledger.sqlite-"))
    }
