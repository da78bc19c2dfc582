"""Whether the influences are true: retraining without chosen samples, beside what a finished run predicts of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from infl_cache.config import Options, only_options_of, option, short
from infl_cache.disk.durable import make_folders, write_atomically
from infl_cache.disk.matrix import MatrixFile
from infl_cache.disk.run import RunFolder
from infl_cache.disk.sweep import VALIDATION
from infl_cache.errors import BadInput
from infl_cache.interrupt import stop_between_blocks
from infl_cache.maths.params import select
from infl_cache.maths.task import Task
from infl_cache.stages.columns import stored_column
from infl_cache.stages.figures.canvas import picture
from infl_cache.stages.figures.scatter import draw_scatter
from infl_cache.stages.opening import as_asked, choose_device, log, memory_budget
from infl_cache.stages.rankings import require_matrix
from infl_cache.stages.removals import Ids, complements, groups, single_points
from infl_cache.stages.retrain import Setting, measures
from infl_cache.stages.same import check_same_identity, check_same_task
from infl_cache.stages.tiles import FINAL, require_sound_matrix
from infl_cache.stages.validation import Validation, figures_of

WORST, MOST_TESTS = 3, 1000
POINTS = {"loo": 40, "group": 20}


@dataclass(frozen=True)
class ValidateOptions:
    """What is removed, which test samples are looked at, and who retrains."""

    kind: Literal["loo", "group", "lds"] = option(
        "loo", "loo: single training samples; group: groups of them; lds: the score over random subsets"
    )
    test: str | None = option(
        None, "test samples by number (0,5,7 or, for one, 5,), or how many of those of largest loss; 3, for lds all"
    )
    points: int | None = option(None, "training samples (loo, 40) or groups (group, 20) to retrain without", 3)
    group_size: int | None = option(None, "training samples in a group; a twentieth of all if not given", 1)
    subsets: int = option(50, "lds: random subsets to train on", 3)
    fraction: float = option(0.5, "lds: part of the training set that a subset keeps", 0.01, 0.99)
    seed: int = option(0, "seed of what is chosen at random", 0)
    retrain: Literal["auto", "task", "lbfgs"] = option(
        "auto", "by the task's own retrain, or built in, for convex models; auto: the task's if it has one"
    )
    force: bool = option(False, "retrain anew what was kept")

    @classmethod
    def resolve(cls, given: Mapping[str, Any]) -> ValidateOptions:
        """Options from a mapping, `test` as text, a number or a list; `BadInput` for a wrong one."""
        test = given.get("test")
        if isinstance(test, (list, tuple, range, np.ndarray)):
            test = ",".join(str(each) for each in test) + ","
        return only_options_of(cls, {**given, "test": test if test is None else str(test)})


def validate(folder: RunFolder, task: Task, options: Options, asked: ValidateOptions) -> Validation:
    """Retrain, compare, and write `RUN/validate/<kind>.json` and `.png`.

    Raises `IncompleteStore` for a run without a finished matrix, `ForeignRun` for another task than the run's, and
    `BadInput` where there is no way to retrain.
    """
    require_matrix(folder, "of what is predicted")
    require_sound_matrix(folder)
    task = as_asked(task, options)
    parameters = select(task.model, task.parameters)
    check_same_identity(folder, task, parameters)
    check_same_task(folder, task)
    way = way_asked(task, asked.retrain)
    device = choose_device(options.resources.device)
    budget = memory_budget(options.resources.memory, device)
    losses = stored_column(folder, "stest", "loss")
    matrix = MatrixFile(folder.path / FINAL)
    try:
        tests, removed = chosen(matrix, losses, asked)
        with folder.writing(), stop_between_blocks() as check:
            setting = Setting(folder, task, parameters, device, budget, check)
            before, after, retrained, notes = measures(
                setting, way, tests, removed, asked.force, options.resources.progress
            )
            predicted = np.array([predictions(matrix, test, removed) for test in tests])
            actual = after - before[:, None]
            notes += own_remarks(folder, setting, way, tests, before, actual)
            figures, by_test, error = figures_of(asked.kind, predicted, actual, asked.seed)
            found = Validation(
                asked.kind, way, "loss" if task.measure is None else "measure", tuple(tests),
                tuple(losses[tests].tolist()), tuple(removed), matrix.shape[1], predicted, actual, figures, by_test,
                error, tuple(notes), retrained,
            )  # fmt: skip
            for note in notes:
                log.warning(note)
            return written(folder, found, asked)
    finally:
        matrix.close()


def way_asked(task: Task, asked: str) -> Literal["task", "lbfgs"]:
    """Who retrains; `BadInput` if the task is asked to and cannot."""
    if asked == "task" and task.retrain is None:
        raise BadInput("retrain: expected the task to have a retrain= function (keep -> model), found none")
    return "task" if task.retrain is not None and asked != "lbfgs" else "lbfgs"


def chosen(matrix: MatrixFile, losses: NDArray[np.float64], asked: ValidateOptions) -> tuple[list[int], list[Ids]]:
    """The test samples, and what is removed for them."""
    tests = test_samples(matrix, losses, asked)
    rows = [matrix.read(test, test + 1)[0].astype(np.float64) for test in tests[: asked.points or max(POINTS.values())]]
    usable = np.flatnonzero(np.isfinite(rows[0]))
    n = len(usable)
    size = asked.group_size or max(1, n // 20)
    points = asked.points or min(POINTS.get(asked.kind, 0), n)
    if asked.kind == "loo" and points > n:
        raise BadInput(f"points: expected at most the {n} training samples, found {points}")
    if asked.kind == "group" and size > n // 2:
        raise BadInput(f"group-size: expected at most half of the {n} training samples, found {size}")
    if asked.kind == "lds" and not 0 < round(asked.fraction * n) < n:
        raise BadInput(
            f"fraction: expected some of {n} training samples to be kept and some not, found {asked.fraction}"
        )
    if asked.kind == "loo":
        return tests, single_points(rows, usable, points, asked.seed)
    if asked.kind == "group":
        return tests, groups(rows, usable, points, size, asked.seed)
    return tests, complements(usable, asked.subsets, asked.fraction, asked.seed)


def test_samples(matrix: MatrixFile, losses: NDArray[np.float64], asked: ValidateOptions) -> list[int]:
    """Those named, or so many of largest loss; rows of the matrix that are not finite are no good."""
    n_test, text = matrix.shape[0], asked.test
    try:
        named = [int(each) for each in (text or "").split(",") if each.strip()]
    except ValueError:
        named = [-1]
    if text is not None and (not named or min(named) < 0 or len(set(named)) < len(named)):
        raise BadInput(f"test: expected a number of test samples, or their numbers as in 0,5,7, found {short(text)}")
    if text is not None and "," in text:
        if max(named) >= n_test:
            raise BadInput(f"test: expected numbers from 0 to {n_test - 1}, found {max(named)}")
        bad = [test for test in named if not np.isfinite(matrix.read(test, test + 1)).any()]
        if bad:
            raise BadInput(f"test: expected test samples with influences, found none for {bad[0]}")
        return named
    count = named[0] if named else (min(MOST_TESTS, n_test) if asked.kind == "lds" else min(WORST, n_test))
    if not 1 <= count <= n_test:
        raise BadInput(f"test: expected 1 to {n_test} test samples, found {count}")
    worst = np.argsort(-np.nan_to_num(losses), kind="stable")
    finite = (int(test) for test in worst if np.isfinite(matrix.read(int(test), int(test) + 1)).any())
    return [test for test, _ in zip(finite, range(count), strict=False)]


def predictions(matrix: MatrixFile, test: int, removed: Sequence[Ids]) -> NDArray[np.float64]:
    """Minus the sum of the influences of each of `removed` on one test sample."""
    row = matrix.read(test, test + 1)[0].astype(np.float64)
    return np.array([-row[each].sum() for each in removed])


def own_remarks(
    folder: RunFolder, setting: Setting, way: str, tests: list[int], before: NDArray[np.float64],
    actual: NDArray[np.float64],
) -> list[str]:  # fmt: skip
    """What there is to say about a task's own retraining: whether it gives back the trained model, and the damping."""
    notes = []
    if way == "task":
        off = float(np.nanmedian(np.abs(before - stored_column(folder, "stest", "measure")[tests])))
        usual = float(np.nanmedian(np.abs(actual)))
        if off > usual:
            notes.append(
                f"retrain on all samples does not give back the trained model: it moves a test sample by {off:.1e},"
                f" removing samples by {usual:.1e} (medians)"
            )
        if setting.damping > 0:
            notes.append(
                f"the run's damping of {setting.damping:g} weakens what is predicted, and the task's retrain knows"
                " nothing of it: expect a slope above 1"
            )
    if not np.isfinite(actual).all():
        notes.append(f"{int((~np.isfinite(actual)).sum())} changes are not finite and left out of the figures")
    return notes


def written(folder: RunFolder, found: Validation, asked: ValidateOptions) -> Validation:
    """The same with its picture, after both files are on the disk."""
    path: Path = folder.path / VALIDATION / f"{asked.kind}.json"
    make_folders(path.parent)
    facts = {"influence": folder.fingerprint("influence"), "options": dataclasses.asdict(asked)}
    write_atomically(path, found.to_json(**facts))
    return dataclasses.replace(found, picture=picture(path.with_suffix(".png"), lambda: draw_scatter(found)))
