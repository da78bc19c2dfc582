"""Parts of a gradient: they cover it once, and the sum of their scores is the score."""

import pytest
import torch

from infl_cache.maths.capture import capture
from infl_cache.maths.parts import by_module, joined, units, units_of, whole
from infl_cache.maths.scores import add_factored_scores, plain_scores, queries, scores
from infl_cache.maths.task import evaluating
from tests.driving import CPU, decided, one_batch
from tests.tasks import TASKS
from tests.twins import gradient_rows

MODELS = sorted(set(TASKS) - {"branching"})


def covered(parts, size):
    count = torch.zeros(size, dtype=torch.int64)
    for part in parts:
        for at in part.columns:
            count[at] += 1
    return count


@pytest.mark.parametrize("form", ["auto", "dense", "factored"])
@pytest.mark.parametrize("name", MODELS)
def test_parts_cover_every_number_once_and_their_scores_add_up(name, form):
    task = TASKS[name](torch.float64)
    forms, _ = decided(task, layer_forms="*=factored") if form == "factored" else decided(task, form=form)
    with evaluating(task.model, CPU):
        captured = capture(task, forms, one_batch(task))
    size = forms.parameters.size
    s_test = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = s_test @ gradient_rows(task, range(len(captured.loss))).T
    cut = units(forms)
    modules = list(by_module(forms).values())
    smaller = [unit for part in modules for unit in units_of(part)]
    for parts in (cut, modules, smaller, [whole(forms)], [joined(cut)]):
        assert (covered(parts, size) == 1).all()
        total = torch.zeros(3, len(captured.loss), dtype=torch.float64)
        for part in parts:
            asked = queries(forms, torch.cat([s_test[:, at] for at in part.columns], 1), part)
            if part.stop > part.start:
                total += plain_scores(asked, captured.dense[:, part.start : part.stop], 0)
            add_factored_scores(asked, captured.factors, 10**6, total)
        assert torch.allclose(total, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    found = scores(forms, queries(forms, s_test), captured.factors, captured.dense, 10**6)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_layers_that_share_a_weight_or_an_input_stay_together():
    forms, _ = decided(TASKS["tied"](torch.float64), layer_forms="*=factored")
    together = [part for part in units(forms) if len(part.layers) > 1]
    assert together, "two layers use one weight"
    for first in units(forms):
        for other in units(forms):
            if first != other:
                assert not {layer.input_from for layer in first.layers} & {layer.input_from for layer in other.layers}
                assert not set(first.names) & set(other.names)


def test_a_module_has_its_own_parameters_and_no_others():
    forms, _ = decided(TASKS["tied"](torch.float64), layer_forms="*=factored")
    names = forms.parameters.names
    for module, part in by_module(forms).items():
        own = {name for name in names if name.rpartition(".")[0] == module}
        assert {name for name, _ in part.spans} == own


def test_plain_columns_that_do_not_follow_one_another_are_not_joined():
    forms, _ = decided(TASKS["mlp"](torch.float64), form="dense")
    first, second = list(by_module(forms).values())[:2]
    with pytest.raises(ValueError, match="follow one another"):
        joined([second, first])
