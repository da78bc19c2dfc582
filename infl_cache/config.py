"""Every option, its default, its allowed values and its help: once, for Python, files and the command line."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
import tomllib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from infl_cache.errors import BadInput

MAX_CONFIG_BYTES = 1_000_000
# No option means anything beyond this, and larger integers do not fit the arithmetic behind them.
LARGEST = 2**62
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def option(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field that carries its help text and inclusive range."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


def short(value: Any) -> str:
    """A value as text of a bounded length, whatever it holds.

    >>> len(short(list(range(10**6)))) < 100
    True
    """
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to write out an integer of more than some thousand digits
        return f"an integer of {int(value).bit_length()} bits"


def parse_size(text: str | int | float) -> int:
    """Bytes from a number or from text such as `2GB`, `512 MiB`.

    >>> parse_size("2GB"), parse_size("1.5 MiB"), parse_size(4096)
    (2000000000, 1572864, 4096)
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return int(text)
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"expected a size such as 2GB or 512MiB, found {short(text)}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


@dataclass(frozen=True)
class GradsOptions:
    """Stage 1: what is stored of every training gradient. Part of that stage's identity."""

    form: Literal["auto", "dense"] = option(
        "auto", "auto: each layer as factors or as plain rows, whichever is smaller; dense: all as plain rows"
    )
    layer_forms: str | None = option(
        None, "overrules form for some layers: PATTERN=factored or PATTERN=dense, separated by commas; see plan"
    )
    cache: bool = option(True, "keep the gradients on disk; without, stage 3 computes them again (--no-cache)")
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = option(
        "auto", "stored element type; auto: that of the parameters; 16 bits are scaled row by row, their error measured"
    )
    codec: Literal["lz4", "zstd", "none"] = option("lz4", "compression of the chunks (always lossless)")
    level: int = option(5, "compression level", 1, 9)


@dataclass(frozen=True)
class StestOptions:
    """Stage 2: which linear system is solved, and how. Part of that stage's identity."""

    solver: Literal["cg", "pcg", "exact", "lissa", "ekfac", "fisher", "identity"] = option(
        "cg",
        "cg: conjugate gradients; pcg: block cg with a preconditioner; exact: dense float64 (up to 20,000 parameters);"
        " lissa: the paper's recursion; ekfac: Kronecker-factored approximation; fisher: the empirical Fisher matrix,"
        " exactly, from the stored gradients; identity: plain products of gradients",
    )
    curvature: Literal["auto", "ggn", "hessian", "fisher"] = option(
        "auto",
        "ggn: Gauss-Newton (never indefinite); hessian: exact; fisher: empirical, from the stored gradients;"
        " auto: ggn, but fisher for that solver",
    )
    curvature_samples: int | None = option(
        None, "a fixed random subsample of the training set for the curvature; all if not given", 1
    )
    damping: float | Literal["auto"] = option(
        0.01,
        "added to the diagonal of the curvature; auto: a thousandth of its largest eigenvalue, and enough to make an"
        " indefinite Hessian definite",
        0.0,
    )
    tolerance: float | None = option(
        None,
        "cg, pcg, fisher: relative residual, 1e-4 if not given; lissa: relative error of s_test, 0.02 if not given",
        0.0,
    )
    max_iterations: int = option(1000, "cg, pcg: most iterations for one block of test samples", 1)
    preconditioner: Literal["ekfac", "none"] = option("ekfac", "pcg: what makes it converge faster")
    scale: float | None = option(
        None, "lissa: divides each step; must exceed the curvature; estimated if not given", 1e-30
    )
    depth: int | None = option(None, "lissa: most steps of one recursion; from scale and damping if not given", 1)
    repeats: int = option(1, "lissa: independent recursions that are averaged (the paper's r)", 1)
    sample_batch: int | None = option(None, "lissa: training samples a step; grows by itself if not given", 1)
    seed: int = option(42, "lissa: seed of the sampling", 0)
    solve_dtype: Literal["auto", "float32", "float64"] = option(
        "auto", "arithmetic of the curvature products; auto: float64 for exact and fisher, else that of the parameters"
    )


@dataclass(frozen=True)
class InfluenceOptions:
    """Stage 3: what is kept beside the matrix. Changing these recomputes rankings, never the matrix."""

    top_k: int = option(100, "length of each ranking of helpful and of harmful training samples", 1)
    nonfinite: Literal["stop", "skip"] = option(
        "stop", "a gradient or s_test with NaN or Inf: stop and name it, or leave NaN and keep it out of the rankings"
    )


@dataclass(frozen=True)
class Resources:
    """Where and with how much of the machine; never part of an identity, results do not depend on it."""

    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    memory: int | None = option(None, "budget a stage keeps to, e.g. 4GB; a quarter of the RAM if not given", 1)
    batch_size: int | None = option(None, "samples in one forward and backward; from memory if not given", 1)
    workers: int = option(0, "processes that load data; 0: load in the main process", 0)
    block_rows: int | None = option(None, "training samples in one committed block; from memory if not given", 1)
    test_block_rows: int | None = option(None, "test samples solved together and committed as one block", 1)
    tile_rows: int | None = option(None, "test samples in one tile of the influence matrix; from memory", 1)
    progress: bool = option(True, "progress bars (they are silent in a file anyway)")


SECTIONS = {"grads": GradsOptions, "stest": StestOptions, "influence": InfluenceOptions, "resources": Resources}


@dataclass(frozen=True)
class Options:
    """All options, resolved; one flat mapping outside, four groups inside.

    >>> Options.resolve({"damping": 0.1, "memory": "2GB"}).resources.memory
    2000000000
    """

    grads: GradsOptions = GradsOptions()
    stest: StestOptions = StestOptions()
    influence: InfluenceOptions = InfluenceOptions()
    resources: Resources = Resources()

    @classmethod
    def resolve(cls, given: Mapping[str, Any]) -> Options:
        """Options from a flat mapping; what is not given keeps its default.

        Raises `BadInput` for an unknown key, a wrong type or a value out of range.
        """
        known = {name for name, _, _ in option_fields()}
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known))}"
                raise BadInput(f"unknown option {str(key)[:60]!r}{hint}")
        sections = {}
        for section, kind in SECTIONS.items():
            hints = get_type_hints(kind)
            sections[section] = kind(
                **{
                    f.name: _checked(f, hints[f.name], given[f.name])
                    for f in dataclasses.fields(kind)
                    if f.name in given
                }
            )
        return cls(**sections)

    def flat(self) -> dict[str, Any]:
        """The flat mapping that `resolve` takes; round-trips."""
        return {key: value for section in SECTIONS for key, value in dataclasses.asdict(getattr(self, section)).items()}


def option_fields() -> Iterator[tuple[str, str, dataclasses.Field[Any]]]:
    """Every option as (name, section, dataclass field), in the order of the help text."""
    for section, kind in SECTIONS.items():
        for each in dataclasses.fields(kind):
            yield each.name, section, each


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


def _checked(spec: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """`value` as the field's type, or `BadInput` that names field, value and what is allowed."""
    choices = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    words = next((get_args(each) for each in choices if len(choices) > 1 and get_origin(each) is Literal), ())
    if (value is None and type(None) in choices) or (isinstance(value, str) and value in words):
        return value
    kind = next(each for each in choices if each is not type(None))
    name, found = spec.name.replace("_", "-"), short(value)
    if get_origin(kind) is Literal:
        if not isinstance(value, str) or value not in get_args(kind):
            raise BadInput(f"{name}: expected one of {', '.join(get_args(kind))}, found {found}")
        return value
    try:
        value = parse_size(value) if spec.name == "memory" else _converted(kind, value)
    except (ValueError, OverflowError):
        expected = "a size such as 2GB or 512MiB" if spec.name == "memory" else " or ".join([kind.__name__, *words])
        raise BadInput(f"{name}: expected {expected}, found {found}") from None
    if kind in (int, float):
        _check_range(name, spec.metadata["low"], spec.metadata["high"], value)
    return value


def _converted(kind: type, value: Any) -> Any:
    """`value` as `kind`; a number may come as text, as from a command line or from YAML, to which 1e-3 is text."""
    if isinstance(value, str) and kind in (int, float):
        return kind(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError
    return value


def _check_range(name: str, low: float | None, high: float | None, value: float) -> None:
    highest = LARGEST if high is None and isinstance(value, int) else high
    outside = (low is not None and value < low) or (highest is not None and value > highest)
    if outside or not math.isfinite(value):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise BadInput(f"{name}: expected a finite number {allowed}, found {short(value)}")
