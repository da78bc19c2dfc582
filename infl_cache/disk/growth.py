"""A store that gets more rows: its metadata files are replaced one by one, each at any moment the old or the new one.

Chunk files are not touched: the grid of an array starts at its first row, so more rows only name more files. The plan
of the stage comes first and names the metadata files as they were and as they will be; after a kill at any moment
readers accept both, and the next writer finishes.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from infl_cache.disk.codecs import Codec
from infl_cache.disk.durable import crc32c, make_folders, remove, write_atomically
from infl_cache.disk.layout import ArrayLayout
from infl_cache.disk.ledger import FileRecord
from infl_cache.disk.store import check_file, metadata_contents, record_of_file

Plan = dict[str, Any]


def metadata_of(root: Path, plan: Plan) -> list[FileRecord]:
    """The metadata files of a store; while it grows each may be as it was or as it will be."""
    old = {each["path"]: FileRecord(**each) for each in plan.get("metadata_before", ())}
    return [_as_it_is(root, old.get(each["path"]), FileRecord(**each)) for each in plan["metadata"]]


def check_metadata(root: Path, plan: Plan) -> None:
    """`DamagedStore` unless the metadata files of a store are those that its plan names."""
    for each in metadata_of(root, plan):
        check_file(root, each, record_of_file)


def restore_metadata(root: Path, stage_folder: str, plan: Plan, codec: Codec) -> list[str]:
    """Write the metadata files of a store that are not as recorded once more; the names of those that cannot be.

    What is written has the size and the checksum of the record: it is what was there.
    """
    layouts = [ArrayLayout.from_json(each) for each in plan["arrays"]]
    made, failed = metadata_contents(layouts, codec), []
    for each in metadata_of(root, plan):
        path = root / each.path
        if path.is_file() and record_of_file(root, path) == each:
            continue
        content = made.get(each.path.removeprefix(f"{stage_folder}/"), b"")
        # A store that has grown was rewritten by us, not by zarr.
        tried = [content, *([_with_rows(content, plan["arrays"][0]["n_rows"])] if content else [])]
        found = next((one for one in tried if (len(one), crc32c(one)) == (each.size, each.crc)), None)
        if found is None:
            failed.append(each.path)
            continue
        if path.is_dir():
            remove([path])
        make_folders(path.parent)
        write_atomically(path, found)
    return failed


def begin_growth(root: Path, plan: Plan, n_rows: int) -> None:
    """Put into the plan what the store will be with at least `n_rows` rows; nothing is written."""
    if all(each["n_rows"] >= n_rows for each in plan["arrays"]):
        return
    check_metadata(root, plan)
    new = []
    for each in metadata_of(root, plan):
        content = _with_rows((root / each.path).read_bytes(), n_rows)
        new.append(dataclasses.asdict(FileRecord(each.path, len(content), crc32c(content))))
    plan["arrays"] = [{**each, "n_rows": n_rows} for each in plan["arrays"]]
    plan["metadata_before"], plan["metadata"] = plan["metadata"], new


def finish_growth(root: Path, plan: Plan) -> bool:
    """Replace what is still old, once the plan is on the disk; whether there was anything to finish.

    Raises `DamagedStore` for a file that is neither old nor new.
    """
    if "metadata_before" not in plan:
        return False
    n_rows, after = plan["arrays"][0]["n_rows"], {each["path"]: FileRecord(**each) for each in plan["metadata"]}
    for each in metadata_of(root, plan):
        if each != after[each.path]:
            write_atomically(root / each.path, _with_rows((root / each.path).read_bytes(), n_rows))
    del plan["metadata_before"]
    check_metadata(root, plan)
    return True


def _as_it_is(root: Path, old: FileRecord | None, new: FileRecord) -> FileRecord:
    """Which of two records a file has; the new one if neither."""
    path = root / new.path
    return old if old is not None and path.is_file() and record_of_file(root, path) == old else new


def _with_rows(content: bytes, n_rows: int) -> bytes:
    """An array's `zarr.json` for another number of rows; that of a group as it is."""
    metadata = json.loads(content)
    if metadata.get("node_type") != "array":
        return content
    metadata["shape"][0] = n_rows
    return json.dumps(metadata, indent=2).encode()
