"""Configuration files: YAML or TOML, plain data only."""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import yaml

from infl_cache.errors import BadInput

MAX_CONFIG_BYTES = 1_000_000


def read_config_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or TOML file: plain data only, tags that would build objects are refused."""
    try:
        text = _read(path).decode("utf-8")
        loaded = tomllib.loads(text) if path.suffix == ".toml" else _plain_yaml(text)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BadInput(f"{path}: not a plain YAML or TOML file: {' '.join(str(error).split())[:200]}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise BadInput(f"{path}: expected a mapping of option names to values, found {type(loaded).__name__}")
    named = {key.replace("-", "_"): value for key, value in loaded.items()}
    if len(named) < len(loaded):
        raise BadInput(f"{path}: expected each option once, found one written with - and with _")
    return named


def _read(path: Path) -> bytes:
    """The content of a plain file that is not too large; a pipe or device is not waited for."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BadInput(f"{path}: expected a configuration file, found no plain file")
        content = file.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise BadInput(
            f"{path}: expected a configuration under {MAX_CONFIG_BYTES:,} bytes, found {path.stat().st_size:,}"
        )
    return content


class _PlainLoader(yaml.SafeLoader):
    """YAML without tags that build objects (SafeLoader), aliases, by which a small file unfolds, or a key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        if len(set(map(str, keys))) < len(keys):
            raise ValueError(f"a key is there twice: {next(key for key in keys if keys.count(key) > 1)}")
        return super().construct_mapping(node, deep)


def _plain_yaml(text: str) -> Any:
    loader = _PlainLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
