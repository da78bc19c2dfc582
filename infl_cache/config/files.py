"""Configuration files: YAML or TOML, plain data only."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import yaml

from infl_cache.errors import BadInput

MAX_CONFIG_BYTES = 1_000_000


def read_config_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or TOML file: plain data only, tags that would build objects are refused."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise BadInput(
                f"{path}: expected a configuration under {MAX_CONFIG_BYTES:,} bytes, found {path.stat().st_size:,}"
            )
        text = path.read_text(encoding="utf-8")
        loaded = tomllib.loads(text) if path.suffix == ".toml" else _plain_yaml(text)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BadInput(f"{path}: not a plain YAML or TOML file: {' '.join(str(error).split())[:200]}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise BadInput(f"{path}: expected a mapping of option names to values, found {type(loaded).__name__}")
    return {key.replace("-", "_"): value for key, value in loaded.items()}


class _PlainLoader(yaml.SafeLoader):
    """YAML without tags that build objects (SafeLoader), nor aliases, by which a small file unfolds to a huge one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases are not allowed")
        return super().compose_node(parent, index)


def _plain_yaml(text: str) -> Any:
    loader = _PlainLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
