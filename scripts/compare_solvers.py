"""What each solver's influences are worth: beside the exact matrix, and beside retraining.

python scripts/compare_solvers.py --data FOLDER --json compare_solvers.jsonl

On the demo's digits, and with a small CNN on 2,000 training and 64 test images of MNIST (*-images-idx3-ubyte.gz) or
CIFAR-10 (cifar10_jpeg.npz, or cifar-10-batches-py) in FOLDER. Prints Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits import digits
from head import command_line
from measuring import chosen, device_name, number, say, versions
from numpy.typing import NDArray
from pictures import NoPictures, pictures
from solving import CHOICES, Choice, first_tests

from infl_cache import Run, Task
from infl_cache.maths.correlation import spearman
from infl_cache.maths.params import select
from infl_cache.maths.solvers.exact import MAX_PARAMETERS
from infl_cache.stages.columns import stored_column
from infl_cache.stages.validation import Validation, figures_of

PACKAGES = ("torch", "numpy", "infl_cache")
SOLVERS = ("cg", "pcg", "lissa", "ekfac", "fisher", "identity")
# What the others are compared with where there are too many parameters for a dense matrix.
CONVERGED: dict[str, Any] = {"solver": "pcg", "preconditioner": "nystrom", "solve_dtype": "float64", "tolerance": 1e-6}
TASKS = ("digits", "MNIST", "CIFAR-10")
N_TRAIN, N_TEST, QUICK_TRAIN = 2000, 64, 200

Matrix = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Test samples, training samples left out one at a time, and subsets retrained on."""

    tests: int
    points: int
    subsets: int


def choices() -> list[Choice]:
    """The solvers that are compared, those of the benchmark among them as they are there."""
    known = {each.key: each for each in CHOICES}
    return [known.get(key, Choice(key)) for key in SOLVERS]


def compare(name: str, task: Task, settings: argparse.Namespace, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Everything about one task: a row for the reference, which is retrained against, and one for each solver."""
    say(f"{name}: stage 1")
    base = folder / "base"
    Run(base, task, progress=False).grads()
    n_params = select(task.model, task.parameters).size
    reference = Choice("exact") if n_params <= MAX_PARAMETERS else Choice("converged", CONVERGED)
    others = [choice for choice in choices() if choice.key in settings.only]
    rows: list[dict[str, Any]] = []
    exact, found = np.zeros(0), []
    for choice in [reference, *(choice for choice in others if choice.known)]:
        say(f"{name}: {choice.key}")
        path = folder / choice.key
        shutil.copytree(base, path)
        run = Run(path, task, progress=False, **{"solver": choice.key, "damping": settings.damping, **choice.options})
        seconds = run.stest().seconds
        run.influence()
        matrix = np.array(run.scores(), np.float64)
        if choice is reference:
            exact, found = matrix, retrained(name, run, sizes)
        residual = float(stored_column(run.folder, "stest", "residual").max())
        rows.append({"key": choice.key, "seconds": seconds, "largest_residual": residual,
                     **agreement(exact, matrix), **predictive(matrix, found)})  # fmt: skip
    return {"name": name, "n_params": n_params, "n_train": len(task.train), "n_test": len(task.test), "rows": rows,
            "skipped": {each.key: "there is no such solver yet" for each in others if not each.known},
            "damping": settings.damping, **dataclasses.asdict(sizes)}  # fmt: skip


def agreement(exact: Matrix, matrix: Matrix) -> dict[str, float]:
    """Spearman of each test sample's row to the exact one, the median and the lowest; the matrix's relative error."""
    of_rows = [spearman(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(exact, matrix, strict=True)]
    off = float(np.linalg.norm(matrix - exact) / np.linalg.norm(exact))
    return {"spearman_median": float(np.median(of_rows)), "spearman_lowest": min(of_rows), "relative_error": off}


def retrained(name: str, run: Run, sizes: Sizes) -> list[Validation]:
    """What retraining without single samples, and on random subsets, does: the same for every solver.

    The single samples are the most helpful and harmful ones by the reference's influences, and some at random.
    """
    say(f"{name}: {sizes.points} and {sizes.subsets} retrainings")
    return [run.validate(kind="loo", points=sizes.points), run.validate(kind="lds", subsets=sizes.subsets)]


def predictive(matrix: Matrix, found: Sequence[Validation]) -> dict[str, float]:
    """How well a solver's influences predict what retraining has done."""
    figures = {}
    for each in found:
        predicted = np.array([[-matrix[test, ids].sum() for ids in each.removed] for test in each.tests])
        figures[each.kind], _, error = figures_of(each.kind, predicted, each.actual, seed=0)
    return {"loo_pearson": figures["loo"].pearson, "loo_slope": figures["loo"].slope,
            "lds": figures["lds"].spearman, "lds_error": error}  # fmt: skip


def report(record: dict[str, Any]) -> str:
    """A Markdown table of one task."""
    head = ["solver", "stage 2, s", "largest residual", "Spearman to exact, median", "lowest", "leave-one-out, Pearson",
            "LDS"]  # fmt: skip
    lines = [
        f"{record['name']}: {record['n_params']:,} parameters, {record['n_train']:,} training and {record['n_test']}"
        f" test samples, damping {record['damping']:g}, {record['points']} samples left out one at a time,"
        f" {record['subsets']} subsets",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for row in record["rows"]:
        cells = [row["key"], number(row["seconds"]), f"{row['largest_residual']:.0e}", f"{row['spearman_median']:.4f}",
                 f"{row['spearman_lowest']:.4f}", f"{row['loo_pearson']:.3f}",
                 f"{row['lds']:.3f} ± {row['lds_error']:.3f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"\n{who}: skipped, {why}" for who, why in record["skipped"].items())])


def made(name: str, settings: argparse.Namespace) -> Task:
    """A task by its name; `NoPictures` for one whose images are not there."""
    if name == "digits":
        return digits()
    if settings.data is None:
        raise NoPictures("--data names no folder")
    return pictures(name, settings.data, QUICK_TRAIN if settings.quick else N_TRAIN, N_TEST)


def asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, rounds=None)
    parser.add_argument("--tasks", default="digits,MNIST", help=f"some of {','.join(TASKS)}; digits,MNIST by default")
    parser.add_argument("--data", type=Path, help="the folder of MNIST or CIFAR-10")
    parser.add_argument("--only", default=",".join(SOLVERS), help="solvers; the exact one always is compared with")
    parser.add_argument("--damping", type=float, default=0.01)
    settings = parser.parse_args(arguments)
    settings.tasks = chosen(parser, "tasks", settings.tasks, list(TASKS))
    settings.only = chosen(parser, "only", settings.only, list(SOLVERS))
    if not settings.damping > 0:
        parser.error("--damping: expected more than 0")
    return settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the solvers on each task, print its table, append its figures to the file."""
    settings = asked(arguments)
    settings.folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("infl_cache").setLevel(logging.ERROR)
    sizes = Sizes(4, 4, 3) if settings.quick else Sizes(N_TEST, 30, 20)
    for name in settings.tasks:
        try:
            task = first_tests(made(name, settings), sizes.tests)
        except NoPictures as error:
            print(f"{name}: skipped, {error}\n", flush=True)
            continue
        with tempfile.TemporaryDirectory(prefix="compare-solvers-", dir=settings.folder.resolve()) as folder:
            record = compare(name, task, settings, Path(folder), sizes)
        print(report(record), end="\n\n", flush=True)
        if settings.json:
            about = {"quick": settings.quick, "threads": torch.get_num_threads(), "versions": versions(PACKAGES),
                     "device_name": device_name(torch.device("cpu")),
                     "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}  # fmt: skip
            with settings.json.open("a") as file:
                file.write(json.dumps({**record, **about}) + "\n")


if __name__ == "__main__":
    main()
