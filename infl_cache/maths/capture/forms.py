"""In which form each parameter's gradient is kept: plain data, the same in memory and in the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from infl_cache.maths.params import Parameters


@dataclass(frozen=True)
class Layer:
    """A linear layer seen through its factors `input (T, n_in)` and `output_grad (T, n_out)`.

    `key` is its name in the store, `module` its path in the model; `weight` and `bias` are the names of
    those of its parameters that were chosen.
    """

    key: str
    module: str
    weight: str | None
    bias: str | None
    positions: int
    n_in: int
    n_out: int

    @property
    def factor_size(self) -> int:
        """Numbers a sample in factored form."""
        return self.positions * (self.n_in + self.n_out)

    @property
    def gradient_size(self) -> int:
        """Numbers a sample in plain form."""
        return (self.n_in * self.n_out if self.weight else 0) + (self.n_out if self.bias else 0)

    @property
    def names(self) -> tuple[str, ...]:
        """The chosen parameters of this layer."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)


@dataclass(frozen=True)
class Forms:
    """The whole plan of a capture.

    `factored` layers are kept as factors; `expanded` ones are captured as factors and multiplied out into
    plain rows; `mapped` parameters get their rows by `engine`: `vmap` of the whole model, or a `loop` of
    plain autograd where vmap cannot go.
    """

    parameters: Parameters
    factored: tuple[Layer, ...]
    expanded: tuple[Layer, ...]
    mapped: tuple[str, ...]
    engine: Literal["vmap", "loop"] = "vmap"

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers that are captured as factors."""
        return self.factored + self.expanded

    @property
    def dense(self) -> tuple[str, ...]:
        """Parameters kept as plain columns, in the order of the columns."""
        kept = {name for layer in self.factored for name in layer.names}
        return tuple(name for name in self.parameters.names if name not in kept)

    @property
    def n_dense(self) -> int:
        """Number of plain columns."""
        sizes = dict(zip(self.parameters.names, self.parameters.sizes, strict=True))
        return sum(sizes[name] for name in self.dense)

    @property
    def row_size(self) -> int:
        """Numbers a sample in the store."""
        return self.n_dense + sum(layer.factor_size for layer in self.factored)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Forms:
        """The inverse of `to_json`.

        >>> forms = Forms(Parameters(("w",), ((2, 2),)), (), (), ("w",))
        >>> Forms.from_json(forms.to_json()) == forms
        True
        """
        parameters = content["parameters"]
        return cls(
            Parameters(tuple(parameters["names"]), tuple(tuple(shape) for shape in parameters["shapes"])),
            tuple(Layer(**layer) for layer in content["factored"]),
            tuple(Layer(**layer) for layer in content["expanded"]),
            tuple(content["mapped"]),
            content["engine"],
        )
