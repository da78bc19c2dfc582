"""What a rule is: how one kind of layer's gradient follows from what went in and what came back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from infl_cache.maths.capture.tape import Call

Settings = Mapping[str, Any]


class Rule(ABC):
    """Per-sample parameter gradients of one kind of layer from one batched forward and backward pass.

    With `input (B, n, *in)` and `output_grad (B, n, *out)`, n calls or positions of the layer for each sample,
    `weight_gradient` and `bias_gradient` give gradients `(B, *shape)`, summed over n.
    """

    name: str
    # Whether input and output gradient alone, without the module, give the gradient: only then can they be stored.
    stored: bool = False

    @abstractmethod
    def follows(self, module: nn.Module) -> bool:
        """Whether a module computes what this rule differentiates."""

    def accepts(self, module: nn.Module, call: Call) -> bool:
        """Whether this call of it does, too."""
        del module
        return len(call.args) + len(call.named) == 1 and isinstance((*call.args, *call.named.values())[0], Tensor)

    @abstractmethod
    def events(self, module: nn.Module, call: Call) -> tuple[int, int]:
        """How many of the last axes of input and output belong to one position."""

    def prepare(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The input as `weight_gradient` wants it; anything but itself only where it is not stored."""
        del module
        return inputs

    def settings(self, module: nn.Module) -> dict[str, Any]:
        """What the gradients need to know of the module besides: plain data, kept in the manifest."""
        del module
        return {}

    @abstractmethod
    def weight_gradient(self, settings: Settings, inputs: Tensor, output_grad: Tensor) -> Tensor:
        """Gradients of `weight`, `(B, *shape)`."""

    def bias_gradient(self, settings: Settings, output_grad: Tensor) -> Tensor:
        """Gradients of `bias`, `(B, *shape)`: the output gradients summed over positions."""
        del settings
        return output_grad.sum(1) if output_grad.shape[1] > 1 else output_grad[:, 0]

    def products(self, settings: Settings, weights: Tensor, inputs: Tensor, output_grad: Tensor) -> Tensor:
        """`(M, B)` inner products of M weights with B weight gradients that are never built."""
        raise NotImplementedError(f"{self.name} has no direct contraction")

    def seen(self, settings: Settings, weights: Tensor, inputs: Tensor) -> Tensor:
        """The layer's output `(B, M, n, *out)` with each of M weights `(M, *shape)`, for inputs `(B, n, *in)`."""
        raise NotImplementedError(f"{self.name} has no direct contraction")

    def add_combined(self, settings: Settings, inputs: Tensor, output_grad: Tensor, total: Tensor) -> None:
        """The transpose of `seen`: add to `total (M, *shape)` the sum over samples of M weight gradients of each.

        Output gradients are `(B, M, n, *out)`, `total` is contiguous.
        """
        raise NotImplementedError(f"{self.name} has no direct contraction")

    def operations(self, inputs: tuple[int, ...], output_grad: tuple[int, ...], size: int) -> tuple[int, int | None]:
        """Multiplications a sample: to build a gradient of `size` numbers; for one product without building it."""
        del inputs
        positions = output_grad[0] if output_grad else 1
        return positions * size, None

    def held(self, inputs: tuple[int, ...], output_grad: tuple[int, ...], size: int) -> tuple[int, int]:
        """Numbers in memory a sample: to build a gradient of `size` numbers; for one product without building it."""
        del inputs
        return 2 * size, math.prod(output_grad)


def own(module: nn.Module, name: str) -> Tensor | None:
    """A parameter that is the module's own and stands as it is, not recomputed from others."""
    found: Tensor | None = module._parameters.get(name)
    return found


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of a kind and has not changed how it computes."""
    return isinstance(module, kind) and type(module).forward is kind.forward and own(module, "weight") is not None
