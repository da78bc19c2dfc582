"""The rule for `nn.Linear`: its input going forward, the gradient of its output going backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Call:
    """One call of a layer during one forward pass."""

    def __init__(self, inputs: Tensor, output_shape: torch.Size) -> None:
        self.input = inputs
        self.output_shape = output_shape
        self.output_grad: Tensor | None = None


class _Probe(torch.autograd.Function):
    """The identity, which keeps the gradient that passes through it.

    It marks its argument as changed in place, so that what the model does next in place (`ReLU(inplace=True)`)
    acts on its result: the gradient seen here is that of the layer's own output. `anchor` makes it part of
    the graph although no parameter requires a gradient, so that no weight gradient is ever computed.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, call: Call) -> Tensor:
        ctx.call = call
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.call.output_grad = grads[0].detach()
        return grads[0], grads[0].new_zeros(()), None


class Tape:
    """The calls of the watched layers, and the anchor to differentiate by."""

    def __init__(self, anchor: Tensor) -> None:
        self.anchor = anchor
        self.calls: dict[str, list[Call]] = {}
        # Off during the backward pass: activation checkpoints run parts of the model once more, as they did before.
        self.running = True


@contextmanager
def recording(model: nn.Module, modules: Sequence[str], device: torch.device) -> Iterator[Tape]:
    """Watch the named layers inside; hooks are removed on leaving."""
    tape = Tape(torch.zeros((), device=device, requires_grad=True))
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            call = Call((args[0] if args else named["input"]).detach(), output.shape)
            if tape.running:
                tape.calls.setdefault(name, []).append(call)
            probed: Tensor = _Probe.apply(output, tape.anchor, call)  # type: ignore[no-untyped-call]
            return probed

        return hook

    try:
        for name in modules:
            handles.append(model.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True))
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def follows_rule(module: nn.Module) -> bool:
    """Whether a module computes what `nn.Linear` does, from parameters that are its own."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and module._parameters.get("weight") is not None
    )


def factors(calls: Sequence[Call], size: int, positions: int | None) -> tuple[Tensor, Tensor] | None:
    """`input (B, T, n_in)` and `output_grad (B, T, n_out)` over all calls; None if they have another shape.

    A layer called twice has the positions of both calls. Fewer than `positions` are padded with zeros, which
    add nothing to a gradient; with None any number will do.
    """
    if any(call.input.dim() < 2 or call.input.shape[0] != size for call in calls):
        return None
    inputs = [call.input.reshape(size, -1, call.input.shape[-1]) for call in calls]
    grads = [
        call.input.new_zeros(size, *each.shape[1:2], call.output_shape[-1]) if call.output_grad is None
        else call.output_grad.reshape(size, each.shape[1], -1)
        for call, each in zip(calls, inputs, strict=True)
    ]  # fmt: skip
    together, grad = torch.cat(inputs, 1), torch.cat(grads, 1)
    missing = 0 if positions is None else positions - together.shape[1]
    if missing < 0:
        return None
    if missing:
        together, grad = (nn.functional.pad(each, (0, 0, 0, missing)) for each in (together, grad))
    return together, grad


def multiplied_out(inputs: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients themselves: weight `(B, n_out, n_in)` and bias `(B, n_out)`."""
    return output_grad.transpose(1, 2) @ inputs, output_grad.sum(1)
