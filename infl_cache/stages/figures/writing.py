"""`--figures`: every figure that a run has the numbers for, as files in `RUN/report/figures`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infl_cache.config import short
from infl_cache.disk.durable import remove, require_folder
from infl_cache.disk.inside import refuse_links
from infl_cache.disk.run import RunFolder
from infl_cache.disk.sweep import VALIDATION
from infl_cache.errors import BadInput, IncompleteStore
from infl_cache.maths.task import Task
from infl_cache.stages.figures import of_run
from infl_cache.stages.figures.canvas import FORMATS, require_installed, save
from infl_cache.stages.figures.classes import NoClasses
from infl_cache.stages.rankings import has_matrix
from infl_cache.stages.same import check_same_task
from infl_cache.stages.tiles import require_sound_matrix
from infl_cache.stages.validated import KINDS

if TYPE_CHECKING:
    from infl_cache.stages.figures.canvas import AnyFigure

FOLDER = Path("report") / "figures"


@dataclass(frozen=True)
class Written:
    """The files of the figures, and why others could not be drawn, by name."""

    paths: tuple[Path, ...]
    left_out: dict[str, str]

    def __str__(self) -> str:
        lines = [str(path) for path in self.paths]
        return "\n".join([*lines, *(f"not drawn: {name}: {why}" for name, why in self.left_out.items())])


def require_figures(path: Path, kind: str) -> None:
    """`BadInput`, before any work, unless figures of that kind can be drawn and written below a run folder.

    `DamagedStore` for a link in place of the folder or of a figure.
    """
    if kind not in FORMATS:
        raise BadInput(f"figures: expected one of {', '.join(FORMATS)}, found {short(kind)}")
    require_installed()
    for folder in (path / FOLDER.parent, path / FOLDER):
        require_folder(folder)
    refuse_links(path / FOLDER.parent, (FOLDER.name,))


def write_figures(folder: RunFolder, task: Task | None, kind: str, show: bool = True) -> Written:
    """All figures as `kind` files; of older ones of that kind, those that cannot be drawn any more are removed.

    With a task its samples are shown, where they are pictures. Raises `BadInput` for another kind, without matplotlib,
    and where they cannot be written; `ForeignRun` for another task than the run's.
    """
    require_figures(folder.path, kind)
    if has_matrix(folder):
        require_sound_matrix(folder)
    if task is not None:
        check_same_task(folder, task)
    paths, left_out = [], {}
    for name, draw in _figures(folder, task, show).items():
        path = folder.path / FOLDER / f"{name}.{kind}"
        try:
            paths.append(save(draw(), path))
        except (IncompleteStore, NoClasses) as error:
            left_out[name] = str(error)
            remove([path])
    return Written(tuple(paths), left_out)


def _figures(folder: RunFolder, task: Task | None, show: bool) -> dict[str, Callable[[], AnyFigure]]:
    """What draws each figure, by the name of its file."""
    kinds = [kind for kind in KINDS if (folder.path / VALIDATION / f"{kind}.json").exists()] or ["loo"]
    return {
        "neighbours": lambda: of_run.neighbours_figure(folder, task),
        "classes": lambda: of_run.classes_figure(folder, task, show=show),
        "histogram": lambda: of_run.histogram_figure(folder, show=show),
        "layers": lambda: of_run.layers_figure(folder),
        "self_influence": lambda: of_run.suspects_figure(folder, task),
        **{
            f"validation_{kind}": (lambda kind=kind: of_run.validation_figure(folder, kind))  # type: ignore[misc]
            for kind in kinds
        },
    }
