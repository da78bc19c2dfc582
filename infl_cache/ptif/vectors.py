"""All grad_z and all s_test, into a run folder and from one; a vector is a list of tensors, one a parameter."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from infl_cache.config import Options
from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput
from infl_cache.maths.capture import Forms
from infl_cache.maths.model import unwrapped
from infl_cache.maths.params import Parameters, select, unflatten
from infl_cache.pipeline import Run
from infl_cache.ptif.calculating import Given
from infl_cache.ptif.config import Config
from infl_cache.ptif.loaders import Loss, batch_of, task_of
from infl_cache.ptif.readjust import adjusted

AT_ONCE = 64
Vector = list[Tensor]


class Vectors(Sequence[Vector]):
    """Vectors of a run folder, each read when it is asked for; those of the samples `ids`."""

    def __init__(self, run: Run, stage: str, parameters: Parameters, ids: range) -> None:
        self._read = run.grad_z if stage == "grads" else run.s_test
        self._parameters, self.ids = parameters, ids

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, at: int) -> Vector: ...

    @overload
    def __getitem__(self, at: slice) -> list[Vector]: ...

    def __getitem__(self, at: int | slice) -> Vector | list[Vector]:
        """The vector of the sample `ids[at]`, or those of a slice."""
        rows = self._rows(list(self.ids[at]) if isinstance(at, slice) else [self.ids[at]])
        return rows if isinstance(at, slice) else rows[0]

    def __iter__(self) -> Iterator[Vector]:
        for start in range(0, len(self), AT_ONCE):
            yield from self[start : start + AT_ONCE]

    def _rows(self, ids: list[int]) -> list[Vector]:
        return [_shaped(self._parameters, row) for row in self._read(ids)]


def _shaped(parameters: Parameters, row: NDArray[Any]) -> Vector:
    return list(unflatten(parameters, torch.from_numpy(np.array(row))).values())


def calc_grad_z(
    model: nn.Module, train_loader: Any, save_pth: str | Path | bool = False, gpu: int = -1, start: int = 0, *,
    loss: Loss | None = None, config: Given | None = None, **task: Any,
) -> tuple[Sequence[Vector], str | Path | bool]:  # fmt: skip
    r""":math:`\nabla L(z_i)` of every training sample from `start` on, into the run folder `save_pth` if one is named.

    Without, they are held in memory. Returns the vectors and `save_pth`. It is stage 1 of `infl_cache.Run`: resumable,
    and what `calc_all_grad_then_test` goes on with, given the same `save_pth`.
    """
    asked = Config.beside(config, gpu=gpu)
    made = task_of(model, train_loader, train_loader, loss, **task)
    _check_start(start, len(made.train), "training")
    with _folder(save_pth) as path:
        run = Run(path, made, **asked.run_options(batch_of(train_loader)))
        run.grads()
        found = Vectors(run, "grads", _parameters(made), range(start, len(made.train)))
        return (found if save_pth else list(found)), save_pth


def calc_s_test(
    model: nn.Module, test_loader: Any, train_loader: Any, save: str | Path | bool = False, gpu: int = -1,
    damp: float = 0.01, scale: float | None = 25.0, recursion_depth: int = 5000, r: int = 1, start: int = 0, *,
    loss: Loss | None = None, config: Given | None = None, **task: Any,
) -> tuple[Sequence[Vector], str | Path | bool]:  # fmt: skip
    r""":math:`(C + damp\, I)^{-1} \nabla L(z_j)` of every test sample from `start` on, into the run folder `save`.

    Without one they are held in memory. Returns the vectors and `save`. It is stage 2 of `infl_cache.Run`.
    """
    asked = Config.beside(config, gpu=gpu, damp=damp, scale=scale, recursion_depth=recursion_depth, r=r)
    made = task_of(model, train_loader, test_loader, loss, **task)
    _check_start(start, len(made.test), "test")
    with _folder(save) as path:
        options = {**asked.run_options(batch_of(train_loader)), "test": f"{start}:"}
        options["scale"] = adjusted(asked, RunFolder(path), made, Options.resolve(options)).scale
        run = Run(path, made, **options)
        if "fisher" in (asked.solver, asked.curvature):
            run.grads()
        run.stest()
        found = Vectors(run, "stest", _parameters(made), range(start, len(made.test)))
        return (found if save else list(found)), save


def load_grad_z(grad_z_dir: str | Path = "grad_z", train_dataset_size: int = -1) -> Vectors:
    """The training gradients in a run folder, read as they are asked for: those of `calc_grad_z`, or of any run.

    Raises `BadInput` if `train_dataset_size` is given and another, `IncompleteStore` where rows are missing.
    """
    run = _opened(grad_z_dir, "grads")
    count = int(run.folder.plan("grads")["n_rows"])
    if train_dataset_size not in (-1, count):
        raise BadInput(f"{grad_z_dir}: expected gradients of {train_dataset_size} samples, found {count}")
    return Vectors(run, "grads", Forms.from_json(run.folder.plan("grads")["forms"]).parameters, range(count))


def load_s_test(
    s_test_dir: str | Path = "s_test", s_test_id: int = 0, r_sample_size: int | None = None,
    train_dataset_size: int = -1, *, model: nn.Module | None = None,
) -> tuple[Vector, list[Vector]]:  # fmt: skip
    """The s_test of test sample `s_test_id` in a run folder, and a list of it alone.

    The old package kept each of `r` recursions; here their average is kept, and `r_sample_size` says nothing.
    Where the folder has no training gradients, `model` tells the parameters' shapes.
    """
    run = _opened(s_test_dir, "stest")
    folder = run.folder
    if "grads" in folder.manifest.stages:
        parameters = Forms.from_json(folder.plan("grads")["forms"]).parameters
    elif model is not None:
        parameters = select(unwrapped(model), None)
    else:
        raise BadInput(f"{s_test_dir}: expected the model, for the shapes of its parameters; load_s_test(..., model=)")
    count = (folder.manifest.task or {}).get("n_train")
    if train_dataset_size not in (-1, count):
        raise BadInput(f"{s_test_dir}: expected s_test of {train_dataset_size} training samples, found {count}")
    row = run.s_test(s_test_id)
    if len(row) != parameters.size:
        raise BadInput(f"model: expected one of {len(row)} parameters, found {parameters.size}")
    found = _shaped(parameters, row)
    return found, [found]


def _opened(path: str | Path, stage: str) -> Run:
    run = Run(path)
    if stage not in run.folder.manifest.stages:
        raise BadInput(f"{path}: expected a run folder with {stage}, found none")
    return run


def _parameters(task: Any) -> Parameters:
    return select(unwrapped(task.model), task.parameters)


def _check_start(start: int, count: int, what: str) -> None:
    if isinstance(start, bool) or not 0 <= start < count:
        raise BadInput(f"start: expected the id of a {what} sample, 0 to {count - 1}, found {start}")


@contextmanager
def _folder(named: str | Path | bool) -> Iterator[Path]:
    """The folder that is named, or a temporary one that is gone afterwards."""
    if named is True:
        raise BadInput("save: expected a folder, or False, found True")
    if named:
        yield Path(str(named))
        return
    with tempfile.TemporaryDirectory(prefix="infl_cache-") as temporary:
        yield Path(temporary) / "run"
