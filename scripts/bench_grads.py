"""Stage 1 beside what else there is: plain forward+backward, vmap, a loop, and other libraries' caches of gradients.

python scripts/bench_grads.py --workloads W1,W3 --json bench_grads.jsonl

The contestants of a workload take turns: a round is one turn of each, and a ratio is one of two turns of one round.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from head import at_least_one, command_line, publish
from measuring import bytes_below, chosen, device_name, number, peak_memory, say, spread, sync_below, table
from peer import Peer, why
from peer_caches import PEERS
from torch import Tensor
from workloads import WORKLOADS, Data, Workload

OWN = ("plain", "ours", "vmap", "loop")
PACKAGES = ("torch", "numpy", "zarr", "numcodecs", "infl_cache", *dict.fromkeys(peer.distribution for peer in PEERS))
QUICK_SAMPLES = {"W1": 1000, "W2": 128, "W3": 16, "W4": 4, "W5": 16}
QUICK_FIT = 32
BATCHES = {"cpu": (16, 32, 64, 128, 256, 512), "cuda": (64, 128, 256, 512, 1024, 2048, 4096)}
CHUNKS = {"cpu": (8, 16, 32), "cuda": (8, 16, 32, 64, 128)}
PEER_BATCHES = {"W1": 16, "W2": 32, "W3": 16}
MOST_PEER_SAMPLES, MOST_PEER_BYTES = 512, 2**29
# No batch size is tried whose batch would take longer than this.
LONGEST_BATCH = 4.0
MOST_NOTES = 4

Step = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True)
class Setting:
    """A workload on its device, where to write, and for how long (seconds) slow contestants are measured."""

    workload: Workload
    data: Data
    device: torch.device
    folder: Path
    options: dict[str, Any]
    seconds: float
    peer_samples: int

    def finish(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Turn:
    """One measured turn: seconds, and whatever else is known of it."""

    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """Something that goes over `samples` samples each turn."""

    key: str
    title: str
    samples: int
    batch: int | None
    turn: Callable[[], Turn]


def plain(setting: Setting) -> Contestant:
    """Forward and backward of the whole model over all samples at the best batch size; no per-sample gradients."""
    workload, parameters = setting.workload, list(setting.workload.model.parameters())

    def step(x: Tensor, y: Tensor) -> object:
        return torch.autograd.grad(workload.loss(workload.model(x), y).mean(), parameters)

    return stepping("plain", "plain forward+backward", step, setting, BATCHES[setting.device.type], whole=True)


def mapped(setting: Setting) -> Contestant:
    """vmap(grad) of the whole model, the rows thrown away."""
    workload = setting.workload
    values = {name: value.detach() for name, value in workload.model.named_parameters()}
    buffers = dict(workload.model.named_buffers())

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = torch.func.functional_call(workload.model, (values, buffers), (x[None],))
        return workload.loss(outputs, y[None])[0]

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    return stepping("vmap", "vmap(grad)", lambda x, y: gradients(values, x, y), setting, CHUNKS[setting.device.type])


def looped(setting: Setting) -> Contestant:
    """Forward and backward of one sample after the other."""
    workload, parameters = setting.workload, list(setting.workload.model.parameters())

    def step(x: Tensor, y: Tensor) -> object:
        return torch.autograd.grad(workload.loss(workload.model(x), y).sum(), parameters)

    return stepping("loop", "per-sample loop", step, setting, (1,))


def stepping(
    key: str, title: str, step: Step, setting: Setting, sizes: Sequence[int], whole: bool = False
) -> Contestant:
    """A contestant that takes `step` for each batch, at the best of `sizes`; over all samples or for a while."""
    x, y = setting.data
    size, rate = best_size(step, setting, sizes)
    wanted = len(x) if whole else max(1, round(rate * setting.seconds / size)) * size
    samples = min(len(x), wanted)

    def turn() -> Turn:
        setting.finish()
        started = time.perf_counter()
        for start in range(0, samples, size):
            stop = min(start + size, samples)
            step(x[start:stop], y[start:stop])
        setting.finish()
        return Turn(time.perf_counter() - started)

    return Contestant(key, title, samples, size, turn)


def best_size(step: Step, setting: Setting, sizes: Sequence[int]) -> tuple[int, float]:
    """The batch size at which `step` does most samples a second, and how many."""
    best, fastest = min(sizes[0], len(setting.data[0])), 0.0
    for size in sizes:
        if fastest and (size > len(setting.data[0]) or size / fastest > LONGEST_BATCH):
            break
        try:
            rate = rate_at(step, setting, size)
        except torch.OutOfMemoryError:
            break
        if rate > fastest:
            best, fastest = min(size, len(setting.data[0])), rate
    return best, fastest


def rate_at(step: Step, setting: Setting, size: int) -> float:
    """Samples a second at one batch size: warmed up, then one batch repeated for a third of the setting's seconds."""
    x, y = (tensor[:size] for tensor in setting.data)
    step(x, y)
    setting.finish()
    started, times, passed = time.perf_counter(), 0, 0.0
    while passed < setting.seconds / 3:
        step(x, y)
        setting.finish()
        times, passed = times + 1, time.perf_counter() - started
    return times * len(x) / passed


def ours(setting: Setting) -> Contestant:
    """Stage 1 as a user calls it, into a fresh folder: from opening the task to the last commit."""
    from infl_cache import Run  # here, so that other libraries can be measured without it

    def once(n_train: int) -> Turn:
        path, task = setting.folder / "run", setting.workload.task(n_train)
        started = time.perf_counter()
        result = Run(path, task, progress=False, device=str(setting.device), **setting.options).grads()
        seconds = time.perf_counter() - started
        details = {
            "bytes": bytes_below(path),
            "stage_seconds": result.seconds,
            "timings": dict(getattr(result, "timings", None) or {}),
            "notes": list(result.notes),
        }
        shutil.rmtree(path)
        return Turn(seconds, details)

    n_train = len(setting.workload.train)
    once(min(64, n_train))
    return Contestant("ours", "infl_cache", n_train, None, lambda: once(n_train))


def peer_contestant(peer: Peer, setting: Setting) -> Contestant:
    """A peer's cache of gradients; its own time, and the time until all of it is synced."""
    size = PEER_BATCHES[setting.workload.name]

    def once(count: int) -> Turn:
        path = setting.folder / peer.key
        path.mkdir()
        try:
            started = time.perf_counter()
            peer(setting.workload, path, count, size)
            seconds = time.perf_counter() - started
            sync_below(path)
            return Turn(seconds, {"bytes": bytes_below(path), "synced": time.perf_counter() - started})
        finally:
            shutil.rmtree(path)

    once(min(2 * size, setting.peer_samples))
    return Contestant(peer.key, peer.title, setting.peer_samples, size, lambda: once(setting.peer_samples))


def contestants_of(setting: Setting, only: Sequence[str]) -> tuple[list[Contestant], dict[str, str]]:
    """Who takes part, warmed up, the plain pass first; and why others do not."""
    makers = {"plain": plain, "ours": ours, "vmap": mapped, "loop": looped}
    found, skipped = [], {}
    for key in OWN:
        if key in only:
            say(f"{setting.workload.name}: warming up {key}")
            found.append(makers[key](setting))
    for peer in PEERS:
        if peer.key not in only or setting.workload.name not in PEER_BATCHES:
            continue
        if not peer.installed or setting.device.type != "cpu":
            skipped[peer.title] = "measured on the CPU only" if peer.installed else "not installed"
            continue
        say(f"{setting.workload.name}: warming up {peer.key}")
        try:
            found.append(peer_contestant(peer, setting))
        except Exception as error:
            skipped[peer.title] = why(error)
    return found, skipped


def measure(contestants: Sequence[Contestant], rounds: int, setting: Setting) -> dict[str, list[Turn]]:
    """One turn of each contestant after the other, `rounds` times."""
    turns: dict[str, list[Turn]] = {contestant.key: [] for contestant in contestants}
    for done in range(rounds):
        say(f"{setting.workload.name}: round {done + 1} of {rounds}, {len(contestants)} contestants")
        for contestant in contestants:
            gc.collect()
            with peak_memory(setting.device) as peak:
                turn = contestant.turn()
            turns[contestant.key].append(Turn(turn.seconds, turn.details | peak))
    return turns


def figures(contestant: Contestant, turns: Sequence[Turn], yardstick: Sequence[float], dense: int) -> dict[str, Any]:
    """What is known of a contestant: medians over the rounds, and its rate over the plain one's in each round."""
    rates = [contestant.samples / turn.seconds for turn in turns]
    known: dict[str, Any] = {
        "key": contestant.key,
        "title": contestant.title,
        "samples": contestant.samples,
        "batch": contestant.batch,
        "samples_per_second": statistics.median(rates),
        "samples_per_second_rounds": rates,
        "of_plain": spread([rate / other for rate, other in zip(rates, yardstick, strict=True)]),
        "peak_rss_mb": max(turn.details["peak_rss_mb"] for turn in turns),
    }
    last = turns[-1].details
    if "peak_gpu_mb" in last:
        known["peak_gpu_mb"] = max(turn.details["peak_gpu_mb"] for turn in turns)
    if "bytes" in last:
        known["bytes_per_sample"] = last["bytes"] / contestant.samples
        known["times_smaller"] = dense / known["bytes_per_sample"]
    if "synced" in last:
        known["samples_per_second_synced"] = contestant.samples / median_of(turns, "synced")
    if "stage_seconds" in last:
        known["samples_per_second_stage"] = contestant.samples / median_of(turns, "stage_seconds")
        known["seconds"] = statistics.median(turn.seconds for turn in turns)
        known["timings"] = {
            part: statistics.median(turn.details["timings"].get(part, 0.0) for turn in turns)
            for part in last["timings"]
        }
        known["notes"] = last["notes"]
    return known


def median_of(turns: Sequence[Turn], name: str) -> float:
    """The median of one detail."""
    return float(statistics.median(turn.details[name] for turn in turns))


def bench(name: str, settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything about one workload, as it goes into the file."""
    device = torch.device(settings.device)
    say(f"{name}: making the model and its data")
    setting = prepared(name, settings, device, folder)
    contestants, skipped = contestants_of(setting, settings.only)
    turns = measure(contestants, settings.rounds, setting)
    dense = 4 * setting.workload.n_params
    yardstick = [contestants[0].samples / turn.seconds for turn in turns["plain"]]
    return {
        "title": setting.workload.title,
        "n_params": setting.workload.n_params,
        "n_train": len(setting.workload.train),
        "dense_bytes_per_sample": dense,
        "contestants": [figures(each, turns[each.key], yardstick, dense) for each in contestants],
        "over_fastest_peer": over_fastest_peer(contestants, turns),
        "skipped": skipped,
        "options": setting.options,
        "device": str(device),
        "device_name": device_name(device),
    }


def prepared(name: str, settings: argparse.Namespace, device: torch.device, folder: Path) -> Setting:
    """The workload at the size asked for, on its device."""
    samples = settings.samples or (QUICK_SAMPLES[name] if settings.quick else None)
    sizes = {} if samples is None else {"n_train": samples}
    workload = WORKLOADS[name](**sizes, **({"n_fit": QUICK_FIT} if settings.quick else {}))
    workload.model.to(device)
    x, y = (tensor.to(device) for tensor in workload.train.tensors)
    options = {key: getattr(settings, key) for key in ("dtype", "codec") if getattr(settings, key) is not None}
    most = 32 if settings.quick else min(MOST_PEER_SAMPLES, MOST_PEER_BYTES // (4 * workload.n_params))
    seconds = 0.05 if settings.quick else 1.5
    return Setting(workload, (x, y), device, folder, options, seconds, max(1, min(most, len(x))))


def over_fastest_peer(contestants: Sequence[Contestant], turns: dict[str, list[Turn]]) -> dict[str, Any] | None:
    """Our rate over that of the peer with the highest median, round by round; None where one is missing."""
    rates = {
        each.key: [each.samples / turn.seconds for turn in turns[each.key]]
        for each in contestants
        if each.key == "ours" or each.key not in OWN
    }
    mine = rates.pop("ours", None)
    if mine is None or not rates:
        return None
    fastest = max(rates, key=lambda key: statistics.median(rates[key]))
    return {"peer": fastest, **spread([a / b for a, b in zip(mine, rates[fastest], strict=True)])}


def report(record: dict[str, Any]) -> str:
    """The table of one workload, and what does not fit into it."""
    head = ["contestant", "samples/s", "of plain", "(low-high)", "samples", "batch", "bytes/sample", "x smaller", "MB"]
    rows = []
    for each in record["contestants"]:
        ratio, stored = each["of_plain"], "bytes_per_sample" in each
        rows.append([
            each["title"],
            number(each["samples_per_second"]),
            number(ratio["median"]),
            f"({number(ratio['low'])}-{number(ratio['high'])})",
            number(each["samples"]),
            number(each["batch"]) if each["batch"] else "auto",
            number(each["bytes_per_sample"]) if stored else "-",
            number(each["times_smaller"]) if stored else "-",
            number(each["peak_rss_mb"]),
        ])  # fmt: skip
    title = f"{record['workload']}  {record['title']}: {record['n_params']:,} parameters, {record['n_train']:,} samples"
    where = f"{record['device_name']}, {record['threads']} threads, {record['rounds']} rounds, MB is peak memory"
    return "\n".join([f"{title} ({where})", table(head, rows), *remarks(record)])


def remarks(record: dict[str, Any]) -> list[str]:
    """Lines below the table: our time by parts, peers when synced, who did not take part."""
    lines = [f"{who}: skipped, {why}" for who, why in record["skipped"].items()]
    for each in record["contestants"]:
        if "samples_per_second_synced" in each:
            lines.append(f"{each['title']}: {number(each['samples_per_second_synced'])} samples/s until synced")
        if "samples_per_second_stage" in each:
            rate = number(each["samples_per_second_stage"])
            lines.append(
                f"{each['title']}: {rate} samples/s without opening the task; stored {stored_size(record, each)}"
            )
            lines += [f"{each['title']}: {note}" for note in each["notes"][:MOST_NOTES]]
            if len(each["notes"]) > MOST_NOTES:
                lines.append(f"{each['title']}: and {len(each['notes']) - MOST_NOTES} notes more, in the JSON file")
        if each.get("timings"):
            parts = [f"{part} {s:.2f} s ({s / each['seconds']:.0%})" for part, s in each["timings"].items()]
            lines.append(f"{each['title']}: of {each['seconds']:.2f} s, {', '.join(parts)}")
    if record["over_fastest_peer"]:
        over = record["over_fastest_peer"]
        lines.append(f"infl_cache over the fastest peer ({over['peer']}): {number(over['median'])}"
                     f" ({number(over['low'])}-{number(over['high'])})")  # fmt: skip
    return [f"  {line}" for line in lines]


def stored_size(record: dict[str, Any], ours: dict[str, Any]) -> str:
    """Bytes a sample in the folder against those of a plain float32 row."""
    dense, times = number(record["dense_bytes_per_sample"]), number(ours["times_smaller"])
    return f"{number(ours['bytes_per_sample'])} bytes a sample, a float32 row is {dense}: {times} times smaller"


def summary(records: Sequence[dict[str, Any]]) -> str:
    """One line for each workload."""
    head = ["all", "parameters", "plain/s", "ours/s", "ours/plain", "vmap/s", "loop/s", "peer/s", "ours/peer",
            "bytes/sample", "x smaller", "MB"]  # fmt: skip
    rows = []
    for record in records:
        known = {each["key"]: each for each in record["contestants"]}
        rate = {key: number(each["samples_per_second"]) for key, each in known.items()}
        mine, over = known.get("ours", {}), record["over_fastest_peer"]
        fastest = max((known[key]["samples_per_second"] for key in known if key not in OWN), default=None)
        rows.append([
            record["workload"],
            number(record["n_params"]),
            rate["plain"],
            rate.get("ours", "-"),
            number(mine["of_plain"]["median"]) if mine else "-",
            rate.get("vmap", "-"),
            rate.get("loop", "-"),
            number(fastest) if fastest else "-",
            number(over["median"]) if over else "-",
            number(mine["bytes_per_sample"]) if mine else "-",
            number(mine["times_smaller"]) if mine else "-",
            number(mine["peak_rss_mb"]) if mine else "-",
        ])  # fmt: skip
    return table(head, rows)


def asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="some of W1,W2,W3,W4,W5; all by default")
    parser.add_argument("--samples", type=int, help="training samples of every workload")
    parser.add_argument("--only", default="plain,ours,vmap,loop,peers", help="contestants; plain always takes part")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", help="stored element type, passed on to Run")
    parser.add_argument("--codec", help="compression, passed on to Run")
    settings = parser.parse_args(arguments)
    peers = [peer.key for peer in PEERS]
    settings.workloads = chosen(parser, "workloads", settings.workloads, list(WORKLOADS))
    wanted = chosen(parser, "only", settings.only, [*OWN, "peers", *peers])
    settings.only = ["plain", *wanted, *(peers if "peers" in wanted else [])]
    at_least_one(parser, settings, "rounds", "samples")
    return settings


def once(name: str, settings: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The one record of a workload."""
    return [bench(name, settings, folder)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each workload, print its table, append its figures to the file."""
    settings = asked(arguments)
    records = []
    for name in settings.workloads:
        records += publish(settings, {"workload": name}, partial(once, name, settings), report, PACKAGES)
    print(summary(records))


if __name__ == "__main__":
    main()
