"""Stage 2 beside what else there is: products with the curvature, solvers to one residual, other libraries' solvers.

python scripts/bench_stest.py --workloads W1,W2 --json bench_stest.jsonl

The contestants take turns: a round is one turn of each, and a ratio is one of two turns of one round.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from head import at_least_one, command_line, publish
from measuring import between, chosen, in_turns, number, say, spread, table
from peer import installed, silent, why
from peer_solvers import PEER_SOLVERS, PEER_WAYS, right_hand_sides, solved
from products import TOGETHER, WAYS, Products, TooLarge, Way
from solving import CHOICES, Choice, first_tests, whole_stage
from torch import Tensor
from workloads import WORKLOADS, Workload

from infl_cache import Run

DAMPING, TOLERANCE, TESTS = 0.01, 1e-3, 64
PARTS = ("products", "solvers", "fisher", "peers")
# Training samples of a product, and of a whole stage.
PRODUCT_SAMPLES = {"W1": 2000, "W2": 512, "W3": 128}
STAGE_SAMPLES = {"W1": 2000, "W2": 1000, "W3": 256}
QUICK_SAMPLES, QUICK_TESTS, QUICK_FIT = {"W1": 48, "W2": 16, "W3": 8}, 3, 32
SIZES = {"W1": (64, 128, 256, 512, 1024), "W2": (32, 64, 128, 256), "W3": (8, 16, 32, 64)}
YARDSTICK = "loop"
HESSIAN_PRODUCTS, FISHER_TESTS = 50, 20
PEER_TESTS = 8
PACKAGES = ("torch", "numpy", "infl_cache", "curvlinops-for-pytorch", "pyDVL")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large and how long: training samples of products and of stages, test samples, seconds of a turn."""

    workload: Workload
    samples: int
    stage_samples: int
    tests: int
    seconds: float


def prepared(name: str, quick: bool) -> Scale:
    """A workload with as many samples as the parts need."""
    samples, stage = (QUICK_SAMPLES[name],) * 2 if quick else (PRODUCT_SAMPLES[name], STAGE_SAMPLES[name])
    tests = QUICK_TESTS if quick else TESTS
    fitted = {"n_fit": QUICK_FIT} if quick else {}
    workload = WORKLOADS[name](n_train=max(samples, stage), n_test=tests, **fitted)
    return Scale(workload, samples, stage, tests, 0.02 if quick else 2.0)


def timed(products: Products, vectors: Tensor) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    products(vectors)
    return time.perf_counter() - started


def some_vectors(workload: Workload, count: int) -> Tensor:
    """Random rows (count, n_params), the first ones always the same; they repeat themselves."""
    rows = torch.randn(TOGETHER, workload.n_params, generator=torch.Generator().manual_seed(0))
    return rows[torch.arange(count) % TOGETHER]


def best_size(way: Way, scale: Scale) -> int:
    """The batch size at which a way is fastest, over as many samples as the largest has, until one is much slower."""
    sizes = [size for size in SIZES[scale.workload.name] if size <= scale.samples] or [scale.samples]
    if len(sizes) == 1:
        return sizes[0]
    vectors, seconds = some_vectors(scale.workload, way.together), {}
    for size in sizes:
        products = way.products(scale.workload, sizes[-1], size)
        products(vectors[:1])
        seconds[size] = timed(products, vectors)
        if seconds[size] < scale.seconds / 4:
            seconds[size] = min(seconds[size], timed(products, vectors))
        if seconds[size] > 1.3 * min(seconds.values()):
            break
    return min(seconds, key=seconds.__getitem__)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A way at its best batch size; a turn multiplies `vectors` of them, and `error` is that of its product."""

    way: Way
    size: int
    vectors: int
    products: Products
    error: float | None


def contestant(way: Way, scale: Scale, expected: Tensor | None) -> Contestant:
    """Warmed up; one that takes vectors one by one gets as many as fill the seconds of a turn."""
    size = best_size(way, scale)
    products = way.products(scale.workload, scale.samples, size)
    vectors = some_vectors(scale.workload, way.together)
    found = products(vectors[:1])
    error = None if expected is None or way.kind != "ggn" else float((found - expected).norm() / expected.norm())
    count = way.together
    if count == 1:
        count = max(1, min(TESTS, round(scale.seconds / timed(products, vectors))))
    return Contestant(way, size, count, products, error)


def bench_products(scale: Scale, settings: argparse.Namespace) -> dict[str, Any]:
    """Vectors a second over all samples, and their ratios to a loop of single vectors by double backward."""
    contestants, skipped = [], {}
    expected = None
    for way, module in [*((way, None) for way in WAYS), *PEER_WAYS]:
        if way.key not in settings.only:
            continue
        if module is not None and not installed(module):
            skipped[way.title] = "not installed"
            continue
        say(f"{scale.workload.name}: warming up {way.key}")
        try:
            with silent():
                contestants.append(contestant(way, scale, expected))
        except TooLarge as error:
            skipped[way.title] = str(error)
            continue
        if way.key == YARDSTICK:
            expected = contestants[0].products(some_vectors(scale.workload, 1))
    seconds = in_turns({each.way.key: lambda each=each: timed(each.products, some_vectors(scale.workload, each.vectors))
                        for each in contestants}, settings.rounds)  # fmt: skip
    rates = {each.way.key: [each.vectors / s for s in seconds[each.way.key]] for each in contestants}
    return {
        "samples": scale.samples,
        "skipped": skipped,
        "contestants": [
            {
                "key": each.way.key,
                "title": each.way.title,
                "batch": each.size,
                "together": each.way.together,
                "vectors_per_second": spread(rates[each.way.key]),
                "sample_vectors_per_second": scale.samples * statistics.median(rates[each.way.key]),
                "of_loop": spread([a / b for a, b in zip(rates[each.way.key], rates[YARDSTICK], strict=True)]),
                "error": each.error,
            }
            for each in contestants
        ],
    }


def with_gradients(scale: Scale, tests: int, folder: Path) -> Any:
    """The task of a whole stage, and its stage 1 done in `folder`."""
    task = first_tests(scale.workload.task(scale.stage_samples), tests)
    say(f"{scale.workload.name}: stage 1 of {scale.stage_samples:,} samples")
    Run(folder, task, progress=False).grads()
    return task


def options_of(choice: Choice) -> dict[str, Any]:
    """The options of every whole stage."""
    return {"damping": DAMPING, "curvature": "auto", **({"tolerance": TOLERANCE} if choice.iterates else {})}


def bench_solvers(scale: Scale, settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Whole stages with each solver: seconds, residuals, products of one vector with the whole training set."""
    turns, skipped = {}, {}
    task = with_gradients(scale, scale.tests, folder)
    for choice in CHOICES:
        if choice.key not in settings.only:
            continue
        if not choice.known:
            skipped[choice.key] = "there is no such solver yet"
        elif choice.solver == "exact":
            skipped[choice.key] = f"{scale.workload.n_params:,} parameters are too many"
        else:
            turns[choice.key] = lambda choice=choice: whole_stage(folder, task, choice, **options_of(choice))
    found = in_turns(turns, settings.rounds)
    return {
        "samples": scale.stage_samples,
        "tests": scale.tests,
        "tolerance": TOLERANCE,
        "skipped": skipped,
        "contestants": [
            {
                "key": key,
                "iterates": next(each.iterates for each in CHOICES if each.key == key),
                "seconds": spread([each.seconds for each in stages]),
                "products": stages[-1].products,
                "spectrum_products": stages[-1].spectrum,
                "converged": stages[-1].converged,
                "largest_residual": max(stages[-1].residuals),
                "median_residual": statistics.median(stages[-1].residuals),
            }
            for key, stages in found.items()
        ],
    }


def bench_fisher(scale: Scale, settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A whole stage 2 by `fisher` beside products with the Hessian over all samples, one vector at a time."""
    choice = next(each for each in CHOICES if each.key == "fisher")
    if not choice.known:
        return {"skipped": {"fisher": "there is no such solver yet"}}
    tests = min(FISHER_TESTS, scale.tests)
    task = with_gradients(scale, tests, folder)
    way = next(each for each in WAYS if each.key == "hessian")
    size = best_size(way, scale)
    products, vectors = way.products(scale.workload, scale.stage_samples, size), some_vectors(scale.workload, 1)
    count = 2 if settings.quick else HESSIAN_PRODUCTS
    found = in_turns({
        "fisher": lambda: whole_stage(folder, task, choice, **options_of(choice)).seconds,
        "hessian": lambda: sum(timed(products, vectors) for _ in range(count)),
    }, settings.rounds)  # fmt: skip
    ratios = [a / b for a, b in zip(found["fisher"], found["hessian"], strict=True)]
    return {
        "samples": scale.stage_samples, "tests": tests, "products": count, "batch": size, "skipped": {},
        "seconds": {key: spread(each) for key, each in found.items()}, "fisher_over_products": spread(ratios),
    }  # fmt: skip


def bench_peers(scale: Scale, settings: argparse.Namespace) -> dict[str, Any]:
    """Other libraries' solvers on a few test samples, with the true residual of the system that each solves."""
    skipped, rows = {}, []
    tests = min(PEER_TESTS, scale.tests)
    rhs = right_hand_sides(scale.workload, tests)
    for peer in PEER_SOLVERS:
        if not peer.installed:
            skipped[peer.title] = "not installed"
            continue
        say(f"{scale.workload.name}: {peer.key}")
        try:
            rows.append(solved(peer, scale.workload, scale.stage_samples, rhs, DAMPING, TOLERANCE))
        except Exception as error:
            skipped[peer.title] = why(error)
    return {"samples": scale.stage_samples, "tests": tests, "tolerance": TOLERANCE, "skipped": skipped,
            "contestants": rows}  # fmt: skip


def report(record: dict[str, Any]) -> str:
    """The table of one part of one workload."""
    part, each_of = record["part"], record.get("contestants", [])
    title = f"{record['workload']} {part}: {record['title']}, {record['n_params']:,} parameters"
    if "samples" in record:
        title += f", {record['samples']:,} samples" + (f", {record['tests']} tests" if "tests" in record else "")
    lines = [f"{title} ({record['device_name']}, {record['threads']} threads, {record['rounds']} rounds)"]
    if part == "products" and each_of:
        head = ["products", "sample-vectors/s", "vectors/s", "of the loop (low-high)", "at once", "batch", "error"]
        lines.append(table(head, [
            [each["title"], number(each["sample_vectors_per_second"]), number(each["vectors_per_second"]["median"]),
             between(each["of_loop"]), str(each["together"]), str(each["batch"]),
             "-" if each["error"] is None else f"{each['error']:.0e}"] for each in each_of
        ]))  # fmt: skip
    elif part == "solvers" and each_of:
        head = ["solver", "seconds (low-high)", "vector-products", "of its spectrum", "converged", "largest residual"]
        lines.append(table(head, [
            [each["key"], between(each["seconds"]), number(each["products"]) if each["iterates"] else "-",
             number(each["spectrum_products"]), f"{each['converged']} of {record['tests']}",
             f"{each['largest_residual']:.1e}"] for each in each_of
        ]))  # fmt: skip
    elif part == "peers" and each_of:
        head = ["library", "seconds", "seconds a test sample", "largest residual", "system"]
        lines.append(table(head, [
            [each["title"], number(each["seconds"]), number(each["seconds"] / record["tests"]),
             f"{each['largest_residual']:.1e}" if each["largest_residual"] is not None else "-", each["system"]]
            for each in each_of
        ]))  # fmt: skip
    elif part == "fisher" and "seconds" in record:
        seconds = {key: between(each) for key, each in record["seconds"].items()}
        lines.append(f"  stage 2 by fisher: {seconds['fisher']} s; {record['products']} products with the Hessian:"
                     f" {seconds['hessian']} s; ratio {between(record['fisher_over_products'])}")  # fmt: skip
    return "\n".join([*lines, *(f"  {who}: skipped, {why}" for who, why in record["skipped"].items())])


def asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    keys = [*(way.key for way in WAYS), *(way.key for way, _ in PEER_WAYS), *(choice.key for choice in CHOICES)]
    parser.add_argument("--workloads", default=",".join(STAGE_SAMPLES), help="some of W1,W2,W3; all by default")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}; all by default")
    parser.add_argument("--only", default=",".join(keys), help="contestants; the loop of single products always is one")
    settings = parser.parse_args(arguments)
    settings.workloads = chosen(parser, "workloads", settings.workloads, list(STAGE_SAMPLES))
    settings.parts = chosen(parser, "parts", settings.parts, list(PARTS))
    settings.only = [YARDSTICK, *chosen(parser, "only", settings.only, keys)]
    at_least_one(parser, settings, "rounds")
    return settings


def measured(part: str, scale: Scale, settings: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The one record of a part of a workload."""
    if part == "solvers":
        return [bench_solvers(scale, settings, folder / "run")]
    if part == "fisher":
        return [bench_fisher(scale, settings, folder / "run")]
    return [bench_products(scale, settings) if part == "products" else bench_peers(scale, settings)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each part of each workload, print its table, append its figures to the file."""
    settings = asked(arguments)
    for name in settings.workloads:
        say(f"{name}: making the model and its data")
        scale = prepared(name, settings.quick)
        about = {"workload": name, "title": scale.workload.title, "n_params": scale.workload.n_params,
                 "damping": DAMPING}  # fmt: skip
        for part in settings.parts:
            if part == "fisher" and name != "W1":
                continue
            publish(settings, {**about, "part": part}, partial(measured, part, scale, settings), report, PACKAGES)


if __name__ == "__main__":
    main()
