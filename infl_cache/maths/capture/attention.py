"""The projections inside `nn.MultiheadAttention`, seen as the linear layers that they are.

The module hands its weights to one function, which no hook sees into. While it is watched, self-attention is
computed as projection, the same function with identity matrices for weights, projection: equal numbers, and the two
projections can be recorded like any other linear layer. Masks, heads and all other options stay with the function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

Record = Callable[[str, Tensor, Tensor], Tensor]

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_WEIGHTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight")


def has_projections(module: nn.Module) -> bool:
    """Whether a module is a plain `nn.MultiheadAttention` with one matrix for queries, keys and values."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and module._parameters.get("in_proj_weight") is not None
    )


@dataclass(frozen=True)
class Place:
    """Where a module's parameters are used: its calls' name, the attention module around it, `{attribute: kind}`."""

    calls: str
    within: str
    kinds: dict[str, str]


def place_of(model: nn.Module, path: str) -> Place:
    """A module's own place, or that of the projection that uses its parameters."""
    around = path.rpartition(".")[0]
    if has_projections(model.get_submodule(path)):
        return Place(f"{path}.in_proj", path, {"in_proj_weight": "weight", "in_proj_bias": "bias"})
    within = around if path.endswith("out_proj") and has_projections(model.get_submodule(around)) else ""
    return Place(path, within, {"weight": "weight", "bias": "bias"})


class Projections(TorchFunctionMode):
    """Inside, the self-attention of the named modules calls `record(name, input, output)` for each projection.

    The names are the module's path and `.in_proj` or `.out_proj`; what `record` returns takes the output's place.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], record: Record) -> None:
        super().__init__()
        self._modules = [model.get_submodule(path) for path in paths]
        self._paths = {id(model.get_submodule(path)._parameters["in_proj_weight"]): path for path in paths}
        self._record = record

    def around_calls(self) -> list[RemovableHandle]:
        """Hooks that have this at work during each call of the modules: also in a backward pass, by a checkpoint."""

        def enter(*_: Any) -> None:
            self.__enter__()  # type: ignore[no-untyped-call]

        def leave(*_: Any) -> None:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        entering = [module.register_forward_pre_hook(enter) for module in self._modules]
        return entering + [module.register_forward_hook(leave, always_call=True) for module in self._modules]

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Everything but self-attention of a named module goes on as it is."""
        if func is F.multi_head_attention_forward:
            bound = _SIGNATURE.bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            given = dict(bound.arguments)
            path = self._paths.get(id(given["in_proj_weight"]))
            if path is not None and given["query"] is given["key"] and given["key"] is given["value"]:
                return self._attended(path, given)
        return func(*args, **(kwargs or {}))

    def _attended(self, path: str, given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        query: Tensor = given["query"]
        projected = F.linear(query, given["in_proj_weight"], given["in_proj_bias"])
        parts = self._record(f"{path}.in_proj", query, projected).chunk(3, dim=-1)
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        same = torch.eye(query.shape[-1], dtype=query.dtype, device=query.device)
        given.update(zip(("query", "key", "value"), parts, strict=True))
        given.update(
            dict.fromkeys(_WEIGHTS, same), in_proj_bias=None, out_proj_bias=None, use_separate_proj_weight=True
        )
        attended, weights = F.multi_head_attention_forward(**given)
        return self._record(f"{path}.out_proj", attended, F.linear(attended, weight, bias)), weights
