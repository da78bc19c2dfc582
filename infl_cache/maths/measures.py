r"""What may be explained of a test sample instead of its loss: functions for `Task(measure=...)` and `--measure NAME`.

`influence[j, i]` is then about :math:`f(z_j, \theta)`: negative where more weight on training sample i lowers it. A
margin or a logit is good when it is high, so here **positive is helpful**, and the rankings of such a run know that.
A measure of a task's own counts, as a loss does, as good when it is low.

>>> from infl_cache import Task, measures
>>> data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.zeros(8, dtype=torch.long))
>>> loss = torch.nn.CrossEntropyLoss(reduction="none")
>>> task = Task(model=torch.nn.Linear(3, 2), train=data, test=data, loss=loss, measure=measures.margin)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infl_cache.errors import BadInput

Measure = Callable[[Any, Any], Tensor]


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    r"""The log-odds of the right answer, (B,): what TRAK explains (Park et al. 2023, "TRAK", Eq. 5).

    .. math:: f = a_y - \log \sum_{c \ne y} e^{a_c} = \log \frac{p_y}{1 - p_y}

    with the logits :math:`a` (B, C) and integer labels :math:`y` (B,). Of binary outputs, (B,) or (B, 1), it is the
    output for label 1 and minus the output for label 0 (or -1), which is the same quantity.

    Raises `BadInput` for other shapes.

    >>> margin(torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([1]))  # 2 - log 2
    tensor([1.3069])
    """
    if _is_binary(outputs):
        return _signed("margin", outputs, targets)
    labels = _labels("margin", outputs, targets)
    own = outputs.gather(1, labels).squeeze(1)
    return own - outputs.scatter(1, labels, -torch.inf).logsumexp(1)


def logit(outputs: Tensor, targets: Tensor) -> Tensor:
    r"""The output of the right class, (B,): :math:`f = a_y`; of binary outputs the same as `margin`.

    Raises `BadInput` for other shapes.

    >>> logit(torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([1])), logit(torch.tensor([0.5]), torch.tensor([0.0]))
    (tensor([2.]), tensor([-0.5000]))
    """
    if _is_binary(outputs):
        return _signed("logit", outputs, targets)
    return outputs.gather(1, _labels("logit", outputs, targets)).squeeze(1)


def embedding_norm(outputs: Tensor, targets: Any) -> Tensor:
    r"""The Euclidean norm of a sample's outputs, flattened, (B,): :math:`f = |e|`; the targets are not looked at.

    For models whose outputs are embeddings. Raises `BadInput` for outputs that are no tensor (B, ...).

    >>> embedding_norm(torch.tensor([[3.0, 4.0]]), None)
    tensor([5.])
    """
    if not isinstance(outputs, Tensor) or outputs.dim() == 0:
        raise BadInput(f"measure embedding-norm: expected outputs (B, ...), found {_shape(outputs)}")
    norms: Tensor = torch.linalg.vector_norm(outputs.reshape(len(outputs), -1), dim=1)
    return norms


MEASURES: dict[str, Measure] = {"margin": margin, "logit": logit, "embedding-norm": embedding_norm}

HIGHER_IS_BETTER = ("margin", "logit")


def named(name: str | None, own: Measure | None) -> Measure | None:
    """The measure of that name; None is the loss. Without a name that of the task itself."""
    return own if name is None else MEASURES.get(name)


def name_of(measure: Measure | None) -> str | None:
    """The name under which a measure is found here, if it is."""
    return next((name for name, each in MEASURES.items() if each is measure), None)


def words_for(measure: Measure | None) -> str:
    """What a measure is called where it is shown; that of a task's own is never taken for one of these."""
    if measure is None:
        return "loss"
    return name_of(measure) or f"{getattr(measure, '__qualname__', type(measure).__name__)}, the task's own"


def _is_binary(outputs: Any) -> bool:
    return isinstance(outputs, Tensor) and (outputs.dim() == 1 or (outputs.dim() == 2 and outputs.shape[1] == 1))


def _signed(name: str, outputs: Tensor, targets: Any) -> Tensor:
    """The output of each sample, its sign turned for label 0."""
    if not isinstance(targets, Tensor) or targets.numel() != len(outputs) or targets.shape[:1] != outputs.shape[:1]:
        raise BadInput(
            f"measure {name}: expected a label 0 or 1 for each of the outputs {_shape(outputs)}, found targets"
            f" {_shape(targets)}"
        )
    sign = torch.sign(2 * targets.reshape(-1).to(outputs.dtype) - 1)
    return outputs.reshape(-1) * sign


def _labels(name: str, outputs: Any, targets: Any) -> Tensor:
    """The labels as a column (B, 1) of indices."""
    fitting = isinstance(outputs, Tensor) and outputs.dim() == 2 and isinstance(targets, Tensor)
    if not fitting or targets.shape not in (outputs.shape[:1], (len(outputs), 1)) or targets.is_floating_point():
        found = f", of type {targets.dtype}" if isinstance(targets, Tensor) else ""
        raise BadInput(
            f"measure {name}: expected outputs (B, classes) and an integer label a sample, found outputs"
            f" {_shape(outputs)} and targets {_shape(targets)}{found};\ngive the task a measure= of its own"
        )
    column: Tensor = targets.reshape(-1, 1).long()
    return column


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
