"""Choose each layer's form, then prove the choice against plain autograd, sample by sample."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from infl_cache.errors import BadInput
from infl_cache.maths.capture.cost import asked_forms, choose_factored, unfactorable
from infl_cache.maths.capture.engine import capture, gradients_of
from infl_cache.maths.capture.forms import Forms
from infl_cache.maths.capture.survey import Found, survey
from infl_cache.maths.params import Parameters
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import Batch
from infl_cache.maths.task import Task, reference_gradient

# Of the samples, how many may differ by a flipped kink, and by how much of the whole gradient's norm at most.
MOST_KINKED = 0.5
LARGEST_KINK = 0.1


def decide_forms(
    task: Task, parameters: Parameters, batch: Batch, form: str, at_once: int = 32, layer_forms: str | None = None
) -> tuple[Forms, list[str]]:
    """The forms for a task, and in words every part that a faster way should have covered but did not.

    A rule where one agrees with plain autograd on every sample of `batch`, factored where that is cheaper
    (`form="auto"`); for the rest a copy of the parameter for each sample, vmap of the module alone, vmap of the
    whole model, or a loop. No more than `at_once` samples' gradients are held at a time.
    """
    at_once = max(2, at_once)  # what is whose sample's is told by more than one of them
    groups = [batch.indices[i : i + at_once] for i in range(0, len(batch.indices), at_once)]
    found, notes = _survey(task, parameters, batch, groups[0])
    asked = asked_forms(layer_forms, found.layers, _unfactorable(found))
    notes += [
        f"layer {module!r} sees samples of different lengths and is stored as plain rows;"
        " pad to one length in collate= to store it as factors"
        for module in sorted(found.varying)
        if form == "auto" and any(layer.module == module for layer in found.layers)
    ]
    forms, more = _with_working_engine(task, _arranged(parameters, found, form, asked), groups)
    wrong = _disagreeing(task, forms, groups)
    copied = wrong.intersection(each.name for each in found.spread)
    if copied:
        found, notes = _survey(task, parameters, batch, groups[0], copied)
        forms, more = _with_working_engine(task, _arranged(parameters, found, form, asked), groups)
        wrong = _disagreeing(task, forms, groups)
    if wrong:
        more += _said(found, wrong)
        found = found.without(wrong)
        forms, again = _with_working_engine(task, _arranged(parameters, found, form, asked), groups)
        more += again
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


def supposed_forms(
    task: Task, parameters: Parameters, batch: Batch, form: str, layer_forms: str | None = None
) -> Forms:
    """The forms that `decide_forms` would choose, taken on trust: no number is computed, the model may be on `meta`."""
    found = survey(task, parameters, batch, parameters.names)
    return _arranged(parameters, found, form, asked_forms(layer_forms, found.layers, _unfactorable(found)))


def _survey(
    task: Task, parameters: Parameters, batch: Batch, group: Sequence[int], not_copied: Iterable[str] = ()
) -> tuple[Found, list[str]]:
    """What the model offers, less what fails when it is run."""
    try:
        found = survey(task, parameters, batch, not_copied)
    except BadInput:
        raise
    except Exception as error:  # a model that cannot be watched at all
        note = f"the model's layers cannot be watched, vmap of the whole model takes their place ({_short(error)})"
        return Found(mapped=parameters.names), [note]
    return _runnable(task, parameters, found, group)


def check_forms(task: Task, forms: Forms, batch: Batch) -> None:
    """`BadInput` if forms that were decided earlier no longer agree with plain autograd."""
    wrong = _disagreeing(task, forms, [[index] for index in batch.indices])
    if wrong:
        raise BadInput(
            f"gradients of {', '.join(sorted(wrong)[:4])}: expected agreement with plain autograd as when the run"
            " was begun, found a difference; is it the same version of torch and of the model's code?"
        )


def _runnable(task: Task, parameters: Parameters, found: Found, group: Sequence[int]) -> tuple[Found, list[str]]:
    """What was found, less the parts that fail when they are run; a module that vmap cannot follow gets a loop."""
    notes: list[str] = []
    looped = [replace(each, engine="loop") for each in found.alone]
    tries: list[tuple[str, list[Found]]] = []
    together = _failure(task, parameters, Found(layers=found.layers), group)
    if together is not None:
        fine = tuple(each for each in found.layers if _failure(task, parameters, Found(layers=(each,)), group) is None)
        tries += [(f"layer {each.module!r}", [Found(layers=(each,))]) for each in found.layers if each not in fine]
        tries += [("layers with a rule", [Found(layers=fine)])]
    tries += [(f"parameter {each.name!r}", [Found(spread=(each,))]) for each in found.spread]
    tries += [
        (f"module {each.module!r}", [Found(alone=(each,)), Found(alone=(other,))])
        for each, other in zip(found.alone, looped, strict=True)
    ]
    for what, parts in tries:
        errors = []
        for part in parts:
            error = _failure(task, parameters, part, group)
            if error is None:
                break
            errors.append(error)
        if not errors:
            continue
        if len(errors) < len(parts):
            found = replace(found, alone=tuple(part.alone[0] if each.module == part.alone[0].module else each
                                               for each in found.alone))  # fmt: skip
            notes.append(f"{what}: vmap cannot follow it, a slower loop over it takes its place ({errors[0]})")
        else:
            found = found.without(parts[0].names)
            notes.append(f"{what}: vmap of the whole model takes its place ({errors[0]})")
    return found, notes


def _failure(task: Task, parameters: Parameters, part: Found, group: Sequence[int]) -> str | None:
    """In short how capturing a part fails, None if it does not."""
    if not part.names:
        return None
    names = tuple(name for name in parameters.names if name in part.names)
    only = Parameters(names, tuple(parameters.shape_of(name) for name in names))
    try:
        capture(
            task, _arranged(only, part, "dense", {}), probe_batch(task, group, next(task.model.parameters()).device)
        )
    except Exception as error:  # vmap and in-place writes fail in many ways
        return _short(error)
    return None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _said(found: Found, wrong: set[str]) -> list[str]:
    """Which parts disagree with plain autograd."""
    parts = [f"layer {each.module!r}" for each in found.layers if wrong.intersection(each.names)]
    parts += [f"parameter {each.name!r}" for each in found.spread if each.name in wrong]
    parts += [f"module {each.module!r}" for each in found.alone if wrong.intersection(each.parameters.values())]
    return [f"{part} disagrees with plain autograd by its rule; vmap takes it" for part in parts]


def _unfactorable(found: Found) -> dict[str, str]:
    elsewhere = {name for each in found.alone for name in each.parameters.values()}
    return unfactorable(found.layers, found.varying, elsewhere)


def _arranged(parameters: Parameters, found: Found, form: str, asked: dict[str, str]) -> Forms:
    cannot = _unfactorable(found)
    can = {layer.module: layer.module not in cannot for layer in found.layers}
    if form == "dense":
        asked = {**{layer.module: "dense" for layer in found.layers}, **asked}
    factored = choose_factored(found.layers, can, asked)
    kept = {layer.module for layer in factored}
    return Forms(
        parameters,
        factored,
        tuple(replace(layer, input_key="") for layer in found.layers if layer.module not in kept),
        found.spread,
        found.alone,
        tuple(name for name in parameters.names if name in found.mapped),
    )


def _with_working_engine(task: Task, forms: Forms, groups: Sequence[Sequence[int]]) -> tuple[Forms, list[str]]:
    """The forms with vmap if it runs on this model, else with the loop, and a note that says why."""
    if not forms.mapped:
        return forms, []
    try:
        capture(task, forms, probe_batch(task, groups[0], next(task.model.parameters()).device))
        return forms, []
    except Exception as error:  # vmap refuses in many ways: in-place writes, data-dependent branches, custom kernels
        reason = _short(error)
        return replace(forms, engine="loop"), [
            f"vmap cannot follow this model, a slower loop takes its place ({reason})"
        ]


def _disagreeing(task: Task, forms: Forms, groups: Sequence[Sequence[int]]) -> set[str]:
    """Names of parameters whose captured gradient differs from plain autograd by more than rounding.

    A sample alone is compared with autograd of that sample: the same arithmetic, so hardly any difference is allowed.
    A sample in its batch is compared with itself alone. There another order of additions may put an input of a ReLU on
    the other side of its kink, which changes single samples of deep float32 networks by up to a hundredth: only a
    difference in most samples, or a large one, counts.
    """
    device = next(task.model.parameters()).device
    wrong: set[str] = set()
    kinked: Counter[str] = Counter()
    for group in groups:
        singles = []
        for index in group:
            one = probe_batch(task, [index], device)
            found = _plain(task, forms, one)
            singles.append(found)
            expected = reference_gradient(task, forms.parameters, one)
            norm = _norm([g for g in expected.values() if g is not None])
            differing = {name for name in forms.parameters.names if not _close(found[name][0], expected[name], norm)}
            # vmap runs other kernels than autograd does, so kinks count there too.
            kinked.update(differing.intersection(forms.mapped))
            wrong |= differing.difference(forms.mapped)
            wrong |= {name for name in differing if not _alike(found[name][0], expected[name], norm)}
        if len(group) > 1 and not (forms.engine == "loop" and forms.mapped):
            together = _plain(task, forms, probe_batch(task, group, device))
            for row, single in enumerate(singles):
                norm = _norm([each[0] for each in single.values()])
                pairs = {name: (together[name][row], single[name][0]) for name in forms.parameters.names}
                kinked.update(name for name, (a, b) in pairs.items() if not _close(a, b, norm))
                wrong |= {name for name, (a, b) in pairs.items() if not _alike(a, b, norm)}
    total = sum(map(len, groups))
    return wrong | {name for name, count in kinked.items() if count > max(1, MOST_KINKED * total)}


def _plain(task: Task, forms: Forms, batch: Batch) -> dict[str, Tensor]:
    """A batch's captured gradients, parameter by parameter."""
    captured = capture(task, forms, batch)
    return gradients_of(forms, captured.factors, captured.dense)


def _norm(tensors: Sequence[Tensor]) -> float:
    """The norm of all finite gradients together: one that is not must not decide about the others."""
    norms = [float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in tensors]
    return math.sqrt(sum(norm**2 for norm in norms if math.isfinite(norm)))


def _alike(found: Tensor, expected: Tensor | None, norm: float) -> bool:
    """Equal but for what a flipped kink changes."""
    if found.dtype == torch.float64:
        return _close(found, expected, norm)
    # What is not finite was compared by `_close`; the norm says so in one pass.
    distance = float((found if expected is None else found - expected).norm())
    return not math.isfinite(distance) or distance <= LARGEST_KINK * norm


def _close(found: Tensor, expected: Tensor | None, norm: float) -> bool:
    """Equal up to rounding: relative to the parameter's own gradient, and to the whole gradient's norm."""
    expected = torch.zeros_like(found) if expected is None else expected
    relative, floor = (1e-9, 1e-11) if found.dtype == torch.float64 else (2e-3, 1e-5)
    distance = float((found - expected).norm())
    if not math.isfinite(distance) and not (torch.isfinite(found).all() and torch.isfinite(expected).all()):
        return bool(torch.equal(torch.isfinite(found), torch.isfinite(expected)))
    return distance <= relative * float(expected.norm()) + floor * norm
