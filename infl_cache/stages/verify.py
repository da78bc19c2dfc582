"""Whether a run folder still holds what its ledger recorded: structure and sizes always, contents by checksums."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass

from infl_cache.config import short
from infl_cache.disk.codecs import CRC_BYTES
from infl_cache.disk.growth import metadata_of
from infl_cache.disk.layout import chunk_keys
from infl_cache.disk.ledger import BlockRecord, FileRecord
from infl_cache.disk.run import RunFolder
from infl_cache.disk.state import read_header
from infl_cache.disk.sums import room
from infl_cache.disk.sweep import OUTPUTS
from infl_cache.errors import BadInput, DamagedStore, IncompleteStore
from infl_cache.progress import human_bytes, human_seconds, progress
from infl_cache.stages.again import still_missing
from infl_cache.stages.checks import Fault, FileCheck, TileCheck
from infl_cache.stages.layers import MODEL, covered_tiles, layer_names
from infl_cache.stages.rankings import has_matrix
from infl_cache.stages.tiles import committed_tiles, open_matrix, planned_tiles

STORES = ("grads", "stest", "self_influence")
MATRICES = ("influence", "by_layer")
LEDGER, MANIFEST, STATE = "ledger.sqlite", "manifest.json", "influence.state"
AT_ONCE = 4096


@dataclass(frozen=True)
class Verdict:
    """What was looked at in a run folder, and every fault.

    `sample` is the part whose contents were read, drawn with `seed`; without it all were.
    `files` and `n_bytes` count what the ledger speaks of, `read_files` and `read_bytes` what was read of it.
    """

    path: str
    faults: tuple[Fault, ...]
    files: int
    n_bytes: int
    read_files: int
    read_bytes: int
    seconds: float
    sample: float | None = None
    seed: int | None = None

    @property
    def sound(self) -> bool:
        """Whether no fault was found."""
        return not self.faults

    def __str__(self) -> str:
        read = f"{self.read_files:,} of {self.files:,} files read" if self.sample else f"{self.files:,} files"
        drawn = f", drawn with seed {self.seed}" if self.sample else ""
        size = human_bytes(self.read_bytes)
        text = f"{self.path}: everything is as it was committed ({read}, {size}, {human_seconds(self.seconds)}{drawn})"
        return "\n".join(map(str, self.faults)) or text

    def as_json(self) -> str:
        """All of it, for programs."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


Check = FileCheck | TileCheck


def verify(folder: RunFolder, sample: float | None = None, show: bool = True, seed: int | None = None) -> Verdict:
    """Compare the folder with its ledger: every file's size, and the contents of all, or of the part `sample` of them.

    Which chunk files and tiles are read is drawn anew each time, or with `seed`. What is small is always read.
    Raises `BadInput` where there is no run; damage is never an error here, but a `Fault`.
    """
    if not folder.exists:
        raise BadInput(f"{folder.path}: expected a run folder, found no manifest.json there")
    if sample is not None and not 0 < sample <= 1:
        raise BadInput(f"sample: expected a part above 0 and at most 1, such as 5% or 0.05, found {sample}")
    started, checks, faults = time.perf_counter(), list[Check](), list[Fault]()
    seed = None if sample is None else secrets.randbits(32) if seed is None else seed
    with ExitStack() as opened:
        for each in _listed(folder, opened):
            (faults if isinstance(each, Fault) else checks).append(each)  # type: ignore[arg-type]
        read = _drawn(checks, sample, seed)
        faults += _found(checks, read, show)
    size = sum(each.n_bytes for each in checks)
    looked = [each for number, each in enumerate(checks) if number in read]
    return Verdict(
        str(folder.path), tuple(faults), len({each.file for each in checks}), size,
        len({each.file for each in looked}), sum(each.n_bytes for each in looked), time.perf_counter() - started,
        sample, seed,
    )  # fmt: skip


def part_of(text: str) -> float:
    """A part as people say it; `BadInput` unless it is above 0 and at most 1.

    >>> part_of("5%"), part_of("0.05")
    (0.05, 0.05)
    """
    try:
        part = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        part = -1.0
    if not 0 < part <= 1:
        raise BadInput(f"sample: expected a part such as 5% or 0.05, found {short(text)}")
    return part


def _drawn(checks: Sequence[Check], sample: float | None, seed: int | None) -> set[int]:
    """The numbers of the checks whose contents are read: at least one where there are any."""
    if sample is None:
        return set(range(len(checks)))
    chosen = [number for number, each in enumerate(checks) if not each.always]
    count = min(len(chosen), max(1, round(sample * len(chosen))))
    always = {number for number, each in enumerate(checks) if each.always}
    return always | set(random.Random(seed).sample(chosen, count))


def _found(checks: Sequence[Check], read: set[int], show: bool) -> list[Fault]:
    """The faults in the order of the checks; each thread has memory of its own, which it uses again and again."""
    own, faults = threading.local(), list[Fault]()

    def begin() -> None:
        own.memory = room()

    def look(number: int) -> Fault | None:
        return checks[number].fault(number in read, own.memory)

    total = sum(checks[number].n_bytes for number in read)
    with (
        progress("verify", total, unit="B", show=show) as bar,
        ThreadPoolExecutor(os.cpu_count(), initializer=begin) as pool,
    ):
        for start in range(0, len(checks), AT_ONCE):
            numbers = range(start, min(start + AT_ONCE, len(checks)))
            for number, fault in zip(numbers, pool.map(look, numbers), strict=True):
                faults += [fault] if fault is not None else []
                bar.advance(checks[number].n_bytes if number in read else 0)
    return faults


def _listed(folder: RunFolder, opened: ExitStack) -> Iterator[Check | Fault]:
    """Everything that there is to look at, and what is wrong already with how it hangs together."""
    if folder.manifest.stages and not (folder.path / LEDGER).is_file():
        yield Fault("", None, LEDGER, None, "the ledger of what is done", "no file")
        return
    for stage in (each for each in OUTPUTS if each in folder.manifest.stages):
        try:
            records = folder.records(stage)
            yield from _still_missing(folder, stage, records)
            if stage in STORES:
                yield from _store_checks(folder, stage, records)
            elif stage in MATRICES:
                yield from _matrix_checks(folder, stage, records, opened)
            else:
                yield from _whole_files(folder, stage, records)
        except (DamagedStore, IncompleteStore) as error:
            yield Fault(stage, None, LEDGER, None, f"what was done of {stage}", f"what cannot be used: {error}")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            yield Fault(stage, None, MANIFEST, None, f"a plan of {stage}", f"what cannot be used: {error!r}")


def _still_missing(folder: RunFolder, stage: str, records: dict[int, BlockRecord]) -> Iterator[Fault]:
    """Blocks that a repair which was stopped has yet to make again."""
    planned = {block.index for block in folder.stage_blocks(stage)}
    for block in planned.intersection(still_missing(folder.plan(stage), records)):
        words = f"block {block}, which was damaged, to be made again"
        yield Fault(stage, block, OUTPUTS[stage][0], None, words, "a repair that was stopped")


def _store_checks(folder: RunFolder, stage: str, records: dict[int, BlockRecord]) -> Iterator[Check | Fault]:
    """A store's metadata files (no rows) and the chunk files of its committed blocks, which are those of its layout."""
    for each in metadata_of(folder.path, folder.plan(stage)):
        yield FileCheck(folder.path, stage, None, each.path, None, each.size, each.crc, always=True)
    layouts, every = folder.array_layouts(stage), {block.index: block for block in folder.stage_blocks(stage)}
    for index, record in records.items():
        rows = f"rows {record.start} to {record.stop - 1}"
        names = {f"{OUTPUTS[stage][0]}/{each.path}/{key}" for each in layouts for key in chunk_keys(each, every[index])}
        for file in record.files:
            if file.path in names:
                yield FileCheck(folder.path, stage, index, file.path, rows, file.size, file.crc, CRC_BYTES)
            else:
                yield Fault(stage, index, LEDGER, rows, "chunk files of the block", f"the name {file.path[:200]!r}")
        for name in sorted(names - {file.path for file in record.files}):
            yield Fault(stage, index, name, rows, "its size and checksum in the ledger", "none")


def _matrix_checks(
    folder: RunFolder, stage: str, records: dict[int, BlockRecord], opened: ExitStack
) -> Iterator[Check | Fault]:
    """The committed tiles of a matrix; in a run without one, what its rankings are made of."""
    if not records:
        return
    if not has_matrix(folder):
        yield from _state_check(folder, stage)
        return
    if not {"grads", "stest"} <= set(folder.manifest.stages):
        return
    layers = [name or MODEL for name in layer_names(folder)] if stage != "influence" else []
    tiles = covered_tiles(folder) if layers else planned_tiles(folder)
    try:
        matrix = opened.enter_context(closing(open_matrix(folder, stage, len(layers))))
    except (DamagedStore, OSError) as error:
        yield Fault(stage, None, OUTPUTS[stage][0], None, "a matrix of its size", f"none that can be used: {error}")
        return
    yield from (TileCheck(matrix, stage, tile) for tile in committed_tiles(folder, stage, tiles, layers))


def _state_check(folder: RunFolder, stage: str) -> Iterator[Check | Fault]:
    try:
        header = read_header(folder.path / STATE)
    except DamagedStore as error:
        yield Fault(stage, None, STATE, None, "what the rankings are made of", f"a damaged file: {error}")
        return
    if header is None:
        yield Fault(stage, None, STATE, None, "what the rankings are made of", "no file")
        return
    yield FileCheck(folder.path, stage, None, STATE, None, header.n_bytes, None, CRC_BYTES, always=True)


def _whole_files(folder: RunFolder, stage: str, records: dict[int, BlockRecord]) -> Iterator[Check | Fault]:
    files: Iterable[FileRecord] = [file for record in records.values() for file in record.files]
    for file in files:
        if file.path == OUTPUTS[stage][0]:
            yield FileCheck(folder.path, stage, 0, file.path, None, file.size, file.crc, always=True)
        else:
            yield Fault(stage, 0, LEDGER, None, OUTPUTS[stage][0], f"the name {file.path[:200]!r}")
