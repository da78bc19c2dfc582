"""Who makes scores in turns: stage 3 from the disk, plain means, and other libraries' scorers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import plain_scores
import torch
from measuring import forget, peak_memory, recall, say
from peer import why
from peer_influence import SCORERS
from plain_scores import elapsed, fitting
from stage3 import Own, run_of
from torch import Tensor
from torch.utils.data import TensorDataset
from workloads import Workload

from infl_cache import Run

MM, MAP, SLICES, DECODE, MULTIPLY = "mm", "memmap", "zarr", "decode", "multiply"
# Samples on which the error is looked at.
CHECKED, CHECKED_TESTS = 64, 8
# Other libraries' scorers take part where there are no more test samples than this.
PEER_TESTS = 20
# A product in memory is repeated for about so long: more would change nothing.
MEMORY_SECONDS = 3.0


@dataclass(frozen=True)
class Contestant:
    """Something that scores `samples` samples a turn, from `files`, hot or cold; no cache where nothing is read.

    `halves` are the names of the contestants that do alone, one after the other, what it does in one.
    """

    key: str
    title: str
    samples: int
    work: Callable[[], float]
    cache: str | None = None
    files: tuple[Path, ...] = ()
    error: Callable[[], float] | None = None
    halves: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The key with its cache."""
        return self.key if self.cache is None else f"{self.key} {self.cache}"


@dataclass(frozen=True)
class Turn:
    """Seconds of the work, the most memory (MB) above what there was before, and the error of what was made."""

    seconds: float
    memory: float
    error: float | None = None


@dataclass(frozen=True)
class Setting:
    """A workload whose stores are made, the folder with them, the test samples, plain rows, and what takes part."""

    workload: Workload
    folder: Path
    exact: Run
    s_test: Tensor
    rows: Tensor
    mapped: int
    caches: Sequence[str]
    only: Sequence[str]
    seconds: float

    @property
    def tests(self) -> int:
        """How many test samples."""
        return len(self.s_test)

    @property
    def table(self) -> Path:
        """The file of plain float32 rows."""
        return table_of(self.folder)


def table_of(folder: Path) -> Path:
    """Where plain rows lie beside the stores."""
    return folder / "rows.f32"


def turn(contestant: Contestant) -> Turn:
    """Bring the page cache into the state that is asked for, then work."""
    settle(contestant.files, contestant.cache)
    with peak_memory(torch.device("cpu")) as peak:
        before = peak["peak_rss_mb"]
        seconds = contestant.work()
    error = contestant.error() if contestant.error else None
    return Turn(seconds, peak["peak_rss_mb"] - before, error)


def settle(files: Sequence[Path], cache: str | None) -> None:
    """All of the files in the page cache, or none of them."""
    if files:
        (forget if cache == "cold" else recall)(files)


def own_contestants(setting: Setting, own: Own) -> list[Contestant]:
    """The whole of stage 3, from its call to the finished matrix and rankings, over all samples."""
    run, count = run_of(setting.folder / own.store, setting.workload, setting.tests, own), len(setting.workload.train)
    first = min(CHECKED, count)
    # Made in float64 from the exact store, so that the error of a narrow one shows.
    gradients = torch.from_numpy(setting.exact.grad_z(slice(0, first))).double()
    wanted = setting.s_test[:CHECKED_TESTS].double() @ gradients.T / -count

    def error() -> float:
        found = np.load(run.path / "influence.npy", mmap_mode="r")[:CHECKED_TESTS, :first]
        return float((torch.from_numpy(found.copy()) - wanted).norm() / wanted.norm())

    files = (run.path / "grad_z.zarr", run.path / "s_test.zarr")
    return [
        Contestant(own.key, own.title, count, lambda: elapsed(lambda: run.influence(force=True)), cache, files, error,
                   (f"{DECODE} {own.store} {cache}", f"{MULTIPLY} {own.product}"))
        for cache in setting.caches
    ]  # fmt: skip


def in_memory(setting: Setting, key: str, title: str, ways: Sequence[plain_scores.Multiply], dtype: str) -> Contestant:
    """The product alone, of rows that are in memory, the fastest way of some, for a few seconds."""
    kind = getattr(torch, dtype)
    s_test, rows = setting.s_test.to(kind), setting.rows.to(kind)
    work = partial(plain_scores.in_memory, rows, s_test, plain_scores.faster(ways, s_test, rows))
    samples = fitting(work, len(setting.workload.train), min(MEMORY_SECONDS, setting.seconds))
    return Contestant(key, title, samples, partial(work, samples))


def reading(
    setting: Setting, key: str, title: str, work: Callable[[int], object], file: Path, most: int
) -> list[Contestant]:
    """A way that reads a file or a store, with each cache, over as many samples as a turn has time for."""
    found = []
    for cache in setting.caches:

        def first(samples: int, cache: str = cache) -> float:
            settle((file,), cache)
            return elapsed(lambda: work(samples))

        samples = fitting(first, most, setting.seconds)
        found.append(Contestant(key, title, samples, partial(elapsed, partial(work, samples)), cache, (file,)))
    return found


def plain_contestants(setting: Setting, ours: Sequence[Own]) -> list[Contestant]:
    """The product in memory; from a memory map; by zarr's slices; and, for plain rows, both halves of stage 3."""
    count, s_test = len(setting.workload.train), setting.s_test
    multiply = plain_scores.faster(plain_scores.OF_TORCH, s_test, setting.rows)
    found = [in_memory(setting, MM, "torch.mm in memory", (multiply,), "float32")]
    if MAP in setting.only:
        work = partial(plain_scores.from_map, setting.table, s_test, multiply)
        found += reading(setting, MAP, "memory map of float32 rows", work, setting.table, setting.mapped)
    if setting.workload.name != "dense":
        return found
    if SLICES in setting.only:
        path = setting.exact.path / "grad_z.zarr"
        work = partial(plain_scores.by_slices, path, s_test, multiply)
        found += reading(setting, SLICES, f"zarr's slices, {setting.exact.path.name}", work, path, count)
    if DECODE in setting.only:
        for store in dict.fromkeys(own.store for own in ours):
            path = setting.folder / store / "grad_z.zarr"
            work = partial(elapsed, partial(plain_scores.decoded, path))
            found += [Contestant(f"{DECODE} {store}", f"decoding alone, {store}", count, work, cache, (path,))
                      for cache in setting.caches]  # fmt: skip
        for dtype in dict.fromkeys(own.product for own in ours):
            title = f"multiplying alone, {dtype}"
            found.append(in_memory(setting, f"{MULTIPLY} {dtype}", title, plain_scores.ANY, dtype))
    return found


def peer_contestants(setting: Setting) -> tuple[list[Contestant], dict[str, str]]:
    """Other libraries' scorers over as many samples as they can bear, prepared; and why others do not take part."""
    found, skipped = [], {}
    tests = TensorDataset(*(tensor[: setting.tests] for tensor in setting.workload.test.tensors))
    workload = replace(setting.workload, test=tests)
    for peer in SCORERS:
        if peer.key not in setting.only:
            continue
        if not peer.installed or setting.tests > PEER_TESTS or workload.name == "dense":
            reason = f"only for {PEER_TESTS} test samples or fewer of W1, W2"
            skipped[peer.title] = reason if peer.installed else "not installed"
            continue
        say(f"{workload.name}: preparing {peer.key}")
        samples, folder = min(peer.most, len(workload.train)), setting.folder / peer.key
        folder.mkdir(exist_ok=True)
        try:
            score = peer(workload, folder, samples)
            score()
        except Exception as error:
            skipped[peer.title] = why(error)
            continue
        found.append(Contestant(peer.key, peer.title, samples, partial(elapsed, score)))
    return found, skipped
