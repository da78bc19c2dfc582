r"""One gradient, one s_test, the influences on one test sample: in memory, nothing on the disk."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from infl_cache.config import Options, short
from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput
from infl_cache.maths.capture import capture, decide_forms
from infl_cache.maths.params import flatten, unflatten
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import Batch, batches, groups_of, to_device
from infl_cache.maths.scores import influence, queries, scores
from infl_cache.maths.solvers import Identity, Solution, make_solver
from infl_cache.maths.task import Task, reference_gradient
from infl_cache.progress import progress
from infl_cache.ptif.calculating import Given
from infl_cache.ptif.config import Config
from infl_cache.ptif.loaders import Loss, batch_of, class_loss, task_of
from infl_cache.ptif.readjust import adjusted, saved_steps
from infl_cache.stages import rank
from infl_cache.stages.grads import CHECKED_SAMPLES, rows_at_once
from infl_cache.stages.opening import Opened, looked_at
from infl_cache.stages.spectrum import chosen_damping, estimated_spectrum
from infl_cache.stages.system import curvature_samples, damped_curvature, solve_dtype

log = logging.getLogger("infl_cache")

PRECONDITIONER_SAMPLES = 512
# Training samples whose gradients are captured at once.
MOST_AT_ONCE = 256
# Nothing is read or written there.
NOWHERE = Path("nowhere")


def grad_z(z: Any, t: Any, model: nn.Module, gpu: int = -1, *, loss: Loss | None = None, **task: Any) -> list[Tensor]:
    r""":math:`\nabla_\theta \frac1B \sum_b L(z_b, t_b)` of a batch, a tensor for each parameter that is looked at.

    Args:
        z, t: inputs and targets of one batch, B samples; of a single sample B = 1.
        model, loss, task: as in `calc_img_wise`.
        gpu: GPU id, -1 for the CPU.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> [tuple(each.shape) for each in grad_z(torch.ones(1, 2), torch.tensor([0]), model)]
        [(2, 2)]
    """
    made = Task(model, [0], [0], loss or class_loss, **task)
    with _looked_at(made, Config(gpu=gpu), None) as run:
        return _tensors(run, _gradient(run, (z, t)))


def s_test(
    z_test: Any, t_test: Any, model: nn.Module, z_loader: Any, gpu: int = -1, damp: float = 0.01,
    scale: float | None = 25.0, recursion_depth: int = 5000, *, loss: Loss | None = None,
    config: Given | None = None, **task: Any,
) -> list[Tensor]:  # fmt: skip
    r""":math:`(C + damp\, I)^{-1} \nabla L(z_{test}, t_{test})`, a tensor for each parameter: one recursion."""
    once = {**Config.from_dict(config or {}).to_dict(), "r": 1}
    return calc_s_test_single(
        model, z_test, t_test, z_loader, gpu, damp, scale, recursion_depth, 1, loss=loss, config=once, **task
    )


def calc_s_test_single(
    model: nn.Module, z_test: Any, t_test: Any, train_loader: Any, gpu: int = -1, damp: float = 0.01,
    scale: float | None = 25.0, recursion_depth: int = 5000, r: int = 1, *, loss: Loss | None = None,
    config: Given | None = None, **task: Any,
) -> list[Tensor]:  # fmt: skip
    r""":math:`(C + damp\, I)^{-1} \nabla L(z_{test}, t_{test})`, averaged over at most `r` recursions.

    Args:
        z_test, t_test: a batch of one test sample, or of several, of whose mean loss it is.
        train_loader: the curvature `C` is the mean over its data set.
        config: where further keys of a config come from, `{"solver": "cg"}` say, and those of the arguments that are
            left at their defaults.

    Returns a tensor for each parameter that is looked at, as `grad_z`. It logs a warning if the error is over the
    tolerance. Raises `BadInput` if it is not finite.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(20, 3); y = (x.sum(1) > 0).long()
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y))
        >>> s = calc_s_test_single(torch.nn.Linear(3, 2), x[:1], y[:1], loader, config={"solver": "exact"})
        >>> [tuple(each.shape) for each in s]
        [(2, 3), (2,)]
    """
    asked = Config.beside(config, gpu=gpu, damp=damp, scale=scale, recursion_depth=recursion_depth, r=r)
    return _solved(task_of(model, train_loader, train_loader, loss, **task), (z_test, t_test), asked, train_loader)


def calc_influence_single(
    model: nn.Module, train_loader: Any, test_loader: Any, test_id_num: int, gpu: int = -1,
    recursion_depth: int = 5000, r: int = 1, s_test_vec: Sequence[Tensor] | None = None, time_logging: bool = False,
    *, damp: float = 0.01, scale: float | None = 25.0, loss: Loss | None = None, config: Given | None = None,
    **task: Any,
) -> tuple[list[float], list[int], list[int], int]:  # fmt: skip
    r""":math:`-\frac1n s_{test} \cdot \nabla L(z_i)` for all training samples i, on one test sample.

    `s_test_vec` is taken as the test sample's s_test if given, as `calc_s_test_single` returns it.
    Returns the influences (negative is helpful), the ids of the training samples from the most harmful and from the
    most helpful on, and `test_id_num`.
    """
    started = time.perf_counter()
    asked = Config.beside(config, gpu=gpu, damp=damp, scale=scale, recursion_depth=recursion_depth, r=r)
    made = task_of(model, train_loader, test_loader, loss, **task)
    if isinstance(test_id_num, bool) or not 0 <= test_id_num < len(made.test):
        raise BadInput(f"test_id_num: expected 0 to {len(made.test) - 1}, found {short(test_id_num)}")
    if s_test_vec is None:
        s_test_vec = _solved(made, made.collate([made.test[test_id_num]]), asked, train_loader)
    with _looked_at(made, asked, batch_of(train_loader)) as run:
        row = _influences(run, s_test_vec)
    if time_logging:
        log.info(f"influences on test sample {test_id_num}: {time.perf_counter() - started:.1f} s")
    harmful, helpful = (ends(row, len(row)).ids.tolist() for ends in (rank.harmful, rank.helpful))
    return row.tolist(), harmful, helpful, test_id_num


@contextmanager
def _looked_at(task: Task, config: Config, batch: int | None) -> Iterator[Opened]:
    with looked_at(RunFolder(NOWHERE), task, Options.resolve(config.run_options(batch))) as run:
        yield run


def _gradient(run: Opened, data: Any) -> Tensor:
    """The gradient of a batch's mean loss (or measure), (1, n_params)."""
    data = to_device(data, run.device)
    targets = run.task.targets(data)
    many = bool(targets.dim()) if isinstance(targets, Tensor) else hasattr(targets, "__len__")
    size = len(targets) if many else 0
    if not size:
        raise BadInput("t: expected the targets of a batch, found those of none; a single sample is a batch of one")
    batch = Batch(range(size), data, np.zeros(size, np.uint64), None)
    found = reference_gradient(run.task, run.parameters, batch, measure=True)
    named = dict(run.task.model.named_parameters())
    whole = {name: torch.zeros_like(named[name]) if each is None else each for name, each in found.items()}
    return flatten(run.parameters, whole)[None].detach() / size


def _tensors(run: Opened, vector: Tensor) -> list[Tensor]:
    return [each[0] for each in unflatten(run.parameters, vector).values()]


def _solved(task: Task, data: Any, config: Config, loader: Any) -> list[Tensor]:
    """s_test of the mean loss of a batch."""
    if "fisher" in (config.solver, config.curvature):
        raise BadInput("solver, curvature: expected those that need no stored gradients, found fisher; use calc_s_test")
    options = Options.resolve(config.run_options(batch_of(loader)))
    scale = adjusted(config, RunFolder(NOWHERE), task, options).scale
    options = dataclasses.replace(options, stest=dataclasses.replace(options.stest, scale=scale))
    with looked_at(RunFolder(NOWHERE), task, options) as run:
        rhs = _gradient(run, data)
        found = _solution(run, rhs.to(solve_dtype(run)))
        if not bool(torch.isfinite(found.value).all()):
            raise BadInput("s_test: expected finite numbers, found NaN or Inf; look at the sample, or take more damp")
        if not bool(found.converged.all()):
            log.warning(f"s_test is over the tolerance (residual {float(found.residual):.1e}): {found.reasons[0]}")
        saved_steps(config, found.iterations.numpy())
        return _tensors(run, found.value.to(rhs.dtype))


def _solution(run: Opened, rhs: Tensor) -> Solution:
    if run.options.stest.solver == "identity":
        return Identity().prepare(lambda v: v)(rhs)
    first = probe_batch(run.task, range(min(CHECKED_SAMPLES, len(run.task.train))), run.device)
    forms, _ = decide_forms(run.task, run.parameters, first, "dense", rows_at_once(run))
    spectrum = estimated_spectrum(run, forms, log.warning)[0]
    damping = chosen_damping(run, spectrum)
    hooks: dict[str, Any] = {"tick": run.check, "note": log.warning}
    operator = damped_curvature(run, forms, 1, damping, curvature_samples(run), **hooks)
    few = curvature_samples(run, PRECONDITIONER_SAMPLES)
    solver = make_solver(
        run.options.stest, run.budget, spectrum,
        sampled=lambda: damped_curvature(run, forms, 1, damping, few, **hooks),
    )  # fmt: skip
    solver.check(run.parameters.size)
    return solver.prepare(operator)(rhs)


def _influences(run: Opened, vectors: Sequence[Tensor]) -> NDArray[np.float32]:
    """The influences by a pass over the training set."""
    shapes = [tuple(each.shape) for each in vectors]
    if shapes != list(run.parameters.shapes):
        raise BadInput(
            f"s_test_vec: expected tensors of the parameters' shapes {short(list(run.parameters.shapes))},"
            f" found {short(shapes)}"
        )
    task, n_train = run.task, len(run.task.train)
    first = probe_batch(task, range(min(CHECKED_SAMPLES, n_train)), run.device)
    forms, _ = decide_forms(task, run.parameters, first, "auto", rows_at_once(run))
    size = forms.at_once(min(run.options.resources.batch_size or MOST_AT_ONCE, rows_at_once(run)))
    named = dict(zip(run.parameters.names, vectors, strict=True))
    like = next(task.model.parameters())
    asked = queries(forms, flatten(run.parameters, named)[None].to(like))
    dots = []
    with progress("influence", n_train, show=run.options.resources.progress) as bar:
        for batch in batches(task.train, "train", task.collate, groups_of(0, n_train, size), run.device):
            found = capture(task, forms, batch)
            dots.append(scores(forms, asked, found.factors, found.dense, run.budget // 4)[0].cpu())
            bar.advance(len(batch.indices))
    row: NDArray[np.float32] = influence(torch.cat(dots), n_train).to(torch.float32).numpy()
    return row
