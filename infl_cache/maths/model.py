"""The model itself, out of whatever it was wrapped in, and run by its own code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from infl_cache.errors import BadInput


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, `DataParallel` and `DistributedDataParallel`; its numbers are the same.

    Raises `BadInput` for a model whose parameters are sharded over processes.

    >>> type(unwrapped(nn.DataParallel(nn.Linear(2, 3)))).__name__
    'Linear'
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            break
    sharded = [name for name, module in model.named_modules() if type(module).__name__ == "FullyShardedDataParallel"]
    sharded += [name for name, parameter in model.named_parameters() if type(parameter.data).__name__ == "DTensor"]
    if sharded:
        raise BadInput(
            f"model: expected all parameters in this process, found {sharded[0] or 'the model'!r} sharded over several;"
            " load the full state into the plain model"
        )
    return model


def called_at(
    module: nn.Module, values: Mapping[str, Tensor], args: tuple[Any, ...], named: Mapping[str, Any] | None = None
) -> Any:
    """As `torch.func.functional_call`, which leaves the values behind in a module that is found under two names."""
    own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    ids, given = {name: id(tensor) for name, tensor in own}, dict(values)
    wanted = {ids[name]: value for name, value in values.items() if name in ids}
    slots = {_slot(module, name) for name in values}
    for name in ids:
        if ids[name] in wanted and _slot(module, name) not in slots:
            slots.add(_slot(module, name))
            given[name] = wanted[ids[name]]
    return torch.func.functional_call(module, given, args, dict(named or {}), tie_weights=False)


def _slot(module: nn.Module, name: str) -> tuple[int, str]:
    """Where a tensor is held: in which module object, under which name."""
    path, _, attribute = name.rpartition(".")
    return id(module.get_submodule(path)), attribute


@contextmanager
def by_its_own_code(model: nn.Module) -> Iterator[None]:
    """Inside, compiled parts of the model run uncompiled, and attention layers without their fused shortcut.

    Both would run past the layers whose inputs and gradients are looked at.
    """
    compiled = any(each._compiled_call_impl is not None or "_orig_mod" in each._modules for each in model.modules())
    shortcut = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if compiled:
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(shortcut)
