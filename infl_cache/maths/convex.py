r"""Retraining of convex models without some samples, in float64, to the very minimum.

With w_i = 1 for the samples that are kept and 0 for the others, and the trained parameters :math:`\theta_t`, what is
minimised is

.. math:: \frac1n \sum_i w_i L(z_i, \theta) + \frac{weight\_decay}2 |\theta|^2 + \frac{damping}2 |\theta - \theta_t|^2

with n the number of all samples, kept or not: the objective whose response to w_i is, to first order and with its
sign, what an influence says. Its Hessian is that of stage 2, damping included: damping is a spring to the trained
parameters (the proximal response of Bae et al. 2022, "If Influence Functions are the Answer, Then What is the
Question?"). At a trained model that is at its optimum the spring pulls nowhere, whatever its strength.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from infl_cache.errors import BadInput
from infl_cache.maths.cast import with_model
from infl_cache.maths.curvature import Curvature, remembered
from infl_cache.maths.minimise import Minimum, minimise
from infl_cache.maths.params import Parameters, flatten, unflatten
from infl_cache.maths.samples import Batch, spread
from infl_cache.maths.task import Task, blaming, outputs_at, per_sample, reference_gradient, values_of

# Relative to the gradient that a removal makes at first.
TOLERANCE = 1e-10
# What is still good enough to be shown, where rounding allows no better.
GOOD_ENOUGH = 1e-4
# A gradient over the mean |grad L| of the samples, below which float64 does not go.
ROUNDING = 4e-16
# Up to so many parameters the curvature is factorised once, and each retraining takes a handful of iterations.
FACTORISED = 2000
COLUMNS = 128
MAX_BATCH = 2048
# A minimum that was reached in so few iterations has the curvature of where they began.
SAME_CURVATURE = 6
JITTER = 1e-9
DIRECTIONS = 3
# Outputs of one sample up to which the Hessian of its loss is looked at whole.
WHOLE = 512
# Samples that are looked at: outputs, losses, gradients.
PROBED, LOOKED_AT, SHARES = 32, 8, 32
REMEDY = "give the task a retrain= (keep -> model): the built-in retraining is for convex models"


@dataclass
class ConvexRetraining:
    """`retraining(keep)` is the task's model, in float64, at the minimum for the samples of the bool mask `keep` (n,).

    `load(groups)` gives the training samples with those indices, batch by batch, in the model's own type; `rows` are
    those that count, at most `size` of them fit into a batch; they are kept in memory where `budget` bytes hold them;
    `tick()` is called before each batch. The model returned is one and the same object, with other weights after the
    next call.
    """

    task: Task
    parameters: Parameters
    load: Callable[[Sequence[Sequence[int]]], Iterable[Batch]]
    rows: Sequence[int]
    size: int
    n_train: int
    damping: float
    budget: int
    tick: Callable[[], None]

    def __post_init__(self) -> None:
        self.wide = with_model(self.task, copy.deepcopy(self.task.model).double())
        self.trained = flatten(self.parameters, values_of(self.wide.model, self.parameters)).clone()
        self.batches = remembered(lambda: self._loaded(min(self.size, MAX_BATCH), self.rows), self.budget)
        self._full: Minimum | None = None
        self._solve: Callable[[Tensor], Tensor] | None = None
        # What was left of the gradient that the removed samples make, where it did not vanish.
        self.unfinished: list[float] = []

    def check(self) -> None:
        """`BadInput` unless outputs are affine in the parameters and the loss convex in them, on some samples."""
        try:
            with blaming("retrain: the model or loss in float64"):
                (batch,) = self._loaded(PROBED, spread_over(self.rows, PROBED))
                check_affine(self.wide, self.parameters, batch.data, self.trained)
                for each in self._loaded(1, spread_over(self.rows, LOOKED_AT)):
                    check_convex_loss(self.wide, self.parameters, each.data, self.trained)
        except BadInput as error:
            raise BadInput(f"{str(error).splitlines()[0]}\n{REMEDY}") from error

    def __call__(self, keep: Tensor) -> nn.Module:
        """The model at the minimum for the samples kept."""
        full, weights = self._whole(), keep.to(self.trained)
        found = full
        if not bool(keep.all()):
            first = float(self._gradient(full.point, weights).norm())
            target = max(TOLERANCE * first, self._floor)
            found = minimise(lambda at: self._gradient(at, weights), full.point, target, self._solve)
            if found.norm > max(GOOD_ENOUGH * first, self._floor):
                self.unfinished.append(found.norm / first)
        self._put(found.point)
        return self.wide.model

    def off_optimum(self) -> float:
        """The norm of the objective's gradient at the trained parameters, in units of what one sample has in it."""
        return float(self._gradient(self.trained, self.trained.new_ones(self.n_train)).norm()) / self._share

    def _whole(self) -> Minimum:
        """The minimum with all samples: what every other one is compared with and starts from."""
        if self._full is None:
            ones, share = self.trained.new_ones(self.n_train), self._share
            solve = self._factorised(self.trained)
            target = max(TOLERANCE * share, self._floor)
            found = minimise(lambda at: self._gradient(at, ones), self.trained, target, solve)
            if found.iterations > SAME_CURVATURE:
                solve = self._factorised(found.point)
            # Where the minimum is at infinity the gradient vanishes on the way, but a step stays a step.
            step = float(solve(self._gradient(found.point, ones)).norm()) if solve is not None else 0.0
            if found.norm > GOOD_ENOUGH * share or step > GOOD_ENOUGH * float(found.point.norm()):
                raise BadInput(
                    f"retrain: expected the training loss to have a minimum, found none in {found.iterations} steps"
                    f" (gradient {found.norm:.1e}, next step {step:.1e});\nmore weight_decay or damping makes one"
                )
            self._full, self._solve = found, solve
        return self._full

    def _gradient(self, at: Tensor, weights: Tensor) -> Tensor:
        """Of the objective above, at parameters (P,)."""
        theta, total = at.detach().requires_grad_(True), torch.zeros_like(at)
        for batch in self.batches():
            self.tick()
            with torch.enable_grad():
                outputs = outputs_at(self.wide, unflatten(self.parameters, theta), batch.data)
                losses = per_sample(self.wide, outputs, batch.data, len(batch.indices))
                places = torch.as_tensor(list(batch.indices), device=at.device)
                total += torch.autograd.grad(losses @ weights[places], theta)[0]
        return total / self.n_train + self.wide.weight_decay * at + self.damping * (at - self.trained)

    @cached_property
    def _share(self) -> float:
        """What one sample has in the gradient of the objective: mean |grad L| / n, from some samples."""
        norms = []
        for batch in self._loaded(1, spread_over(self.rows, SHARES)):
            found = reference_gradient(self.wide, self.parameters, batch)
            norms.append(math.sqrt(sum(float(each.square().sum()) for each in found.values() if each is not None)))
        return max(sum(norms) / len(norms), 1e-290) / self.n_train

    @property
    def _floor(self) -> float:
        """The norm of a gradient that rounding alone makes."""
        return ROUNDING * self._share * self.n_train

    def _factorised(self, at: Tensor) -> Callable[[Tensor], Tensor] | None:
        """`v -> A^-1 v` with A the curvature at `at`, made a little more definite; None where it would be too large."""
        size = self.parameters.size
        if size > FACTORISED:
            return None
        self._put(at)
        rows = max(1, min(self.size // COLUMNS, MAX_BATCH))
        operator = Curvature(
            task=self.wide, parameters=self.parameters, kind="ggn", batches=lambda: self._loaded(rows, self.rows),
            pick=lambda some: (), n_train=self.n_train, damping=self.damping, dtype=torch.float64, tick=self.tick,
        )  # fmt: skip
        unit = torch.eye(size, dtype=torch.float64, device=at.device)
        matrix = (
            operator(unit) if size <= COLUMNS else torch.cat([operator(part) for part in torch.split(unit, COLUMNS)])
        )
        matrix = (matrix + matrix.T) / 2 + JITTER * matrix.diagonal().max() * unit
        lower, failed = torch.linalg.cholesky_ex(matrix)
        return None if int(failed) else lambda v: torch.cholesky_solve(v.unsqueeze(1), lower).squeeze(1)

    def _put(self, at: Tensor) -> None:
        named = dict(self.wide.model.named_parameters())
        with torch.no_grad():
            for name, value in unflatten(self.parameters, at).items():
                named[name].copy_(value)

    def _loaded(self, size: int, rows: Sequence[int]) -> Iterable[Batch]:
        return self.load([rows[i : i + size] for i in range(0, len(rows), size)])


def spread_over(rows: Sequence[int], count: int) -> list[int]:
    """At most `count` of `rows`, evenly spread."""
    return [rows[place] for place in spread(len(rows), count)]


def check_affine(task: Task, parameters: Parameters, data: Any, at: Tensor) -> None:
    r"""`BadInput` unless :math:`f(\theta + d) - 2 f(\theta) + f(\theta - d)` vanishes beside the first difference."""
    for direction in _directions(parameters, at):
        low, middle, high = (_outputs(task, parameters, data, at + t * direction) for t in (-1, 0, 1))
        second, first = float((high - 2 * middle + low).norm()), float((high - low).norm())
        if not second <= 1e-8 * first + 1e-12 * float(middle.norm()):
            raise BadInput(
                "retrain: expected outputs that are affine in the chosen parameters, found second differences of"
                f" {second / max(first, 1e-300):.1e} of the first"
            )


def check_convex_loss(task: Task, parameters: Parameters, data: Any, at: Tensor) -> None:
    """`BadInput` unless the Hessian of one sample's loss in its outputs has no negative eigenvalue, at three points."""
    (direction, *_) = _directions(parameters, at)
    for t in (-1, 0, 1):
        floats, rebuilt = _split(task, parameters, data, at + t * direction)
        flat = torch.cat([each.flatten() for each in floats])

        def loss(outputs: Tensor, floats: list[Tensor] = floats, rebuilt: Callable[..., Any] = rebuilt) -> Tensor:
            pieces = torch.split(outputs, [each.numel() for each in floats])
            shaped = [piece.view(each.shape) for piece, each in zip(pieces, floats, strict=True)]
            return per_sample(task, rebuilt(shaped), data, 1).sum()

        basis = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
        if len(flat) > WHOLE:
            generator = torch.Generator().manual_seed(0)
            basis = torch.linalg.qr(torch.randn(len(flat), 64, dtype=flat.dtype, generator=generator).to(flat))[0].T
        products = vmap(lambda v, at=flat, loss=loss: jvp(grad(loss), (at,), (v,))[1])(basis)
        values = torch.linalg.eigvalsh((products @ basis.T + basis @ products.T) / 2)
        if not float(values[0]) >= -1e-9 * max(float(values[-1]), 1e-30):
            raise BadInput(
                "retrain: expected a loss that is convex in the outputs, found a Hessian with the eigenvalue"
                f" {float(values[0]):.1e}"
            )


def _directions(parameters: Parameters, at: Tensor) -> list[Tensor]:
    """Steps that are as large as the parameters themselves, so that they cross what bends."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(DIRECTIONS):
        step = torch.randn(len(at), generator=generator, dtype=torch.float64).to(at)
        for name in parameters.names:
            place = parameters.slice_of(name)
            size = float(at[place].square().mean().sqrt())
            step[place] *= size if size > 0 else 1.0
        found.append(step)
    return found


def _outputs(task: Task, parameters: Parameters, data: Any, at: Tensor) -> Tensor:
    return torch.cat([each.flatten() for each in _split(task, parameters, data, at)[0]])


def _split(
    task: Task, parameters: Parameters, data: Any, at: Tensor
) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The float tensors among the outputs at parameters (P,), and the function that puts others in their place."""
    with torch.no_grad():
        leaves, structure = tree_flatten(outputs_at(task, unflatten(parameters, at), data))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def rebuilt(floats: Sequence[Tensor]) -> Any:
        own = dict(zip(places, floats, strict=True))
        return tree_unflatten([own.get(i, leaf) for i, leaf in enumerate(leaves)], structure)

    return [leaves[i] for i in places], rebuilt
