"""JSON files that are whole or not there; beside results a second one that says whose they are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infl_cache.disk.durable import crc32c, make_folders, require_folder, write_atomically
from infl_cache.errors import BadInput, DamagedStore, ForeignRun
from infl_cache.maths.digest import digest_of
from infl_cache.ptif.config import Config

FORMAT = 1
Results = dict[str, dict[str, Any]]


def save_json(
    json_obj: Any, json_path: str | Path, append_if_exists: bool = False, overwrite_if_exists: bool = False,
    unique_fn_if_exists: bool = True,
) -> Path:  # fmt: skip
    """Write an object as JSON, whole or not at all; return the file.

    Of a file that is there: appended to (a dict's keys, a list's elements), overwritten, or left alone and a name
    with a number taken. Arrays and tensors become lists, NaN and infinities null.
    Raises `BadInput` if the file is there and none of these is asked for, or if nothing can be appended to it.
    """
    path, plain = Path(json_path), _plain(json_obj)
    require_folder(path.parent)
    make_folders(path.parent)
    if path.exists() and append_if_exists:
        plain = _appended(path, plain)
    elif path.exists() and not overwrite_if_exists:
        if not unique_fn_if_exists:
            raise BadInput(f"{path}: expected a name that is free, found a file; overwrite_if_exists=True replaces it")
        path = next(free for n in range(1, 10**9) if not (free := path.with_stem(f"{path.stem}_{n}")).exists())
    write_atomically(path, json.dumps(plain, allow_nan=False, indent=1).encode())
    return path


def _appended(path: Path, more: Any) -> Any:
    before = loaded_json(path)
    if isinstance(before, dict) and isinstance(more, dict):
        return {**before, **more}
    if isinstance(before, list) and isinstance(more, list):
        return [*before, *more]
    raise BadInput(
        f"{path}: expected a dict to append to a dict or a list to a list, found {type(more).__name__} and"
        f" {type(before).__name__}"
    )


def loaded_json(path: Path) -> Any:
    """The content of a JSON file; `BadInput` if there is none, or something else."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: expected JSON, found {type(error).__name__}: {str(error)[:100]}") from error


def _plain(value: Any) -> Any:
    """An object as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple, range)):
        return [_plain(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (str, int, float)) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    raise BadInput(f"json: expected what JSON can hold, found {type(value).__name__}")


@dataclass(frozen=True)
class ResultFiles:
    """The files of one call: results, what is known about them, and the folder that is there while it computes."""

    results: Path

    @classmethod
    def of(cls, config: Config) -> ResultFiles:
        """Those that the config names, in a folder that can be written in; `BadInput` otherwise."""
        name = config.json_filename
        if name is None:
            part = f"{config.start}_{config.test_sample_num or 'all'}"
            if config.test_sample_ids is not None:
                part = f"ids_{digest_of(config.test_sample_ids)[:8]}"
            name = f"influence_results_{part}.json"
        if not name.strip() or Path(name).name != name:
            raise BadInput(f"config['json_filename']: expected a file name without a folder, found {name!r}")
        outdir = Path(config.outdir)
        require_folder(outdir)
        make_folders(outdir)
        require_folder(outdir)
        return cls(outdir / (name if name.endswith(".json") else f"{name}.json"))

    @property
    def meta(self) -> Path:
        """Whose results they are, and how they were found."""
        return self.results.with_suffix(".meta.json")

    @property
    def work(self) -> Path:
        """The run folder of calc_img_wise, gone when it is done."""
        return self.results.with_name(f".{self.results.stem}.work")

    def read(self, identity: Mapping[str, Any]) -> tuple[Results, list[int], list[int]] | None:
        """The results of that identity, if they were written before.

        Raises `ForeignRun` for results of another one, and `DamagedStore` if the file is not the one that was written.
        """
        if not self.results.exists():
            return None
        if not self.meta.exists():
            raise ForeignRun(
                f"{self.results}: expected results of this package, found a file without {self.meta.name};"
                " choose another outdir or json_filename, or config['force'] = True"
            )
        meta = loaded_json(self.meta)
        kept = meta.get("identity") if isinstance(meta, dict) else None
        if not isinstance(kept, dict) or meta.get("format") != FORMAT:
            raise DamagedStore(f"{self.meta}: expected what this package wrote, found something else; remove it")
        wanted = _plain(identity)
        if kept != wanted:
            fields = [key for key in {**kept, **wanted} if kept.get(key) != wanted.get(key)]
            changed = "; ".join(
                f"{key}: {_brief(kept.get(key))} there, {_brief(wanted.get(key))} here" for key in fields
            )
            raise ForeignRun(
                f"{self.results}: expected results of this task and config, found others ({changed});"
                " choose another outdir or json_filename, or config['force'] = True"
            )
        data = self.results.read_bytes()
        if crc32c(data) != meta.get("crc32c"):
            raise DamagedStore(
                f"{self.results}: expected the file that was written, found another;"
                " remove it, or write it anew by config['force'] = True"
            )
        results: Results = json.loads(data)
        return results, list(meta["harmful"]), list(meta["helpful"])

    def write(self, results: Results, meta: Mapping[str, Any]) -> None:
        """Both files; the one that says whose they are first, so that no results are ever nobody's."""
        lines = (f"{json.dumps(key)}: {json.dumps(entry, allow_nan=False)}" for key, entry in results.items())
        data = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
        about = {"format": FORMAT, **meta, "file": self.results.name, "bytes": len(data), "crc32c": crc32c(data)}
        write_atomically(self.meta, (json.dumps(_plain(about), allow_nan=False, indent=1) + "\n").encode())
        write_atomically(self.results, data)


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
