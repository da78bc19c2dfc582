"""What is tried before any work."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from infl_cache import BadInput
from infl_cache.maths.digest import sample_digest
from infl_cache.maths.params import select
from infl_cache.maths.probe import (
    activation_bytes,
    check_data,
    check_gradients_arrive,
    check_independence,
    probe_batch,
)
from infl_cache.maths.task import evaluating
from tests.driving import CPU, one_batch
from tests.tasks import TASKS, Samples, convnet, cross_entropy, logistic, mlp, normal


class Augmented(Samples):
    """Sample 4 is another each time it is fetched."""

    def __init__(self, samples):
        super().__init__(samples)
        self.counter = itertools.count()

    def __getitem__(self, index):
        x, label = super().__getitem__(index)
        return (x + next(self.counter), label) if index == 4 else (x, label)


def test_check_data_gives_the_digests_of_the_samples():
    data = Samples([(torch.full((2,), float(i)), i) for i in range(6)])
    assert check_data(data, "train", [4, 1]) == [sample_digest(data[4]), sample_digest(data[1])]


def test_a_sample_that_differs_when_fetched_twice_is_named():
    data = Augmented([(torch.zeros(2), i) for i in range(6)])
    with pytest.raises(BadInput, match=r"train\[4\]: expected the same sample each time .* switch off augmentation"):
        check_data(data, "train", range(6))
    assert len(check_data(data, "train", range(4))) == 4


def test_a_dataset_that_raises_is_named_with_index_and_traceback():
    class Torn(Samples):
        def __getitem__(self, index):
            return super().__getitem__(index) / (index - 2)

    with pytest.raises(
        BadInput, match=r"(?s)test\[2\] raised ZeroDivisionError: .*Traceback .*in __getitem__"
    ) as caught:
        check_data(Torn([6.0, 6.0, 6.0]), "test", range(3))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def check(task, name="train", count=5):
    with evaluating(task.model, CPU):
        check_independence(task, name, range(count), CPU)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_independent_samples_pass(name, dtype):
    check(TASKS[name](dtype), "train")
    check(TASKS[name](dtype), "test", 4)


class CentredOverBatch(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0))


DEPENDENT = {
    "a mean over the batch": {"model": CentredOverBatch(5, 3).double()},
    "a softmax over the batch": {"forward": lambda model, batch: model(batch[0]).softmax(0)},
    "outputs that the loss does not look at": {
        "forward": lambda model, batch: {"logits": model(batch[0]), "rest": batch[0].cumsum(0)},
        "loss": lambda outputs, targets: cross_entropy(outputs["logits"], targets),
    },
    "a loss relative to the batch": {
        "loss": lambda outputs, targets: cross_entropy(outputs, targets) - cross_entropy(outputs, targets).mean()
    },
}


@pytest.mark.parametrize("what", DEPENDENT)
def test_samples_that_see_each_other_are_refused(what):
    message = r"\[\d\]: expected outputs that do not depend on the other samples .* a norm over the batch, or a loss"
    with pytest.raises(BadInput, match=f"^train{message}"):
        check(logistic(**DEPENDENT[what]))
    with pytest.raises(BadInput, match=f"^test{message}"):
        check(logistic(**DEPENDENT[what]), "test", 4)


def test_batch_norm_without_running_statistics_is_refused():
    pictures = convnet(model=nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False).double(), *convnet().model))
    with pytest.raises(BadInput, match="norm over the batch"):
        check(pictures)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).double()
    with pytest.raises(BadInput, match=r"norm over the batch|on samples 0 to 0, raised ValueError"):
        check(logistic(model=model))


def test_dropout_that_eval_mode_does_not_switch_off_is_refused():
    class Careless(nn.Linear):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5))

    torch.manual_seed(0)
    message = r"train\[0\]: expected the same loss each time, found .* dropout or sampling that eval mode does not swi"
    with pytest.raises(BadInput, match=message):
        check(logistic(model=Careless(5, 3).double()))


def test_parameters_that_receive_no_gradient_are_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.used(x)

    task = logistic(model=Unused().double())
    with (
        evaluating(task.model, CPU),
        pytest.raises(BadInput, match=r"found none at spare.weight, spare.bias; leave them out with parameters="),
    ):
        check_gradients_arrive(task, select(task.model, ["*"]), range(3), CPU)
    used = select(task.model, ["used.*"])
    with evaluating(task.model, CPU):
        check_gradients_arrive(task, used, range(3), CPU)


def test_a_gradient_may_arrive_from_only_one_of_the_samples():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.rarely = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.rarely(x) if bool((x[:, 0] > 0).all()) else self.always(x)

    task = logistic(model=Sometimes().double())
    positive = [i for i in range(10) if task.train[i][0][0] > 0]
    negative = [i for i in range(10) if task.train[i][0][0] <= 0]
    parameters = select(task.model, None)
    with evaluating(task.model, CPU):
        check_gradients_arrive(task, parameters, [negative[0], positive[0]], CPU)
        with pytest.raises(BadInput, match=r"found none at always\.weight, always\.bias"):
            check_gradients_arrive(task, parameters, positive, CPU)


def test_the_probes_leave_flags_and_gradients_as_they_were():
    task = mlp()
    task.model[0].requires_grad_(False)
    parameters = select(task.model, ["*"])
    with evaluating(task.model, CPU):
        check_independence(task, "train", range(4), CPU)
        check_gradients_arrive(task, parameters, range(4), CPU)
        activation_bytes(task, parameters, one_batch(task))
        assert not any(parameter.requires_grad for parameter in task.model.parameters())
    assert [p.requires_grad for p in task.model.parameters()] == [False, False, True, True, True]
    assert all(parameter.grad is None for parameter in task.model.parameters())


def kept_bytes(task, count=8):
    parameters = select(task.model, None)
    with evaluating(task.model, CPU):
        return activation_bytes(task, parameters, probe_batch(task, range(count), CPU))


def wide(width, dtype=torch.float64):
    model = nn.Sequential(nn.Linear(5, width), nn.Sigmoid(), nn.Linear(width, 3)).to(dtype)
    return logistic(dtype, model=model)


def test_activation_bytes_are_those_of_one_sample():
    assert kept_bytes(wide(100), 2) == pytest.approx(kept_bytes(wide(100), 10), rel=0.1)


def test_activation_bytes_grow_with_width_and_element_size_but_not_with_the_weights():
    # A sample of this model keeps its input, one hidden row (the sigmoid's result, which is also the next layer's
    # input) and the loss's own few numbers: about 8 (5 + width + 2 * 3) bytes in float64.
    assert kept_bytes(wide(1000)) - kept_bytes(wide(500)) == pytest.approx(8 * 500, rel=0.02)
    assert kept_bytes(wide(1000)) == pytest.approx(2 * kept_bytes(wide(1000, torch.float32)), rel=0.02)
    assert kept_bytes(wide(1000)) < 2 * 8 * 1000


def test_probe_batch_holds_the_samples_asked_for():
    task = logistic()
    batch = probe_batch(task, [3, 1], CPU, "test")
    assert list(batch.indices) == [3, 1]
    assert torch.equal(batch.data[0], normal(14, 5)[[13, 11]])
