"""The task: what is refused before any work, how it is found, and that the model is put back."""

from __future__ import annotations

import contextlib
import math
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from infl_cache import BadInput, Task, load_task
from infl_cache.maths.params import flatten, select
from infl_cache.maths.task import (
    blaming,
    evaluating,
    losses_of,
    outputs_at,
    per_sample,
    predictions_of,
    reference_gradient,
    requiring_grad,
    targets_as_numbers,
    values_of,
)
from tests.driving import CPU, one_batch
from tests.tasks import Samples, cross_entropy, dicts, logistic, mlp, regression, tied
from tests.twins import gradient_rows, relative_error


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(5), 0)])


class StreamWithLength(Stream):
    def __len__(self):
        return 1


class WithoutIndex(Dataset):
    def __len__(self):
        return 1


UNUSABLE = {
    "a generator": ((x for x in range(3)), "found generator without __len__"),
    "an iterator": (iter([1, 2]), "found list_iterator without __"),
    "a set": ({1, 2}, "found set without __getitem__"),
    "an iterable dataset": (Stream(), "found Stream without __len__"),
    "an iterable dataset with a length": (StreamWithLength(), "found .*StreamWithLength"),
    "a dataset without an index": (WithoutIndex(), "found .*WithoutIndex"),
    "nothing at all": ([], "expected at least one sample, found none"),
    "a loader": (DataLoader([1, 2]), "expected a dataset addressed by index, found a DataLoader; give its .dataset"),
}


@pytest.mark.parametrize("name", ["train", "test"])
@pytest.mark.parametrize("what", UNUSABLE)
def test_a_dataset_that_is_not_addressed_by_index_is_refused(what, name):
    dataset, message = UNUSABLE[what]
    with pytest.raises(BadInput, match=f"^{name}: .*{message}"):
        logistic(**{name: dataset})


def test_a_list_is_a_dataset():
    assert len(logistic(train=[(torch.zeros(5), 0)]).train) == 1


@pytest.mark.parametrize("name", ["loss", "collate", "forward", "targets", "measure"])
def test_what_should_be_a_function_is_refused_if_it_is_none(name):
    with pytest.raises(BadInput, match=f"{name}: expected a function, found str"):
        logistic(**{name: "cross_entropy"})


def test_a_model_that_is_no_module_is_refused():
    with pytest.raises(BadInput, match=r"model: expected a torch.nn.Module, found function"):
        logistic(model=flatten)


@pytest.mark.parametrize("weight_decay", [-0.1, math.nan, math.inf, "0.1", None])
def test_a_weight_decay_that_is_no_number_from_zero_is_refused(weight_decay):
    with pytest.raises(BadInput, match="weight_decay: expected a number of at least 0, found"):
        logistic(weight_decay=weight_decay)


# --- load_task ---


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in; what is imported from it is forgotten."""
    before = dict(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - set(before):
        del sys.modules[name]
    sys.modules.update(before)


FILE = """
import torch
from helper_beside import WIDTH
from infl_cache import Task

def make(rows=4, classes=3):
    data = [(torch.ones(WIDTH) * i, i % classes) for i in range(rows)]
    loss = torch.nn.CrossEntropyLoss(reduction="none")
    return Task(model=torch.nn.Linear(WIDTH, classes), train=data, test=data, loss=loss)

def positional(rows):
    return make(rows)

def number():
    return 3

def failing():
    raise KeyError("no such picture")

VALUE = 3
"""


@pytest.fixture
def task_file(place):
    (place / "helper_beside.py").write_text("WIDTH = 2\n")
    path = place / "my_task.py"
    path.write_text(FILE)
    return path


def test_a_task_is_loaded_from_a_file_with_its_neighbours(task_file):
    task = load_task(f"{task_file}:make")
    assert isinstance(task, Task)
    assert len(task.train) == 4
    assert load_task("my_task.py:make").model.in_features == 2


def test_arguments_reach_the_function(task_file):
    assert len(load_task(f"{task_file}:make", {"rows": 7}).train) == 7


def test_a_task_is_loaded_from_a_module_of_the_working_folder(task_file, place):
    (place / "some_package").mkdir()
    (place / "some_package" / "tasks.py").write_text("from my_task import make\n")
    assert len(load_task("some_package.tasks:make").train) == 4


def test_the_file_can_be_loaded_again_after_it_was_changed(task_file):
    assert len(load_task(f"{task_file}:make").train) == 4
    task_file.write_text(FILE.replace("rows=4", "rows=5678"))
    assert len(load_task(f"{task_file}:make").train) == 5678


REFERENCES = {
    "no function": ("my_task.py", r"task: expected path/to/file.py:function or package.module:function, found 'my_t"),
    "no name": ("my_task.py:make()", r"task: expected path/to/file.py:function or package.module:function, found"),
    "no file": ("other.py:make", r"task: expected a Python file, found none at other.py"),
    "no name of a file": (f"{'long' * 100}.py:make", r"task: expected a Python file, found none at longlong"),
    "no name at all": ("o\0ther.py:make", r"task: expected a Python file, found none at o"),
    "no module": ("nowhere.to_be_found:make", r"task: expected a Python module, found none called nowhere; .*\?$"),
    "no such function": ("my_task.py:mkae", r"task: expected a function mkae in my_task.py, found none"),
    "not a function": ("my_task.py:VALUE", r"task: expected a function VALUE in my_task.py, found none"),
    "not a task": ("my_task.py:number", r"task: expected my_task.py:number to return an infl_cache.Task, found int"),
    "fails": ("my_task.py:failing", r"(?s)task: my_task.py:failing raised KeyError: 'no such picture'.*in failing"),
    "lacks an argument": ("my_task.py:positional", r"task: my_task.py:positional cannot be called with {}: missing a"),
}


@pytest.mark.parametrize("what", REFERENCES)
def test_a_reference_that_leads_to_no_task_is_refused(what, task_file):
    reference, message = REFERENCES[what]
    with pytest.raises(BadInput, match=message):
        load_task(reference)


@pytest.mark.parametrize("reference", ["9" * 10_000, "a.py:" + "9" * 10_000, "9" * 10_000 + ":f"])
def test_a_reference_without_end_is_not_said_again_in_full(reference):
    with pytest.raises(BadInput) as refused:
        load_task(reference)
    assert len(str(refused.value)) < 1000


def test_an_argument_that_the_function_does_not_take_is_refused(task_file):
    with pytest.raises(BadInput, match=r"my_task.py:make cannot be called with {'row': 3}: got an unexpected keyword"):
        load_task("my_task.py:make", {"row": 3})


def test_a_file_that_fails_is_refused_and_leaves_no_module_behind(place):
    (place / "half.py").write_text("first = 1\nsecond = first / 0\n")
    with pytest.raises(BadInput, match=r"(?s)task: half.py raised ZeroDivisionError: division by zero.*line 2"):
        load_task("half.py:make")
    assert "half" not in sys.modules


def test_a_file_that_fails_gives_a_module_of_the_same_name_back(place):
    (place / "json.py").write_text("raise RuntimeError('no')\n")
    before = sys.modules["json"]
    with pytest.raises(BadInput, match="RuntimeError: no"):
        load_task("json.py:make")
    assert sys.modules["json"] is before


# --- one value a sample ---


REDUCED = {
    "a mean": (nn.CrossEntropyLoss(), r'found shape \(\); use reduction="none"'),
    "one value a class": (lambda outputs, targets: outputs, r"found shape \(10, 3\)"),
    "a column": (lambda outputs, targets: cross_entropy(outputs, targets)[:, None], r"found shape \(10, 1\)"),
    "a number": (lambda outputs, targets: 1.0, "found float"),
}


@pytest.mark.parametrize("name", ["loss", "measure"])
@pytest.mark.parametrize("what", REDUCED)
def test_a_loss_or_measure_without_one_value_a_sample_is_refused(what, name):
    function, message = REDUCED[what]
    task = mlp(**{name: function})
    with pytest.raises(BadInput, match=f"^{name}: expected one value a sample, shape \\(10,\\), .*{message}"):
        losses_of(task, one_batch(task), measure=name == "measure")


def test_the_measure_is_the_loss_unless_the_task_gives_another():
    task = mlp(measure=lambda outputs, targets: outputs.amax(1))
    batch = one_batch(task)
    task.model.eval()
    outputs, losses = losses_of(task, batch)
    assert torch.equal(losses, task.loss(outputs, batch.data[1]))
    assert torch.equal(losses_of(task, batch, measure=True)[1], outputs.amax(1))
    assert torch.equal(per_sample(mlp(), outputs, batch.data, 10, measure=True), losses)


def test_a_model_that_raises_is_blamed_with_the_samples_and_its_traceback():
    class Broken(nn.Linear):
        def forward(self, x):
            raise ValueError("expected 7 features")

    task = logistic(model=Broken(5, 3))
    with pytest.raises(
        BadInput, match=r"(?s)model or loss, on samples 0 to 9, raised ValueError: expected 7 .*in forward"
    ):
        losses_of(task, one_batch(task))


def test_blaming_lets_our_own_and_memory_errors_pass():
    for error in (BadInput("as it is"), MemoryError("as it is"), torch.OutOfMemoryError("as it is")):
        with pytest.raises(type(error), match=r"^as it is\Z"), blaming("task"):
            raise error
    with pytest.raises(KeyboardInterrupt), blaming("task"):
        raise KeyboardInterrupt


# --- the model is put back ---


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        [value.clone() for value in model.state_dict().values()],
    )


def same_state(one, other):
    return one[:3] == other[:3] and all(torch.equal(a, b) for a, b in zip(one[3], other[3], strict=True))


@pytest.mark.parametrize("error", [None, ValueError("inside"), KeyboardInterrupt()], ids=["well", "error", "signal"])
def test_evaluating_puts_modes_and_flags_back_whatever_happens(error):
    model = mlp().model.train()
    model[1].eval()
    model[3].requires_grad_(False)
    before = state_of(model)
    inside = []
    with contextlib.suppress(ValueError, KeyboardInterrupt), evaluating(model, CPU):
        inside += [*(module.training for module in model.modules()), *(p.requires_grad for p in model.parameters())]
        if error is not None:
            raise error
    assert inside
    assert not any(inside)
    assert same_state(state_of(model), before)


def test_requiring_grad_puts_flags_back_after_an_error():
    model = mlp().model
    model[3].requires_grad_(False)
    inside = []
    with contextlib.suppress(ValueError), requiring_grad(list(model.parameters())):
        inside += [parameter.requires_grad for parameter in model.parameters()]
        raise ValueError("inside")
    assert inside == [True] * 5
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True, True]


# --- functions of the parameters, and the reference ---


def test_outputs_at_other_values_leave_the_model_alone():
    task = tied()
    batch, parameters = one_batch(task), select(task.model, None)
    before = state_of(task.model)
    doubled = {name: 2 * value for name, value in values_of(task.model, parameters).items()}
    found = outputs_at(task, doubled, batch.data)
    assert same_state(state_of(task.model), before)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.mul_(2)
    assert torch.equal(found, task.model(batch.data[0]))


def test_the_reference_is_plain_autograd_of_one_sample():
    task = dicts(measure=lambda outputs, targets: outputs["logits"][:, 0])
    parameters = select(task.model, None)
    expected = {kind: gradient_rows(task, range(10), measure=kind) for kind in (False, True)}
    with evaluating(task.model, CPU):
        for index in range(10):
            batch = one_batch(dicts(train=Samples([task.train[index]]), measure=task.measure))
            for kind, rows in expected.items():
                found = flatten(parameters, reference_gradient(task, parameters, batch, measure=kind))
                assert relative_error(found, rows[index]) < 1e-14


def test_the_reference_says_where_no_gradient_arrives():
    task = mlp(forward=lambda model, batch: model[5](batch[0][:, :4]))
    found = reference_gradient(task, select(task.model, None), one_batch(task))
    assert [name for name, gradient in found.items() if gradient is None] == ["0.weight", "0.bias", "3.weight"]
    constant = mlp(loss=lambda outputs, targets: targets.double())
    assert set(reference_gradient(constant, select(constant.model, None), one_batch(constant)).values()) == {None}


# --- targets and predictions as numbers ---


TARGETS = {
    "labels": (torch.tensor([2, 0]), [2.0, 0.0]),
    "a column": (torch.tensor([[1.5], [2.5]]), [1.5, 2.5]),
    "a list of numbers": ([3, "4"], [3.0, 4.0]),
    "a list of texts": (["cat", 1], [math.nan, 1.0]),
    "vectors": (torch.zeros(2, 3), [math.nan, math.nan]),
    "too few": (torch.zeros(1), [math.nan, math.nan]),
    "nothing": (None, [math.nan, math.nan]),
}


@pytest.mark.parametrize("what", TARGETS)
def test_targets_are_numbers_or_nan(what):
    targets, expected = TARGETS[what]
    found = targets_as_numbers(logistic(targets=lambda batch: batch), targets, 2)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


PREDICTIONS = {
    "classes": (torch.tensor([[0.1, 0.9], [0.8, 0.2]]), [1.0, 0.0]),
    "one output": (torch.tensor([[0.25], [4.0]]), [0.25, 4.0]),
    "values": (torch.tensor([0.25, 4.0]), [0.25, 4.0]),
    "positions": (torch.zeros(2, 3, 4), [math.nan, math.nan]),
    "another batch": (torch.zeros(3, 2), [math.nan, math.nan]),
    "a dict": ({"logits": torch.zeros(2, 2)}, [math.nan, math.nan]),
}


@pytest.mark.parametrize("what", PREDICTIONS)
def test_predictions_are_classes_values_or_nan(what):
    outputs, expected = PREDICTIONS[what]
    found = predictions_of(outputs, 2)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def test_samples_may_have_several_inputs():
    task = regression()
    outputs, losses = losses_of(task, one_batch(task))
    assert outputs.shape == (10, 2)
    assert losses.shape == (10,)
