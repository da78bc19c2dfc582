"""Identity: what a run folder was computed from, and whether that is still what we are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infl_cache.disk.durable import write_atomically
from infl_cache.disk.inside import Plan, check_plan
from infl_cache.errors import BadInput, DamagedStore, ForeignRun

FORMAT = 1
Identity = dict[str, Any]


@dataclass
class Manifest:
    """`manifest.json`: the task's identity, and per stage its own identity and the plan of its files.

    A stage's entry is `{"identity": ..., "fingerprint": ..., "options": ..., "plan": ...}`: the identity must be
    met to carry on, the plan (block size, forms, files) is taken from here and never decided again,
    `options` are those of its options that were chosen by name. A checksum covers all of it.
    """

    task: Identity | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest in `path`, or an empty one where there is none."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                found = content["format"]
                raise ForeignRun(
                    f"{path}: expected format {FORMAT}, found format {found!r}; use the version that wrote it"
                )
            manifest = cls(content["task"], content["stages"])
            sound = isinstance(manifest.stages, dict) and isinstance(manifest.task, dict | None)
            for entry in manifest.stages.values():
                kinds = (("identity", dict), ("plan", dict), ("fingerprint", str))
                sound = sound and all(isinstance(entry[name], kind) for name, kind in kinds)
                sound = sound and isinstance(entry.get("options", {}), dict)
            intact = content["checksum"] == manifest.checksum()
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise BadInput(f"{path.parent} cannot be a run folder: {error.strerror}; choose another --run") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedStore(f"{path}: expected a manifest, found a damaged file ({error}); restore it") from error
        if not (sound and intact):
            raise DamagedStore(f"{path}: expected the manifest as it was written, found an edited one; restore it")
        for stage, entry in manifest.stages.items():
            try:
                check_plan(entry["plan"])
                entry["plan"] = Plan(entry["plan"])
            except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
                raise DamagedStore(
                    f"{path}: expected a plan of {stage[:40]} that a run can have, found {str(error)[:120]}; restore it"
                ) from error
        return manifest

    def checksum(self) -> str:
        """Over all that it says."""
        return fingerprint({"task": self.task, "stages": self.stages})

    def write(self, path: Path) -> None:
        """Replace `path` by this manifest, atomically and durably."""
        content = {"format": FORMAT, "checksum": self.checksum(), "task": self.task, "stages": self.stages}
        write_atomically(path, json.dumps(content, indent=1, sort_keys=True).encode())


def fingerprint(identity: Mapping[str, Any]) -> str:
    """A short digest of an identity.

    >>> fingerprint({"damping": 0.01}) == fingerprint({"damping": 0.010})
    True
    """
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Field by field, what differs between the identity in a run folder and the one asked for.

    >>> differences({"damping": 0.01, "solver": "cg"}, {"damping": 0.1, "solver": "cg"})
    ['damping: expected 0.01, found 0.1']
    """
    return [
        f"{key}: expected {expected.get(key)!r}, found {found.get(key)!r}"
        for key in sorted(expected.keys() | found.keys())
        if expected.get(key) != found.get(key)
    ]
