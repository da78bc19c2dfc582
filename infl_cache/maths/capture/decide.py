"""Choose each layer's form, then prove the choice against plain autograd, sample by sample."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from infl_cache.errors import BadInput
from infl_cache.maths.capture import linear
from infl_cache.maths.capture.engine import capture, rows_of
from infl_cache.maths.capture.forms import Forms, Layer
from infl_cache.maths.params import Parameters, unflatten
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import Batch, spread
from infl_cache.maths.task import Task, losses_of, reference_gradient

RESERVED = {"dense", "loss", "target", "digest"}
LENGTH_PROBES = 16


def decide_forms(
    task: Task, parameters: Parameters, batch: Batch, form: Literal["auto", "dense"], at_once: int = 32
) -> tuple[Forms, list[str]]:
    """The forms for a task, and in words every layer that a rule should have covered but did not.

    Factored where that is smaller (`form="auto"`), by rule where one agrees with plain autograd on
    every sample of `batch`, by vmap of the whole model for the rest, by a loop where vmap fails.
    No more than `at_once` samples' gradients are held at a time.
    """
    found = _linear_layers(task, parameters, batch)
    varying = _varying_layers(task, found)
    notes = [
        f"layer {module!r} sees samples of different lengths and is stored as plain rows;"
        " pad to one length in collate= to store it as factors"
        for module in sorted(varying)
        if form == "auto"
    ]
    groups = [batch.indices[i : i + at_once] for i in range(0, len(batch.indices), at_once)]
    forms, more = _with_working_engine(task, _arranged(parameters, found, form, varying), groups)
    wrong = _disagreeing(task, forms, groups)
    bad = [layer for layer in found if wrong.intersection(layer.names)]
    if bad:
        more += [f"layer {layer.module!r} disagrees with plain autograd by its rule; vmap takes it" for layer in bad]
        rest = [layer for layer in found if layer not in bad]
        forms, note = _with_working_engine(task, _arranged(parameters, rest, form, varying), groups)
        more += note
        wrong = _disagreeing(task, forms, groups)
    if wrong and forms.engine == "vmap" and forms.mapped:
        more.append("vmap of the whole model disagrees with plain autograd; a loop over samples takes its place")
        forms = replace(forms, engine="loop")
        wrong = _disagreeing(task, forms, groups)
    if wrong:
        raise BadInput(
            f"gradients of {', '.join(sorted(wrong)[:4])}: expected two computations to agree, found that they differ;"
            " does the model keep state between calls, or draw random numbers?"
        )
    return forms, notes + more


def check_forms(task: Task, forms: Forms, batch: Batch) -> None:
    """`BadInput` if forms that were decided earlier no longer agree with plain autograd."""
    wrong = _disagreeing(task, forms, [[index] for index in batch.indices])
    if wrong:
        raise BadInput(
            f"gradients of {', '.join(sorted(wrong)[:4])}: expected agreement with plain autograd as when the run"
            " was begun, found a difference; is it the same version of torch and of the model's code?"
        )


def _linear_layers(task: Task, parameters: Parameters, batch: Batch) -> list[Layer]:
    """Every layer that the linear rule may cover: its own parameters, called, inputs with the batch first."""
    model, size = task.model, len(batch.indices)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners = Counter(id(own) for module in model.modules() for own in module._parameters.values() if own is not None)
    shared = {owned for owned, count in owners.items() if count > 1}
    candidates = [
        name
        for name, module in model.named_modules()
        if linear.follows_rule(module) and not shared.intersection(map(id, module._parameters.values()))
    ]
    device = next(model.parameters()).device
    with linear.recording(model, candidates, device) as tape, torch.no_grad():
        losses_of(task, batch)
    layers: list[Layer] = []
    for name in candidates:
        calls = tape.calls.get(name, [])
        positions = sum(call.output_shape[:-1].numel() for call in calls) // size
        if not calls or linear.factors(calls, size, positions) is None:
            continue
        module = model.get_submodule(name)
        chosen = {
            kind: names[id(own)] if own is not None and names[id(own)] in parameters.names else None
            for kind, own in (("weight", module._parameters["weight"]), ("bias", module._parameters["bias"]))
        }
        if any(chosen.values()):
            layers.append(Layer(_key(name, layers), name, chosen["weight"], chosen["bias"], positions,
                                _int(module.in_features), _int(module.out_features)))  # fmt: skip
    return layers


def _int(value: Tensor | nn.Module) -> int:
    return int(value)  # type: ignore[arg-type]


def _key(module: str, taken: list[Layer]) -> str:
    """A name that is safe as a folder and belongs to no other array of the store."""
    plain = re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", module) and module not in RESERVED
    key = module if plain else f"layer-{len(taken)}"
    return key if len(key) < 200 else f"layer-{len(taken)}"


def _varying_layers(task: Task, layers: list[Layer]) -> set[str]:
    """Modules whose number of positions is not the same for every sample: their factors fit no array."""
    device = next(task.model.parameters()).device
    modules = [layer.module for layer in layers]
    seen: dict[str, set[int]] = {layer.module: {layer.positions} for layer in layers}
    for index in spread(len(task.train), LENGTH_PROBES):
        with linear.recording(task.model, modules, device) as tape, torch.no_grad():
            losses_of(task, probe_batch(task, [index], device))
        for module, calls in tape.calls.items():
            seen[module].add(sum(call.output_shape[:-1].numel() for call in calls))
    return {module for module, positions in seen.items() if len(positions) > 1}


def _arranged(parameters: Parameters, layers: list[Layer], form: str, varying: set[str]) -> Forms:
    factored = [
        layer
        for layer in layers
        if form == "auto"
        and layer.weight is not None
        and layer.factor_size < layer.gradient_size
        and layer.module not in varying
    ]
    covered = {name for layer in layers for name in layer.names}
    return Forms(
        parameters,
        tuple(factored),
        tuple(layer for layer in layers if layer not in factored),
        tuple(name for name in parameters.names if name not in covered),
    )


def _with_working_engine(task: Task, forms: Forms, groups: Sequence[Sequence[int]]) -> tuple[Forms, list[str]]:
    """The forms with vmap if it runs on this model, else with the loop, and a note that says why."""
    if not forms.mapped:
        return forms, []
    try:
        capture(task, forms, probe_batch(task, groups[0], next(task.model.parameters()).device))
        return forms, []
    except Exception as error:  # vmap refuses in many ways: in-place writes, data-dependent branches, custom kernels
        reason = " ".join(str(error).split())[:160]
        return replace(forms, engine="loop"), [
            f"vmap cannot follow this model, a slower loop takes its place ({reason})"
        ]


def _disagreeing(task: Task, forms: Forms, groups: Sequence[Sequence[int]]) -> set[str]:
    """Names of parameters whose captured gradient of some sample differs from plain autograd by more than rounding."""
    device = next(task.model.parameters()).device
    if forms.engine == "loop" and forms.mapped:
        groups = [[index] for group in groups for index in group]
    wrong: set[str] = set()
    for group in groups:
        captured = capture(task, forms, probe_batch(task, group, device))
        rows = unflatten(forms.parameters, rows_of(forms, captured.factors, captured.dense))
        for row, index in enumerate(group):
            expected = reference_gradient(task, forms.parameters, probe_batch(task, [index], device))
            norm = sum(float(g.square().sum()) for g in expected.values() if g is not None) ** 0.5
            wrong |= {name for name in forms.parameters.names if not _close(rows[name][row], expected[name], norm)}
    return wrong


def _close(found: Tensor, expected: Tensor | None, norm: float) -> bool:
    """Equal up to rounding: relative to the parameter's own gradient, and to the whole gradient's norm."""
    expected = torch.zeros_like(found) if expected is None else expected
    relative, floor = (1e-9, 1e-11) if found.dtype == torch.float64 else (2e-3, 1e-5)
    if not (torch.isfinite(found).all() and torch.isfinite(expected).all()):
        return bool(torch.equal(torch.isfinite(found), torch.isfinite(expected)))
    return float((found - expected).norm()) <= relative * float(expected.norm()) + floor * norm
