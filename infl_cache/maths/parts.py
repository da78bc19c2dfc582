"""A gradient in parts: whole factored layers and runs of plain columns, each scored by itself; the sum is the score."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from infl_cache.maths.capture.forms import Forms, Layer


@dataclass(frozen=True)
class Part:
    """Of a gradient the parameters `names`, kept as factors, and the plain columns `start <= column < stop`."""

    forms: Forms
    names: tuple[str, ...]
    start: int
    stop: int

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The factored layers whose weights or biases belong to this part."""
        return tuple(layer for layer in self.forms.factored if set(layer.names) & set(self.names))

    @property
    def spans(self) -> list[tuple[str, slice]]:
        """Each parameter (or run of one) of this part, in the vector's order: its name and where it lies in vectors."""
        plain, dense = set(self.forms.dense), 0
        found: list[tuple[str, slice]] = []
        for name, at in _places(self.forms):
            if name in self.names:
                found.append((name, at))
            elif name in plain:
                size = at.stop - at.start
                first, last = max(self.start, dense), min(self.stop, dense + size)
                if first < last:
                    found.append((name, slice(at.start + first - dense, at.start + last - dense)))
                dense += size
        return found

    @property
    def columns(self) -> list[slice]:
        """Where this part lies in vectors, neighbours joined."""
        joined: list[slice] = []
        for _, at in self.spans:
            if joined and joined[-1].stop == at.start:
                joined[-1] = slice(joined[-1].start, at.stop)
            else:
                joined.append(at)
        return joined

    @property
    def size(self) -> int:
        """Numbers of a vector that belong to this part."""
        return sum(at.stop - at.start for at in self.columns)


def whole(forms: Forms) -> Part:
    """All of it.

    >>> from infl_cache.maths.params import Parameters
    >>> whole(Forms(Parameters(("w", "b"), ((2, 2), (2,))), mapped=("w", "b"))).columns
    [slice(0, 6, None)]
    """
    return Part(forms, _names(forms.factored), 0, forms.n_dense)


def units(forms: Forms) -> list[Part]:
    """The smallest parts by which stores are read: `units_of` all of a gradient."""
    return units_of(whole(forms))


def units_of(part: Part) -> list[Part]:
    """The smallest parts by which what `part` needs is read: layers that share a weight or stored input stay together.

    The plain columns come last, as one unit.
    """
    groups = [tuple(name for name in _names(group) if name in part.names) for group in _sharing(part.layers)]
    found = [Part(part.forms, names, 0, 0) for names in groups]
    return found + ([Part(part.forms, (), part.start, part.stop)] if part.stop > part.start else [])


def joined(parts: Sequence[Part]) -> Part:
    """Several parts as one; their plain columns must follow one another."""
    dense = [part for part in parts if part.stop > part.start]
    if any(a.stop != b.start for a, b in itertools.pairwise(dense)):
        raise ValueError("expected plain columns that follow one another")
    names = tuple(name for part in parts for name in part.names)
    span = (dense[0].start, dense[-1].stop) if dense else (0, 0)
    return Part(parts[0].forms, names, *span)


def by_module(forms: Forms) -> dict[str, Part]:
    """The part of each module that has parameters of its own, in the vector's order; a shared weight is the first's.

    >>> from infl_cache.maths.params import Parameters
    >>> parameters = Parameters(("a.w", "a.b", "c.w"), ((2,), (1,), (3,)))
    >>> {name: (part.start, part.stop) for name, part in by_module(Forms(parameters)).items()}
    {'a': (0, 3), 'c': (3, 6)}
    """
    groups: dict[str, list[str]] = {}
    for name in forms.parameters.names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    plain, sizes = set(forms.dense), dict(zip(forms.parameters.names, forms.parameters.sizes, strict=True))
    found, dense = {}, 0
    for module, names in groups.items():
        size = sum(sizes[name] for name in names if name in plain)
        found[module] = Part(forms, tuple(name for name in names if name not in plain), dense, dense + size)
        dense += size
    return found


def _names(layers: Sequence[Layer]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for layer in layers for name in layer.names))


def _places(forms: Forms) -> Iterator[tuple[str, slice]]:
    start = 0
    for name, size in zip(forms.parameters.names, forms.parameters.sizes, strict=True):
        yield name, slice(start, start + size)
        start += size


def _sharing(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers in groups that have no weight and no stored input in common."""
    groups: list[tuple[set[str], list[Layer]]] = []
    for layer in layers:
        keys = {f"weight {name}" for name in layer.names} | {f"input {layer.input_from}"}
        own = [group for group in groups if group[0] & keys]
        rest = [group for group in groups if not group[0] & keys]
        merged = [each for _, members in own for each in members]
        groups = [*rest, (keys.union(*(kept for kept, _ in own)), [*merged, layer])]
    return [members for _, members in groups]
