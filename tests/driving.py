"""Drive the maths column on a task as the stages do: parameters selected first, then everything in `evaluating`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from infl_cache import Task
from infl_cache.maths.capture import Forms, capture, decide_forms, rows_of
from infl_cache.maths.capture.engine import by_position
from infl_cache.maths.capture.rules import RULES, rule_for
from infl_cache.maths.capture.tape import Call, recording
from infl_cache.maths.curvature import Curvature
from infl_cache.maths.params import select
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import Batch, batches, groups_of
from infl_cache.maths.scores import queries, scores
from infl_cache.maths.task import evaluating
from tests.tasks import normal
from tests.twins import gradient_rows

CPU = torch.device("cpu")


def one_batch(task: Task, data: str = "train") -> Batch:
    """All samples as one batch."""
    return probe_batch(task, range(len(getattr(task, data))), CPU, data)


def decided(
    task: Task, form: Literal["auto", "dense"] = "auto", count: int | None = None, **changes: Any
) -> tuple[Forms, list[str]]:
    """Forms and notes, decided on the first `count` training samples."""
    parameters = select(task.model, task.parameters)
    with evaluating(task.model, CPU):
        first = probe_batch(task, range(count or len(task.train)), CPU)
        return decide_forms(task, parameters, first, form, **changes)


def recorded(model: nn.Module, names: Sequence[str], *inputs: Tensor) -> tuple[Tensor, dict[str, list[Call]]]:
    """The outputs, and the calls of the named modules in one forward and backward of the outputs' sum."""
    with recording(model, names, CPU) as tape:
        out = model(*inputs)
        tape.backward(out.sum())
    return out.detach(), tape.calls


def gradients_by_rule(layer: nn.Module, inputs: Tensor, weighting: Tensor) -> dict[str, Tensor]:
    """Per-sample gradients of `(layer(inputs) * weighting).sum()` as the layer's rule makes them of one pass."""
    rule = rule_for(layer)
    assert rule is not None
    with recording(layer, [""], CPU) as tape:
        tape.backward((layer(inputs) * weighting).sum())
    (call,) = tape.calls[""]
    assert rule.accepts(layer, call)
    into, out = rule.events(layer, call)
    grad = by_position(call.grad(weighting), len(inputs), 0, out)
    settings = rule.settings(layer)
    found = {"weight": rule.weight_gradient(
        settings, by_position(rule.prepare(layer, call.input), len(inputs), 0, into), grad
    )}  # fmt: skip
    return found if layer._parameters.get("bias") is None else {**found, "bias": rule.bias_gradient(settings, grad)}


def captured_rows(
    task: Task, forms: Forms, size: int | None = None, measure: bool = False, data: str = "train"
) -> Tensor:
    """Plain gradient rows of a whole data set in micro-batches of `size`; the loop engine takes single samples."""
    count = len(getattr(task, data))
    if forms.engine == "loop" and forms.mapped:
        size = 1
    rows = []
    with evaluating(task.model, CPU):
        for batch in batches(getattr(task, data), data, task.collate, groups_of(0, count, size or count), CPU):
            captured = capture(task, forms, batch, measure)
            rows.append(rows_of(forms, captured.factors, captured.dense))
    return torch.cat(rows)


def check_rule(task: Task, rule: str) -> None:
    """A rule covers all chosen parameters of `tasks.around`: rows of loss and measure, and scores, are autograd's."""
    count, names = len(task.train), select(task.model, task.parameters).names
    rows = {measure: gradient_rows(task, range(count), names, measure=measure) for measure in (False, True)}
    asked = normal(3, rows[False].shape[1], seed=13)
    factored = {"layer_forms": "layer=factored"} if RULES[rule].stored and "layer.weight" in names else {}
    for form, changes in (("auto", factored), ("dense", {})):
        forms, notes = decided(task, form, **changes)
        assert (notes, forms.spread, forms.alone, forms.mapped) == ([], (), (), ())
        assert [layer.rule for layer in forms.layers] == [rule]
        assert bool(forms.factored) == bool(changes)
        assert Forms.from_json(json.loads(json.dumps(forms.to_json()))) == forms
        for size, measure in ((None, False), (1, False), (2, True)):
            close(captured_rows(task, forms, size, measure), rows[measure])
        if forms.factored:
            with evaluating(task.model, CPU):
                kept = capture(task, forms, one_batch(task))
            for queries_made, budget in itertools.product((asked, asked[:1]), (1, 10**9)):
                found = scores(forms, queries(forms, queries_made), kept.factors, kept.dense, budget)
                close(found, queries_made @ rows[False].T)


def close(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-10, in float64."""
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@contextmanager
def operator_of(
    task: Task, kind: Literal["ggn", "hessian"] = "ggn", damping: float = 0.0, size: int = 64, **changes: Any
) -> Iterator[Curvature]:
    """The curvature of a task's training loss, in micro-batches of `size`."""
    parameters = select(task.model, task.parameters)
    n_train = len(task.train)

    def pick(indices: Sequence[int]) -> Iterator[Batch]:
        groups = [indices[i : i + size] for i in range(0, len(indices), size)]
        return batches(task.train, "train", task.collate, groups, CPU)

    with evaluating(task.model, CPU):
        loaded = list(pick(range(n_train)))
        own = next(task.model.parameters()).dtype
        made = {"batches": lambda: loaded, "pick": pick, "dtype": own, **changes}
        yield Curvature(task=task, parameters=parameters, kind=kind, n_train=n_train, damping=damping, **made)
