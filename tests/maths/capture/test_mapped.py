"""Per-sample gradients of the whole model by vmap, and by a loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

from infl_cache.maths.capture.mapped import looped_gradients, mapped_gradients, per_sample_leaves
from infl_cache.maths.params import flatten, select
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.task import evaluating
from tests.driving import CPU
from tests.tasks import TASKS, built, logistic, mlp
from tests.twins import gradient_rows, relative_error

FOLLOWED = [name for name in TASKS if name != "branching"]


def mapped_rows(task, size, measure=False):
    parameters = select(task.model, task.parameters)
    rows = []
    with evaluating(task.model, CPU):
        for start in range(0, len(task.train), size):
            batch = probe_batch(task, range(start, min(start + size, len(task.train))), CPU)
            rows.append(flatten(parameters, mapped_gradients(task, parameters, batch, measure), leading=1))
    return torch.cat(rows)


def looped_rows(task, measure=False):
    parameters = select(task.model, task.parameters)
    with evaluating(task.model, CPU):
        return torch.cat(
            [looped_gradients(task, parameters, probe_batch(task, [i], CPU), measure) for i in range(len(task.train))]
        )


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("size", [1, 3, 10])
def test_vmap_of_the_whole_model_equals_the_loop_of_plain_autograd(name, size):
    task = TASKS[name]()
    assert relative_error(mapped_rows(task, size), gradient_rows(task, range(10))) < 1e-12


@pytest.mark.parametrize("name", TASKS)
def test_the_loop_equals_the_loop_of_plain_autograd(name):
    task = TASKS[name]()
    assert relative_error(looped_rows(task), gradient_rows(task, range(10))) < 1e-13


def test_both_follow_the_measure():
    task = mlp(measure=lambda outputs, targets: outputs.amax(1) * (1 + targets))
    expected = gradient_rows(task, range(10), measure=True)
    assert relative_error(mapped_rows(task, 3, measure=True), expected) < 1e-12
    assert relative_error(looped_rows(task, measure=True), expected) < 1e-12
    assert relative_error(expected, gradient_rows(task, range(10))) > 0.1


def test_the_loop_takes_one_sample_at_a_time():
    task = logistic()
    with pytest.raises(ValueError, match="the loop takes batches of one sample, found 2"):
        looped_gradients(task, select(task.model, None), probe_batch(task, [0, 1], CPU), False)


def test_a_parameter_without_a_gradient_has_zeros_in_the_loop():
    task = mlp(forward=lambda model, batch: model[5](batch[0][:, :4]))
    found = looped_rows(task)
    assert relative_error(found, gradient_rows(task, range(10))) < 1e-13
    assert not found[:, :55].any()
    assert found[:, 55:].any(1).all()


def test_leaves_of_a_sample_are_told_from_shared_ones():
    shared, table = torch.zeros(2), torch.zeros(1, 3)

    def collate(samples):
        x, y = default_collate(samples)
        return {"shared": shared, "x": x, "more": (table, x[:, 0], "text", None), "transposed": x.T, "y": y}

    task = logistic(collate=collate)
    for count in (1, 2, 5):
        batch = probe_batch(task, range(count), CPU)
        found = {id(tree_leaves(batch.data)[index]) for index in per_sample_leaves(task, batch)}
        assert found == {id(batch.data["x"]), id(batch.data["more"][1]), id(batch.data["y"])}


class Scaled(nn.Module):
    """Takes a tensor besides the samples that belongs to all of them."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x, shared):
        return self.head(self.norm(x) * shared.square().sum())


@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_a_tensor_that_all_samples_share_is_not_taken_apart_whatever_its_length(size):
    shared = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)

    def collate(samples):
        x, y = default_collate(samples)
        return x, shared, y

    task = logistic(model=built(Scaled, torch.float64), collate=collate)
    assert relative_error(mapped_rows(task, size), gradient_rows(task, range(10))) < 1e-12
