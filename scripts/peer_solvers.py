"""Other libraries' products with the Gauss-Newton matrix and solvers of its damped system, where they are installed."""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peer import Peer
from products import TOGETHER, Products, Way, fresh_hessian, kept_ggn, looped
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import Workload

MOST_ITERATIONS = 100
OWN, HESSIAN, KRONECKER = "the same", "another: Hessian", "another: EK-FAC, linear layers only"
# How a product with the matrix of a system is made, to look at its residual.
MATRICES = {OWN: kept_ggn, HESSIAN: fresh_hessian}

# (workload, training samples, test samples, damping, tolerance) to s of the first test samples (K, n_params).
Solve = Callable[[Workload, int, int, float, float], Tensor]


@dataclass(frozen=True)
class PeerSolver(Peer):
    """A library's solver, and in words the system that it solves: `OWN` is infl_cache's."""

    system: str = OWN


def right_hand_sides(workload: Workload, count: int) -> Tensor:
    """The gradients (count, n_params) of the first test samples."""
    parameters = list(workload.model.parameters())
    rows = []
    for x, y in zip(*(tensor[:count].split(1) for tensor in workload.test.tensors), strict=True):
        found = torch.autograd.grad(workload.loss(workload.model(x), y).sum(), parameters)
        rows.append(torch.cat([each.reshape(-1) for each in found]))
    return torch.stack(rows)


def matrix_of_curvlinops(workload: Workload, n: int, size: int) -> Any:
    """curvlinops' Gauss-Newton matrix of the first `n` training samples."""
    x, y = (tensor[:n] for tensor in workload.train.tensors)
    return importlib.import_module("curvlinops").GGNLinearOperator(
        workload.model, nn.CrossEntropyLoss(), list(workload.model.parameters()),
        list(zip(x.split(size), y.split(size), strict=True)), check_deterministic=False,
    )  # fmt: skip


def products_of_curvlinops(workload: Workload, n: int, size: int) -> Products:
    """All vectors at once, as a matrix of columns."""
    matrix = matrix_of_curvlinops(workload, n, size)
    return lambda vectors: (matrix @ vectors.T).T


def cg_of_curvlinops(workload: Workload, n: int, count: int, damping: float, tolerance: float, size: int) -> Tensor:
    """The conjugate gradients it uses, all test samples at once; its tolerance is the mean of their residuals."""
    matrix = matrix_of_curvlinops(workload, n, size)
    cg: Callable[[Any, Tensor], Tensor] = importlib.import_module("linear_operator.utils.linear_cg").linear_cg
    columns = right_hand_sides(workload, count).T.contiguous()
    return cg(lambda v: matrix @ v + damping * v, columns, tolerance=tolerance, max_iter=MOST_ITERATIONS).T


def of_pydvl(workload: Workload, n: int, count: int, damping: float, tolerance: float, size: int, name: str) -> Tensor:
    """pyDVL's CgInfluence with the Hessian, which may be indefinite, or its EkfacInfluence with the true diagonal."""
    library = importlib.import_module("pydvl.influence.torch")
    model = copy.deepcopy(workload.model)
    if name == "cg":
        made = library.CgInfluence(
            model, nn.functional.cross_entropy, regularization=damping, rtol=tolerance, atol=0.0,
            maxiter=MOST_ITERATIONS, solve_simultaneously=True,
        )  # fmt: skip
    else:
        made = library.EkfacInfluence(model, update_diagonal=True, hessian_regularization=damping)
    data = TensorDataset(*(tensor[:n] for tensor in workload.train.tensors))
    x, y = (tensor[:count] for tensor in workload.test.tensors)
    found: Tensor = made.fit(DataLoader(data, batch_size=size)).influence_factors(x, y)
    return found.detach()


def solved(
    peer: PeerSolver, workload: Workload, n: int, rhs: Tensor, damping: float, tolerance: float
) -> dict[str, Any]:
    """One solve, timed, and the largest true residual of what it gives, in the system that it solves."""
    started = time.perf_counter()
    found = peer(workload, n, len(rhs), damping, tolerance)
    seconds = time.perf_counter() - started
    residual = None
    if peer.system in MATRICES:
        products = looped(workload, n, SIZES[workload.name], MATRICES[peer.system])(found)
        residual = float(((products + damping * found - rhs).norm(dim=1) / rhs.norm(dim=1)).max())
    return {"key": peer.key, "title": peer.title, "system": peer.system, "seconds": seconds,
            "largest_residual": residual}  # fmt: skip


SIZES = {"W1": 256, "W2": 64, "W3": 16}


def at_its_size(solve: Callable[..., Tensor], **options: Any) -> Solve:
    """A solver with the batch size of the workload."""

    def sized(workload: Workload, n: int, count: int, damping: float, tolerance: float) -> Tensor:
        return solve(workload, n, count, damping, tolerance, size=SIZES[workload.name], **options)

    return sized


PEER_WAYS = ((Way("curvlinops", "curvlinops, GGN", "ggn", TOGETHER, products_of_curvlinops), "curvlinops"),)
PEER_SOLVERS = (
    PeerSolver("curvlinops-cg", "curvlinops, CG", "curvlinops", "curvlinops-for-pytorch",
               at_its_size(cg_of_curvlinops)),
    PeerSolver("pydvl-cg", "pyDVL, CgInfluence", "pydvl", "pyDVL",
               at_its_size(of_pydvl, name="cg"), system=HESSIAN),
    PeerSolver("pydvl-ekfac", "pyDVL, EkfacInfluence", "pydvl", "pyDVL",
               at_its_size(of_pydvl, name="ekfac"), system=KRONECKER),
)  # fmt: skip
