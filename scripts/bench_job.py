"""The whole job, from a trained model to rankings, beside other libraries' and one written plainly.

python scripts/bench_job.py --json bench_job.jsonl

The contestants take turns: a round is one turn of each, in a folder of its own, and a ratio is one of two turns of
one round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from head import at_least_one, command_line, publish
from measuring import between, chosen, in_turns, number, peak_memory, say, spread, table
from peer import Peer, why
from peer_influence import DAMPING, DEPTH, SAMPLE_BATCH, SCALE, jobs
from plain_job import plain_job
from plain_scores import elapsed
from torch.utils.data import TensorDataset
from workloads import WORKLOADS, Workload

from infl_cache import Run
from infl_cache.stages.rank import Ranking

SAMPLES, TESTS = {"W1": 2000, "W2": 1000}, 20
QUICK_SAMPLES, QUICK_TESTS, QUICK_FIT, QUICK_DEPTH = {"W1": 64, "W2": 24}, 3, 32, 5
# Samples of a first call.
FEW = 64
PEERS = tuple(peer.key for peer in jobs(DEPTH))
DISTRIBUTIONS = tuple(dict.fromkeys(peer.distribution for peer in jobs(DEPTH)))
PACKAGES = ("torch", "numpy", "zarr", "numcodecs", "infl_cache", *DISTRIBUTIONS)
# The recursion of the others: as many steps as are asked for, none fewer.
RECURSION = {"repeats": 1, "scale": SCALE, "sample_batch": SAMPLE_BATCH, "tolerance": 0.0}
OURS = ("lissa", "fisher", "ekfac", "cg", "pcg")
PLAIN = "plain"


@dataclass(frozen=True)
class Contestant:
    """A job over `samples` training samples of a workload, in an empty folder; a larger one takes in proportion."""

    key: str
    title: str
    samples: int
    job: Callable[[Path], object]


@dataclass(frozen=True)
class Turn:
    """Seconds of a job, and the most memory (MB) above what the process had before."""

    seconds: float
    memory: float


def own_job(workload: Workload, solver: str, depth: int, folder: Path) -> Ranking:
    """A run in a fresh folder: the task opened, gradients, s_test, the matrix and its rankings."""
    options = {"depth": depth, **RECURSION} if solver == "lissa" else {}
    run = Run(folder / "run", workload.task(), solver=solver, damping=DAMPING, progress=False, **options)
    run.all()
    return run.helpful(0, k=10)


def peer_job(peer: Peer, workload: Workload, samples: int, folder: Path) -> object:
    """A peer's job, its folder last."""
    return peer(workload, folder, samples)


def contestants_of(workload: Workload, only: Sequence[str], depth: int) -> tuple[list[Contestant], dict[str, str]]:
    """Who takes part, and why others do not."""
    count, skipped = len(workload.train), {}
    found = [
        Contestant(solver, f"infl_cache, {solver}", count, partial(own_job, workload, solver, depth))
        for solver in OURS
        if solver in only
    ]
    if PLAIN in only:
        job = partial(plain_job, workload, count=count, depth=depth)
        found.append(Contestant(PLAIN, "plain PyTorch, LiSSA, rows in a .npy file", count, job))
    for peer in jobs(depth):
        if peer.key not in only:
            continue
        if not peer.installed:
            skipped[peer.title] = "not installed"
            continue
        samples = min(count, peer.most)
        job = partial(peer_job, peer, workload, samples)
        found.append(Contestant(peer.key, peer.title, samples, job))
    return found, skipped


def turn(contestant: Contestant, folder: Path, failed: dict[str, str]) -> Turn | None:
    """One whole job; None if it failed, now or before."""
    if contestant.key in failed:
        return None
    with tempfile.TemporaryDirectory(dir=folder) as scratch, peak_memory(torch.device("cpu")) as peak:
        before = peak["peak_rss_mb"]
        try:
            seconds = elapsed(lambda: contestant.job(Path(scratch)))
        except Exception as error:
            if contestant.key in OURS:
                raise
            failed[contestant.key] = why(error)
            return None
    return Turn(seconds, peak["peak_rss_mb"] - before)


def warm_up(workload: Workload, settings: argparse.Namespace, folder: Path) -> None:
    """Every job once over a few samples: imports and first calls are not on the clock. Who fails may try again."""
    train = TensorDataset(*(tensor[:FEW] for tensor in workload.train.tensors))
    for each in contestants_of(replace(workload, train=train), settings.only, QUICK_DEPTH)[0]:
        say(f"warming up {each.key}")
        turn(each, folder, {})


def bench(workload: Workload, settings: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All jobs over one workload, in one record: seconds, and for each of ours how many times as long another took."""
    contestants, skipped = contestants_of(workload, settings.only, settings.depth)
    failed: dict[str, str] = {}
    if not settings.quick:
        warm_up(workload, settings, folder)
    turns = in_turns({each.key: partial(turn, each, folder, failed) for each in contestants}, settings.rounds)
    skipped |= {each.title: failed[each.key] for each in contestants if each.key in failed}
    left = [each for each in contestants if each.key not in failed]
    scales = {each.key: len(workload.train) / each.samples for each in left}
    seconds = {key: [each.seconds * scale for each in turns[key]] for key, scale in scales.items()}
    return [{
        "skipped": skipped,
        "contestants": [
            {
                "key": each.key,
                "title": each.title,
                "samples": each.samples,
                "seconds": spread(seconds[each.key]),
                "memory_mb": statistics.median(turn.memory for turn in turns[each.key]),
                "over": {
                    solver: spread([a / b for a, b in zip(seconds[each.key], seconds[solver], strict=True)])
                    for solver in OURS
                    if solver in seconds
                },
            }
            for each in left
        ],
    }]  # fmt: skip


def report(record: dict[str, Any]) -> str:
    """The table of one workload: rows are jobs, columns how many times as long they take as ours."""
    ours = [solver for solver in OURS if any(each["key"] == solver for each in record["contestants"])]
    head = ["job", "seconds (low-high)", *(f"x {solver}" for solver in ours), "samples", "MB"]
    rows = [
        [each["title"], between(each["seconds"]), *(number(each["over"][solver]["median"]) for solver in ours),
         number(each["samples"]), number(each["memory_mb"])]
        for each in record["contestants"]
    ]  # fmt: skip
    title = (
        f"{record['workload']} job: {record['title']}, {record['n_params']:,} parameters, {record['n_train']:,} x"
        f" {record['n_test']} ({record['device_name']}, {record['threads']} threads, {record['rounds']} rounds,"
        " MB is peak memory above what there was)"
    )
    skipped = [f"  {who}: skipped, {why}" for who, why in record["skipped"].items()]
    return "\n".join([title, table(head, rows), *skipped])


def prepared(name: str, settings: argparse.Namespace) -> Workload:
    """A workload with as many samples as were asked for."""
    samples = settings.samples or (QUICK_SAMPLES if settings.quick else SAMPLES)[name]
    tests = settings.tests or (QUICK_TESTS if settings.quick else TESTS)
    return WORKLOADS[name](n_train=samples, n_test=tests, **({"n_fit": QUICK_FIT} if settings.quick else {}))


def asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    keys = [*OURS, PLAIN, *PEERS]
    parser.add_argument("--workloads", default="W1", help="some of W1,W2; W1 by default")
    parser.add_argument("--samples", type=int, help="training samples")
    parser.add_argument("--tests", type=int, help="test samples")
    parser.add_argument("--depth", type=int, help=f"steps of a recursion; {DEPTH} if not given")
    parser.add_argument("--only", default=",".join(keys), help=f"some of {','.join(keys)}; all by default")
    settings = parser.parse_args(arguments)
    settings.workloads = chosen(parser, "workloads", settings.workloads, list(SAMPLES))
    settings.only = chosen(parser, "only", settings.only, keys)
    at_least_one(parser, settings, "rounds", "samples", "tests", "depth")
    settings.depth = settings.depth or (QUICK_DEPTH if settings.quick else DEPTH)
    return settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each workload, print its table, append its figures to the file."""
    settings = asked(arguments)
    for name in settings.workloads:
        say(f"{name}: making the model and its data")
        workload = prepared(name, settings)
        about = {"workload": name, "part": "job", "title": workload.title, "n_params": workload.n_params,
                 "n_train": len(workload.train), "n_test": len(workload.test), "damping": DAMPING,
                 "recursion": {"depth": settings.depth, **RECURSION}}  # fmt: skip
        publish(settings, about, partial(bench, workload, settings), report, PACKAGES)


if __name__ == "__main__":
    main()
