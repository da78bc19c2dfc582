"""What every stage starts from: the folder, the task on its device, the budget, and the identities of both."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from infl_cache.config import Options
from infl_cache.disk.ledger import array_bytes
from infl_cache.disk.manifest import Identity
from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput
from infl_cache.heap import freed_memory_kept
from infl_cache.interrupt import stop_between_blocks
from infl_cache.maths import measures
from infl_cache.maths.digest import code_digest, digest_of, weights_digest
from infl_cache.maths.frozen import Frozen, frozen
from infl_cache.maths.model import unwrapped
from infl_cache.maths.params import Parameters, select
from infl_cache.maths.probe import check_data
from infl_cache.maths.samples import spread
from infl_cache.maths.task import Task, evaluating
from infl_cache.stages.selection import check_selection, remember_tests

log = logging.getLogger("infl_cache")

DATA_PROBES = 32


@dataclass(frozen=True)
class Opened:
    """A locked run folder and a task that is ready to be computed with; `check()` raises after a signal.

    `most_samples` bounds the batches of stage 2 once memory has run out.
    """

    folder: RunFolder
    task: Task
    options: Options
    parameters: Parameters
    device: torch.device
    budget: int
    check: Callable[[], None]
    task_identity: Identity
    most_samples: int | None = None


@dataclass(frozen=True)
class StageResult:
    """What one call of a stage did: rows in all, rows computed now, bytes on disk, seconds, and remarks.

    `timings` says where the seconds went; those of different threads overlap. `beside` are stages that hang on this
    one and were asked for with it.
    """

    stage: str
    rows: int
    computed: int
    n_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    beside: tuple[StageResult, ...] = ()


@contextmanager
def looked_at(folder: RunFolder, task: Task, options: Options) -> Iterator[Opened]:
    """Put the model on its device in eval mode; nothing is locked, made or written, nothing compared with the task."""
    device = choose_device(options.resources.device)
    task = as_asked(task, options)
    parameters = select(task.model, task.parameters)
    with evaluating(task.model, device):
        budget = memory_budget(options.resources.memory, device)
        yield Opened(folder, task, options, parameters, device, budget, lambda: None, {})


@contextmanager
def opened(folder: RunFolder, task: Task, options: Options) -> Iterator[Opened]:
    """`looked_at`, with the folder locked and signals caught; all of it is undone on leaving."""
    with (
        looked_at(folder, task, options) as run, folder.writing(), stop_between_blocks() as check, freed_memory_kept(),
    ):  # fmt: skip
        remember_tests(folder)
        if not folder.manifest.stages and _is_frozen(run.task):
            log.warning(
                "augmentation is frozen: each sample is drawn once, by a seed made of its number; the results speak of"
                " these draws"
            )
        yield dataclasses.replace(run, check=check, task_identity=task_identity(run.task, run.parameters))


def as_asked(task: Task, options: Options) -> Task:
    """The task with its plain model, its data frozen and the measure chosen where that is asked for.

    Raises `BadInput` for test samples it does not have.
    """
    check_selection(options.selection, len(task.test))
    measure = measures.named(options.selection.measure, task.measure)
    task = frozen(task) if options.data.freeze_augmentation else task
    return dataclasses.replace(task, model=unwrapped(task.model), measure=measure)


def as_stored(folder: RunFolder, task: Task) -> Task:
    """The task with its data as a finished run saw them, for those who only show them."""
    return frozen(task) if (folder.manifest.task or {}).get("frozen") else task


def _is_frozen(task: Task) -> bool:
    return isinstance(task.train, Frozen) or isinstance(task.test, Frozen)


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(
            f"device: expected one that works here, found {name!r} ({str(error).splitlines()[0]})"
        ) from error
    return device


def memory_budget(asked: int | None, device: torch.device) -> int:
    """Bytes a stage plans with: what was asked for, or a quarter of the RAM; at most half of what a GPU has free."""
    budget = asked if asked is not None else psutil.virtual_memory().total // 4
    return min(budget, torch.cuda.mem_get_info(device)[0] // 2) if device.type == "cuda" else budget


def task_identity(task: Task, parameters: Parameters) -> Identity:
    """What every stage's numbers depend on; a change of any field makes the run another run."""
    return {
        "model": digest_of([type(task.model).__qualname__, re.sub(r"0x[0-9a-f]+", "", repr(task.model))]),
        "weights": weights_digest(task.model),
        "n_params": parameters.size,
        "parameters": digest_of([parameters.names, parameters.shapes]),
        "n_train": len(task.train),
        "train": dataset_digest(task.train, "train"),
        "loss": code_digest(task.loss),
        "forward": digest_of([code_digest(each) for each in (task.collate, task.forward, task.targets)]),
        **({"frozen": True} if _is_frozen(task) else {}),
    }


def test_identity(task: Task) -> Identity:
    """What s_test depends on besides: the test samples, what is measured of them, and weight decay."""
    return {
        "n_test": len(task.test),
        "test": dataset_digest(task.test, "test"),
        "measure": measures.name_of(task.measure) or code_digest(task.measure),
        "weight_decay": float(task.weight_decay),
    }


def dataset_digest(dataset: Any, name: str) -> str:
    """A digest over samples spread through the data set, each fetched twice; refuses data that change."""
    return digest_of(check_data(dataset, name, spread(len(dataset), DATA_PROBES)))


def block_digest(digests: NDArray[np.uint64]) -> str:
    """The ledger's digest over the input samples of a block."""
    return digest_of([digests])


def stored_dtype(parameters: Parameters, task: Task, asked: str = "auto") -> str:
    """The stored element type: float64 for float64 parameters, else float32, unless asked otherwise."""
    own = dict(task.model.named_parameters())[parameters.names[0]].dtype
    return asked if asked != "auto" else ("float64" if own == torch.float64 else "float32")


def options_identity(section: Any, **resolved: Any) -> Identity:
    """A section's options as identity fields, with what `auto` resolved to."""
    return {**dataclasses.asdict(section), **resolved}


def summary(
    opened: Opened,
    stage: str,
    rows: int,
    computed: int,
    started: float,
    notes: Sequence[str] = (),
    timings: Mapping[str, float] | None = None,
) -> StageResult:
    """The result of a stage that has just finished."""
    records = opened.folder.records(stage)
    return StageResult(
        stage,
        rows,
        computed,
        array_bytes(records.values()),
        time.perf_counter() - started,
        tuple(notes),
        dict(timings or {}),
    )
