r"""Products with the curvature of the training loss, K vectors in one pass over the data.

.. math:: H = \frac1n \sum_i \nabla^2 L(z_i) \qquad G = \frac1n \sum_i J_i^T\, \nabla^2_{out} L_i\, J_i

`J_i` is the Jacobian of the outputs of sample i. Both are products of reverse-mode derivatives, so every
operation that can be differentiated twice will do: `J v` is the derivative of `u -> J^T u` (which is
linear), `H v` that of the gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from infl_cache.errors import BadInput
from infl_cache.maths.params import Parameters, flatten, unflatten
from infl_cache.maths.samples import Batch, size_in_bytes
from infl_cache.maths.task import Task, blaming, outputs_at, per_sample, values_of

Vectors = dict[str, Tensor]


def _nothing() -> None:
    """The default of `tick`."""


def _say_nothing(text: str) -> None:
    """The default of `note`."""


@dataclass(frozen=True)
class Curvature:
    """The operator `C + (weight_decay + damping) I` on `(K, n_params)`, C the mean over `n_train` samples.

    `batches()` gives one pass over the training set, `pick(indices)` some of its samples; `tick()` is called
    before each batch and may raise to stop a long product; `note(text)` hears of slower ways that had to be
    taken. Arithmetic is in `dtype`.
    """

    task: Task
    parameters: Parameters
    kind: Literal["ggn", "hessian"]
    batches: Callable[[], Iterable[Batch]]
    pick: Callable[[Sequence[int]], Iterable[Batch]]
    n_train: int
    damping: float
    dtype: torch.dtype
    tick: Callable[[], None] = _nothing
    note: Callable[[str], None] = _say_nothing

    @property
    def shift(self) -> float:
        """What is added to the diagonal: the task's weight decay and the damping."""
        return self.task.weight_decay + self.damping

    def __call__(self, vectors: Tensor) -> Tensor:
        """`(C + shift I) v` for each row v of `vectors` (K, n_params)."""
        return self.mean_over(self.batches(), self.n_train, vectors)

    def mean_over(self, batches: Iterable[Batch], n: int, vectors: Tensor) -> Tensor:
        """The same with C the mean over the `n` samples of the given batches."""
        total = torch.zeros_like(vectors)
        for batch in batches:
            self.tick()
            total += self._product(batch, vectors)
        return total.div_(n).add_(vectors, alpha=self.shift)

    def _product(self, batch: Batch, vectors: Tensor) -> Tensor:
        """The sum over one batch of `C_i v`, as (K, n_params)."""
        task, data, theta = self.task, batch.data, values_of(self.task.model, self.parameters)
        fixed: Vectors = {}
        own = next(iter(theta.values())).dtype
        if self.dtype != own:
            task, data, theta, fixed = self._cast(data, theta)
        pieces, size = unflatten(self.parameters, vectors), len(batch.indices)
        # The fused attention kernels cannot be differentiated twice; the plain one can.
        with sdpa_kernel(SDPBackend.MATH):
            try:
                single = (_ggn if self.kind == "ggn" else _hessian)(task, theta, fixed, data, size)
                found = vmap(single)(pieces)
            except BadInput:
                raise
            except Exception as error:  # custom operations that torch.func or vmap has no rule for
                if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
                    raise
                reason = " ".join(str(error).split())[:160]
                self.note(f"torch.func cannot follow this model, products go one vector at a time ({reason})")
                with self._blaming(own):
                    single = by_plain_autograd(self.kind, task, theta, fixed, data, size)
                    each = [single({name: piece[k] for name, piece in pieces.items()}) for k in range(len(vectors))]
                found = {name: torch.stack([one[name] for one in each]) for name in pieces}
        return flatten(self.parameters, found, leading=1)

    @contextmanager
    def _blaming(self, own: torch.dtype) -> Iterator[None]:
        """Say whose failure it is, and what would help where the arithmetic is not the model's own."""
        try:
            with blaming("second derivative of the model or loss"):
                yield
        except BadInput as error:
            if self.dtype == own:
                raise
            hint = f"--solve-dtype {str(own).removeprefix('torch.')}"
            raise BadInput(f"the model or loss cannot be computed in {self.dtype}; use {hint}\n{error}") from error

    def _cast(self, data: Any, theta: Vectors) -> tuple[Task, Any, Vectors, Vectors]:
        """The task with its loss, the batch, the parameters and everything else of the model in `dtype`."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

        model, loss = self.task.model, self.task.loss
        if isinstance(loss, nn.Module):
            loss = copy.deepcopy(loss).to(self.dtype)
        every = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        rest = {name: cast(value.detach()) for name, value in every.items() if name not in theta}
        cast_theta = {name: cast(value) for name, value in theta.items()}
        return replace(self.task, loss=loss), tree_map_only(Tensor, cast, data), cast_theta, rest


def _hessian(task: Task, theta: Vectors, fixed: Vectors, data: Any, size: int) -> Callable[[Vectors], Vectors]:
    """`v -> H v`, summed over the batch."""

    def total(values: Vectors) -> Tensor:
        return per_sample(task, outputs_at(task, {**fixed, **values}, data), data, size).sum()

    return _pullback(grad(total), theta)


def _ggn(task: Task, theta: Vectors, fixed: Vectors, data: Any, size: int) -> Callable[[Vectors], Vectors]:
    """`v -> J^T (d2 loss / d outputs2) J v`, summed over the batch."""
    split = _Outputs(task, fixed, data, size)
    outputs = split.floats(theta)
    transposed = _pullback(split.floats, theta)
    forward = _pullback(transposed, tuple(torch.zeros_like(each) for each in outputs))
    of_loss = _pullback(grad(split.loss), outputs)
    return lambda v: transposed(of_loss(forward(v)))


class _Outputs:
    """The model's outputs as a tuple of their float tensors, and the loss as a function of that tuple."""

    def __init__(self, task: Task, fixed: Vectors, data: Any, size: int) -> None:
        self._task, self._fixed, self._data, self._size = task, fixed, data, size
        self._structure: Any = None
        self._others: dict[int, Any] = {}

    def floats(self, values: Vectors) -> tuple[Tensor, ...]:
        outputs = outputs_at(self._task, {**self._fixed, **values}, self._data)
        leaves, self._structure = tree_flatten(outputs)
        self._others = {i: leaf for i, leaf in enumerate(leaves) if not _differentiable(leaf)}
        if len(self._others) == len(leaves):
            raise BadInput(
                f"outputs: expected a float tensor, or tuples, lists or dicts of them, found {type(outputs).__name__};"
                " use --curvature hessian, or a forward= that returns tensors"
            )
        return tuple(leaf for leaf in leaves if _differentiable(leaf))

    def loss(self, floats: tuple[Tensor, ...]) -> Tensor:
        own, others = iter(floats), self._others
        count = len(floats) + len(others)
        leaves = [others[i] if i in others else next(own) for i in range(count)]
        return per_sample(self._task, tree_unflatten(leaves, self._structure), self._data, self._size).sum()


def by_plain_autograd(
    kind: str, task: Task, theta: Vectors, fixed: Vectors, data: Any, size: int
) -> Callable[[Vectors], Vectors]:
    """The same products one vector at a time by double backward, for operations that `torch.func` does not know."""
    theta = {name: value.detach().clone().requires_grad_(True) for name, value in theta.items()}
    at = tuple(theta.values())
    split = _Outputs(task, fixed, data, size)

    def derivative(
        of: Sequence[Tensor], by: Sequence[Tensor], along: Sequence[Tensor], again: bool = False
    ) -> list[Tensor]:
        found = torch.autograd.grad(of, by, along, create_graph=again, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(b) if f is None else f for f, b in zip(found, by, strict=True)]

    with torch.enable_grad():
        if kind == "hessian":
            loss = per_sample(task, outputs_at(task, {**fixed, **theta}, data), data, size).sum()
            gradient = derivative([loss], at, [torch.ones_like(loss)], again=True)
            attached = [g if g.requires_grad else g + 0 * a for g, a in zip(gradient, at, strict=True)]
            return lambda v: dict(zip(theta, derivative(attached, at, [v[name] for name in theta]), strict=True))
        # An output that does not depend on the parameters is attached to them by a zero.
        outputs = tuple(o if o.requires_grad else o + 0 * at[0].sum() for o in split.floats(theta))
        leaves = tuple(each.detach().requires_grad_(True) for each in outputs)
        loss = split.loss(leaves)
        of_loss = derivative([loss], leaves, [torch.ones_like(loss)], again=True)
        of_loss = [g if g.requires_grad else g + 0 * leaf for g, leaf in zip(of_loss, leaves, strict=True)]
        zeros = [torch.zeros_like(each, requires_grad=True) for each in outputs]
        transposed = derivative(outputs, at, zeros, again=True)
        attached = [t if t.requires_grad else t + 0 * a for t, a in zip(transposed, at, strict=True)]

    def product(v: Vectors) -> Vectors:
        forward = derivative(attached, zeros, [v[name] for name in theta])
        return dict(zip(theta, derivative(outputs, at, derivative(of_loss, leaves, forward)), strict=True))

    return product


def _pullback(function: Callable[[Any], Any], at: Any) -> Callable[[Any], Any]:
    """`u -> J^T u` of a function of one argument, with J at `at`; its transpose again if the function is linear."""
    transposed = vjp(function, at)[1]
    return lambda u: transposed(u)[0]


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def largest_eigenvalue(operator: Callable[[Tensor], Tensor], size: int, like: Tensor, steps: int = 30) -> float:
    """An estimate of the largest eigenvalue's magnitude by power iteration (never above it, seldom 2 % below)."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, size, generator=generator, dtype=torch.float64).to(like)
    best = 0.0
    for _ in range(steps):
        vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(like.dtype).tiny)
        vectors = operator(vectors)
        found = float(vectors.norm(dim=1).max())
        if abs(found - best) <= 1e-3 * found:
            return found
        best = found
    return best


def remembered(load: Callable[[], Iterable[Batch]], budget: int) -> Callable[[], Iterable[Batch]]:
    """`load`, kept in memory after the first pass if its batches fit into `budget` bytes."""
    kept: list[Batch] = []
    complete = False

    def passes() -> Iterable[Batch]:
        nonlocal complete
        if complete:
            yield from kept
            return
        kept.clear()
        total = 0
        for batch in load():
            total += size_in_bytes(batch.data)
            if total <= budget:
                kept.append(batch)
            else:
                kept.clear()
            yield batch
        complete = total <= budget

    return passes
