r"""`nn.Conv1d/2d/3d` and their transposed forms, with any stride, padding, dilation and groups.

:math:`\nabla W[o, c, k] = \sum_p \delta[o, p]\, x[c, s p + d k]` over output places p, of the padded image x.
A transposed convolution is the same with the two images changing places. The image is kept, never its patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infl_cache.maths.capture.rules.rule import Rule, Settings, plain
from infl_cache.maths.capture.tape import Call

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Numbers in one sample's patches beyond which a CPU takes the library's own kernel, sample by sample, and not one
# product of patches: between 3x3 kernels that were seen to gain by it (64 channels of 32x32: 590,000 numbers) and to
# lose (32 of 16x16: 74,000).
MANY_PATCHES = 150_000
# Patches of several samples at once that still lie in a cache when they are multiplied.
PATCHES_AT_ONCE = 1_500_000
BLOCK = 16


class Convolution(Rule):
    """A convolution of an image with channels first."""

    name = "convolution"
    stored = True

    def follows(self, module: nn.Module) -> bool:
        return any(plain(module, kind) for kind in (*KINDS, *TRANSPOSED))

    def events(self, module: nn.Module, call: Call) -> tuple[int, int]:
        axes = len(module.kernel_size) + 1  # type: ignore[arg-type]
        return axes, axes

    def settings(self, module: nn.Module) -> dict[str, Any]:
        mode: Any = module.padding_mode
        found: dict[str, Any] = {
            name: [int(each) for each in getattr(module, name)] for name in ("kernel_size", "stride", "dilation")
        }
        # Before and after each axis, the last axis first, as `F.pad` takes it; "same" is already in numbers here.
        pads = [int(each) for each in module._reversed_padding_repeated_twice]  # type: ignore[union-attr]
        transposed = isinstance(module, TRANSPOSED)
        mode = "constant" if mode == "zeros" else mode
        return {**found, "pads": pads, "mode": mode, "groups": int(module.groups), "transposed": transposed}  # type: ignore[arg-type]

    def weight_gradient(self, settings: Settings, inputs: Tensor, output_grad: Tensor) -> Tensor:
        calls = [_one_call(settings, inputs[:, n], output_grad[:, n]) for n in range(inputs.shape[1])]
        return calls[0] if len(calls) == 1 else torch.stack(calls).sum(0)

    def bias_gradient(self, settings: Settings, output_grad: Tensor) -> Tensor:
        return output_grad.flatten(3).sum((1, 3))

    def operations(self, inputs: tuple[int, ...], output_grad: tuple[int, ...], size: int) -> tuple[int, int | None]:
        # The smaller image has one place for each product of the whole kernel: the output, or the input if transposed.
        return inputs[0] * min(math.prod(inputs[2:]), math.prod(output_grad[2:])) * size, None


def _one_call(settings: Settings, image: Tensor, grad: Tensor) -> Tensor:
    """Gradients `(B, O, C / groups, *kernel)` for images `(B, C, *in)` and gradients `(B, O, *out)`."""
    if settings["transposed"]:
        image, grad = grad, image
    padded = F.pad(image, settings["pads"], settings["mode"]) if any(settings["pads"]) else image
    for axis, (length, stride, dilation) in enumerate(
        zip(settings["kernel_size"], settings["stride"], settings["dilation"], strict=True)
    ):  # what no window reaches: the rest after the last stride, or the output padding of a transposed one
        padded = padded.narrow(2 + axis, 0, (grad.shape[2 + axis] - 1) * stride + (length - 1) * dilation + 1)
    if _blocked(settings, padded, grad):
        return _as_groups(settings, padded, grad)
    patches = padded.shape[1] * math.prod(settings["kernel_size"]) * math.prod(grad.shape[2:])
    if patches > MANY_PATCHES and image.device.type == "cpu":
        return _one_by_one(settings, padded, grad)
    step = max(1, PATCHES_AT_ONCE // max(1, patches))
    parts = [_by_patches(settings, padded[i : i + step], grad[i : i + step]) for i in range(0, len(image), step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _blocked(settings: Settings, padded: Tensor, grad: Tensor) -> bool:
    """Whether oneDNN has its fast kernels for this convolution with one group a sample: channels in sixteens."""
    channels = (padded.shape[1] // settings["groups"], grad.shape[1] // settings["groups"])
    fast = padded.device.type == "cpu" and padded.dtype == torch.float32 and torch.backends.mkldnn.enabled
    return bool(fast) and all(count % BLOCK == 0 for count in channels)


def _as_groups(settings: Settings, padded: Tensor, grad: Tensor) -> Tensor:
    """One weight gradient of a convolution whose groups are the samples: as fast as that of the whole batch."""
    size, channels, outputs = len(padded), padded.shape[1], grad.shape[1]
    kernel, groups, axes = settings["kernel_size"], size * settings["groups"], len(settings["kernel_size"])
    zeros: Sequence[int] = [0] * axes
    weight = padded.new_empty(size * outputs, channels // settings["groups"], *kernel)
    found: Tensor = torch.ops.aten.convolution_backward(
        grad.reshape(1, size * outputs, *grad.shape[2:]), padded.reshape(1, size * channels, *padded.shape[2:]), weight,
        None, settings["stride"], zeros, settings["dilation"], False, zeros, groups, [False, True, False],
    )[1]  # fmt: skip
    return found.view(size, outputs, -1, *kernel)


def _by_patches(settings: Settings, padded: Tensor, grad: Tensor) -> Tensor:
    """One batched product of patches with gradients."""
    kernel, groups = settings["kernel_size"], settings["groups"]
    size, channels = padded.shape[:2]
    windows = padded
    for axis, (length, stride, dilation) in enumerate(
        zip(kernel, settings["stride"], settings["dilation"], strict=True)
    ):
        windows = windows.unfold(2 + axis, (length - 1) * dilation + 1, stride)[..., ::dilation]
    axes = len(kernel)
    order = (0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))
    patches = windows.permute(order).reshape(size * groups, channels // groups * math.prod(kernel), -1)
    found = grad.reshape(size * groups, grad.shape[1] // groups, -1) @ patches.transpose(1, 2)
    return found.reshape(size, grad.shape[1], channels // groups, *kernel)


def _one_by_one(settings: Settings, padded: Tensor, grad: Tensor) -> Tensor:
    """The library's own weight gradient, one sample after the other."""
    axes, groups = len(settings["kernel_size"]), settings["groups"]
    weight = padded.new_empty(grad.shape[1], padded.shape[1] // groups, *settings["kernel_size"])
    found = padded.new_empty(len(padded), *weight.shape)
    zeros: Sequence[int] = [0] * axes
    for row in range(len(padded)):
        found[row] = torch.ops.aten.convolution_backward(
            grad[row : row + 1], padded[row : row + 1], weight, None, settings["stride"], zeros, settings["dilation"],
            False, zeros, groups, [False, True, False],
        )[1]  # fmt: skip
    return found
