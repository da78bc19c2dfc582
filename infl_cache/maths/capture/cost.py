r"""Which layers to store as factors: a model of bytes and operations.

A layer kept as factors is multiplied out (or contracted) when the scores are made, a layer kept as plain rows when it
is captured. Multiplying out costs the same in both places, so mostly the bytes decide; where factors can be
contracted directly the work of stage 3 is the smaller of the two as well. In seconds a sample, with b bytes a number:

    plain:     b n_params / bytes_a_second + build / operations_a_second
    factored:  b (inputs + output_grads) / bytes_a_second + min(build, direct) / operations_a_second

An input that several layers share is counted once for all of them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from infl_cache.errors import BadInput
from infl_cache.maths.capture.forms import Layer
from infl_cache.maths.capture.rules import RULES

# Written, synced and read once, compressed; multiplied: orders of magnitude of a workstation, only their ratio matters.
BYTES_A_SECOND = 3e8
OPERATIONS_A_SECOND = 3e10


@dataclass(frozen=True)
class Cost:
    """What a sample costs: numbers in the store, and multiplications in stages 1 and 3."""

    numbers: int
    operations: int

    def seconds(self, itemsize: int = 4) -> float:
        """Both in one unit."""
        return self.numbers * itemsize / BYTES_A_SECOND + self.operations / OPERATIONS_A_SECOND


def cost_of(layer: Layer, form: str, with_input: bool = True) -> Cost:
    """The cost of a layer `factored` or `dense`; a shared input that is stored anyway is left out."""
    build, direct = RULES[layer.rule].operations(layer.input_shape, layer.grad_shape, layer.gradient_size)
    if form == "dense":
        return Cost(layer.gradient_size, build)
    inputs = math.prod(layer.input_shape) if with_input else 0
    return Cost(inputs + math.prod(layer.grad_shape), build if direct is None else min(build, direct))


def scored(layer: Layer) -> str:
    """How stage 3 makes a factored layer's scores of many test samples: `contracted` or `rebuilt`."""
    _, direct = RULES[layer.rule].operations(layer.input_shape, layer.grad_shape, layer.gradient_size)
    return "contracted" if direct is not None and direct <= layer.gradient_size else "rebuilt"


def choose_factored(layers: Sequence[Layer], can: Mapping[str, bool], asked: Mapping[str, str]) -> tuple[Layer, ...]:
    """The layers to keep as factors, each naming whose stored input it uses.

    `can` says by module whether a layer's factors can be stored, `asked` overrules the model for some.
    """
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.input_from, []).append(layer)
    chosen: set[str] = set()
    tied = [
        layer for layer in layers if any(set(layer.names) & set(other.names) for other in layers if other is not layer)
    ]
    for group in groups.values():
        chosen |= _best_of_group([layer for layer in group if layer not in tied], can, asked)
    chosen |= _best_of_tied(tied, can, asked)
    return tuple(_inputs_named([layer for layer in layers if layer.module in chosen]))


def _best_of_group(group: Sequence[Layer], can: Mapping[str, bool], asked: Mapping[str, str]) -> set[str]:
    """Modules to keep as factors among layers with one input: storing it must pay for all who use it together."""
    able = [layer for layer in group if can[layer.module] and asked.get(layer.module) != "dense"]
    forced = [layer for layer in able if asked.get(layer.module) == "factored"]

    def gain(layer: Layer) -> float:
        return cost_of(layer, "dense").seconds() - cost_of(layer, "factored", with_input=False).seconds()

    gaining = [layer for layer in able if gain(layer) > 0 or layer in forced]
    if not gaining:
        return set()
    price = math.prod(gaining[0].input_shape) * 4 / BYTES_A_SECOND
    pays = forced or sum(map(gain, gaining)) > price
    return {layer.module for layer in gaining} if pays else set()


def _best_of_tied(tied: Sequence[Layer], can: Mapping[str, bool], asked: Mapping[str, str]) -> set[str]:
    """Layers that share a parameter are all factors or all plain: one plain row is the sum of all of them."""
    left, chosen = list(tied), set()
    while left:
        together = [left.pop(0)]
        for one in together:  # which grows meanwhile: who shares with one of them belongs to all of them
            together += [other for other in left if set(other.names) & set(one.names)]
            left = [layer for layer in left if layer not in together]
        asked_for = {asked.get(layer.module) for layer in together} - {None}
        plain = max(cost_of(layer, "dense").seconds() for layer in together)
        factored = sum(cost_of(layer, "factored").seconds() for layer in together)
        able = all(can[layer.module] for layer in together) and "dense" not in asked_for
        if able and (asked_for or factored < plain):
            chosen |= {layer.module for layer in together}
    return chosen


def _inputs_named(layers: Sequence[Layer]) -> Iterable[Layer]:
    """The first of the chosen layers with an input stores it, the others refer to it."""
    first: dict[str, Layer] = {}
    for layer in layers:
        keeper = first.setdefault(layer.input_from, layer)
        yield dataclasses.replace(layer, input_key="" if keeper is layer else keeper.key)


def unfactorable(
    layers: Sequence[Layer], varying: Collection[str] = (), elsewhere: Collection[str] = ()
) -> dict[str, str]:
    """Which layers cannot be kept as factors, by module, and why.

    `varying` are modules that see samples of different lengths, `elsewhere` parameters that are used without a rule.
    """
    why: dict[str, str] = {}
    for layer in layers:
        if not RULES[layer.rule].stored:
            why[layer.module] = "its gradient is no product"
        elif "weight" not in layer.parameters:
            why[layer.module] = "its weight is not among the parameters"
        elif layer.module in varying:
            why[layer.module] = "it sees samples of different lengths (pad to one length in collate=)"
        elif set(layer.names).intersection(elsewhere):
            why[layer.module] = "a parameter of it is also used where there is no rule"
    while more := _sharing_with(layers, why):
        why |= more
    return why


def _sharing_with(layers: Sequence[Layer], why: Mapping[str, str]) -> dict[str, str]:
    """The other layers that share a parameter with one of those in `why`: all layers of a parameter have one form."""
    holders = {name: layer.module for layer in layers if layer.module in why for name in layer.names}
    return {
        layer.module: f"{shared[0]!r} is shared with layer {holders[shared[0]]!r}, which cannot be factored:"
        f" {why[holders[shared[0]]]}"
        for layer in layers
        if layer.module not in why and (shared := [name for name in layer.names if name in holders])
    }


def asked_forms(text: str | None, layers: Sequence[Layer], cannot: Mapping[str, str] | None = None) -> dict[str, str]:
    """Forms by module from text such as `conv1=dense,layer4.*=factored`; the last pattern that matches counts.

    Raises `BadInput` for another form, or a pattern that matches no layer with a rule, or only layers that `cannot`
    be factored (and why; those of `unfactorable` by default).
    """
    cannot = unfactorable(layers) if cannot is None else cannot
    asked: dict[str, str] = {}
    for item in filter(None, (text or "").replace(" ", "").split(",")):
        pattern, _, form = item.partition("=")
        if form not in ("dense", "factored"):
            raise BadInput(f"layer-forms: expected PATTERN=dense or PATTERN=factored, found {item[:60]!r}")
        hits = [layer.module for layer in layers if fnmatch.fnmatchcase(layer.module, pattern)]
        if not hits:
            known = ", ".join(layer.module for layer in layers[:8])
            raise BadInput(f"layer-forms: {pattern[:60]!r} matches no layer with a rule; they are {known or 'none'}")
        if form == "factored":  # norms, say, among the layers that a pattern matches stay as they are
            able = [module for module in hits if module not in cannot]
            if not able:
                raise BadInput(f"layer-forms: layer {hits[0]!r} cannot be factored, {cannot[hits[0]]}; use dense")
            hits = able
        asked.update(dict.fromkeys(hits, form))
    return asked
