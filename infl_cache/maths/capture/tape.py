"""What a forward and backward pass leave behind: each watched module's inputs and the gradients of its outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from infl_cache.maths.capture.attention import Projections
from infl_cache.maths.capture.forms import Spread


class Call:
    """One call of a module during one forward pass: its arguments, and its tensor outputs' shapes and gradients."""

    def __init__(self, args: tuple[Any, ...], named: Mapping[str, Any], shapes: list[torch.Size]) -> None:
        self.args, self.named = tree_map_only(Tensor, Tensor.detach, (args, dict(named)))
        self.shapes = shapes
        self.grads: list[Tensor | None] = [None] * len(shapes)

    @property
    def input(self) -> Tensor:
        """The first argument."""
        found = self.args[0] if self.args else next(iter(self.named.values()), None)
        if not isinstance(found, Tensor):
            raise TypeError(f"expected a tensor as first argument, found {type(found).__name__}")
        return found

    def grad(self, like: Tensor) -> Tensor:
        """The gradient of the (first) output; zeros where the loss does not depend on it."""
        found = self.grads[0]
        return like.new_zeros(self.shapes[0]) if found is None else found


class _Probe(torch.autograd.Function):
    """The identity, which keeps the gradient that passes through it.

    It marks its argument as changed in place, so that what the model does next in place (`ReLU(inplace=True)`)
    acts on its result: the gradient seen here is that of the layer's own output. `anchor` makes it part of
    the graph although no parameter requires a gradient, so that no weight gradient is ever computed.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, call: Call, place: int) -> Tensor:
        ctx.call, ctx.place = call, place
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ctx.call.grads[ctx.place] = grads[0].detach()
        return grads[0], grads[0].new_zeros(()), None, None


class Tape:
    """The calls of the watched modules, and what to differentiate by."""

    def __init__(self, anchor: Tensor) -> None:
        self.anchor = anchor
        self.copies: dict[str, Tensor] = {}
        self.calls: dict[str, list[Call]] = {}
        # Off during the backward pass: activation checkpoints run parts of the model once more, as they did before.
        self.running = True

    def probed(self, name: str, inputs: Tensor, output: Tensor) -> Tensor:
        """Note a call of a layer, and see to it that the gradient of its output will be noted."""
        call = Call((inputs,), {}, [output.shape])
        if self.running:
            self.calls.setdefault(name, []).append(call)
        found: Tensor = _Probe.apply(output, self.anchor, call, 0)  # type: ignore[no-untyped-call]
        return found

    def backward(self, total: Tensor, again: bool = False) -> dict[str, Tensor]:
        """Send the gradient of a scalar through all probes; the gradients of the spread parameters' copies.

        With `again` the graph is kept for the backward pass of another scalar, which replaces what the calls hold.
        """
        self.running = False
        for call in itertools.chain.from_iterable(self.calls.values()):
            call.grads = [None] * len(call.shapes)
        at = [self.anchor, *self.copies.values()]
        found = torch.autograd.grad(total, at, retain_graph=again, allow_unused=True)[1:]
        pairs = zip(self.copies.items(), found, strict=True)
        return {name: torch.zeros_like(copy) if grad is None else grad for (name, copy), grad in pairs}


@contextmanager
def recording(
    model: nn.Module, modules: Sequence[str], device: torch.device, spread: Sequence[Spread] = (), size: int = 0,
    common: Mapping[str, int] | None = None, attention: Sequence[str] = (),
) -> Iterator[Tape]:  # fmt: skip
    """Watch the named modules inside, with a copy of each spread parameter for each of `size` samples.

    `common` modules are called once for all samples (with positions, say): their output is handed on once a
    sample, so that each copy has a gradient of its own. It maps them to how many of their last axes are one position.
    The projections of `attention` modules are recorded under their names.
    """
    tape = Tape(torch.zeros((), device=device, requires_grad=True))
    handles = []
    originals: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    try:
        for each in spread:
            owner = model.get_submodule(each.module)
            originals.append((owner, each.attribute, owner._parameters[each.attribute]))
            tape.copies[each.name] = copies_of(owner._parameters[each.attribute], each.ones, size)
            owner._parameters[each.attribute] = tape.copies[each.name]  # type: ignore[assignment]
        for name in modules:
            handles.append(
                model.get_submodule(name).register_forward_hook(
                    _watching(tape, name, size, common or {}), with_kwargs=True
                )
            )
        if attention:
            handles += Projections(model, attention, tape.probed).around_calls()
        yield tape
    finally:
        for handle in handles:
            handle.remove()
        for owner, attribute, parameter in originals:
            owner._parameters[attribute] = parameter


def copies_of(parameter: Tensor | None, ones: int, size: int) -> Tensor:
    """A parameter once a sample, as a leaf that requires a gradient; see `Spread` for `ones`."""
    assert parameter is not None
    shape = parameter.shape[1:] if ones < 0 else (*[1] * ones, *parameter.shape)
    return parameter.detach().reshape(1, *shape).expand(size, *shape).clone().requires_grad_()


def once_a_sample(tensor: Tensor, size: int, event: int) -> Tensor:
    """A tensor that belongs to all samples, once for each: in a first axis of length 1 if it has one, or a new one."""
    single = tensor if tensor.dim() > event and tensor.shape[0] == 1 else tensor.unsqueeze(0)
    return single.expand(size, *single.shape[1:])


def _watching(tape: Tape, name: str, size: int, common: Mapping[str, int]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        if name in common:
            output = once_a_sample(output, size, common[name]).clone()
        leaves, structure = tree_flatten(output)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        call = Call(args, named, [leaves[i].shape for i in places])
        if tape.running:
            tape.calls.setdefault(name, []).append(call)
        for place, i in enumerate(places):
            # One output of several may be a view of another, and not every view may be changed in place.
            whole = leaves[i].clone() if len(leaves) > 1 or leaves[i]._is_view() else leaves[i]
            leaves[i] = _Probe.apply(whole, tape.anchor, call, place)  # type: ignore[no-untyped-call]
        return tree_unflatten(leaves, structure)

    return hook
