"""Weights for the examples: always the same, for the fingerprint of a run is that of its weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

WEIGHTS = Path("runs/weights")


def trained(
    make: Callable[[], nn.Module],
    data: Dataset[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    epochs: int,
    rate: float = 1e-2,
    decay: float = 0.0,
    size: int = 50,
    keep: str | None = None,
) -> nn.Module:
    """A model of `make` after `epochs` of AdamW on one thread, in batches of `size`, the rate falling to zero.

    Seed and order of the samples are fixed. With a name to `keep` the weights are written to `runs/weights` and read
    from there when the same is asked for the next time: of the same data, epochs and so on.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        samples = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
        file = WEIGHTS / f"{keep}-{digest(samples, model, epochs, rate, decay, size)}.pt"
        if keep and file.exists():
            model.load_state_dict(torch.load(file, weights_only=True))
        else:
            _train(model, samples, loss, epochs, rate, decay, size)
            if keep:
                _write(model, file)
    torch.set_num_threads(threads)
    return model.eval()


def _train(
    model: nn.Module, samples: list[Any], loss: Callable[[nn.Module, Any], Tensor], epochs: int, rate: float,
    decay: float, size: int,
) -> None:  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * -(-len(samples) // size))
    for _ in range(epochs):
        for chosen in torch.randperm(len(samples)).split(size):
            optimizer.zero_grad()
            loss(model, default_collate([samples[i] for i in chosen])).backward()
            optimizer.step()
            schedule.step()


def digest(samples: list[Any], model: nn.Module, *settings: float) -> str:
    """Of everything that the weights are made of: data, weights drawn, settings."""
    found = hashlib.sha256(repr((str(model), settings)).encode())
    whole = default_collate(samples)
    for each in (*(whole.values() if isinstance(whole, dict) else whole), *model.state_dict().values()):
        found.update(each.numpy().tobytes())
    return found.hexdigest()[:12]


def _write(model: nn.Module, file: Path) -> None:
    """Under its name only when complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(f".{os.getpid()}")
    torch.save(model.state_dict(), half)
    half.replace(file)
