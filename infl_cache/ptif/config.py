"""`Config`: every key of the old package's config, its default, its allowed values; both spellings of each."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from infl_cache.config import Options, option, option_fields, short
from infl_cache.config.checking import checked
from infl_cache.errors import BadInput

# What the old package's README called a key, by what its code called it.
SPELLINGS = {
    "r_averaging": "r",
    "test_start_index": "test_sample_start_per_class",
    "progress": "display_progress",
}
FALSE_OR_INT = ("test_sample_start_per_class", "test_sample_num")
# Options of a run that keys of a config stand for.
DECIDED = {
    "solver": "solver", "curvature": "curvature", "damping": "damp", "scale": "scale", "depth": "recursion_depth",
    "repeats": "r", "tolerance": "tolerance", "seed": "seed", "device": "gpu", "batch_size": "batch_size",
    "test_block_rows": "at_once", "test": "test_sample_ids", "test_per_class": "test_sample_num",
    "test_start": "test_sample_start_per_class", "progress": "display_progress",
    "freeze_augmentation": "freeze_augmentation", "cache": "calc_method", "matrix": "calc_method",
}  # fmt: skip
# Keys that decide no number: where, with how much, and what is shown.
ELSEWHERE = (
    "gpu", "outdir", "save_pth", "log_filename", "json_filename", "display_progress", "calc_method", "batch_size",
    "dataset", "force", "at_once", "test_sample_start_per_class", "test_sample_num", "test_sample_ids", "num_classes",
)  # fmt: skip


# Batches of a loader smaller than this are no hint at how many fit: the old package's examples had 1 to 4.
SMALL_BATCH = 16


@dataclass(frozen=True)
class Config:
    r"""The config as a checked, frozen object; a dict of the same keys does as well wherever a config is asked for.

    `print(config)` shows it as a table. With `readjust` the scale of LiSSA is chosen anew where the one given would
    diverge, or would take more than `recursion_depth` steps: by

    .. math:: h \leftarrow v + (1 - damp / scale)\, h - C h / scale, \qquad s = h / scale

    the limit is :math:`(C + damp\, I)^{-1} v` at any scale. Recursion depth and `r` are upper bounds: a recursion
    stops, and no more are averaged, once a bound of the error meets `tolerance`.

    Raises `BadInput` for an unknown key, a wrong type or a value out of range.

    Example:
        >>> config = Config.from_dict({"r_averaging": 10, "damp": 0.1})
        >>> config.r, config.damp, config.to_dict()["recursion_depth"]
        (10, 0.1, 5000)
    """

    outdir: str = option("outdir", "folder of the JSON files")
    save_pth: str | None = option(None, "run folder of calc_all_grad_then_test; outdir/run if None")
    json_filename: str | None = option(None, "name of the JSON file; influence_results_START_NUM.json if None")
    log_filename: str | None = option(None, "file that is logged to besides stdout")
    display_progress: bool = option(True, "progress bars")
    seed: int = option(42, "seed of the sampling of LiSSA, and of curvature_samples", 0)
    gpu: int = option(-1, "GPU id, -1 for the CPU", -1)
    calc_method: Literal["img_wise", "all_grad_then_test"] = option("img_wise", "which mode calc_influences takes")
    test_sample_start_per_class: int = option(False, "test samples of each class to leave out first; False: none")
    test_sample_num: int = option(False, "test samples of each class; False: all")
    test_sample_ids: list[int] | None = field(
        default=None, metadata={"help": "test samples by their ids, in place of the two above"}
    )
    num_classes: int | None = option(None, "with a number or start of each class: classes below it alone", 1)
    recursion_depth: int = option(5000, "most steps of a LiSSA recursion", 1)
    r: int = option(1, "most LiSSA recursions that are averaged", 1)
    damp: float | Literal["auto"] | None = option(
        0.01, "added to the diagonal of the curvature; auto or None: a thousandth of its largest eigenvalue", 0.0
    )
    scale: float | None = option(25.0, "divides each LiSSA step, decides no result; None: from the spectrum", 1e-30)
    readjust: bool = option(True, "choose the scale anew where the one given diverges or takes too many steps")
    solver: Literal["lissa", "cg", "pcg", "exact", "ekfac", "fisher", "identity"] = option(
        "lissa", "of s_test; cg and exact solve the system itself"
    )
    curvature: Literal["auto", "ggn", "hessian", "fisher"] = option("auto", "auto: Gauss-Newton; hessian: exact")
    tolerance: float | None = option(None, "error of s_test; None: 0.02 of LiSSA, a residual of 1e-4 of others", 0.0)
    at_once: int | None = option(
        None, "test samples solved together; None: as many as fit. Decides no result but by rounding", 1
    )
    batch_size: int | Literal["loader", "auto"] = option(
        "loader",
        "samples a forward and backward; loader: its own, if 16 or more; auto: from memory. Decides no result",
        1,
    )
    freeze_augmentation: bool = option(False, "draw each sample of data that change by the same seed each time")
    force: bool = option(False, "compute and write anew what is there already")
    dataset: str | None = option(None, "a name, for the reader")
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "any other option of infl_cache.Run, such as memory or dtype"}
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in dataclasses.fields(self):
            object.__setattr__(self, each.name, _checked(each, hints[each.name], getattr(self, each.name)))
        if self.test_sample_ids is not None and (self.test_sample_num or self.test_sample_start_per_class):
            raise BadInput(
                "config['test_sample_ids']: expected either ids or a number of each class, found both;"
                " leave test_sample_num and test_sample_start_per_class False"
            )

    @classmethod
    def from_dict(cls, given: Mapping[str, Any] | Config) -> Config:
        """The config that a mapping says, in either spelling of a key; what it leaves out keeps its default."""
        if isinstance(given, Config):
            return given
        if not isinstance(given, Mapping):
            raise BadInput(f"config: expected a dict or a Config, found {type(given).__name__}; see get_default_config")
        defaults = {each.name: each.default for each in dataclasses.fields(cls)}
        found = {key: value for key, value in given.items() if key in defaults}
        for key, value in given.items():
            if key in defaults:
                continue
            if key not in SPELLINGS:
                raise BadInput(_unknown(key, [*defaults, *SPELLINGS], f"config: unknown key {short(key)}"))
            name = SPELLINGS[key]
            # A dict of defaults to which the other spelling was added.
            if name not in found or found[name] == defaults[name]:
                found[name] = value
            elif value not in (defaults[name], found[name]):
                raise BadInput(f"config: expected one of {key} and {name}, found {short(value)} and {found[name]!r}")
        return cls(**found)

    @classmethod
    def beside(cls, config: Mapping[str, Any] | Config | None, **arguments: Any) -> Config:
        """The config (None: the defaults) of a function that has arguments of the same names and defaults.

        Raises `BadInput` where both say something else than the default, and not the same.

        >>> Config.beside({"damp": 0.5}, damp=0.01, r=3).to_dict()["damp"]
        0.5
        """
        found, defaults = cls.from_dict(config or {}).to_dict(), cls().to_dict()
        for name, value in arguments.items():
            if value == defaults[name]:
                continue
            if found[name] not in (defaults[name], value):
                raise BadInput(
                    f"{name}: expected {short(value)}, as the argument says, or config[{name!r}] {short(found[name])},"
                    " found both"
                )
            found[name] = value
        return cls.from_dict(found)

    def to_dict(self) -> dict[str, Any]:
        """The dict that `from_dict` takes, of what JSON can hold."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        values = {each.name: repr(getattr(self, each.name)) for each in dataclasses.fields(self)}
        wide, name = max(map(len, values.values())), max(map(len, values))
        return "\n".join(
            f"{each.name:{name}}  {values[each.name]:{min(wide, 40)}}  {each.metadata['help']}"
            for each in dataclasses.fields(self)
        )

    @property
    def start(self) -> int:
        """Test samples of each class that are left out."""
        return int(self.test_sample_start_per_class)

    def run_options(self, loader_batch: int | None) -> dict[str, Any]:
        """The options of `infl_cache.Run` that say the same, but for the choice of test samples and the cache."""
        sampled = (
            {"scale": self.scale, "depth": self.recursion_depth, "repeats": self.r} if self.solver == "lissa" else {}
        )
        size = self.batch_size if isinstance(self.batch_size, int) else None
        if self.batch_size == "loader" and loader_batch is not None and loader_batch >= SMALL_BATCH:
            size = loader_batch
        return {
            **self.options,
            **sampled,
            "solver": self.solver,
            "curvature": self.curvature,
            "damping": "auto" if self.damp is None else self.damp,
            "tolerance": self.tolerance,
            "seed": self.seed,
            "device": "cpu" if self.gpu == -1 else f"cuda:{self.gpu}",
            "batch_size": size,
            "test_block_rows": self.at_once,
            "progress": self.display_progress,
            "freeze_augmentation": self.freeze_augmentation,
        }

    def numbers(self) -> dict[str, Any]:
        """The keys that decide what comes out."""
        own = {key: value for key, value in self.to_dict().items() if key not in (*ELSEWHERE, "options")}
        unused = {"recursion_depth", "r", "scale", "readjust", "seed"} if self.solver != "lissa" else set()
        if self.options.get("curvature_samples") is not None:  # they are drawn by it
            unused.discard("seed")
        resources = {name for name, section, _ in option_fields() if section == "resources"}
        beside = {f"options.{key}": value for key, value in self.options.items() if key not in resources}
        return {key: value for key, value in {**own, **beside}.items() if key not in unused}


def get_default_config() -> dict[str, Any]:
    """The documented defaults, as a dict to change at will.

    >>> config = get_default_config()
    >>> config["recursion_depth"], config["r"], config["damp"], config["scale"], config["gpu"]
    (5000, 1, 0.01, 25.0, -1)
    """
    return Config().to_dict()


def _unknown(key: Any, known: list[str], text: str) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    return f"{text}; did you mean {near[0]}?" if near else f"{text}; known: {', '.join(sorted(known))}"


def _checked(spec: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """A value of the config as its key's type, or `BadInput` that says what was expected."""
    where = f"config[{spec.name!r}]"
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    value = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
    if spec.name in FALSE_OR_INT:
        least = 0 if spec.name == FALSE_OR_INT[0] else 1
        if value is None or value is False:
            return False
        if not isinstance(value, int) or value is True or value < least:
            raise BadInput(f"{where}: expected False or a whole number of at least {least}, found {short(value)}")
        return value
    if spec.name == "test_sample_ids":
        return _ids(where, value)
    if spec.name == "options":
        return _options(where, value)
    if spec.name == "calc_method" and isinstance(value, str):
        value = value.removeprefix("calc_")
    try:
        return checked(spec, hint, value)
    except BadInput as error:
        raise BadInput(f"{where}: {str(error).split(': ', 1)[1]}") from None


def _ids(where: str, value: Any) -> list[int] | None:
    if value is None:
        return None
    found = value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, (range, tuple)) else value
    if not isinstance(found, list) or not found or not all(type(each) is int and each >= 0 for each in found):
        raise BadInput(f"{where}: expected a list of ids of test samples, found {short(value)}")
    return list(dict.fromkeys(found))


def _options(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise BadInput(f"{where}: expected a dict of options of infl_cache.Run, found {short(value)}")
    for key in value:
        if key in DECIDED:
            raise BadInput(f"{where}: expected other options than {key}, which config['{DECIDED[key]}'] decides")
    Options.resolve(value)
    return dict(value)
