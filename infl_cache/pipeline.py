"""`Run`: the three stages and what they leave behind, as one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infl_cache.config import Options, option_fields, read_config_file
from infl_cache.disk.layout import Block, rows_by_block
from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput, IncompleteStore
from infl_cache.maths.capture import Forms, rows_of
from infl_cache.maths.task import Task
from infl_cache.stages import rank
from infl_cache.stages.grads import grads
from infl_cache.stages.influence import influence, stored_gradients
from infl_cache.stages.opening import Opened, StageResult, opened
from infl_cache.stages.status import Status, status
from infl_cache.stages.stest import stest

Stage = Callable[[Opened, bool], StageResult]
STAGES: dict[str, Stage] = {"grads": grads, "stest": stest, "influence": influence}


class Run:
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
        self.path = Path(path)
        self.task = task
        # How the task was named on the command line, kept so that run.yaml runs again.
        self.reference: dict[str, Any] = {"task": None, "task_args": {}}
        self.folder = RunFolder(self.path)
        self.options = Options.resolve({**inherited_options(self.folder), **options})

    def grads(self, force: bool = False) -> StageResult:
        """Stage 1: the gradient of every training sample into `grad_z.zarr`."""
        return self._stage("grads", force)

    def stest(self, force: bool = False) -> StageResult:
        """Stage 2: s_test of every test sample into `s_test.zarr`."""
        return self._stage("stest", force)

    def influence(self, force: bool = False) -> StageResult:
        """Stage 3: `influence.npy` (n_test, n_train) and the rankings."""
        return self._stage("influence", force)

    def all(self, force: bool = False) -> list[StageResult]:
        """The three stages in order."""
        return [self._stage(name, force) for name in STAGES]

    def scores(self) -> NDArray[np.float32]:
        """The influence matrix as a read-only memory map, float32 (n_test, n_train)."""
        file = self.path / "influence.npy"
        if not file.exists():
            raise IncompleteStore(f"{file}: expected a finished matrix, found none; run infl-cache influence first")
        matrix: NDArray[np.float32] = np.load(file, mmap_mode="r", allow_pickle=False)
        return matrix

    def helpful(self, j: int, k: int = 10) -> rank.Ranking:
        """The k training samples that help test sample j most: ids and influences, the most negative first."""
        return rank.helpful(self._row(j), k)

    def harmful(self, j: int, k: int = 10) -> rank.Ranking:
        """The k training samples that harm test sample j most: ids and influences, the most positive first."""
        return rank.harmful(self._row(j), k)

    def grad_z(self, rows: int | slice | Sequence[int]) -> NDArray[np.floating[Any]]:
        """Gradients of the given training samples as plain rows (rows, n_params), rebuilt from factors."""
        forms = Forms.from_json(self.folder.plan("grads")["forms"])
        store = self.folder.store("grads")

        def read(block: Block) -> NDArray[Any]:
            factors, dense = stored_gradients(store, forms, block, torch.device("cpu"))
            rebuilt: NDArray[Any] = rows_of(forms, factors, dense).numpy()
            return rebuilt

        return self._vectors("grads", rows, read)

    def s_test(self, rows: int | slice | Sequence[int]) -> NDArray[np.floating[Any]]:
        """s_test of the given test samples as plain rows (rows, n_params)."""
        store = self.folder.store("stest")
        return self._vectors("stest", rows, lambda block: store.read_block(block, ["s_test"])["s_test"])

    def status(self) -> Status:
        """What is done and what is left; reads only, also while another process is writing."""
        return status(RunFolder(self.path))

    def _stage(self, name: str, force: bool) -> StageResult:
        if self.task is None:
            raise BadInput("task: expected a Task to compute with, found none; Run(path, task)")
        self.folder.configuration = {**self.reference, "run": str(self.path), **self.options.flat()}
        with opened(self.folder, self.task, self.options) as run:
            return STAGES[name](run, force)

    def _row(self, j: int) -> NDArray[np.float32]:
        scores = self.scores()
        if not -len(scores) <= j < len(scores):
            raise BadInput(f"test sample: expected 0 to {len(scores) - 1}, found {j}")
        return np.array(scores[j])

    def _vectors(
        self, stage: str, rows: int | slice | Sequence[int], read: Callable[[Block], NDArray[Any]]
    ) -> NDArray[Any]:
        """Rows of a store in the order asked for; a single index gives one row."""
        n_rows = self.folder.plan(stage)["n_rows"]
        if isinstance(rows, slice):
            wanted = list(range(*rows.indices(n_rows)))
        else:
            wanted = [int(rows)] if isinstance(rows, (int, np.integer)) else [int(row) for row in rows]
        if any(not 0 <= row < n_rows for row in wanted):
            raise BadInput(
                f"{stage}: expected rows from 0 to {n_rows - 1}, found {[r for r in wanted if not 0 <= r < n_rows][:5]}"
            )
        records, every = self.folder.records(stage), self.folder.stage_blocks(stage)
        found: dict[int, NDArray[Any]] = {}
        for index, positions in rows_by_block(wanted, self.folder.plan(stage)["block_rows"]).items():
            if index not in records:
                raise IncompleteStore(
                    f"{self.path}: {stage} rows {every[index].start} to {every[index].stop - 1} are not done"
                )
            self.folder.check_block(records[index])
            for position in positions:
                row = wanted[position]
                found[position] = read(Block(index, row, row + 1))[0]
        together = np.stack([found[position] for position in range(len(wanted))]) if wanted else np.empty((0, 0))
        return together[0] if isinstance(rows, (int, np.integer)) else together


def inherited_options(folder: RunFolder) -> Mapping[str, Any]:
    """The options of `run.yaml` that decide numbers: what was chosen once holds until it is changed on purpose."""
    if not folder.exists or not (folder.path / "run.yaml").exists():
        return {}
    stored = read_config_file(folder.path / "run.yaml")
    numeric = {name for name, section, _ in option_fields() if section != "resources"}
    return {name: value for name, value in stored.items() if name in numeric}
