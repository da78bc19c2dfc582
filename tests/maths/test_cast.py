import copy

import pytest
import torch
from torch import nn

from infl_cache.maths.cast import in_dtype, with_model
from infl_cache.maths.task import losses_of
from tests import tasks
from tests.driving import one_batch
from tests.tasks import TASKS

WEIGHTS = [0.5, 1.0, 2.0]


def weighed(dtype):
    """A task whose loss and measure have weights of their own."""
    loss = nn.CrossEntropyLoss(torch.tensor(WEIGHTS, dtype=dtype), reduction="none")
    task = tasks.mlp(dtype, loss=loss, measure=copy.deepcopy(loss))
    task.model.eval()
    return task


@pytest.mark.parametrize("name", TASKS)
def test_a_float32_task_in_float64_has_its_losses_to_float32(name):
    task = TASKS[name](torch.float32)
    task.model.eval()
    batch, wide = one_batch(task), in_dtype(task, torch.float64)
    found, expected = losses_of(wide, batch)[1], losses_of(task, batch)[1]
    assert found.dtype == torch.float64
    assert {each.dtype for each in task.model.parameters()} == {torch.float32}
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("measure", [False, True])
def test_loss_and_measure_are_cast_with_the_model_and_the_arithmetic_is_that_type_s(measure):
    task, twin = weighed(torch.float32), weighed(torch.float64)
    wide = in_dtype(task, torch.float64)
    data = one_batch(task)
    exact = with_model(twin, copy.deepcopy(task.model).double())
    with torch.no_grad():
        outputs = exact.model(data.data[0].double())
        expected = (twin.measure if measure else twin.loss)(outputs, data.data[1])
        torch.testing.assert_close(losses_of(wide, data, measure)[1], expected, rtol=1e-14, atol=0)
    assert task.loss.weight.dtype == task.measure.weight.dtype == torch.float32


def test_a_task_that_has_the_type_is_itself_and_another_model_of_it_changes_nothing_else():
    task = tasks.mlp()
    assert in_dtype(task, torch.float64) is task
    other = with_model(task, copy.deepcopy(task.model))
    assert other.model is not task.model
    assert (other.loss, other.forward, other.targets) == (task.loss, task.forward, task.targets)


def test_a_model_without_floating_parameters_is_given_the_data_as_they_are():
    model = nn.Flatten()
    task = with_model(tasks.mlp(torch.float32), model)
    assert task.forward(model, one_batch(task).data).dtype == torch.float32
