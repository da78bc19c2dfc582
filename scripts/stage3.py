"""Stage 3 of infl_cache as the benchmarks run it: over which workloads, from which stores, in which element type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solving import first_tests
from torch import nn
from workloads import WORKLOADS, Workload, classifier, seeded

from infl_cache import Run

QUICK_FIT = 32


@dataclass(frozen=True)
class Own:
    """Stage 3 over one kind of store: its key, what the table calls it, element type, codec, and of the product."""

    key: str
    title: str
    dtype: str = "float32"
    codec: str = "lz4"
    product: str = "float32"

    @property
    def store(self) -> str:
        """The name of the run folder that holds its store."""
        return f"{self.dtype}-{self.codec}"

    @property
    def options(self) -> dict[str, Any]:
        """What `Run` is given."""
        return {"dtype": self.dtype, "codec": self.codec, "product_dtype": self.product}


# Factors are a hundredth of what plain rows are: how they are packed does not show.
FACTORED = (
    Own("ours", "infl_cache, lz4"),
    Own("ours-product", "infl_cache, lz4, multiplied in bfloat16", product="bfloat16"),
)
OURS = (
    *FACTORED,
    Own("ours-none", "infl_cache, no compression", codec="none"),
    Own("ours-16", "infl_cache, bfloat16, lz4", dtype="bfloat16"),
    Own("ours-16-none", "infl_cache, bfloat16, no compression", dtype="bfloat16", codec="none"),
)


def dense(n_train: int, n_test: int, n_fit: int = 2000) -> Workload:
    """An MLP 256-256-128-10 whose gradients are kept as plain rows of 99,978 numbers."""
    with seeded():
        hidden = [nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()]
        model = nn.Sequential(*hidden, nn.Linear(128, 10))
    sizes = (n_train, n_test, n_fit)
    return classifier("dense", "MLP 256-256-128-10, plain rows", model, (256,), sizes, epochs=4)


MADE: dict[str, Callable[..., Workload]] = {"W1": WORKLOADS["W1"], "W2": WORKLOADS["W2"], "dense": dense}


def prepared(name: str, n_train: int, n_test: int, quick: bool) -> Workload:
    """A workload with its data; a quick one hardly fitted."""
    return MADE[name](n_train=n_train, n_test=n_test, **({"n_fit": QUICK_FIT} if quick else {}))


def about(name: str, part: str) -> dict[str, Any]:
    """What a record says first: the workload, which part of the benchmark, and the model."""
    made = MADE[name](n_train=1, n_test=1, n_fit=0)
    return {"workload": name, "part": part, "title": made.title, "n_params": made.n_params}


def run_of(
    folder: Path, workload: Workload, tests: int, own: Own = OURS[0], n_train: int | None = None, **options: Any
) -> Run:
    """A run over the first `tests` test samples whose s_test are their gradients, and all or `n_train` samples."""
    form = {"form": "dense"} if workload.name == "dense" else {}
    task = first_tests(workload.task(n_train), tests)
    return Run(folder, task, solver="identity", progress=False, **form, **own.options, **options)


def report_head(record: dict[str, Any]) -> str:
    """The line above the table of a part."""
    return (
        f"{record['workload']} {record['part']}: {record['title']}, {record['n_params']:,} parameters"
        f" ({record['device_name']}, {record['threads']} threads, {record['rounds']} rounds)"
    )
