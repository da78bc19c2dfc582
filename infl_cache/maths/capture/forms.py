"""In which form each parameter's gradient is kept: plain data, the same in memory and in the manifest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from infl_cache.errors import DamagedStore
from infl_cache.maths.params import Parameters


@dataclass(frozen=True)
class Layer:
    """A layer that a rule covers, seen through `input (n, ...)` and `output_grad (n, ...)` of one sample.

    `n` counts positions of a linear layer or an embedding, images of a convolution. `key` is the layer's name in
    the store, `module` its path in the model, `parameters` maps the chosen ones of its parameters (`weight`,
    `bias`) to their names in the model; a parameter of several layers is the sum over them. `settings` is what the
    rule needs to multiply out (strides, say), `axes` are the batch axes of the module's own input and output
    (-1 where one call serves all samples), `lengths` how long these are for each sample (0 where that varies),
    `input_key` names the layer whose stored input this one shares, `within` the attention module that this layer is
    a projection of.
    """

    key: str
    module: str
    rule: str
    parameters: dict[str, str]
    input_shape: tuple[int, ...]
    grad_shape: tuple[int, ...]
    gradient_size: int
    settings: dict[str, Any] = field(default_factory=dict)
    axes: tuple[int, int] = (0, 0)
    lengths: tuple[int, int] = (1, 1)
    input_key: str = ""
    indices: bool = False
    within: str = ""

    @property
    def input_from(self) -> str:
        """The key under which this layer's input is stored."""
        return self.input_key or self.key

    @property
    def factor_size(self) -> int:
        """Numbers a sample in factored form, a shared input counted where it is stored."""
        own = 0 if self.input_key else math.prod(self.input_shape)
        return own + math.prod(self.grad_shape)

    @property
    def names(self) -> tuple[str, ...]:
        """The chosen parameters of this layer."""
        return tuple(self.parameters.values())


@dataclass(frozen=True)
class Spread:
    """A parameter used by its own module in arithmetic that broadcasts: each sample is given a copy of its own.

    Parameter `name` is attribute `attribute` of `module`; its copies have `ones` axes of length 1 after the
    batch axis, or take the place of a first axis of length 1 (`ones` is -1).
    """

    name: str
    module: str
    attribute: str
    ones: int


@dataclass(frozen=True)
class Alone:
    """A module without a rule: vmap of it alone, from what goes in to the gradient of what comes out.

    `parameters` maps names inside the module to names in the model; `inputs` and `outputs` hold the batch axis
    of each tensor that goes in or out, None where it belongs to no sample. Where vmap cannot follow the module,
    `engine` is a `loop` over the samples.
    """

    module: str
    parameters: dict[str, str]
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]
    engine: Literal["vmap", "loop"] = "vmap"


@dataclass(frozen=True)
class Forms:
    """The whole plan of a capture.

    `factored` layers are kept as factors; `expanded` ones are captured as factors and multiplied out into
    plain rows; `spread` parameters and modules `alone` get rows from the same backward pass; `mapped` parameters
    by `engine`: `vmap` of the whole model, or a `loop` of plain autograd where vmap cannot go.
    """

    parameters: Parameters
    factored: tuple[Layer, ...] = ()
    expanded: tuple[Layer, ...] = ()
    spread: tuple[Spread, ...] = ()
    alone: tuple[Alone, ...] = ()
    mapped: tuple[str, ...] = ()
    engine: Literal["vmap", "loop"] = "vmap"

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers that are captured by a rule."""
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

    def at_once(self, size: int) -> int:
        """Samples that one capture may take, of `size` that are wanted: one where a loop does the work."""
        return 1 if self.mapped and self.engine == "loop" else size

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Forms:
        """The inverse of `to_json`.

        >>> forms = Forms(Parameters(("w",), ((2, 2),)), mapped=("w",))
        >>> Forms.from_json(forms.to_json()) == forms
        True
        """
        try:
            return cls._read(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedStore(
                f"the plan of grads: expected the forms of this version of infl_cache, found others ({error!r});"
                " start over with infl-cache grads --force"
            ) from error

    @classmethod
    def _read(cls, content: Mapping[str, Any]) -> Forms:
        parameters = content["parameters"]
        return cls(
            Parameters(tuple(parameters["names"]), tuple(tuple(shape) for shape in parameters["shapes"])),
            tuple(_layer(each) for each in content["factored"]),
            tuple(_layer(each) for each in content["expanded"]),
            tuple(Spread(**each) for each in content["spread"]),
            tuple(Alone(**{**each, "inputs": tuple(each["inputs"]), "outputs": tuple(each["outputs"])})
                  for each in content["alone"]),
            tuple(content["mapped"]),
            content["engine"],
        )  # fmt: skip


def _layer(content: Mapping[str, Any]) -> Layer:
    shapes = {name: tuple(content[name]) for name in ("input_shape", "grad_shape", "axes", "lengths")}
    return Layer(**{**content, **shapes})
