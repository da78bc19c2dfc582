"""The proof of sign and scale: what influence predicts is what retraining without a sample does."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from infl_cache import Run, Task

datasets = pytest.importorskip("sklearn.datasets")

N_TRAIN, WEIGHT_DECAY = 1500, 0.01


@pytest.fixture(scope="module")
def digits():
    pictures, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return torch.tensor(pictures[order] / 16), torch.tensor(labels[order])


def fit(model, x, y, weights):
    """Minimise the weighted mean loss plus weight decay, to convergence."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=2000, tolerance_grad=1e-11, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def objective():
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        decay = sum(p.square().sum() for p in model.parameters())
        loss = (losses * weights).mean() + WEIGHT_DECAY / 2 * decay
        loss.backward()
        return loss

    optimizer.step(objective)
    return model


def test_influence_predicts_leave_one_out_retraining_in_sign_and_scale(digits, tmp_path):
    x, y = digits
    x_train, y_train = x[:N_TRAIN], y[:N_TRAIN]
    torch.manual_seed(0)
    model = fit(nn.Linear(64, 10).double(), x_train, y_train, torch.ones(N_TRAIN).double())
    loss = nn.CrossEntropyLoss(reduction="none")
    with torch.no_grad():
        worst = int(loss(model(x[N_TRAIN:]), y[N_TRAIN:]).argmax()) + N_TRAIN
    task = Task(
        model=model,
        train=TensorDataset(x_train, y_train),
        test=TensorDataset(x[worst : worst + 1], y[worst : worst + 1]),
        loss=loss,
        weight_decay=WEIGHT_DECAY,
    )
    run = Run(tmp_path / "run", task, solver="exact", damping=0.0, curvature="hessian", progress=False)
    run.all()
    influence = run.scores()[0]
    strongest = np.argsort(-np.abs(influence), kind="stable")[:12]

    def test_loss(fitted):
        with torch.no_grad():
            return float(loss(fitted(x[worst : worst + 1]), y[worst : worst + 1])[0])

    before = test_loss(model)
    changes = []
    for index in strongest:
        weights = torch.ones(N_TRAIN).double()
        weights[index] = 0
        again = nn.Linear(64, 10).double()
        again.load_state_dict(model.state_dict())
        changes.append(test_loss(fit(again, x_train, y_train, weights)) - before)

    predicted = -influence[strongest].astype(np.float64)
    pearson = np.corrcoef(predicted, changes)[0, 1]
    slope = np.polyfit(predicted, changes, 1)[0]
    assert pearson >= 0.999
    assert 0.9 <= slope <= 1.1
    # The words: removing a sample of the helpful list raises the loss, one of the harmful list lowers it.
    change_of = dict(zip(strongest.tolist(), changes, strict=True))
    assert change_of[int(run.helpful(0, k=1).ids[0])] > 0
    assert change_of[int(run.harmful(0, k=1).ids[0])] < 0
