"""Stage 3 from the disk beside products in memory, a memory map, zarr's slices, other libraries; scaling and memory.

python scripts/bench_influence.py --workloads W1,dense --json bench_influence.jsonl

The contestants take turns: a round is one turn of each, with a hot and with a cold page cache, and a ratio is one of
two turns of one round. The rows of s_test are gradients of test samples: what they solve does not matter here.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import plain_scores
import psutil
import torch
from measuring import (
    between,
    bytes_below,
    chosen,
    circumstances,
    forget,
    in_turns,
    number,
    peak_memory,
    published,
    recall,
    say,
    spread,
    table,
)
from peer_influence import SCORERS
from plain_scores import Rows, elapsed
from solving import first_tests
from torch import nn
from torch.utils.data import TensorDataset
from workloads import WORKLOADS, Workload, classifier, seeded

from infl_cache import Run
from infl_cache.config import option_fields

PARTS = ("scores", "scaling", "memory")
SAMPLES, TESTS = 20_000, "20,256,1000"
QUICK_SAMPLES, QUICK_TESTS, QUICK_FIT = 64, "3", 32
# Samples on which the error is looked at.
CHECKED, CHECKED_TESTS = 64, 8
# Other libraries' scorers take part where there are no more test samples than this.
PEER_TESTS = 20
# Scaling: the smallest stage, and by what n_train and n_test are multiplied.
BASE, QUICK_BASE, FACTORS, QUICK_FACTORS = (4000, 50), (32, 2), (1, 2, 4, 8), (1, 2)
# Memory: the budget, and how many times as large plain rows are, which take about half of that in the store.
BUDGET, QUICK_BUDGET, TIMES, MEMORY_TESTS = 200_000_000, 10_000_000, 20, 256
PACKAGES = ("torch", "numpy", "zarr", "numcodecs", "infl_cache", *(peer.distribution for peer in SCORERS))
KNOWN_OPTIONS = {name for name, _, _ in option_fields()}


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
        product = {"product_dtype": self.product} if "product_dtype" in KNOWN_OPTIONS else {}
        return {"dtype": self.dtype, "codec": self.codec, **product}


OURS = (
    Own("ours", "infl_cache, lz4"),
    Own("ours-none", "infl_cache, no compression", codec="none"),
    Own("ours-product", "infl_cache, lz4, multiplied in bfloat16", product="bfloat16"),
    Own("ours-16", "infl_cache, bfloat16, lz4", dtype="bfloat16"),
    Own("ours-16-none", "infl_cache, bfloat16, no compression", dtype="bfloat16", codec="none"),
)
MM, MAP, SLICES, DECODE = "mm", "memmap", "zarr", "decode"
KEYS = (*(own.key for own in OURS), MM, MAP, SLICES, DECODE, *(peer.key for peer in SCORERS))


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


def run_of(folder: Path, workload: Workload, tests: int, own: Own = OURS[0], **options: Any) -> Run:
    """A run over the first `tests` test samples whose s_test are their gradients."""
    form = {"form": "dense"} if workload.name == "dense" else {}
    task = first_tests(workload.task(), tests)
    return Run(folder, task, solver="identity", progress=False, **form, **own.options, **options)


@dataclass(frozen=True)
class Contestant:
    """Something that makes `pairs` scores a turn from `files`, which are hot or cold; None where nothing is read."""

    key: str
    title: str
    pairs: int
    work: Callable[[], float]
    cache: str | None = None
    files: tuple[Path, ...] = ()
    error: Callable[[], float] | None = None
    decodes: str = ""

    @property
    def name(self) -> str:
        """The key with its cache."""
        return self.key if self.cache is None else f"{self.key} {self.cache}"


@dataclass(frozen=True)
class Turn:
    """Seconds of the work, the most memory (MB) above what there was before, and what the stage says of itself."""

    seconds: float
    memory: float
    error: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


def turn(contestant: Contestant) -> Turn:
    """Bring the page cache into the state that is asked for, then work."""
    if contestant.files:
        (forget if contestant.cache == "cold" else recall)(contestant.files)
    with peak_memory(torch.device("cpu")) as peak:
        before = peak["peak_rss_mb"]
        seconds = contestant.work()
    error = contestant.error() if contestant.error else None
    return Turn(seconds, peak["peak_rss_mb"] - before, error)


@dataclass(frozen=True)
class Setting:
    """A workload whose stores are made, the folder with them, how many test samples, and the plain rows."""

    workload: Workload
    folder: Path
    tests: int
    rows: Rows
    multiply: plain_scores.Multiply
    caches: Sequence[str]

    @property
    def table(self) -> Path:
        """The file of plain float32 rows."""
        return self.folder / "rows.f32"


def own_contestants(setting: Setting, own: Own) -> list[Contestant]:
    """The whole of stage 3, from its call to the finished matrix and rankings."""
    run = run_of(setting.folder / own.store, setting.workload, setting.tests, own)
    first = min(CHECKED, setting.rows.count)
    # Made in float64 from the exact store, so that the error of a narrow one shows.
    gradients, s_test = setting.rows.run.grad_z(slice(0, first)), setting.rows.s_test[:CHECKED_TESTS]
    wanted = s_test.double() @ torch.from_numpy(gradients).double().T / -len(setting.workload.train)

    def error() -> float:
        found = np.load(run.path / "influence.npy", mmap_mode="r")[:CHECKED_TESTS, :first]
        return float((torch.from_numpy(found.copy()) - wanted).norm() / wanted.norm())

    pairs = setting.tests * len(setting.workload.train)
    files = (run.path / "grad_z.zarr", run.path / "s_test.zarr")
    return [
        Contestant(own.key, own.title, pairs, lambda: elapsed(lambda: run.influence(force=True)), cache, files, error,
                   own.store)
        for cache in setting.caches
    ]  # fmt: skip


def plain_contestants(setting: Setting, only: Sequence[str], stores: Sequence[str]) -> list[Contestant]:
    """The product in memory; from a memory map; by zarr's slices; and decoding alone."""
    rows, multiply, found = setting.rows, setting.multiply, []
    some, every = rows.count * setting.tests, len(setting.workload.train) * setting.tests
    found.append(Contestant(MM, "torch.mm in memory", some, lambda: plain_scores.in_memory(rows, multiply)))
    for cache in setting.caches:
        if MAP in only:
            work = partial(plain_scores.from_map, setting.table, rows.s_test, rows.count, multiply)
            found.append(Contestant(MAP, "memory map of float32 rows", some, partial(elapsed, work), cache,
                                    (setting.table,)))  # fmt: skip
        if setting.workload.name != "dense":
            continue
        for store in stores:
            path = setting.folder / store / "grad_z.zarr"
            if SLICES in only:
                work = partial(plain_scores.by_slices, path, rows.s_test, multiply)
                found.append(Contestant(f"{SLICES} {store}", f"zarr's slices, {store}", every, partial(elapsed, work),
                                        cache, (path,)))  # fmt: skip
            work = partial(plain_scores.decoded, path)
            found.append(Contestant(f"{DECODE} {store}", f"decoding alone, {store}", every, partial(elapsed, work),
                                    cache, (path,)))  # fmt: skip
    return found


def peer_contestants(setting: Setting, only: Sequence[str]) -> tuple[list[Contestant], dict[str, str]]:
    """Other libraries' scorers over as many samples as they can bear, prepared; and why others do not take part."""
    found, skipped = [], {}
    tests = TensorDataset(*(tensor[: setting.tests] for tensor in setting.workload.test.tensors))
    workload = replace(setting.workload, test=tests)
    for peer in SCORERS:
        if peer.key not in only:
            continue
        if not peer.installed or setting.tests > PEER_TESTS or workload.name == "dense":
            why = f"only for {PEER_TESTS} test samples or fewer of W1, W2"
            skipped[peer.title] = why if peer.installed else "not installed"
            continue
        say(f"{workload.name}: preparing {peer.key}")
        samples, folder = min(peer.most, len(workload.train)), setting.folder / peer.key
        folder.mkdir(exist_ok=True)
        try:
            score = peer(workload, folder, samples)
            score()
        except Exception as error:
            skipped[peer.title] = f"{type(error).__name__}: {str(error).strip()[:100]}"
            continue
        pairs = samples * setting.tests
        found.append(Contestant(peer.key, peer.title, pairs, partial(elapsed, score)))
    return found, skipped


def ours_of(name: str, only: Sequence[str]) -> tuple[list[Own], dict[str, str]]:
    """Our ways that take part, and why others do not."""
    found, skipped = [], {}
    for own in OURS:
        if own.key not in only or (own.dtype != "float32" and name != "dense"):
            continue
        if own.product != "float32" and "product_dtype" not in KNOWN_OPTIONS:
            skipped[own.title] = "there is no such option yet"
            continue
        found.append(own)
    return found, skipped


def bench_scores(name: str, settings: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Stage 3 and its rivals over one workload, for each number of test samples."""
    say(f"{name}: making the model and its data")
    workload = prepared(name, settings.samples, max(settings.tests), settings.quick)
    ours, skipped = ours_of(name, settings.only)
    stores = {own.store: own for own in (OURS[0], *ours)}
    for store, own in stores.items():
        say(f"{name}: stage 1 of {len(workload.train):,} samples, {store}")
        run_of(folder / store, workload, 1, own).grads()
    rate, records = plain_scores.machine_rate(settings.quick), []
    for tests in settings.tests:
        say(f"{name}: s_test of {tests} test samples")
        for store, own in stores.items():
            run_of(folder / store, workload, tests, own).stest(force=True)
        exact = run_of(folder / OURS[0].store, workload, tests)
        count = max(1, min(len(workload.train), settings.rows_bytes // (4 * workload.n_params)))
        rows = Rows(exact, torch.from_numpy(exact.s_test(slice(0, tests))), count)
        setting = Setting(workload, folder, tests, rows, plain_scores.faster(rows), settings.cache)
        if MAP in settings.only and not setting.table.exists():
            plain_scores.write_map(rows, setting.table)
        peers, absent = peer_contestants(setting, settings.only)
        mine = [each for own in ours for each in own_contestants(setting, own)]
        contestants = [*mine, *plain_contestants(setting, settings.only, list(stores)), *peers]
        turns = in_turns({each.name: partial(turn, each) for each in contestants}, settings.rounds)
        kept = {store: bytes_below(folder / store / "grad_z.zarr") for store in stores}
        records.append({
            "tests": tests, "samples": len(workload.train), "row_samples": count, "machine_gflops": rate,
            "store_bytes": kept, "row_bytes": 4 * workload.n_params * len(workload.train),
            "skipped": skipped | absent,
            "contestants": [figures(each, turns, contestants, setting) for each in contestants],
        })  # fmt: skip
    return records


def figures(
    contestant: Contestant, turns: dict[str, list[Turn]], every: Sequence[Contestant], setting: Setting
) -> dict[str, Any]:
    """What is known of a contestant; ratios are those of one round's turns."""
    pairs = {each.name: each.pairs for each in every}
    rates = {name: [pairs[name] / one.seconds for one in those] for name, those in turns.items()}
    mine, those = rates[contestant.name], turns[contestant.name]
    read = sum(path.stat().st_size if path.is_file() else bytes_below(path) for path in contestant.files)
    known: dict[str, Any] = {
        "key": contestant.key,
        "title": contestant.title,
        "cache": contestant.cache,
        "pairs": contestant.pairs,
        "seconds": spread([one.seconds for one in those]),
        "pairs_per_second": spread(mine),
        # As many as the product with plain rows takes, whatever is really multiplied.
        "gflops": spread([2e-9 * setting.workload.n_params * each for each in mine]),
        "memory_mb": max(one.memory for one in those),
        "of_mm": over(mine, rates[MM]),
    }
    if read:
        known["stored_gb_per_second"] = spread([1e-9 * read / one.seconds for one in those])
    if contestant.error:
        known["error"] = max(one.error for one in those if one.error is not None)
    if (slow := f"{MAP} {contestant.cache}") in rates and contestant.name != slow:
        known["of_memmap"] = over(mine, rates[slow])
    if (halves := f"{DECODE} {contestant.decodes} {contestant.cache}") in rates:
        # Seconds a pair: ours over the sum of both halves, each alone on all cores.
        known["over_halves"] = spread([
            (1 / a) / (1 / b + 1 / c) for a, b, c in zip(mine, rates[halves], rates[MM], strict=True)
        ])  # fmt: skip
    return known


def over(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Ratios round by round."""
    return spread([a / b for a, b in zip(values, others, strict=True)])


def bench_scaling(settings: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Seconds of stage 3 over W1 when n_train or n_test grows, and seconds a pair over those of the smallest."""
    n_train, n_test = QUICK_BASE if settings.quick else BASE
    factors = QUICK_FACTORS if settings.quick else FACTORS
    sizes = list(dict.fromkeys([*((n_train * f, n_test) for f in factors), *((n_train, n_test * f) for f in factors)]))
    workload = prepared("W1", n_train * factors[-1], n_test * factors[-1], settings.quick)
    turns = {}
    for size in sizes:
        say(f"W1: stages 1 and 2 of {size[0]:,} x {size[1]:,}")
        task = first_tests(workload.task(size[0]), size[1])
        run = Run(folder / "x".join(map(str, size)), task, solver="identity", progress=False)
        run.grads()
        run.stest()
        run.influence()
        turns[str(size)] = partial(elapsed, partial(run.influence, force=True))
    found = in_turns(turns, settings.rounds)
    pair = {size: [seconds / (size[0] * size[1]) for seconds in found[str(size)]] for size in sizes}
    return [{
        "n_params": workload.n_params, "skipped": {},
        "sizes": [{"n_train": size[0], "n_test": size[1], "seconds": spread(found[str(size)]),
                   "a_pair_of_smallest": over(pair[size], pair[sizes[0]])} for size in sizes],
    }]  # fmt: skip


def memory_of_stage(folder: Path, workload: Workload, tests: int, budget: int) -> tuple[float, float]:
    """Memory (MB) before stage 3 and its peak within, in this process."""
    run = run_of(folder, workload, tests, memory=budget)
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # the libraries take their own buffers now
    with peak_memory(torch.device("cpu")) as peak:
        before = peak["peak_rss_mb"]
        run.influence(force=True)
    return before, peak["peak_rss_mb"]


def bench_memory(settings: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The most memory of stage 3 above what its process had, over a store of ten times the budget."""
    budget = QUICK_BUDGET if settings.quick else BUDGET
    tests = QUICK_BASE[1] if settings.quick else MEMORY_TESTS
    n_params = dense(1, 1, 0).n_params
    workload = prepared("dense", -(-TIMES * budget // (4 * n_params)), tests, settings.quick)
    say(f"dense: stages 1 and 2 of {len(workload.train):,} x {tests}")
    run = run_of(folder / "run", workload, tests)
    run.grads()
    run.stest()
    found = []
    for done in range(settings.rounds):
        say(f"round {done + 1} of {settings.rounds}: memory")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(memory_of_stage, run.path, workload, tests, budget).result())
    return [{
        "n_params": n_params, "samples": len(workload.train), "tests": tests, "skipped": {}, "budget_mb": budget / 1e6,
        "row_mb": 4e-6 * n_params * len(workload.train), "store_mb": bytes_below(run.path / "grad_z.zarr") / 1e6,
        "before_mb": spread([before for before, _ in found]),
        "above_mb": spread([peak - before for before, peak in found]),
    }]  # fmt: skip


def report(record: dict[str, Any]) -> str:
    """The table of one part."""
    where = f"({record['device_name']}, {record['threads']} threads, {record['rounds']} rounds)"
    made = {"scores": scores_lines, "scaling": scaling_lines, "memory": memory_lines}[record["part"]](record)
    title = f"{record['workload']} {record['part']}: {record['title']}, {record['n_params']:,} parameters"
    skipped = [f"  {who}: skipped, {why}" for who, why in record["skipped"].items()]
    return "\n".join([f"{title} {where}", *made, *skipped])


def scores_lines(record: dict[str, Any]) -> list[str]:
    """A row for each contestant and cache."""
    head = ["contestant", "cache", "pairs/s", "of torch.mm (low-high)", "over decode + mm", "of memmap", "GB/s stored",
            "GFLOP/s", "of machine", "error", "MB"]  # fmt: skip
    rows = []
    for each in record["contestants"]:
        decoding = each["key"].startswith(DECODE)
        rows.append([
            each["title"],
            each["cache"] or "-",
            "-" if decoding else number(each["pairs_per_second"]["median"]),
            "-" if decoding else between(each["of_mm"]),
            between(each["over_halves"]) if "over_halves" in each else "-",
            number(each["of_memmap"]["median"]) if "of_memmap" in each and not decoding else "-",
            number(each["stored_gb_per_second"]["median"]) if "stored_gb_per_second" in each else "-",
            "-" if decoding else number(each["gflops"]["median"]),
            "-" if decoding else number(each["gflops"]["median"] / record["machine_gflops"]),
            f"{each['error']:.0e}" if "error" in each else "-",
            number(each["memory_mb"]),
        ])  # fmt: skip
    sizes = ", ".join(f"{store} {number(1e-6 * size)} MB" for store, size in record["store_bytes"].items())
    return [
        table(head, rows),
        f"  {record['samples']:,} x {record['tests']:,}; plain rows {number(1e-6 * record['row_bytes'])} MB, of which"
        f" {record['row_samples']:,} are multiplied in memory and mapped; {sizes}",
        f"  machine: {number(record['machine_gflops'])} GFLOP/s, the fastest of a few float32 products",
    ]


def scaling_lines(record: dict[str, Any]) -> list[str]:
    """A row for each size."""
    head = ["n_train x n_test", "seconds (low-high)", "a pair, of the smallest's"]
    rows = [[f"{each['n_train']:,} x {each['n_test']:,}", between(each["seconds"]), between(each["a_pair_of_smallest"])]
            for each in record["sizes"]]  # fmt: skip
    return [table(head, rows)]


def memory_lines(record: dict[str, Any]) -> list[str]:
    """Budget, store, and what was taken."""
    return [
        f"  {record['samples']:,} x {record['tests']:,}; plain rows {number(record['row_mb'])} MB, stored in"
        f" {number(record['store_mb'])} MB; --memory {number(record['budget_mb'])} MB",
        f"  before {between(record['before_mb'])} MB, at most {between(record['above_mb'])} MB more:"
        f" {number(record['above_mb']['high'] - record['budget_mb'])} MB above the budget",
    ]


def default_rows_bytes() -> int:
    """20 GB of plain rows, but no more than two fifths of the memory: a memory map is to be hot."""
    return min(20 * 10**9, int(0.4 * psutil.virtual_memory().total))


def asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", default=",".join(MADE), help=f"some of {','.join(MADE)}; all by default")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}; all by default")
    parser.add_argument("--only", default=",".join(KEYS), help=f"some of {','.join(KEYS)}; mm always is one")
    parser.add_argument("--cache", default="hot,cold", help="page cache before each turn: hot, cold or both")
    parser.add_argument("--samples", type=int, help=f"training samples; {SAMPLES:,} if not given")
    parser.add_argument("--tests", help=f"numbers of test samples; {TESTS} if not given")
    parser.add_argument("--rows-bytes", type=int, default=default_rows_bytes(),
                        help="most bytes of plain rows in memory maps and products in memory")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; the figures say little")
    parser.add_argument("--json", type=Path, help="append one JSON object for each table to this file")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the scratch folder is made and deleted")
    settings = parser.parse_args(arguments)
    settings.workloads = chosen(parser, "workloads", settings.workloads, list(MADE))
    settings.parts = chosen(parser, "parts", settings.parts, list(PARTS))
    settings.only = chosen(parser, "only", settings.only, KEYS)
    settings.cache = chosen(parser, "cache", settings.cache, ["hot", "cold"])
    settings.samples = (QUICK_SAMPLES if settings.quick else SAMPLES) if settings.samples is None else settings.samples
    words = (settings.tests or (QUICK_TESTS if settings.quick else TESTS)).split(",")
    settings.tests = [int(word) if word.strip().isdigit() else 0 for word in words]
    for name, least in (("rounds", settings.rounds), ("samples", settings.samples), ("tests", min(settings.tests)),
                        ("rows-bytes", settings.rows_bytes)):  # fmt: skip
        if least < 1:
            parser.error(f"--{name}: expected at least 1")
    return settings


def measured(part: str, name: str, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of one part, in a scratch folder."""
    folder = Path(tempfile.mkdtemp(prefix="bench-influence-", dir=settings.folder.resolve()))
    try:
        if part == "scores":
            return bench_scores(name, settings, folder)
        return bench_scaling(settings, folder) if part == "scaling" else bench_memory(settings, folder)
    finally:
        shutil.rmtree(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each part, print its tables, append its figures to the file."""
    settings = asked(arguments)
    settings.folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", message="There is a performance drop")
    asked_for = [("scores", name) for name in settings.workloads if "scores" in settings.parts]
    asked_for += [(part, name) for part, name in (("scaling", "W1"), ("memory", "dense")) if part in settings.parts]
    for part, name in asked_for:
        title = MADE[name](n_train=1, n_test=1, n_fit=0)
        for found in measured(part, name, settings):
            about = {"workload": name, "part": part, "title": title.title, "n_params": title.n_params}
            record = {**about, **found, "rounds": settings.rounds, "quick": settings.quick, **circumstances(PACKAGES)}
            published(record, report(record), settings.json)


if __name__ == "__main__":
    main()
