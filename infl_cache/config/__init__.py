"""Every option, its default, its allowed values and its help: once, for Python, files and the command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_type_hints

from infl_cache.config.checking import checked, parse_size, short
from infl_cache.config.files import MAX_CONFIG_BYTES, read_config_file
from infl_cache.errors import BadInput

__all__ = [
    "MAX_CONFIG_BYTES", "SECTIONS", "DataOptions", "GradsOptions", "InfluenceOptions", "Options", "Resources",
    "SelectionOptions", "StestOptions", "only_options_of", "option", "option_fields", "parse_size",
    "read_config_file", "short",
]  # fmt: skip

Made = TypeVar("Made")


def option(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field that carries its help text and inclusive range."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


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
        "relative residual, 1e-4 if not given, for ekfac 0.1; lissa: relative error of s_test, 0.02 if not given",
        0.0,
    )
    max_iterations: int = option(1000, "cg, pcg: most iterations for one block of test samples", 1)
    preconditioner: Literal["nystrom", "ekfac", "none"] = option(
        "nystrom", "pcg: from the leading eigenvectors of a subsample's curvature, from EK-FAC, or none"
    )
    scale: float | None = option(
        None, "lissa: divides each step; must exceed the curvature; estimated if not given", 1e-30
    )
    depth: int | None = option(None, "lissa: most steps of one recursion; from scale and damping if not given", 1)
    repeats: int = option(1, "lissa: most independent recursions that are averaged (the paper's r)", 1)
    sample_batch: int | None = option(None, "lissa: training samples a step; grows by itself if not given", 1)
    seed: int = option(42, "lissa: seed of the sampling", 0)
    solve_dtype: Literal["auto", "float32", "float64"] = option(
        "auto", "arithmetic of the curvature products; auto: float64 for exact and fisher, else that of the parameters"
    )


@dataclass(frozen=True)
class DataOptions:
    """The data: how samples are fetched. Part of every stage's identity."""

    freeze_augmentation: bool = option(
        False, "data that are drawn anew at each fetch: draw sample i always by the same seed (--freeze-augmentation)"
    )


@dataclass(frozen=True)
class SelectionOptions:
    """What is asked: about which test samples, and about which quantity. More test samples can follow later."""

    test: str | None = option(
        None, "test samples by indices and slices, such as 0:1000 or 5,7,100:200 or all; those of before if not given"
    )
    test_per_class: int | None = option(None, "so many test samples of each class, the first ones by index", 1)
    test_start: int = option(0, "with test-per-class: leave out the first so many of each class", 0)
    measure: Literal["loss", "margin", "logit", "embedding-norm"] | None = option(
        None, "what is explained of a test sample; that of the task if not given. Part of the identity of stage 2"
    )


@dataclass(frozen=True)
class InfluenceOptions:
    """Stage 3: how it multiplies, and what is kept. Changing these recomputes rankings; product-dtype the matrix."""

    product_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "element type of the products; bfloat16 is faster where the processor or GPU has units for it, and rounds; its"
        " error is measured. What is stored in float64 is multiplied in it by default",
    )

    top_k: int = option(100, "length of each ranking of helpful and of harmful training samples", 1)
    top_k_train: int = option(10, "length of each training sample's rankings of test samples", 1)
    matrix: bool = option(True, "keep the influence matrix; without, the rankings alone (--no-matrix)")
    by_layer: bool = option(
        False, "also what each layer gives to the influences, which sums to them; needs the matrix (--by-layer)"
    )
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
    check_data: Literal["sample", "full"] = option(
        "sample",
        "how many samples are compared with those that stored rows were computed from: as many as two seconds suffice"
        " for, or all",
    )
    progress: bool = option(True, "progress bars (they are silent in a file anyway)")


SECTIONS = {
    "data": DataOptions,
    "grads": GradsOptions,
    "stest": StestOptions,
    "selection": SelectionOptions,
    "influence": InfluenceOptions,
    "resources": Resources,
}


# What a value should have been, where the name of its type does not tell.
@dataclass(frozen=True)
class Options:
    """All options, resolved; one flat mapping outside, six groups inside.

    >>> Options.resolve({"damping": 0.1, "memory": "2GB"}).resources.memory
    2000000000
    """

    data: DataOptions = DataOptions()
    grads: GradsOptions = GradsOptions()
    stest: StestOptions = StestOptions()
    selection: SelectionOptions = SelectionOptions()
    influence: InfluenceOptions = InfluenceOptions()
    resources: Resources = Resources()

    @classmethod
    def resolve(cls, given: Mapping[str, Any]) -> Options:
        """Options from a flat mapping; what is not given keeps its default.

        Raises `BadInput` for an unknown key, a wrong type, a value out of range or two that contradict each other.
        """
        refuse_unknown(given, {name for name, _, _ in option_fields()})
        sections: dict[str, Any] = {section: options_of(kind, given) for section, kind in SECTIONS.items()}
        made = cls(**sections)
        if made.influence.by_layer and not made.influence.matrix:
            raise BadInput(
                "by-layer: expected a run that keeps its matrix, found --no-matrix; give --matrix or --no-by-layer"
            )
        return made

    def flat(self) -> dict[str, Any]:
        """The flat mapping that `resolve` takes; round-trips."""
        return {key: value for section in SECTIONS for key, value in dataclasses.asdict(getattr(self, section)).items()}


def refuse_unknown(given: Mapping[str, Any], known: Collection[str]) -> None:
    """`BadInput` for the first key that is not known, with the nearest one that is."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise BadInput(f"unknown option {str(key)[:60]!r}; {hint}")


def only_options_of(kind: type[Made], given: Mapping[str, Any]) -> Made:
    """As `options_of`, of a mapping that has nothing else; `BadInput` for an unknown key too."""
    refuse_unknown(given, [each.name for each in dataclasses.fields(kind)])  # type: ignore[arg-type]
    return options_of(kind, given)


def options_of(kind: type[Made], given: Mapping[str, Any]) -> Made:
    """A dataclass of options from the values that `given` has for its fields; `BadInput` for a wrong one."""
    hints, fields = get_type_hints(kind), dataclasses.fields(kind)  # type: ignore[arg-type]
    return kind(**{f.name: checked(f, hints[f.name], given[f.name]) for f in fields if f.name in given})


def option_fields() -> Iterator[tuple[str, str, dataclasses.Field[Any]]]:
    """Every option as (name, section, dataclass field), in the order of the help text."""
    for section, kind in SECTIONS.items():
        for each in dataclasses.fields(kind):
            yield each.name, section, each
