"""The measures against their equations, and shapes that they are not made for."""

import numpy as np
import pytest
import torch

from infl_cache import BadInput, ForeignRun, Run, Task, measures
from tests import tasks
from tests.driving import captured_rows, close, decided
from tests.twins import gradient_rows

A = tasks.normal(5, 3)
Y = tasks.labels(5)


def test_the_margin_is_the_log_odds_of_the_right_class():
    p = A.softmax(1)[torch.arange(5), Y]
    close(measures.margin(A, Y), (p / (1 - p)).log())


def test_the_logit_is_the_output_of_the_right_class():
    close(measures.logit(A, Y), A[torch.arange(5), Y])


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
@pytest.mark.parametrize("kind", [torch.int64, torch.float64, torch.bool])
@pytest.mark.parametrize("function", [measures.margin, measures.logit])
def test_of_binary_outputs_both_are_the_log_odds_of_the_label(function, kind, shape):
    z, y = A[:, 0], torch.tensor([0, 1, 1, 0, 1])
    p = torch.where(y > 0, z.sigmoid(), 1 - z.sigmoid())
    close(function(z.reshape(shape), y.to(kind)), (p / (1 - p)).log())
    close(function(z.reshape(shape), (2 * y - 1).double()), (p / (1 - p)).log())


def test_the_embedding_norm_is_that_of_the_flattened_outputs():
    e = tasks.normal(4, 2, 3)
    close(measures.embedding_norm(e, None), e.square().sum((1, 2)).sqrt())
    close(measures.embedding_norm(e[:, 0, 0], None), e[:, 0, 0].abs())


@pytest.mark.parametrize("outputs", [A, -A, 300 * A])
def test_the_margin_of_large_logits_is_finite_with_its_gradient(outputs):
    leaf = outputs.clone().requires_grad_()
    found = measures.margin(leaf, Y)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert torch.isfinite(found).all()
    assert torch.isfinite(gradient).all()
    close(gradient[torch.arange(5), Y], torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("function", "outputs", "targets"),
    [
        (measures.margin, torch.zeros(5, 2, 3), Y),
        (measures.margin, A, torch.zeros(5, 3)),
        (measures.margin, A, torch.zeros(5)),
        (measures.margin, {"logits": A}, Y),
        (measures.logit, A, Y.tolist()),
        (measures.logit, A[:, 0], torch.zeros(5, 2)),
        (measures.logit, A[:, :1], torch.zeros(4)),
        (measures.embedding_norm, [A], Y),
        (measures.embedding_norm, torch.tensor(1.0), Y),
    ],
)
def test_other_shapes_are_refused_in_two_lines(function, outputs, targets):
    with pytest.raises(BadInput, match=r"measure (margin|logit|embedding-norm): expected .* found") as refused:
        function(outputs, targets)
    assert str(refused.value).count("\n") < 2


@pytest.mark.parametrize("name", ["margin", "logit", "embedding-norm"])
def test_gradients_of_a_measure_are_autograds_sample_by_sample(name):
    task = tasks.mlp(measure=measures.MEASURES[name])
    forms, notes = decided(task)
    assert notes == []
    close(captured_rows(task, forms, measure=True, data="test"),
          gradient_rows(task, range(4), data="test", measure=True))  # fmt: skip


def s_test(path, task, **options):
    run = Run(path, task, damping=0.1, solver="exact", progress=False, **options)
    run.stest()
    return run.s_test(slice(None))


def test_a_measure_by_its_name_is_the_function(tmp_path):
    by_name = s_test(tmp_path / "a", tasks.mlp(), measure="margin")
    by_function = s_test(tmp_path / "b", tasks.mlp(measure=measures.margin))
    assert np.array_equal(by_name, by_function)
    assert not np.allclose(by_name, s_test(tmp_path / "c", tasks.mlp()))
    # ... overrides the task's own, back to the loss too,
    own = tasks.mlp(measure=measures.logit)
    assert np.array_equal(s_test(tmp_path / "d", own, measure="margin"), by_name)
    assert np.array_equal(s_test(tmp_path / "e", own, measure="loss"), s_test(tmp_path / "c", tasks.mlp()))
    # and is an identity: the same one however it is given.
    assert np.array_equal(s_test(tmp_path / "a", tasks.mlp(measure=measures.margin)), by_name)
    for other in ("loss", "logit"):
        with pytest.raises(ForeignRun, match="measure: expected 'margin', found"):
            s_test(tmp_path / "a", tasks.mlp(), measure=other)


def test_a_measure_that_was_chosen_once_holds_and_status_names_it(tmp_path):
    Run(tmp_path / "r", tasks.mlp(), damping=0.1, measure="margin", progress=False).all()
    again = Run(tmp_path / "r", tasks.mlp(), progress=False)
    assert [result.computed for result in again.all()] == [0, 0, 0]
    assert "measure: margin" in str(again.status())

    def own(outputs, targets):
        return outputs.sum(1)

    other = Run(tmp_path / "o", tasks.mlp(measure=own), damping=0.1, progress=False)
    other.stest()
    assert "own, the task's own" in str(other.status())


def test_what_helps_a_margin_is_positive(tmp_path):
    """Upweighting the samples of a margin's `helpful` raises it, as those of a loss's `helpful` lower that."""
    runs = {}
    for name in ("loss", "margin"):
        runs[name] = Run(tmp_path / name, tasks.mlp(n_train=60), damping=0.1, measure=name, progress=False)
        runs[name].all()
    margin, loss = runs["margin"], runs["loss"]
    for j in range(4):
        row = margin.scores()[j]
        assert margin.helpful(j, 3).ids.tolist() == np.argsort(-row, kind="stable")[:3].tolist()
        assert margin.harmful(j, 3).ids.tolist() == np.argsort(row, kind="stable")[:3].tolist()
        assert np.corrcoef(row, loss.scores()[j])[0, 1] < -0.9
        kept = np.load(tmp_path / "margin" / "rankings.npz")
        assert kept["helpful_ids"][j, :3].tolist() == margin.helpful(j, 3).ids.tolist()
        assert len(set(margin.helpful(j, 5).ids) & set(loss.helpful(j, 5).ids)) >= 3


def test_a_task_takes_them_as_any_measure():
    data = torch.utils.data.TensorDataset(A, Y)
    task = Task(model=torch.nn.Linear(3, 3).double(), train=data, test=data, loss=tasks.cross_entropy,
                measure=measures.margin)  # fmt: skip
    assert task.measure is measures.margin
