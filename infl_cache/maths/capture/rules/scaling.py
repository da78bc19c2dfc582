r"""Layers that scale and shift, :math:`y = w \hat x + b`: norms and PReLU. :math:`\nabla w = \sum \delta \hat x`.

What multiplies the weight, :math:`\hat x`, is the normalised input, or its negative part for PReLU. These gradients are
small, so they are kept as plain rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infl_cache.maths.capture.rules.rule import Rule, Settings, plain
from infl_cache.maths.capture.tape import Call

ELEMENTWISE = (nn.LayerNorm, nn.RMSNorm)
INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class ElementNorm(Rule):
    """`LayerNorm` and `RMSNorm`: a weight for each element of the normalised axes."""

    name = "element_norm"

    def follows(self, module: nn.Module) -> bool:
        return any(plain(module, kind) for kind in ELEMENTWISE)

    def events(self, module: nn.Module, call: Call) -> tuple[int, int]:
        axes = len(module.normalized_shape)  # type: ignore[arg-type]
        return axes, axes

    def prepare(self, module: nn.Module, inputs: Tensor) -> Tensor:
        shape: Any = module.normalized_shape
        eps: Any = module.eps
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(inputs, shape, None, eps)
        return F.layer_norm(inputs, shape, None, None, eps)

    def weight_gradient(self, settings: Settings, inputs: Tensor, output_grad: Tensor) -> Tensor:
        return (inputs * output_grad).sum(1)


class ChannelNorm(Rule):
    """`GroupNorm`, `InstanceNorm`, and `BatchNorm` by its running statistics: a weight for each channel."""

    name = "channel_norm"

    def follows(self, module: nn.Module) -> bool:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return own_statistics(module) and type(module).forward is nn.modules.batchnorm._BatchNorm.forward
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            ours = type(module).forward is nn.modules.instancenorm._InstanceNorm.forward
            return ours and module._parameters.get("weight") is not None
        return plain(module, nn.GroupNorm)

    def accepts(self, module: nn.Module, call: Call) -> bool:
        # An InstanceNorm of one image without a batch axis is not followed.
        return super().accepts(module, call) and call.input.dim() >= (3 if isinstance(module, INSTANCE) else 2)

    def events(self, module: nn.Module, call: Call) -> tuple[int, int]:
        axes = call.input.dim() - 1
        return axes, axes

    def prepare(self, module: nn.Module, inputs: Tensor) -> Tensor:
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(inputs, module.num_groups, None, None, module.eps)
        mean: Any = module.running_mean
        variance: Any = module.running_var
        eps: Any = module.eps
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            return F.instance_norm(inputs, mean, variance, None, None, mean is None, 0.0, eps)
        return F.batch_norm(inputs, mean, variance, None, None, False, 0.0, eps)

    def weight_gradient(self, settings: Settings, inputs: Tensor, output_grad: Tensor) -> Tensor:
        return _by_channel(inputs, output_grad)

    def bias_gradient(self, settings: Settings, output_grad: Tensor) -> Tensor:
        return output_grad.flatten(3).sum((1, 3)) if output_grad.dim() > 3 else output_grad.sum(1)


class Slope(Rule):
    """`PReLU`: a slope for negative inputs, for each channel or for all."""

    name = "prelu"

    def follows(self, module: nn.Module) -> bool:
        return plain(module, nn.PReLU)

    def events(self, module: nn.Module, call: Call) -> tuple[int, int]:
        axes = call.input.dim() - 1
        return axes, axes

    def settings(self, module: nn.Module) -> dict[str, Any]:
        return {"one": int(module.num_parameters) == 1}  # type: ignore[arg-type]

    def prepare(self, module: nn.Module, inputs: Tensor) -> Tensor:
        return inputs.clamp_max(0)

    def weight_gradient(self, settings: Settings, inputs: Tensor, output_grad: Tensor) -> Tensor:
        if settings["one"]:
            return (inputs * output_grad).flatten(1).sum(1, keepdim=True)
        return _by_channel(inputs, output_grad)


def own_statistics(module: nn.Module) -> bool:
    """Whether a BatchNorm has weights, and running statistics that do not depend on the batch."""
    return module._parameters.get("weight") is not None and module._buffers.get("running_mean") is not None


def _by_channel(inputs: Tensor, output_grad: Tensor) -> Tensor:
    """Sums of products over positions and places of `(B, n, C, ...)`, for each channel."""
    if inputs.dim() == 3:
        return (inputs * output_grad).sum(1)
    dots: Tensor = torch.linalg.vecdot(inputs.flatten(3), output_grad.flatten(3))
    return dots.sum(1)
