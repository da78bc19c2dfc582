"""Whether a run folder still holds what its ledger recorded: every file's size and every byte's checksum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from infl_cache.disk.codecs import CRC_BYTES
from infl_cache.disk.durable import crc32c
from infl_cache.disk.growth import metadata_of
from infl_cache.disk.ledger import BlockRecord, FileRecord
from infl_cache.disk.run import RunFolder
from infl_cache.disk.store import record_of_file
from infl_cache.disk.sweep import OUTPUTS
from infl_cache.errors import BadInput, DamagedStore
from infl_cache.progress import progress
from infl_cache.stages.layers import checked_layers
from infl_cache.stages.rankings import has_matrix
from infl_cache.stages.tiles import checked_tiles, planned_tiles

STORES = ("grads", "stest", "self_influence")
FILES = ("rankings", "layer_shares", "self_ranking")


def verify(folder: RunFolder, show: bool = True) -> list[str]:
    """Every fault found, each naming file and rows; an empty list if the folder is as it was committed."""
    if not folder.exists:
        raise BadInput(f"{folder.path}: expected a run folder, found no manifest.json there")
    checks = [check for stage in STORES if stage in folder.manifest.stages for check in _store_checks(folder, stage)]
    faults: list[str] = []
    with progress("verify", sum(file.size for file, _ in checks), unit="B", show=show) as bar:
        for file, rows in checks:
            faults += _fault(folder.path, file, rows)
            bar.advance(file.size)
    for stage in STORES:
        if stage in folder.manifest.stages and not (folder.path / OUTPUTS[stage][0]).is_dir():
            faults.append(f"{OUTPUTS[stage][0]}: expected a store, found none")
    return faults + _matrix_faults(folder) + _layer_faults(folder) + _rankings_faults(folder)


def _store_checks(folder: RunFolder, stage: str) -> Iterator[tuple[FileRecord, str | None]]:
    """A store's metadata files (no rows) and the chunk files of its committed blocks."""
    for each in metadata_of(folder.path, folder.plan(stage)):
        yield each, None
    for record in folder.records(stage).values():
        for file in record.files:
            yield file, f"rows {record.start} to {record.stop - 1}"


def _fault(root: Path, expected: FileRecord, rows: str | None) -> list[str]:
    """What is wrong with one file, if anything. A chunk's checksum covers all but its own four bytes."""
    path = root / expected.path
    if ".." in Path(expected.path).parts or Path(expected.path).is_absolute():
        return [f"{expected.path}: expected a name inside the folder"]
    try:
        if rows is None:
            found = record_of_file(root, path)
        else:
            data = path.read_bytes()
            found = FileRecord(expected.path, len(data), crc32c(data[:-CRC_BYTES]))
    except OSError as error:
        return [f"{expected.path}{_of(rows)}: cannot be read ({error.strerror})"]
    if found == expected:
        return []
    return [
        f"{expected.path}{_of(rows)}: expected {expected.size} bytes with checksum {expected.crc:08x},"
        f" found {found.size} with {found.crc:08x}"
    ]


def _of(rows: str | None) -> str:
    return f" ({rows})" if rows else ""


def _matrix_faults(folder: RunFolder) -> list[str]:
    records: dict[int, BlockRecord] = folder.records("influence")
    if not records or not has_matrix(folder) or not {"grads", "stest"} <= set(folder.manifest.stages):
        return []
    try:
        checked_tiles(folder, planned_tiles(folder))
    except DamagedStore as error:
        return [str(error)]
    return []


def _layer_faults(folder: RunFolder) -> list[str]:
    try:
        checked_layers(folder)
    except DamagedStore as error:
        return [str(error)]
    return []


def _rankings_faults(folder: RunFolder) -> list[str]:
    records = [record for stage in FILES for record in folder.records(stage).values()]
    files: Sequence[FileRecord] = [file for record in records for file in record.files]
    return [fault for file in files for fault in _fault(folder.path, file, None)]
