"""Whole calls of stage 2, solver by solver, with the vector-products that they take counted."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from infl_cache import Run, Task
from infl_cache.config import Options
from infl_cache.maths.curvature import Curvature
from infl_cache.maths.solvers import LiSSA, make_solver
from infl_cache.stages.columns import stored_column


@dataclass(frozen=True)
class Choice:
    """A solver with its options, and whether it iterates to the tolerance."""

    key: str
    options: dict[str, Any] = field(default_factory=dict)
    iterates: bool = False

    @property
    def solver(self) -> str:
        """The name that `Run` knows it by."""
        return str(self.options.get("solver", self.key))

    @property
    def known(self) -> bool:
        """Whether it is there: `make_solver` takes every name that it does not know for LiSSA."""
        made = make_solver(Options.resolve({"solver": self.solver}).stest)
        return self.solver == "lissa" or not isinstance(made, LiSSA)


CHOICES = (
    Choice("cg", iterates=True),
    Choice("pcg", {"preconditioner": "nystrom"}, iterates=True),
    Choice("pcg-none", {"solver": "pcg", "preconditioner": "none"}, iterates=True),
    Choice("ekfac"),
    Choice("fisher"),
    Choice("exact"),
    Choice("identity"),
)


@dataclass
class Counts:
    """Products of one vector with the whole training set: those of the system, and those spent on its spectrum."""

    system: float = 0.0
    spectrum: float = 0.0


@contextmanager
def counted(n_train: int) -> Iterator[Counts]:
    """Count what the operators of infl_cache multiply; products over a part of the samples count as that part.

    The spectrum is looked at without damping and weight decay: there alone the shift is zero.
    """
    counts, product = Counts(), Curvature.__call__

    def counting(operator: Curvature, vectors: Tensor) -> Tensor:
        taken = len(vectors) * operator.n_train / n_train
        if operator.shift:
            counts.system += taken
        else:
            counts.spectrum += taken
        return product(operator, vectors)

    Curvature.__call__ = counting  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        Curvature.__call__ = product  # type: ignore[method-assign]


@dataclass(frozen=True)
class Solved:
    """What a whole stage 2 took, the relative residual of each test sample, and how many were called converged."""

    seconds: float
    products: float
    spectrum: float
    residuals: Sequence[float]
    converged: int


def first_tests(task: Task, count: int) -> Task:
    """The task with its first `count` test samples only."""
    return dataclasses.replace(task, test=Subset(task.test, range(count)))


def whole_stage(folder: Path, task: Task, choice: Choice, **options: Any) -> Solved:
    """Stage 2 from the beginning, in a run folder whose stage 1 is done."""
    run = Run(folder, task, progress=False, **{"solver": choice.key, **options, **choice.options})
    with counted(len(task.train)) as counts:
        started = time.perf_counter()
        run.stest(force=True)
        seconds = time.perf_counter() - started
    residuals = stored_column(run.folder, "stest", "residual")
    converged = int(np.sum(stored_column(run.folder, "stest", "converged")))
    return Solved(seconds, counts.system, counts.spectrum, [float(each) for each in residuals], converged)
