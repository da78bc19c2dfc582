"""The whole job as one would write it in plain PyTorch: LiSSA, every gradient as a row of a .npy file, one product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peer_influence import DAMPING, SAMPLE_BATCH, SCALE
from torch import Tensor
from workloads import Workload

ROWS = 64


def weights_of(workload: Workload) -> dict[str, Tensor]:
    """The parameters by name, without a graph."""
    return {name: value.detach() for name, value in workload.model.named_parameters()}


def gradient_rows(workload: Workload, x: Tensor, y: Tensor) -> Tensor:
    """The gradients (B, n_params) of a batch, by vmap."""

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return workload.loss(torch.func.functional_call(workload.model, weights, (x[None],)), y[None])[0]

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights_of(workload), x, y)
    return torch.cat([each.flatten(1) for each in found.values()], 1)


def hessian_rows(workload: Workload, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """The Hessian of a batch's mean loss times each row, all through one graph."""
    weights = weights_of(workload)
    names, values = list(weights), tuple(weights.values())

    def loss(*values: Tensor) -> Tensor:
        outputs = torch.func.functional_call(workload.model, dict(zip(names, values, strict=True)), (x,))
        return workload.loss(outputs, y).mean()

    _, product = torch.func.vjp(torch.func.grad(loss, argnums=tuple(range(len(values)))), *values)
    pieces = rows.split([value.numel() for value in values], 1)
    shaped = [piece.view(-1, *value.shape) for piece, value in zip(pieces, values, strict=True)]
    found = torch.func.vmap(lambda *vectors: product(vectors))(*shaped)
    return torch.cat([each.flatten(1) for each in found], 1)


def lissa(workload: Workload, rhs: Tensor, count: int, depth: int) -> Tensor:
    """`h <- rhs + h - (H_batch h + damping h) / scale`, so many times; `h / scale`."""
    generator, h = torch.Generator().manual_seed(0), rhs.clone()
    x, y = (tensor[:count] for tensor in workload.train.tensors)
    for _ in range(depth):
        drawn = torch.randint(count, (SAMPLE_BATCH,), generator=generator)
        h = rhs + (1 - DAMPING / SCALE) * h - hessian_rows(workload, x[drawn], y[drawn], h) / SCALE
    return h / SCALE


def plain_job(workload: Workload, folder: Path, count: int, depth: int) -> Tensor:
    """Influences (n_test, count): s_test of all test samples at once, gradients to the disk, products from there."""
    s_test = lissa(workload, gradient_rows(workload, *workload.test.tensors), count, depth)
    file, (x, y) = folder / "gradients.npy", workload.train.tensors
    shape = (count, workload.n_params)
    rows = np.lib.format.open_memmap(file, "w+", np.float32, shape)
    for start in range(0, count, ROWS):
        part = slice(start, min(start + ROWS, count))
        rows[part] = gradient_rows(workload, x[part], y[part]).numpy()
    rows.flush()
    del rows
    rows = np.lib.format.open_memmap(file, "c")
    parts = [s_test @ torch.from_numpy(rows[start : start + ROWS]).T for start in range(0, count, ROWS)]
    return torch.cat(parts, 1) / -count
