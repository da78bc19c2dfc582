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
from infl_cache.maths.capture.engine import by_position
from infl_cache.maths.capture.forms import Alone, Layer, Spread
from infl_cache.maths.capture.rules import RULES, Rule, rule_for
from infl_cache.maths.capture.tape import Call, once_a_sample, recording
from infl_cache.maths.params import Parameters
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import Batch, spread
from infl_cache.maths.task import Task, losses_of

RESERVED = {"dense", "loss", "target", "digest"}
LENGTH_PROBES = 16
MOST_ONES = 3


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
    covered: set[tuple[str, str]] = set()
    for path in dict.fromkeys(path for places in owners.values() for path, _ in places):
        chosen = {own: name for name, places in owners.items() for where, own in places if where == path}
        place = place_of(model, path)
        layer = _layer(model, path, place, chosen, one.get(place.calls, []), two.get(place.calls, []))
        if layer is None or (layer.axes[1] < 0 and not _serves_all(task, layer, batch)):
            continue
        layers.append(replace(layer, key=_key(place.calls, layers)))
        covered |= {(path, own) for own in chosen if own in place.kinds}
    rest = {name: [place for place in places if place not in covered] for name, places in owners.items()}
    to_copy = {name: places for name, places in rest.items() if places and name not in not_copied}
    copied = _copied(task, to_copy, owners, one, batch)
    alone, mapped = _units(model, {n: p for n, p in rest.items() if p and n not in {s.name for s in copied}}, one, two)
    found = Found(tuple(_sharing(layers, one)), tuple(copied), tuple(alone), (), _varying(task, layers))
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
        settings=rule.settings(module), axes=first, indices=not one[0].input.is_floating_point(),
    )  # fmt: skip


def _axes_of_layer(one: Call, two: Call) -> tuple[int | None, int | None]:
    """Batch axes of input and output; -1 for both if the layer is called once for all samples."""
    shapes = [(one.input.shape, two.input.shape), (one.shapes[0], two.shapes[0])]
    if all(a == b for a, b in shapes):
        return -1, -1
    return _axis(*shapes[0]), _axis(*shapes[1])


def _serves_all(task: Task, layer: Layer, batch: Batch) -> bool:
    """Whether the losses stay the same when a layer's one output for all samples is handed on once a sample."""
    device = next(task.model.parameters()).device
    pair = probe_batch(task, [batch.indices[0], batch.indices[-1]], device)
    try:
        with torch.no_grad():
            expected = losses_of(task, pair)[1]
            with recording(task.model, [layer.module], device, (), 2, {layer.module: len(layer.grad_shape) - 1}):
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
        seen = tuple((c.input.data_ptr(), c.input.stride(), c.input._version) for c in calls[layer.module])
        other = first.setdefault((seen, layer.input_shape, layer.indices), layer)
        shared.append(layer if other is layer else replace(layer, input_key=other.key))
    return shared


def _varying(task: Task, layers: list[Layer]) -> frozenset[str]:
    """Modules whose number of positions is not the same for every sample: their factors fit no array."""
    seen: dict[str, set[Any]] = {}
    for index in spread(len(task.train), LENGTH_PROBES):
        calls = _calls(task, [index])
        for layer in layers:
            shapes = [(tuple(call.input.shape), tuple(call.shapes[0])) for call in calls.get(layer.module, [])]
            seen.setdefault(layer.module, set()).add(tuple(shapes))
    return frozenset(module for module, shapes in seen.items() if len(shapes) > 1)


def _copied(
    task: Task, rest: dict[str, list[tuple[str, str]]], owners: dict[str, list[tuple[str, str]]],
    calls: dict[str, list[Call]], batch: Batch,
) -> list[Spread]:  # fmt: skip
    """Parameters that may be given once a sample without changing any loss; the gradients are proved later."""
    found: list[Spread] = []
    device = next(task.model.parameters()).device
    pair = probe_batch(task, [batch.indices[0], batch.indices[-1]], device)
    with torch.no_grad():
        expected = losses_of(task, pair)[1]
    for name, places in rest.items():
        if len(owners[name]) != 1:
            continue
        path, attribute = places[0]
        parameter = task.model.get_submodule(path)._parameters[attribute]
        assert parameter is not None
        for ones in _likely_ones(parameter, calls.get(path, [])):
            candidate = Spread(name, path, attribute, ones)
            try:
                with recording(task.model, [], device, [candidate], 2), torch.no_grad():
                    losses = losses_of(task, pair)[1]
            except Exception:  # shapes that do not broadcast, and whatever else a model makes of them
                continue
            if torch.allclose(losses, expected, rtol=1e-5, atol=1e-7):
                found.append(candidate)
                break
    return found


def _likely_ones(parameter: Tensor, calls: list[Call]) -> list[int]:
    """How many axes of length 1 to try after the batch axis, the likeliest first."""
    every = [*([-1] if parameter.dim() and parameter.shape[0] == 1 else []), *range(MOST_ONES + 1)]
    inputs = [leaf for call in calls[:1] for leaf in tree_leaves(call.args) if isinstance(leaf, Tensor)]
    guess = inputs[0].dim() - 1 - parameter.dim() if inputs else 0
    return sorted(every, key=lambda ones: ones not in (guess, -1))


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
