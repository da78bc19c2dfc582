"""Look at a model once: which modules a rule covers, and how the gradient of every other parameter can be had."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from infl_cache.maths.capture.attention import Place, has_projections, place_of
from infl_cache.maths.capture.copies import copied
from infl_cache.maths.capture.engine import by_position
from infl_cache.maths.capture.forms import Alone, Layer, Spread
from infl_cache.maths.capture.rules import RULES, Rule, rule_for
from infl_cache.maths.capture.tape import Call, once_a_sample, recording
from infl_cache.maths.params import Parameters
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import Batch, spread
from infl_cache.maths.task import Task, losses_of

RESERVED = {"dense", "dense_exponent", "loss", "target", "digest"}
LENGTH_PROBES = 16


@dataclass(frozen=True)
class Found:
    """What each parameter's gradient can be made from; every chosen parameter is in at least one of them."""

    layers: tuple[Layer, ...] = ()
    spread: tuple[Spread, ...] = ()
    alone: tuple[Alone, ...] = ()
    mapped: tuple[str, ...] = ()
    varying: frozenset[str] = field(default_factory=frozenset)

    @property
    def names(self) -> set[str]:
        """The parameters of all parts but the whole-model engine."""
        by_layers = {name for each in self.layers for name in each.names}
        by_modules = {name for each in self.alone for name in each.parameters.values()}
        return by_layers | by_modules | {each.name for each in self.spread}

    def without(self, names: Iterable[str]) -> Found:
        """The same with everything that touches these parameters given to the whole-model engine."""
        out = set(names)
        grown = True
        while grown:  # a layer that leaves takes its other parameters with it, and they the layers that share them
            leaving = [each.names for each in self.layers if out.intersection(each.names)]
            leaving += [
                tuple(each.parameters.values()) for each in self.alone if out.intersection(each.parameters.values())
            ]
            grown = not out.issuperset(name for names in leaving for name in names)
            out.update(name for names in leaving for name in names)
        return Found(
            tuple(each for each in self.layers if not out.intersection(each.names)),
            tuple(each for each in self.spread if each.name not in out),
            tuple(each for each in self.alone if not out.intersection(each.parameters.values())),
            (*self.mapped, *(name for name in out if name not in self.mapped)),
            self.varying,
        )


def survey(task: Task, parameters: Parameters, batch: Batch, not_copied: Iterable[str] = ()) -> Found:
    """A rule where there is one, else copies of the parameter, else the module alone, else the whole model.

    Parameters in `not_copied` turned out to need more than a copy.
    """
    model = task.model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners: dict[str, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for attribute, own in module._parameters.items():
            if own is not None and names[id(own)] in parameters.names:
                owners.setdefault(names[id(own)], []).append((path, attribute))
    one, two = (_calls(task, [batch.indices[0]] * count) for count in (1, 2))
    layers: list[Layer] = []
    places_of: dict[str, set[tuple[str, str]]] = {}
    for path in dict.fromkeys(path for places in owners.values() for path, _ in places):
        chosen = {own: name for name, places in owners.items() for where, own in places if where == path}
        place = place_of(model, path)
        layer = _layer(model, path, place, chosen, one.get(place.calls, []), two.get(place.calls, []))
        if layer is None or (layer.axes[1] < 0 and not _serve_all(task, [*layers, layer], batch)):
            continue
        layers.append(replace(layer, key=_key(place.calls, layers)))
        places_of[layer.module] = {(path, own) for own in chosen if own in place.kinds}
    varying, packed = _lengths(task, layers)
    layers = [
        replace(layer, lengths=(0, 0)) if layer.module in varying and layer.lengths != (1, 1) else layer
        for layer in layers
        if layer.module not in packed
    ]
    covered = {each for layer in layers for each in places_of[layer.module]}
    rest = {name: [place for place in places if place not in covered] for name, places in owners.items()}
    to_copy = {name: places for name, places in rest.items() if places and name not in not_copied}
    copies = copied(task, to_copy, owners, one, batch)
    alone, mapped = _units(model, {n: p for n, p in rest.items() if p and n not in {s.name for s in copies}}, one, two)
    found = Found(tuple(_sharing(layers, one)), tuple(copies), tuple(alone), (), varying)
    return found.without(mapped)


def _calls(task: Task, indices: Sequence[int]) -> dict[str, list[Call]]:
    """Every module's calls for the given samples, in one forward pass."""
    device = next(task.model.parameters()).device
    everything = [name for name, _ in task.model.named_modules()]
    attention = [name for name, module in task.model.named_modules() if has_projections(module)]
    with recording(task.model, everything, device, attention=attention) as tape, torch.no_grad():
        losses_of(task, probe_batch(task, indices, device))
    return tape.calls


def _layer(
    model: nn.Module, path: str, place: Place, chosen: dict[str, str], one: list[Call], two: list[Call]
) -> Layer | None:
    """The module as a rule sees it; None if there is no rule, or a call that the rule does not cover."""
    module = model.get_submodule(path)
    rule = RULES["linear"] if place.within else rule_for(module)
    kinds = {place.kinds[own]: name for own, name in chosen.items() if own in place.kinds}
    if not kinds or (not place.within and set(chosen) != set(kinds)):
        return None
    if rule is None or not one or len(one) != len(two) or not all(rule.accepts(module, call) for call in one):
        return None
    axes = {_axes_of_layer(a, b) for a, b in zip(one, two, strict=True)}
    if len(axes) != 1 or None in next(iter(axes)):
        return None
    first: Any = next(iter(axes))
    shapes = [_event_shapes(rule, module, call, first) for call in one]
    if None in shapes or len({(a[1:], b[1:]) for a, b in shapes if a is not None}) != 1:  # type: ignore[misc]
        return None
    pairs: list[Any] = shapes
    return Layer(
        key=path, module=place.calls, rule=rule.name, parameters=kinds, within=place.within,
        input_shape=(sum(a[0] for a, _ in pairs), *pairs[0][0][1:]),
        grad_shape=(sum(b[0] for _, b in pairs), *pairs[0][1][1:]),
        gradient_size=sum(model.get_parameter(name).numel() for name in kinds.values()),
        settings=rule.settings(module), axes=first, lengths=_lengths_of(one, first),
        indices=not one[0].input.is_floating_point(),
    )  # fmt: skip


def _lengths_of(calls: list[Call], axes: tuple[int, int]) -> tuple[int, int]:
    """How long the batch axes are for one sample, 0 where its calls differ."""
    if axes[0] < 0:
        return 1, 1
    found = {(call.input.shape[axes[0]], call.shapes[0][axes[1]]) for call in calls}
    return found.pop() if len(found) == 1 else (0, 0)


def _axes_of_layer(one: Call, two: Call) -> tuple[int | None, int | None]:
    """Batch axes of input and output; -1 for both if the layer is called once for all samples."""
    shapes = [(one.input.shape, two.input.shape), (one.shapes[0], two.shapes[0])]
    if all(a == b for a, b in shapes):
        return -1, -1
    return _axis(*shapes[0]), _axis(*shapes[1])


def _serve_all(task: Task, layers: list[Layer], batch: Batch) -> bool:
    """Whether the losses stay the same when layers' one output for all samples is handed on once a sample."""
    common = {layer.module: len(layer.grad_shape) - 1 for layer in layers if layer.axes[1] < 0}
    device = next(task.model.parameters()).device
    pair = probe_batch(task, [batch.indices[0], batch.indices[-1]], device)
    try:
        with torch.no_grad():
            expected = losses_of(task, pair)[1]
            with recording(task.model, list(common), device, (), 2, common):
                found = losses_of(task, pair)[1]
    except Exception:  # shapes that do not broadcast, and whatever else a model makes of them
        return False
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


def _event_shapes(rule: Rule, module: nn.Module, call: Call, axes: tuple[int, int]) -> tuple[Any, Any] | None:
    """Shapes (n, *event) of one sample's input and output in one call."""
    into, out = rule.events(module, call)
    x, y = call.input, torch.empty(call.shapes[0], device="meta")
    if axes[0] < 0:
        x, y, axes = once_a_sample(x, 1, into), once_a_sample(y, 1, out), (0, 0)
    if axes[0] >= max(1, x.dim() - into) or axes[1] >= max(1, y.dim() - out):
        return None
    return tuple(by_position(x, 1, axes[0], into).shape[1:]), tuple(by_position(y, 1, axes[1], out).shape[1:])


def _axis(one: Sequence[int], two: Sequence[int]) -> int | None:
    """The axis that is twice as long for two samples as for one; None if there is no such axis."""
    if len(one) != len(two):
        return None
    differing = [axis for axis, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    if len(differing) != 1 or two[differing[0]] != 2 * one[differing[0]]:
        return None
    # A longer axis can be told apart into samples only if it is the first (samples one after the other).
    return differing[0] if one[differing[0]] == 1 or differing[0] == 0 else None


def _key(module: str, taken: list[Layer]) -> str:
    """A name that is safe as a folder and belongs to no other array of the store."""
    plain = re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", module) and module not in RESERVED
    return module if plain and len(module) < 200 else f"layer-{len(taken)}"


def _sharing(layers: list[Layer], calls: dict[str, list[Call]]) -> list[Layer]:
    """Layers that see the very same input (query, key and value projections) name the first of them."""
    first: dict[Any, Layer] = {}
    shared = []
    for layer in layers:
        # A tensor on `meta` has no address, but a storage of its own.
        tensors = [call.input for call in calls[layer.module]]
        places = [(x.data_ptr() or x.untyped_storage()._cdata, x.storage_offset()) for x in tensors]
        seen = tuple((place, x.stride(), x._version) for place, x in zip(places, tensors, strict=True))
        other = first.setdefault((seen, layer.input_shape, layer.indices), layer)
        shared.append(layer if other is layer else replace(layer, input_key=other.key))
    return shared


def _lengths(task: Task, layers: list[Layer]) -> tuple[frozenset[str], frozenset[str]]:
    """Modules whose number of positions is not the same for every sample: their factors fit no array.

    And those of them whose batches have less than the samples' greatest length for each: padding is taken out, or
    samples, and nothing says whose the rest are.
    """
    seen = {index: _shapes(task, [index], layers) for index in spread(len(task.train), LENGTH_PROBES)}
    varying, packed, pairs = set(), set(), {}
    for layer in layers:
        other = {shapes[layer.module]: index for index, shapes in seen.items()}
        if len(other) == 1:
            continue
        varying.add(layer.module)
        a, b = sorted(other.values())[:2]
        if (a, b) not in pairs:
            pairs[a, b] = _shapes(task, [a, b], layers)
        for place, (together, _) in enumerate(pairs[a, b][layer.module]):
            alone = [seen[each][layer.module][place : place + 1] for each in (a, b)]
            longest = max((shapes[0][layer.axes[0]] for (shapes,) in filter(None, alone)), default=0)
            if layer.axes[0] >= 0 and together[layer.axes[0]] != 2 * longest:
                packed.add(layer.module)
    return frozenset(varying), frozenset(packed)


def _shapes(task: Task, indices: Sequence[int], layers: list[Layer]) -> dict[str, Any]:
    """Shapes of inputs and outputs in each call of each layer's module."""
    calls = _calls(task, indices)
    return {
        layer.module: tuple((tuple(c.input.shape), tuple(c.shapes[0])) for c in calls.get(layer.module, []))
        for layer in layers
    }


def _units(
    model: nn.Module, rest: dict[str, list[tuple[str, str]]], one: dict[str, list[Call]], two: dict[str, list[Call]]
) -> tuple[list[Alone], list[str]]:
    """The smallest module that was called and uses each parameter; names for which there is none but the model."""
    units: dict[str, dict[str, str]] = {}
    mapped = []
    for name, places in rest.items():
        homes = {_home(path, one, two) for path, _ in places}
        home = next(iter(homes))
        if len(homes) > 1 or not home:
            mapped.append(name)
        else:
            inner = f"{places[0][0]}.{places[0][1]}".removeprefix(f"{home}.").lstrip(".")
            units.setdefault(home, {})[inner] = name
    alone = []
    for path, parameters in units.items():
        inputs, outputs = _axes_of(one[path], two[path])  # type: ignore[misc]
        alone.append(Alone(path, parameters, inputs, outputs))
    return alone, mapped


def _home(path: str, one: dict[str, list[Call]], two: dict[str, list[Call]]) -> str:
    """The module itself, or the nearest one around it, that was called with samples; "" for the whole model."""
    while path and _axes_of(one.get(path, []), two.get(path, [])) is None:
        path = path.rpartition(".")[0]
    return path


def _axes_of(one: list[Call], two: list[Call]) -> tuple[tuple[int | None, ...], tuple[int | None, ...]] | None:
    """Batch axes of the tensors that go into and come out of a module, the same in all calls; None if unclear."""
    found = set()
    for a, b in zip(one, two, strict=False):
        into = [
            tuple(tuple(leaf.shape) for leaf in tree_leaves((c.args, dict(c.named))) if isinstance(leaf, Tensor))
            for c in (a, b)
        ]
        axes = []
        for single, double in ((into[0], into[1]), (a.shapes, b.shapes)):
            if len(single) != len(double):
                return None
            pairs = list(zip(single, double, strict=True))
            each = [None if tuple(s) == tuple(d) else _axis(s, d) for s, d in pairs]
            told_apart = all(
                tuple(s) == tuple(d) or (x is not None and s[x] == 1) for x, (s, d) in zip(each, pairs, strict=True)
            )
            if not told_apart:
                return None
            axes.append(tuple(each))
        if not any(axis is not None for axis in axes[1]):
            return None
        found.add((axes[0], axes[1]))
    return found.pop() if len(found) == 1 and len(one) == len(two) else None
