"""What stage 1 would do and cost: the form of each layer, bytes, seconds, store or not, other types and codecs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from infl_cache.disk.codecs import Codec
from infl_cache.disk.trial import Trial, try_codec, try_store
from infl_cache.maths.capture import Forms, capture
from infl_cache.maths.capture.cost import cost_of, scored
from infl_cache.maths.probe import activation_bytes, probe_batch
from infl_cache.maths.samples import groups_of, spread
from infl_cache.stages.buffers import BlockBuffer
from infl_cache.stages.grads import CHECKED_SAMPLES, bytes_a_number
from infl_cache.stages.opening import Opened
from infl_cache.stages.plan.costs import FIXED
from infl_cache.stages.stored import arrays_of, layouts

# Looks into a store, and facts that are made to last, of each stage besides its blocks and tiles: as counted in a run.
SETTLED = {"grads": (2, 4), "stest": (5, 6), "influence": (16, 8)}
TRIAL_BATCHES = 4
TRIAL_BYTES = 64 * 2**20
# What each other element type and codec is tried on.
CHOICE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class PlannedLayer:
    """A part of the model: how its gradient is had, kept and scored; numbers and multiplications a sample."""

    name: str
    by: str
    form: str
    scored: str
    numbers: int
    plain: int
    operations: int


@dataclass(frozen=True)
class StoreChoice:
    """Another element type and codec: bytes a sample, seconds a sample to encode and write, and to read."""

    dtype: str
    codec: str
    bytes_a_sample: float
    write: float
    read: float


@dataclass(frozen=True)
class GradsPlan:
    """Stage 1 on paper. Rates are samples a second, measured on a few batches and one trial block, or reckoned.

    `start` are the seconds before the first block, `encode_rate` is that of compressing, `commit` the seconds that a
    block takes besides.
    """

    layers: tuple[PlannedLayer, ...]
    n_train: int
    n_params: int
    batch_size: int
    block_rows: int
    compute_rate: float
    encode_rate: float
    write_rate: float
    read_rate: float
    bytes_a_sample: float
    passes: int
    rounding: dict[str, float] | None
    notes: tuple[str, ...]
    cache: bool = True
    dtype: str = "float32"
    codec: str = "lz4"
    start: float = 0.0
    commit: float = 0.0
    memory: float = 0.0
    choices: tuple[StoreChoice, ...] = ()

    @property
    def seconds(self) -> float:
        """Computing a block and writing the last one overlap."""
        made, written = 1 / self.compute_rate + 1 / self.encode_rate, 1 / self.write_rate
        alone = min(self.n_train, self.block_rows) * min(made, written)
        blocks = -(-self.n_train // self.block_rows)
        return self.start + self.n_train * max(made, written) + alone + blocks * self.commit

    @property
    def stored_seconds(self) -> float:
        """To compute and store them, then each pass of stage 3 reads the store once."""
        made, written = 1 / self.compute_rate + 1 / self.encode_rate, 1 / self.write_rate
        return self.n_train * (max(made, written) + self.passes / self.read_rate)

    @property
    def uncached_seconds(self) -> float:
        """One pass for the losses and to see that all gradients are finite, then one in each pass of stage 3."""
        return self.n_train * (1 + self.passes) / self.compute_rate

    @property
    def n_bytes(self) -> float:
        """Size of the store."""
        return self.bytes_a_sample * self.n_train


def held_by_grads(run: Opened, forms: Forms, batch_size: int, block_bytes: float) -> float:
    """Bytes that stage 1 holds: blocks, activations and rows of a batch, plain rows of its first samples."""
    few = range(min(8, len(run.task.train)))
    kept = activation_bytes(run.task, run.parameters, probe_batch(run.task, few, run.device))
    batch = batch_size * 4 * (kept + 4 * forms.row_size)
    # Of the first samples alone, in their batch, and by autograd.
    first = 3 * CHECKED_SAMPLES * 4 * run.parameters.size
    return 3.0 * block_bytes + min(run.budget / 4, batch) + min(run.budget / 8, first) + FIXED


def settled(trial: Trial, looks: int, facts: int) -> float:
    """Seconds of a new store, of so many looks into one and of so many small facts that are made to last."""
    return trial.create_seconds + looks * trial.look_seconds + facts * trial.commit_seconds


def measured(run: Opened, forms: Forms, batch_size: int, dtype: str) -> tuple[float, int, Trial]:
    """Samples a second of computing, and a trial store of so many samples."""
    row_bytes = max(1, forms.row_size * bytes_a_number(dtype))
    wanted = min(len(run.task.train), TRIAL_BATCHES * batch_size, max(1, TRIAL_BYTES // row_bytes))
    groups = _groups(len(run.task.train), wanted, batch_size)
    options, count = run.options.grads, sum(map(len, groups))
    arrays = layouts(forms, count, dtype, count, options.cache)
    buffer = BlockBuffer(arrays, count, run.device)
    rate = _filled(run, forms, buffer, groups, dtype, options.cache)
    codec = Codec(options.codec, options.level)
    return rate, count, try_store(run.folder.path, arrays, codec, buffer.arrays(count))


def _groups(n: int, wanted: int, batch_size: int) -> list[range]:
    """Batches as the stage makes them, spread over the training set, of about `wanted` samples together.

    >>> _groups(100, 8, 4), _groups(3, 8, 4)
    ([range(0, 4), range(96, 100)], [range(0, 3)])
    """
    every = groups_of(0, n, max(1, min(batch_size, wanted)))
    return [every[place] for place in spread(len(every), -(-wanted // len(every[0])))]


def _filled(run: Opened, forms: Forms, buffer: BlockBuffer, groups: Sequence[range], dtype: str, cache: bool) -> float:
    """Fill the buffer with the gradients of the chosen samples; samples a second."""
    found, filled = [], 0
    for group in groups:
        started = time.perf_counter()
        batch = probe_batch(run.task, group, run.device)
        captured = capture(run.task, forms, batch)
        stored = {"loss": captured.loss, "target": captured.target}
        stored |= arrays_of(forms, captured, dtype) if cache else {}
        buffer.fill(slice(filled, filled + len(group)), stored, batch.digests)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        found.append((time.perf_counter() - started) / len(group))
        filled += len(group)
    buffer.wait()
    # The first batch also warms up.
    return 1 / statistics.median(found[1:] or found)


def store_choices(run: Opened, forms: Forms, dtype: str, disk: float) -> tuple[StoreChoice, ...]:
    """The stored type of this run and bfloat16, with each codec, in memory; `disk` are the seconds of a byte."""
    row_bytes = max(1, forms.row_size * bytes_a_number(dtype))
    wanted = max(1, min(256, CHOICE_BYTES // row_bytes))
    groups = _groups(len(run.task.train), wanted, forms.at_once(min(32, wanted)))
    n, found = sum(map(len, groups)), []
    for kind in dict.fromkeys((dtype, "bfloat16")):
        arrays = layouts(forms, n, kind, n)
        buffer = BlockBuffer(arrays, n, run.device)
        _filled(run, forms, buffer, groups, kind, True)
        for name in ("lz4", "zstd", "none"):
            size, encoding, decoding = try_codec(arrays, Codec(name, run.options.grads.level), buffer.arrays(n))
            found.append(StoreChoice(kind, name, size / n, (encoding + size * disk) / n, decoding / n))
    return tuple(found)


def planned_layers(forms: Forms) -> list[PlannedLayer]:
    """The parts of the model in the order in which they are kept."""
    factored = {layer.module for layer in forms.factored}
    found = []
    for layer in forms.layers:
        form = "factored" if layer.module in factored else "dense"
        cost = cost_of(layer, form, with_input=not layer.input_key)
        shared = f" (input of {layer.input_key})" if layer.input_key else ""
        found.append(PlannedLayer(
            layer.module or "(model)", layer.rule, form + shared, scored(layer) if form == "factored" else "stored",
            cost.numbers, layer.gradient_size, cost.operations,
        ))  # fmt: skip
    sizes = dict(zip(forms.parameters.names, forms.parameters.sizes, strict=True))
    for copied in forms.spread:
        found.append(_dense(copied.name, "a copy a sample", sizes[copied.name]))
    for unit in forms.alone:
        size = sum(sizes[name] for name in unit.parameters.values())
        found.append(_dense(unit.module, f"{unit.engine} of the module", size))
    return found + [_dense(name, f"{forms.engine} of the model", sizes[name]) for name in forms.mapped]


def _dense(name: str, by: str, size: int) -> PlannedLayer:
    return PlannedLayer(name, by, "dense", "stored", size, size, 0)
