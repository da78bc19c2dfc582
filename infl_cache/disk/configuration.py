"""`run.yaml`: the resolved options of a run, in a form that runs again as it is, marked as written by this user.

It names the code of the task. Who runs it by `--config` means that code; a command that merely repairs a folder must
not run what somebody else wrote into it. So the file ends with a keyed digest of all before it, the key being this
user's own, outside of any run folder.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

HEAD = "# Written by infl_cache. Runs again as it is: infl-cache run --config run.yaml\n"
MARK = "# by "
KEY_BYTES = 32


def as_yaml(configuration: Mapping[str, Any]) -> bytes:
    """The file's content; without the mark where this user has no place for a key."""
    text = HEAD + yaml.safe_dump(dict(configuration), sort_keys=False)
    mark = _mark(text, make=True)
    return (text + (f"{MARK}{mark}\n" if mark else "")).encode()


def written_by_this_user(path: Path) -> bool:
    """Whether the file is, byte for byte, as this user's infl_cache wrote it on this machine, wherever it lies now."""
    try:
        text, found, mark = path.read_text(encoding="utf-8").rpartition(MARK)
    except (OSError, ValueError):
        return False
    return bool(found) and hmac.compare_digest(mark.strip().encode(), _mark(text, make=False).encode())


def _mark(text: str, make: bool) -> str:
    key = _key(make)
    return hashlib.blake2b(text.encode(), key=key, digest_size=16).hexdigest() if key else ""


def _key(make: bool) -> bytes:
    """This user's key, made the first time; empty where there is none and none can be."""
    place = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "infl_cache" / "key"
    try:
        if make and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
        key = place.read_bytes()
    except (OSError, RuntimeError):  # no home, nobody may write there, or another process has just made it
        return b""
    return key if len(key) == KEY_BYTES else b""
