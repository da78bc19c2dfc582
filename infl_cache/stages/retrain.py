"""The measures of retrained models: by the task's own function or by the built-in one, each kept on disk at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from infl_cache.disk.lines import append_line, read_lines
from infl_cache.disk.manifest import fingerprint
from infl_cache.disk.run import RunFolder
from infl_cache.disk.sweep import VALIDATION
from infl_cache.errors import BadInput
from infl_cache.maths.cast import with_model
from infl_cache.maths.convex import ConvexRetraining
from infl_cache.maths.digest import code_digest
from infl_cache.maths.model import unwrapped
from infl_cache.maths.params import Parameters
from infl_cache.maths.probe import activation_bytes, probe_batch
from infl_cache.maths.samples import batches, groups_of
from infl_cache.maths.task import Task, blaming, evaluating, losses_of
from infl_cache.progress import progress
from infl_cache.stages.opening import test_identity

Retraining = Callable[[Tensor], nn.Module]

FILE = f"{VALIDATION}/retrained.jsonl"
MEASURED_AT_ONCE = 256


@dataclass(frozen=True)
class Setting:
    """A finished run, its task, and where and with how much to compute; `check()` raises after a signal."""

    folder: RunFolder
    task: Task
    parameters: Parameters
    device: torch.device
    budget: int
    check: Callable[[], None]

    @property
    def damping(self) -> float:
        """What was added to the curvature's diagonal, if there was one."""
        asked = self.folder.manifest.stages["stest"]["identity"]["damping"]
        return float(self.folder.plan("stest").get("damping", 0.0 if asked == "auto" else asked))

    @property
    def left_out(self) -> list[int]:
        """Training samples that the curvature was made without."""
        return list(self.folder.manifest.stages["stest"]["identity"].get("left_out", []))


class Kept:
    """What finished retrainings gave, in `RUN/validate/retrained.jsonl`, found again by way of retraining and mask.

    With the task's own function the way is its code and the data: another solver or damping uses the same lines.
    """

    def __init__(self, setting: Setting, way: str, force: bool) -> None:
        self.path: Path = setting.folder.path / FILE
        task, known = setting.task, setting.folder.manifest.task or {}
        self._way = {"way": way, **test_identity(task)}
        if way == "task":
            self._way["retrain"] = code_digest(task.retrain)
            self._way |= {name: known[name] for name in ("n_train", "train", "loss", "forward")}
        else:
            self._way |= {**known, "damping": setting.damping, "left_out": setting.left_out}
        self._found: dict[str, dict[int, float]] = {}
        for line in read_lines(self.path) if not force else ():
            values = dict(zip(line["tests"], line["values"], strict=True))
            self._found.setdefault(line["key"], {}).update(values)

    def get(self, keep: Tensor, tests: Sequence[int]) -> list[float] | None:
        """The measures of `tests` after a training on `keep`, if they are all there."""
        values = self._found.get(self._key(keep), {})
        return [values[test] for test in tests] if set(tests) <= values.keys() else None

    def put(self, keep: Tensor, tests: Sequence[int], values: Sequence[float]) -> None:
        """Keep them; on the disk on return."""
        append_line(self.path, {"key": self._key(keep), "tests": list(tests), "values": list(values)})

    def _key(self, keep: Tensor) -> str:
        mask = hashlib.blake2b(np.packbits(keep.numpy()).tobytes(), digest_size=16).hexdigest()
        return fingerprint({**self._way, "keep": mask})


def measures(
    setting: Setting, way: str, tests: Sequence[int], removed: Sequence[NDArray[np.int64]], force: bool, show: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], int, list[str]]:
    """The measures of `tests` with all samples (T,) and without each of `removed` (T, K); retrainings; remarks.

    A signal stops it between two retrainings; the finished ones are found again.
    """
    kept, found, notes, count = Kept(setting, way, force), [], [], 0
    masks = [without(setting, np.array([], np.int64)), *(without(setting, each) for each in removed)]
    done = sum(kept.get(mask, tests) is not None for mask in masks)
    with (
        progress("validate", len(masks), done, "retraining", show) as bar,
        way_of(setting, way, unless=done == len(masks)) as retraining,
    ):
        for mask in masks:
            values = kept.get(mask, tests)
            if values is None:
                values = measured(setting, retraining(mask), tests)
                if not (isinstance(retraining, ConvexRetraining) and retraining.unfinished):
                    kept.put(mask, tests, values)
                count += 1
                bar.advance(1)
            found.append(values)
            setting.check()
        if isinstance(retraining, ConvexRetraining):
            notes = remarks(retraining)
    columns = np.array(found).T
    return columns[:, 0], columns[:, 1:], count, notes


def without(setting: Setting, removed: NDArray[np.int64]) -> Tensor:
    """The bool mask (n_train,) of the samples to keep."""
    keep = torch.ones(len(setting.task.train), dtype=torch.bool)
    keep[setting.left_out] = False
    keep[torch.from_numpy(removed)] = False
    return keep


@contextmanager
def way_of(setting: Setting, way: str, unless: bool) -> Iterator[Retraining]:
    """The function from mask to model; the built-in one is checked to apply, `unless` nothing is left to be done."""
    if way == "task":
        yield lambda keep: by_the_task(setting, keep)
        return
    with evaluating(setting.task.model, setting.device):
        yield built_in(setting, checked=not unless)


def by_the_task(setting: Setting, keep: Tensor) -> nn.Module:
    """The model that the task's own function trains; torch's random numbers begin the same each time."""
    assert setting.task.retrain is not None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices), torch.enable_grad(), blaming("task: retrain"):
        torch.manual_seed(0)
        model = setting.task.retrain(keep.clone())
    if not isinstance(model, nn.Module):
        raise BadInput(f"task: expected retrain to return a torch.nn.Module, found {type(model).__name__}")
    return unwrapped(model)


def built_in(setting: Setting, checked: bool = True) -> ConvexRetraining:
    """Retraining to the minimum in float64; `BadInput` unless the model is convex."""
    task, n_train = setting.task, len(setting.task.train)
    rows: Sequence[int] = range(n_train)
    if setting.left_out:
        rows = sorted(set(rows) - set(setting.left_out))
    kept = 2 * activation_bytes(task, setting.parameters, probe_batch(task, range(min(8, n_train)), setting.device))
    made = ConvexRetraining(
        task, setting.parameters, lambda groups: batches(task.train, "train", task.collate, groups, setting.device),
        rows, max(1, setting.budget // 8 // kept), n_train, setting.damping, setting.budget // 4,
        setting.check,
    )  # fmt: skip
    if checked:
        made.check()
    return made


def measured(setting: Setting, model: nn.Module, tests: Sequence[int]) -> list[float]:
    """The measure of each of `tests` by a model, in the model's own type."""
    found: list[float] = []
    groups: Any = [[tests[place] for place in group] for group in groups_of(0, len(tests), MEASURED_AT_ONCE)]
    with evaluating(model, setting.device), torch.no_grad():
        task = with_model(setting.task, model)
        for batch in batches(task.test, "test", task.collate, groups, setting.device):
            found += losses_of(task, batch, measure=True)[1].tolist()
    return found


def remarks(retraining: ConvexRetraining) -> list[str]:
    """What there is to say about the trained model and the minima found."""
    notes = []
    if (distance := retraining.off_optimum()) > 1:
        notes.append(
            f"the trained model is not at the minimum of its loss: its gradient is {distance:.1f} times what one"
            " training sample has in it; changes are counted from that minimum"
        )
    if retraining.unfinished:
        notes.append(
            f"{len(retraining.unfinished)} retrainings ended with a gradient of up to"
            f" {max(retraining.unfinished):.1e} of the removed samples'; is the loss smooth?"
        )
    return notes
