"""The task: model, data by index, loss. What the user brings, and what we refuse before any work."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, default_collate

from infl_cache.errors import BadInput
from infl_cache.maths.model import by_its_own_code, called_at
from infl_cache.maths.params import Parameters
from infl_cache.maths.samples import Batch

REENTRANT = "expected checkpoints with use_reentrant=False, found use_reentrant=True;\nset it to False"
# Functions that a task may do without.
OPTIONAL = ("measure", "retrain", "render")


def _inputs_first(model: nn.Module, batch: Any) -> Any:
    """The outputs of `(x, y)` and `(x1, x2, ..., y)` batches."""
    return model(*batch[:-1])


def _last(batch: Any) -> Any:
    """The targets of `(x, y)` and `(x1, x2, ..., y)` batches."""
    return batch[-1]


@dataclass(frozen=True)
class Task:
    r"""A trained model, its data and its loss: everything an influence is computed from.

    With `z_i` the training samples, :math:`L(z, \theta)` the loss and :math:`f(z, \theta)` the measure,
    `influence[j, i]` is :math:`-\frac1n \nabla f(z_j)^T (H + \lambda I)^{-1} \nabla L(z_i)` (Koh & Liang 2017, Eq. 2).

    Args:
        model: trained; used in eval mode and put back afterwards.
        train, test: map-style datasets (`len` and `[index]`) that give the same sample each time.
        loss: `loss(outputs, targets) -> (B,)`, one value a sample (`reduction="none"`).
        measure: what is explained for a test sample, as `loss`; the loss itself by default.
        parameters: names or shell patterns of the parameters to look at; all that require a gradient by default.
        weight_decay: the task was trained with `weight_decay / 2 * |theta|^2` added to the mean loss.
        collate: samples (a list) to a batch; `torch.utils.data.default_collate` by default.
        forward: `forward(model, batch) -> outputs`; `model(*batch[:-1])` by default.
        targets: `targets(batch) -> targets`; `batch[-1]` by default.
        classes: names of integer labels, for tables and pictures.
        retrain: `retrain(keep) -> model`, for `infl-cache validate`: a model of the same kind trained anew on the
            training samples where the bool tensor `keep` (n_train,) is true, the same one for the same `keep`. Divide
            the sum of their losses by n_train, not by their number, for that is what the influences predict. Whoever
            wants the mean over several seeds calls them inside. A float64 model is measured in float64.
        render: `render(sample)`: what a sample is shown as in the report. A picture ((H, W) or (H, W, 3), an array,
            tensor or PIL image; bytes 0 to 255, floats 0 to 1), a str, or a mapping of names to values (a row of a
            table); by default what it looks like. It only shows: it is no part of a run's identity.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.zeros(8, dtype=torch.long))
        >>> loss = torch.nn.CrossEntropyLoss(reduction="none")
        >>> task = Task(model=torch.nn.Linear(3, 2), train=data, test=data, loss=loss)
    """

    model: nn.Module
    train: Any
    test: Any
    loss: Callable[[Any, Any], Tensor]
    measure: Callable[[Any, Any], Tensor] | None = None
    parameters: Sequence[str] | None = None
    weight_decay: float = 0.0
    collate: Callable[[list[Any]], Any] = default_collate
    forward: Callable[[nn.Module, Any], Any] = _inputs_first
    targets: Callable[[Any], Any] = _last
    classes: Sequence[str] | None = None
    retrain: Callable[[Tensor], nn.Module] | None = None
    render: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise BadInput(f"model: expected a torch.nn.Module, found {type(self.model).__name__}")
        for name in ("train", "test"):
            _check_dataset(getattr(self, name), name)
        for name in ("loss", "measure", "collate", "forward", "targets", "retrain", "render"):
            if not callable(getattr(self, name)) and not (name in OPTIONAL and getattr(self, name) is None):
                raise BadInput(f"{name}: expected a function, found {type(getattr(self, name)).__name__}")
        if not (isinstance(self.weight_decay, (int, float)) and 0 <= self.weight_decay < float("inf")):
            raise BadInput(f"weight_decay: expected a number of at least 0, found {self.weight_decay!r}")


def _check_dataset(dataset: Any, name: str) -> None:
    if isinstance(dataset, torch.utils.data.DataLoader):
        raise BadInput(f"{name}: expected a dataset addressed by index, found a DataLoader; give its .dataset")
    for method in ("__len__", "__getitem__"):
        own = getattr(type(dataset), method, None)
        # torch's base class has an index that only says that there is none.
        if own is None or isinstance(dataset, IterableDataset) or own is TorchDataset.__getitem__:
            raise BadInput(
                f"{name}: expected a dataset with a length and an index, found {type(dataset).__name__}"
                f" without {method}; make it map-style, e.g. list(dataset)"
            )
    if len(dataset) == 0:
        raise BadInput(f"{name}: expected at least one sample, found none")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a device or on the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Turn an exception of the user's code into `BadInput` that says whose it is and ends with its traceback."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        if "use_reentrant=True" in str(error):
            raise BadInput(f"{what}: {REENTRANT}") from error
        lines = traceback.format_exc(limit=-3).rstrip()
        raise BadInput(f"{what} raised {type(error).__name__}: {error}\n{lines}") from error


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on `device`, in eval mode, no parameter requiring a gradient; put back whatever happens."""
    training = {module: module.training for module in model.modules()}
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    home = next((p.device for p in model.parameters()), device)
    try:
        model.to(device)
        model.eval()
        for parameter, _ in required:
            parameter.requires_grad_(False)
        with by_its_own_code(model):
            yield
    finally:
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        for module, flag in training.items():
            module.training = flag
        model.to(home)


class _Forward(nn.Module):
    """The task's forward as a module, so that `functional_call` swaps parameters inside it."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Any:
        return self.function(self.model, batch)


def outputs_at(task: Task, values: Mapping[str, Tensor], data: Any) -> Any:
    """The outputs for a batch with some parameters (or buffers) replaced by `values`: pure in `values`."""
    module = _Forward(task.model, task.forward)
    return called_at(module, {f"model.{name}": value for name, value in values.items()}, (data,))


def values_of(model: nn.Module, parameters: Parameters) -> dict[str, Tensor]:
    """The chosen parameters' current values, detached."""
    named = dict(model.named_parameters())
    return {name: named[name].detach() for name in parameters.names}


def per_sample(task: Task, outputs: Any, data: Any, size: int, measure: bool = False) -> Tensor:
    """The loss (or the measure) of every sample of a batch, (B,); refuses anything reduced.

    Raises `BadInput` with the shape that was expected and found.
    """
    function = task.measure if measure and task.measure is not None else task.loss
    name = "measure" if function is task.measure else "loss"
    values = function(outputs, task.targets(data))
    if not isinstance(values, Tensor) or values.shape != (size,):
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        hint = '; use reduction="none"' if isinstance(values, Tensor) and values.dim() == 0 else ""
        raise BadInput(f"{name}: expected one value a sample, shape ({size},), found {found}{hint}")
    return values


def losses_of(task: Task, batch: Batch, measure: bool = False) -> tuple[Any, Tensor]:
    """Outputs and per-sample losses of a batch at the trained parameters."""
    where = f"samples {batch.indices[0]} to {batch.indices[-1]}"
    with blaming(f"model or loss, on {where},"):
        outputs = task.forward(task.model, batch.data)
        return outputs, per_sample(task, outputs, batch.data, len(batch.indices), measure)


def reference_gradient(
    task: Task, parameters: Parameters, batch: Batch, measure: bool = False
) -> dict[str, Tensor | None]:
    """Plain autograd of one sample's loss: the slow twin of every fast path. None where nothing arrives."""
    named = dict(task.model.named_parameters())
    chosen = [named[name] for name in parameters.names]
    with requiring_grad(chosen), torch.enable_grad():
        _, losses = losses_of(task, batch, measure)
        if not losses.requires_grad:
            return dict.fromkeys(parameters.names)
        with blaming("backward of the loss"):
            gradients = torch.autograd.grad(losses.sum(), chosen, allow_unused=True)
    # Embeddings with sparse=True give sparse gradients, of the same values.
    plain = [grad.to_dense() if grad is not None and grad.is_sparse else grad for grad in gradients]
    return dict(zip(parameters.names, plain, strict=True))


@contextmanager
def requiring_grad(tensors: Sequence[Tensor]) -> Iterator[None]:
    """The given parameters require a gradient inside, and are put back."""
    flags = [tensor.requires_grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)


def scalar_of(value: Any) -> float:
    """A label or target as one number, NaN where it is not one (text, vectors)."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def targets_as_numbers(task: Task, data: Any, size: int) -> Tensor:
    """The targets of a batch as float64 (B,), NaN where a sample's target is not a single number."""
    targets = task.targets(data)
    if isinstance(targets, Tensor) and targets.numel() == size and targets.shape[:1] == (size,):
        return targets.detach().reshape(size).to(torch.float64)
    if isinstance(targets, (list, tuple)) and len(targets) == size:
        return torch.tensor([scalar_of(target) for target in targets], dtype=torch.float64)
    return torch.full((size,), float("nan"), dtype=torch.float64)


def predictions_of(outputs: Any, size: int) -> Tensor:
    """The predicted class of (B, C) outputs, the value of (B,) or (B, 1) ones, else NaN; float64 (B,)."""
    if isinstance(outputs, Tensor) and outputs.shape[:1] == (size,):
        if outputs.dim() == 2 and outputs.shape[1] > 1:
            return outputs.detach().argmax(1).to(torch.float64)
        if outputs.numel() == size:
            return outputs.detach().reshape(size).to(torch.float64)
    return torch.full((size,), float("nan"), dtype=torch.float64)
