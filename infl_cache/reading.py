"""What a run says once stage 3 is done: the matrix, or, where it is not kept, the rankings made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Subset

from infl_cache.config import short
from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput, IncompleteStore
from infl_cache.maths.task import Task
from infl_cache.stages import chosen, rank
from infl_cache.stages.blocks import some
from infl_cache.stages.export import named_arrays
from infl_cache.stages.layers import (
    BY_LAYER,
    LayerShares,
    layer_names,
    require_layers,
    require_sound_layers,
    stored_shares,
)
from infl_cache.stages.rankings import (
    RANKINGS,
    Arrays,
    has_matrix,
    require_matrix,
    stored_ranking,
    stored_rankings,
)
from infl_cache.stages.same import check_same_task
from infl_cache.stages.selection import as_text, count_of_tests, held_tests
from infl_cache.stages.tiles import FINAL, matrix_tests, require_sound_matrix, sign_of

if TYPE_CHECKING:
    from infl_cache.stages.export.named import Dataset

Changed = tuple[int, int]


class Influences:
    """The influences of the run in folder `path`, read; with a task, only if it is the run's."""

    def __init__(self, path: str | Path, task: Task | None = None) -> None:
        self.path = Path(path)
        self.task = task
        self.folder = RunFolder(self.path)
        # The matrix file when its checksums were last compared: its size and time of change; the others likewise.
        self._sound: Changed | None = None
        self._sound_layers: Changed | None = None
        self._ranked: tuple[Changed, Arrays] | None = None

    def scores(self) -> NDArray[np.float32]:
        """The influence matrix as a read-only memory map, float32 (n_test, n_train): row j is of test sample j.

        Rows of test samples that the run was not asked about are NaN.
        Its checksums are compared the first time, and again when the file has changed.
        Raises `IncompleteStore` in a run that was made with `matrix=False`: it keeps the rankings alone.
        """
        self.folder = RunFolder(self.path)
        require_matrix(self.folder, "to be read")
        file = self.path / FINAL
        if not file.exists():
            raise IncompleteStore(f"{file}: expected a finished matrix, found none; run infl-cache influence first")
        self.folder.require_complete("influence")
        now = _changed(file)
        if self._sound != now:
            require_sound_matrix(self.folder)
            if self.task is not None:
                check_same_task(self.folder, self.task)
            self._sound = now
        matrix: NDArray[np.float32] = np.load(file, mmap_mode="r", allow_pickle=False)
        return matrix

    def by_layer(self) -> dict[str, NDArray[np.float32]]:
        """What each layer gives to the influences: by its name a read-only memory map, float32 (n_test, n_train).

        A layer is a module with parameters of its own, by its name in the model (the model itself is ""); a weight
        that modules share is the first one's. Their sum is `scores()`; rows that nobody asked for are NaN.
        Raises `IncompleteStore` unless stage 3 was run with `by_layer=True`.
        """
        self.folder = RunFolder(self.path)
        file = self.path / BY_LAYER
        now = _changed(file) if file.exists() else (0, 0)
        if self._sound_layers != now:
            require_sound_layers(self.folder)
            if self.task is not None:
                check_same_task(self.folder, self.task)
            self._sound_layers = now
        require_layers(self.folder)
        matrices: NDArray[np.float32] = np.load(file, mmap_mode="r", allow_pickle=False)
        return dict(zip(layer_names(self.folder), matrices, strict=True))

    def layer_shares(self) -> LayerShares:
        """Which layers carry the effect: names, parameters, `share` (n_layers, n_test), `share_of_all` (n_layers,).

        Raises `IncompleteStore` unless stage 3 was run with `by_layer=True`.
        """
        self.folder = RunFolder(self.path)
        require_layers(self.folder)
        return stored_shares(self.folder)

    @property
    def tests(self) -> NDArray[np.int64]:
        """The test samples that the run was asked about, done or not, in the order of the rows of `s_test.zarr`."""
        self.folder = RunFolder(self.path)
        return held_tests(self.folder)

    def helpful(self, j: int, k: int = 10) -> rank.Ranking:
        """The k training samples that help test sample j most: ids and influences, the most negative first.

        With the measures `margin` and `logit`, which are better when higher, the most positive first.
        In a run without a matrix k is at most `top_k`, that of the run (`BadInput`).
        """
        return self._of_test("helpful", j, k)

    def harmful(self, j: int, k: int = 10) -> rank.Ranking:
        """The k training samples that harm test sample j most: ids and influences, the other end of `helpful`."""
        return self._of_test("harmful", j, k)

    def helps(self, i: int, k: int = 10) -> rank.Ranking:
        """The k test samples that training sample i helps most: their ids and its influences on them.

        In a run without a matrix k is at most `top_k_train` (`BadInput`).
        """
        return self._of_train("helpful", i, k)

    def harms(self, i: int, k: int = 10) -> rank.Ranking:
        """The k test samples that training sample i harms most: their ids and its influences on them."""
        return self._of_train("harmful", i, k)

    def helpful_to_class(self, label: int, k: int = 10) -> rank.Ranking:
        """The k training samples that help the test samples of a class most: ids, and influences averaged over it.

        Of the test samples that the run was asked about; k is at most `top_k` (`BadInput`).
        """
        return self._of_class("helpful", label, k)

    def harmful_to_class(self, label: int, k: int = 10) -> rank.Ranking:
        """The k training samples that harm the test samples of a class most: the other end of `helpful_to_class`."""
        return self._of_class("harmful", label, k)

    def helpful_to_all(self, k: int = 10) -> rank.Ranking:
        """The k training samples that help most on average: ids, and influences averaged over the test samples."""
        return self._of_all("helpful", k)

    def harmful_to_all(self, k: int = 10) -> rank.Ranking:
        """The k training samples that harm most on average, the suspects: the other end of `helpful_to_all`."""
        return self._of_all("harmful", k)

    def most_influential(
        self, k: int = 10, effect: str = "harmful", test: int | Sequence[int] | None = None, label: int | None = None
    ) -> rank.Ranking:
        """The k training samples that help or harm most, or all that do: ids and influences, the strongest first.

        `effect` is "helpful", "harmful" or "both" (the largest influences of either sign). They are averaged over all
        test samples, over those of `test` (one, or several: that needs the matrix), or over the class `label`.
        `BadInput` for both of these, and for k above the length of stored rankings where these are what is asked.
        """
        if effect not in chosen.EFFECTS:
            raise BadInput(f"effect: expected one of {', '.join(chosen.EFFECTS)}, found {short(effect)}")
        if test is not None and label is not None:
            raise BadInput(f"test, label: expected one of them, found both ({short(test)}, {short(label)})")
        if effect == "both":
            return chosen.of_both(k, *(self.most_influential(k, end, test, label) for end in rank.ENDS))
        if isinstance(test, (int, np.integer)):
            found = self._of_test(effect, int(test), k)
        elif test is not None:
            found = self._of_tests(effect, test, k)
        else:
            found = self._of_all(effect, k) if label is None else self._of_class(effect, label, k)
        return rank.only(found, effect, sign_of(self.folder))

    def subset_of(self, ids: Sequence[int] | NDArray[np.int64] | rank.Ranking) -> Subset[Any]:
        """These training samples as a data set, to train on: sample n of it is `task.train[ids[n]]`."""
        return chosen.subset(self._train, chosen.checked_ids(ids, len(self._train)))

    def subset_without(self, ids: Sequence[int] | NDArray[np.int64] | rank.Ranking) -> Subset[Any]:
        """All training samples but these as a data set, in their order: what to retrain on without the harmful ones.

        Example:
            >>> import tempfile, torch
            >>> from infl_cache import Run
            >>> data = [(torch.tensor([float(i)]), i) for i in range(4)]
            >>> task = Task(model=torch.nn.Linear(1, 1), train=data, test=data, loss=torch.nn.MSELoss(reduction="none"))
            >>> run = Run(tempfile.mkdtemp() + "/run", task)
            >>> [label for _, label in run.subset_without([0, 2])]  # or of run.most_influential(50, "harmful")
            [1, 3]
        """
        n_train = len(self._train)
        return chosen.subset(self._train, chosen.others(chosen.checked_ids(ids, n_train), n_train))

    def to_xarray(self) -> Dataset:
        """The matrix and what is known of each sample as an `xarray.Dataset` with the dimensions `test` and `train`.

        `influence` is the memory map of `scores()`: only what is looked at is read. Beside it are the test samples'
        losses, predictions and residuals, the training samples' losses, labels as coordinates, the self-influence and
        the layers' shares where they are there; `attrs` say what the numbers mean. Needs xarray (`BadInput`).
        """
        scores = self.scores()
        return named_arrays(self.folder, scores)

    @property
    def _train(self) -> Any:
        if self.task is None:
            raise BadInput("task: expected a Task whose training set to take from, found none; Run(path, task)")
        return self.task.train

    def _of_tests(self, end: str, tests: Sequence[int], k: int) -> rank.Ranking:
        self.folder = RunFolder(self.path)
        require_matrix(self.folder, "to average over chosen test samples")
        self.scores()
        wanted = np.asarray(tests)
        if wanted.ndim != 1 or not wanted.size or wanted.dtype.kind not in "iu":
            raise BadInput(f"test: expected a test sample, or a list of them, found {short(tests)}")
        for j in wanted.tolist():
            _check("test sample", j, count_of_tests(self.folder), k)
        if missing := sorted(set(wanted.tolist()) - set((asked := matrix_tests(self.folder)).tolist())):
            raise self._not_asked(missing, asked)
        return rank.ENDS[end](chosen.mean_over(self.folder, wanted), k, sign_of(self.folder))

    def _of_test(self, end: str, j: int, k: int) -> rank.Ranking:
        self.folder = RunFolder(self.path)
        kept = None if has_matrix(self.folder) else self._rankings()
        scores = self.scores() if kept is None else None
        _check("test sample", j, count_of_tests(self.folder), k)
        if j not in (asked := matrix_tests(self.folder)):
            raise self._not_asked([j], asked)
        if scores is not None:
            return rank.ENDS[end](np.array(scores[j]), k, sign_of(self.folder))
        assert kept is not None
        return stored_ranking(kept, end, j, k, self._n_train)

    def _of_train(self, end: str, i: int, k: int) -> rank.Ranking:
        self.folder = RunFolder(self.path)
        kept = None if has_matrix(self.folder) else self._rankings()
        scores = self.scores() if kept is None else None
        _check("training sample", i, self._n_train, k)
        if scores is not None:
            asked = matrix_tests(self.folder)
            found = rank.ENDS[end](np.array(scores[asked, i]), k, sign_of(self.folder))
            return rank.Ranking(asked[found.ids], found.values)
        assert kept is not None
        return stored_ranking(kept, f"train_{end}", i, k, len(matrix_tests(self.folder)))

    def _of_class(self, end: str, label: int, k: int) -> rank.Ranking:
        kept = self._rankings()
        labels: list[int] = kept["class_labels"].tolist() if "class_labels" in kept else [label]
        if label not in labels:
            found = ", ".join(map(str, labels)) if len(labels) <= 20 else f"one of {len(labels)} labels"
            raise BadInput(
                f"class: expected {found or 'a run with classes, whose test samples have integer labels'}, found"
                f" {short(label)}"
            )
        _check("class", 0, 1, k)
        return stored_ranking(kept, f"class_{end}", labels.index(label), k, self._n_train)

    def _of_all(self, end: str, k: int) -> rank.Ranking:
        mean = self._rankings()["mean"]
        _check("mean", 0, 1, k)
        return rank.ENDS[end](mean, k, sign_of(self.folder))

    @property
    def _n_train(self) -> int:
        return int(self.folder.plan("grads")["n_rows"])

    def _rankings(self) -> Arrays:
        """The arrays of the rankings file, compared with its record the first time and when it has changed."""
        self.folder = RunFolder(self.path)
        file = self.path / RANKINGS
        now = _changed(file) if file.exists() else (0, 0)
        if self._ranked is None or self._ranked[0] != now:
            self._ranked = now, stored_rankings(self.folder)
            if self.task is not None:
                check_same_task(self.folder, self.task)
        return self._ranked[1]

    def _not_asked(self, missing: list[int], asked: NDArray[np.int64]) -> IncompleteStore:
        held = as_text(asked, count_of_tests(self.folder))
        return IncompleteStore(
            f"{self.path}: expected test samples that it was asked about ({short(held)}), found {some(missing)};"
            f" run infl-cache stest and influence with --test {as_text(missing, 0)[:60]}"
        )


def _changed(file: Path) -> Changed:
    return file.stat().st_size, file.stat().st_mtime_ns


def _check(name: str, index: int, count: int, k: int) -> None:
    if not 0 <= index < count:
        raise BadInput(f"{name}: expected 0 to {count - 1}, found {index}")
    if k < 1:
        raise BadInput(f"k: expected at least 1, found {k}")
