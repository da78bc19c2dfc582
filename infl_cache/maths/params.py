"""Parameters as one flat vector: which, in what order, at what offset."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infl_cache.errors import BadInput


@dataclass(frozen=True)
class Parameters:
    """The chosen parameters theta in the order of `model.named_parameters()`.

    A vector has `size` entries; parameter `names[i]` is the slice `offsets[i] : offsets[i] + numel`.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Length of the flat vector, n_params."""
        return sum(self.sizes)

    def slice_of(self, name: str) -> slice:
        """Where a parameter lies in the flat vector."""
        index = self.names.index(name)
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The parameter's own shape."""
        return self.shapes[self.names.index(name)]


def select(model: nn.Module, patterns: Sequence[str] | None) -> Parameters:
    """The parameters whose names match any pattern (`*` as in a shell); by default all that require a gradient.

    Raises `BadInput` if a pattern matches nothing or no parameter is left.

    >>> select(nn.Linear(3, 2), ["weight"])
    Parameters(names=('weight',), shapes=((2, 3),))
    """
    every = dict(model.named_parameters())
    if patterns is None:
        chosen = [name for name, parameter in every.items() if parameter.requires_grad]
    else:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
            raise BadInput(f"parameters: expected names or patterns, found {patterns!r}")
        first_name = {id(parameter): name for name, parameter in every.items()}
        matched: set[str] = set()
        for pattern in patterns:
            hits = {
                first_name[id(parameter)]
                for name, parameter in model.named_parameters(remove_duplicate=False)
                if fnmatch.fnmatchcase(name, pattern)
            }
            if not hits:
                raise BadInput(f"parameters: {pattern!r} matches none of {', '.join(list(every)[:8])}, ...")
            matched |= hits
        chosen = [name for name in every if name in matched]
    if not chosen:
        raise BadInput("parameters: expected at least one selected, found none that requires a gradient")
    dtypes = {every[name].dtype for name in chosen}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        raise BadInput(
            f"parameters: expected one floating type, found {sorted(map(str, dtypes))}; select with parameters="
        )
    return Parameters(tuple(chosen), tuple(tuple(every[name].shape) for name in chosen))


def flatten(parameters: Parameters, tensors: Mapping[str, Tensor], leading: int = 0) -> Tensor:
    """Concatenate per-parameter tensors `(*lead, *shape)` into `(*lead, n_params)`; `leading` counts `lead`.

    >>> p = Parameters(("w", "b"), ((2, 2), (2,)))
    >>> flatten(p, {"b": torch.ones(2), "w": torch.zeros(2, 2)}).tolist()
    [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    """
    return torch.cat([tensors[name].flatten(leading) if tensors[name].dim() > leading
                      else tensors[name].unsqueeze(-1) for name in parameters.names], dim=-1)  # fmt: skip


def unflatten(parameters: Parameters, vectors: Tensor) -> dict[str, Tensor]:
    """The inverse of `flatten`: views of `(*lead, n_params)` as `(*lead, *shape)`."""
    pieces = torch.split(vectors, list(parameters.sizes), dim=-1)
    lead = vectors.shape[:-1]
    return {
        name: piece.reshape((*lead, *shape))
        for name, shape, piece in zip(parameters.names, parameters.shapes, pieces, strict=True)
    }
