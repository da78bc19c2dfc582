import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from infl_cache import BadInput
from infl_cache.maths.convex import REMEDY, ConvexRetraining
from infl_cache.maths.params import select
from infl_cache.maths.samples import batches
from tests import tasks

CPU = torch.device("cpu")


def retraining(task, damping=0.0, size=4, rows=None, **changes):
    """The built-in retraining of a small task, in batches of `size`."""
    n_train = len(task.train)
    made = {
        "load": lambda groups: batches(task.train, "train", task.collate, groups, CPU),
        "rows": range(n_train) if rows is None else rows,
        "budget": 10**9,
        "tick": lambda: None,
        **changes,
    }
    for parameter in task.model.parameters():
        parameter.requires_grad_(False)
    return ConvexRetraining(
        task=task, parameters=select(task.model, task.parameters or ["*"]), size=size, n_train=n_train,
        damping=damping, **made,
    )  # fmt: skip


def gradient_of_objective(task, model, keep, damping, trained):
    """By plain autograd, sample by sample; of all parameters as one vector."""
    theta = [p.detach().clone().requires_grad_(True) for p in model.parameters()]
    named = dict(zip(dict(model.named_parameters()), theta, strict=True))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(task.train)):
        x, y = task.train[i]
        if keep[i]:
            outputs = torch.func.functional_call(model, named, (x.double().unsqueeze(0),))
            total = total + task.loss(outputs, y.unsqueeze(0))[0] / len(task.train)
    for now, then in zip(theta, trained, strict=True):
        total = total + task.weight_decay / 2 * now.square().sum() + damping / 2 * (now - then).square().sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, theta)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_gradient_of_the_written_objective_vanishes(dtype, damping):
    task = tasks.logistic(dtype, weight_decay=0.05)
    trained = [p.detach().double().clone() for p in task.model.parameters()]
    way = retraining(task, damping)
    way.check()
    for removed in ([], [3], [0, 4, 7]):
        keep = torch.ones(10, dtype=torch.bool)
        keep[removed] = False
        model = way(keep)
        assert next(model.parameters()).dtype == torch.float64
        assert float(gradient_of_objective(task, model, keep, damping, trained).norm()) < 1e-9
    assert way.unfinished == []
    assert all(torch.equal(p.double(), t) for p, t in zip(task.model.parameters(), trained, strict=True))


def test_results_do_not_depend_on_batches_order_or_the_factorisation(monkeypatch):
    task = tasks.logistic(weight_decay=0.05)
    keep = torch.ones(10, dtype=torch.bool)
    keep[2] = False

    def weights(way):
        return torch.cat([p.detach().flatten() for p in way(keep).parameters()])

    expected = weights(retraining(task, 0.1))
    torch.testing.assert_close(weights(retraining(task, 0.1, size=10)), expected, rtol=1e-7, atol=1e-9)
    other = retraining(task, 0.1, size=3)
    other(torch.arange(10) > 4)
    torch.testing.assert_close(weights(other), expected, rtol=1e-7, atol=1e-9)
    monkeypatch.setattr("infl_cache.maths.convex.FACTORISED", 0)
    torch.testing.assert_close(weights(retraining(task, 0.1)), expected, rtol=1e-6, atol=1e-8)


def test_only_the_chosen_parameters_move_and_their_part_may_be_affine():
    deep = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    task = tasks.classified(deep.double(), tasks.normal(14, 5), 10, weight_decay=0.1, parameters=["2.*"])
    way = retraining(task)
    way.check()
    before = deep[2].weight.clone()
    model = way(torch.arange(10) != 1)
    assert torch.equal(model[0].weight, deep[0].weight)
    assert not torch.equal(model[2].weight, before)
    with pytest.raises(BadInput, match="affine in the chosen parameters"):
        retraining(dataclasses.replace(task, parameters=None)).check()


@pytest.mark.parametrize("name", ["mlp", "inplace", "tokens", "twice"])
def test_networks_are_refused_in_two_lines_that_name_retrain(name):
    with pytest.raises(BadInput, match="affine in the chosen parameters") as error:
        retraining(getattr(tasks, name)(torch.float32)).check()
    assert str(error.value).count("\n") == 1
    assert REMEDY in str(error.value)
    assert "retrain=" in REMEDY


def bumpy(outputs, targets):
    return 1 - torch.exp(-F.cross_entropy(outputs, targets, reduction="none"))


@pytest.mark.parametrize("loss", [bumpy, lambda o, t: torch.sin(o).sum(1), lambda o, t: -(o**2).sum(1)])
def test_a_loss_that_is_not_convex_in_the_outputs_is_refused(loss):
    with pytest.raises(BadInput, match="convex in the outputs, found a Hessian with the eigenvalue -"):
        retraining(tasks.logistic(loss=loss)).check()


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: F.cross_entropy(o, t, reduction="none", label_smoothing=0.1),
        lambda o, t: torch.relu(1 - o[:, 0]),
        lambda o, t: F.smooth_l1_loss(o[:, 0], t.to(o), reduction="none"),
        lambda o, t: torch.logsumexp(o, 1) + o.square().sum(1),
    ],
)
def test_convex_losses_are_accepted(loss):
    retraining(tasks.logistic(loss=loss)).check()


def test_a_model_that_cannot_be_computed_in_float64_is_refused_in_two_lines():
    class Half(nn.Linear):
        def forward(self, x):
            return F.linear(x.float(), self.weight, self.bias)

    with pytest.raises(BadInput, match="in float64 raised RuntimeError") as error:
        retraining(tasks.classified(Half(5, 3), tasks.normal(14, 5, dtype=torch.float32), 10)).check()
    assert str(error.value).count("\n") == 1


def test_without_a_minimum_it_says_what_would_make_one():
    # Separable, no weight decay, no damping: the best weights are infinite.
    model = tasks.built(lambda: nn.Linear(5, 3), torch.float64)
    x = tasks.normal(14, 5)
    train = torch.utils.data.TensorDataset(x[:6], torch.arange(6) % 3)
    task = tasks.classified(model, x, 10, train=train)
    with pytest.raises(BadInput, match=r"expected the training loss to have a minimum.*\n.*more weight_decay"):
        retraining(task)(torch.ones(6, dtype=torch.bool))
    retraining(task, damping=0.01)(torch.ones(6, dtype=torch.bool))


def test_a_loss_with_kinks_is_said_to_be_unfinished():
    task = tasks.logistic(loss=lambda o, t: (o[:, 0] - t.to(o)).abs(), weight_decay=0.1)
    way = retraining(task)
    with pytest.raises(BadInput, match="expected the training loss to have a minimum"):
        way(torch.ones(10, dtype=torch.bool))


def test_ticks_may_stop_it():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retraining(tasks.logistic(weight_decay=0.1), tick=stop)(torch.ones(10, dtype=torch.bool))


def test_samples_that_are_left_out_play_no_part():
    task = tasks.logistic(weight_decay=0.1)
    x, y = task.train.tensors
    keep = torch.ones(10, dtype=torch.bool)
    keep[6] = False
    expected = [p.clone() for p in retraining(task)(keep).parameters()]
    x = x.clone()
    x[6] = torch.nan
    task = dataclasses.replace(task, train=torch.utils.data.TensorDataset(x, y))
    found = retraining(task, rows=[i for i in range(10) if i != 6])(keep).parameters()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
