"""`Run`: the three stages and what they leave behind, as one object."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infl_cache.config import Options, option_fields, read_config_file, short
from infl_cache.disk.layout import Block, rows_by_block
from infl_cache.disk.run import Force, RunFolder
from infl_cache.errors import BadInput, IncompleteStore
from infl_cache.maths.capture import Forms, rows_of
from infl_cache.maths.narrow import NARROW
from infl_cache.maths.task import Task
from infl_cache.reading import Influences
from infl_cache.stages import rank
from infl_cache.stages.by_layer import by_layer
from infl_cache.stages.grads import grads
from infl_cache.stages.influence import influence
from infl_cache.stages.opening import Opened, StageResult, opened
from infl_cache.stages.page.choosing import PageOptions
from infl_cache.stages.page.reported import reported
from infl_cache.stages.page.writing import PAGE
from infl_cache.stages.plan import Plan, asked_of, plan
from infl_cache.stages.repair import repaired
from infl_cache.stages.selection import count_of_tests, held_tests
from infl_cache.stages.self_influence import begun_with, self_influence
from infl_cache.stages.status import Status, status
from infl_cache.stages.stest import stest
from infl_cache.stages.stored import stored_gradients
from infl_cache.stages.suspects import column, descending
from infl_cache.stages.validate import ValidateOptions, validate
from infl_cache.stages.validation import Validation
from infl_cache.stages.verify import Verdict, verify

Stage = Callable[[Opened, Force], StageResult]
STAGES: dict[str, Stage] = {"grads": grads, "stest": stest, "influence": influence}


class Run(Influences):
    r"""Influence functions of a task, cached in a folder and carried on from whatever is there.

    `influence[j, i] = -(1/n_train) s_test[j] . grad_z[i]` with `s_test[j] = (C + damping I)^-1 grad measure(z_j)`
    (Koh & Liang 2017, Eq. 2, over n). **Negative is helpful**; removing sample i changes the loss of test sample j
    by about `-influence[j, i]`.

    Args:
        path: the run folder; made if missing.
        task: what is computed; may be left out to read a finished run.
        options: any option of the command line by its name (`damping=0.1, solver="exact", memory="4GB"`).
            Options that decide numbers and are not given are taken from the folder's `run.yaml` if there is one.

    Each stage does what is missing and returns; `force=True` starts that stage (and what hangs on it) over.
    Errors are `infl_cache.errors`: another task or other options than the folder's raise `ForeignRun`.

    Example:
        >>> import tempfile, torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(20, 3); y = (x.sum(1) > 0).long()
        >>> data = torch.utils.data.TensorDataset(x, y)
        >>> loss = torch.nn.CrossEntropyLoss(reduction="none")
        >>> task = Task(model=torch.nn.Linear(3, 2), train=data, test=data, loss=loss)
        >>> run = Run(tempfile.mkdtemp() + "/run", task, damping=0.1, solver="exact")
        >>> [result.stage for result in run.all()]
        ['grads', 'stest', 'influence']
        >>> run.scores().shape
        (20, 20)
        >>> bool(run.helpful(0, k=1).values[0] < 0)
        True
    """

    def __init__(self, path: str | Path, task: Task | None = None, **options: Any) -> None:
        super().__init__(path, task)
        # How the task was named on the command line, kept so that run.yaml runs again.
        self.reference: dict[str, Any] = {"task": None, "task_args": {}}
        self._given = options
        self.options = Options.resolve({**inherited_options(self.folder, options), **options})

    def grads(self, force: bool = False) -> StageResult:
        """Stage 1: the gradient of every training sample into `grad_z.zarr`."""
        return self._stage("grads", force)

    def stest(self, force: bool = False) -> StageResult:
        """Stage 2: s_test of the test samples that are asked for into `s_test.zarr`."""
        return self._stage("stest", force)

    def influence(self, force: bool = False) -> StageResult:
        """Stage 3: the rankings and, unless `matrix=False`, `influence.npy` (n_test, n_train).

        With the option `by_layer=True` also `influence_by_layer.npy` (n_layers, n_test, n_train): see `by_layer`.
        """
        return self._stage("influence", force)

    def self_influence(self, force: bool = False) -> StageResult:
        """`grad_i . (C + damping I)^-1 grad_i` of every training sample, of stage 1 alone, into `self_influence.zarr`.

        Options of the system that are not given are those that it was begun with, else the run's.
        """
        return self._stage("self_influence", force)

    def suspects(self, k: int = 10) -> rank.Ranking:
        """The k training samples of largest self-influence, ids and values: probably mislabelled, or atypical."""
        if k < 1:
            raise BadInput(f"k: expected at least 1, found {k}")
        values = column(RunFolder(self.path), "self_influence")
        ids = descending(values)[:k]
        return rank.Ranking(ids, values[ids].astype(np.float32))

    def all(self, force: bool = False) -> list[StageResult]:
        """The three stages in order; with `force`, all of them from the beginning."""
        return [self._stage(name, "all" if force and name == "grads" else False) for name in STAGES]

    def plan(self, **asked: Any) -> Plan:
        """What each stage would write, hold and take, from a few timed samples and a trial block; nothing is kept.

        `n_train=10**9`, `n_test`, `disk="7GB/s"`, `free="2TB"` plan for what is not here, `device="h100"` for a machine
        of a table. `str` of the plan is its text; its `require_room()` raises `DiskFull` where the disk is too small.
        """
        if self.task is None:
            raise BadInput("task: expected a Task to plan for, found none; Run(path, task)")
        own, machine, others = asked_of(asked)
        options = Options.resolve({**self.options.flat(), **others}) if others else self.options
        return plan(self.folder, self.task, options, own, machine)

    def grad_z(self, rows: int | slice | Sequence[int]) -> NDArray[np.floating[Any]]:
        """Gradients of the given training samples as plain rows (rows, n_params), rebuilt from factors."""
        self.folder = RunFolder(self.path)
        forms = Forms.from_json(self.folder.plan("grads")["forms"])
        identity = self.folder.manifest.stages["grads"]["identity"]
        if not identity.get("cache", True):
            raise IncompleteStore(f"{self.path}: expected stored gradients, found a run that was made with --no-cache")
        store = self.folder.store("grads")
        kind = identity["dtype"] if identity["dtype"] not in NARROW else self.folder.plan("grads")["parameters_dtype"]
        wide = torch.float64 if kind == "float64" else torch.float32

        def read(block: Block) -> NDArray[Any]:
            factors, dense = stored_gradients(store, forms, block, torch.device("cpu"), wide)
            rebuilt: NDArray[Any] = rows_of(forms, factors, dense).numpy()
            return rebuilt

        wanted = row_numbers(rows, self.folder.plan("grads")["n_rows"], "grads")
        return self._vectors("grads", wanted, read, isinstance(rows, (int, np.integer)))

    def s_test(self, rows: int | slice | Sequence[int]) -> NDArray[np.floating[Any]]:
        """s_test of the given test samples as plain rows (rows, n_params)."""
        self.folder = RunFolder(self.path)
        store, samples = self.folder.store("stest"), self.folder.samples("stest")
        wanted = row_numbers(rows, count_of_tests(self.folder), "stest")
        place = {int(sample): row for row, sample in enumerate(samples) if sample >= 0}
        if missing := [test for test in wanted if test not in place]:
            raise self._not_asked(missing, held_tests(self.folder))
        return self._vectors(
            "stest",
            [place[test] for test in wanted],
            lambda block: store.read_block(block, ["s_test"])["s_test"],
            isinstance(rows, (int, np.integer)),
        )

    def status(self) -> Status:
        """What is done and what is left; reads only, also while another process is writing."""
        return status(RunFolder(self.path))

    def verify(self, sample: float | None = None, repair: bool = False) -> Verdict:
        """Compare the folder with its ledger: its `faults` are none if everything is as it was committed.

        With `sample`, 0.05 say, the contents of that part of the files, drawn anew each time, else of all of them.
        With `repair` the blocks that are damaged are made again first, by `task` and the run's own options.
        """
        show = self.options.resources.progress
        if not repair:
            return verify(RunFolder(self.path), sample, show)
        if self.task is None:
            raise BadInput("task: expected a Task to repair with, found none; Run(path, task)")
        folder, kept = RunFolder(self.path), self.path / "run.yaml"
        own = {**self.reference, "run": str(self.path), **self.options.flat()}
        folder.configuration = read_config_file(kept) if kept.exists() else own
        return repaired(folder, self.task, self.options, sample)

    def validate(self, **options: Any) -> Validation:
        """Retrain without chosen training samples, beside what this finished run predicts of it.

        Options as on the command line: `kind="loo"|"group"|"lds"`, `test=[0, 5]` or a number, `points`,
        `group_size`, `subsets`, `fraction`, `seed`, `retrain="auto"|"task"|"lbfgs"`, `force`.
        """
        asked = ValidateOptions.resolve(options)
        if self.task is None:
            raise BadInput("task: expected a Task to retrain, found none; Run(path, task)")
        return validate(RunFolder(self.path), self.task, self.options, asked)

    def report(self, **options: Any) -> Path:
        """Write `report/index.html`, one file that any browser opens, and return its path.

        Options as on the command line: `tests=[0, 5]`, `most_tests=200`, `neighbours=8`. Samples are shown by the
        task's `render`, or as they look; without a task they are left out.
        """
        asked = PageOptions.resolve(options)
        note = "" if self.task is not None else "No samples are shown: Run(path, task).report() shows them."
        reported(RunFolder(self.path), self.task, asked, note, self.options.resources.progress)
        return self.path / PAGE

    def _stage(self, name: str, force: Force) -> StageResult:
        if self.task is None:
            raise BadInput("task: expected a Task to compute with, found none; Run(path, task)")
        stage = {**STAGES, "self_influence": self_influence}[name]
        options = begun_with(self.folder, self.options, self._given) if name == "self_influence" else self.options
        self.folder.configuration = {**self.reference, "run": str(self.path), **options.flat()}
        with opened(self.folder, self.task, options) as run:
            result = stage(run, force)
            if name == "influence" and options.influence.by_layer:
                return dataclasses.replace(result, beside=(by_layer(run),))
            return result

    def _vectors(
        self, stage: str, wanted: list[int], read: Callable[[Block], NDArray[Any]], single: bool
    ) -> NDArray[Any]:
        """Rows of a store in the order asked for; a single one as a vector."""
        records, every = self.folder.records(stage), self.folder.stage_blocks(stage)
        together: NDArray[Any] | None = None
        for index, positions in rows_by_block(wanted, self.folder.plan(stage)["block_rows"]).items():
            block = every[index]
            if index not in records:
                raise IncompleteStore(f"{self.path}: {stage} rows {block.start} to {block.stop - 1} are not done")
            self.folder.check_block(records[index])
            asked = np.array([wanted[position] for position in positions])
            values = read(Block(index, int(asked.min()), int(asked.max()) + 1))[asked - asked.min()]
            if together is None:
                together = np.empty((len(wanted), values.shape[1]), values.dtype)
            together[positions] = values
        if together is None:
            return np.empty((0, int((self.folder.manifest.task or {}).get("n_params", 0))))
        return together[0] if single else together


def row_numbers(rows: int | slice | Sequence[int], n_rows: int, stage: str) -> list[int]:
    """The rows asked for, as integers; `BadInput` if there is no such row."""
    if isinstance(rows, slice):
        return list(range(*rows.indices(n_rows)))
    asked = np.atleast_1d(np.asarray(rows))
    if asked.size and (asked.dtype.kind not in "iu" or asked.ndim != 1 or asked.min() < 0 or asked.max() >= n_rows):
        raise BadInput(f"{stage}: expected row numbers from 0 to {n_rows - 1}, found {short(rows)}")
    return [int(row) for row in asked]


def inherited_options(folder: RunFolder, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of `run.yaml` that decide numbers: what was chosen once holds until it is changed on purpose.

    Options of one solver are not handed to another, nor one choice of test samples to another.
    """
    if not folder.exists or not (folder.path / "run.yaml").exists():
        return {}
    stored = read_config_file(folder.path / "run.yaml")
    numeric = {name for name, section, _ in option_fields() if section != "resources"}
    if given.get("solver") not in (None, stored.get("solver")):
        numeric -= {"tolerance", "max_iterations", "scale", "depth", "repeats", "sample_batch", "solve_dtype"}
    if given.get("test") is not None or given.get("test_per_class") is not None or given.get("test_start"):
        numeric -= {"test", "test_per_class", "test_start"}
    return {name: value for name, value in stored.items() if name in numeric}
