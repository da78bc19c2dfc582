"""The only door to matplotlib: figures that nobody else's plots know of, their colours, and how they become files."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from infl_cache.disk.durable import make_folders, write_atomically
from infl_cache.errors import BadInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
    from matplotlib.figure import SubFigure as SubFigure

    AnyFigure: TypeAlias = Figure | SubFigure

log = logging.getLogger("infl_cache")

FORMATS = ("png", "svg")
EXTRA = "pip install 'infl_cache[figures]'"
DOTS = 120
# Told apart by most colour-blind readers (Okabe & Ito 2008), and by their brightness in print.
HELPFUL, HARMFUL = "#0072B2", "#D55E00"
LINE, GREY, PALE = "0.25", "0.55", "0.88"
# Blue is helpful, red harmful: for influences whose negative values help; reversed for the others.
DIVERGING = {1: "RdBu_r", -1: "RdBu"}


def installed() -> bool:
    """Whether figures can be drawn here."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def require_installed() -> None:
    """`BadInput` that names the extra where matplotlib is not installed."""
    if not installed():
        raise BadInput(f"figures: expected matplotlib, found none; {EXTRA}")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, which pyplot never hears of."""
    require_installed()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS, layout="constrained")


def one_axes(axes: Axes | None, width: float, height: float) -> tuple[AnyFigure, Axes]:
    """The axes to draw into, and their figure: a new one of that size unless axes are given."""
    axes = axes if axes is not None else new_figure(width, height).subplots()
    figure = axes.get_figure()
    if figure is None:
        raise BadInput("axes: expected axes of a figure, found some that were removed from theirs")
    return figure, axes


def tidied(axes: Axes) -> None:
    """Without the lines above and to the right, which say nothing."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def plain(text: str) -> str:
    r"""A text that is drawn as it is: matplotlib takes what is between two dollars for a formula, and may refuse it.

    >>> print(plain("$5 or $6"), plain("so\x1b[2J so"))
    \$5 or \$6 so [2J so
    """
    return "".join(each if each.isprintable() else " " for each in text).replace("$", r"\$")


def save(figure: AnyFigure, path: Path) -> Path:
    """Write a figure as `.png` or `.svg`: the file is the old one or the whole new one; equal figures, equal files."""
    from matplotlib import rc_context

    kind, buffer = path.suffix.removeprefix("."), io.BytesIO()
    with rc_context({"svg.hashsalt": "infl_cache"}):
        figure.figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else {})
    make_folders(path.parent)
    write_atomically(path, buffer.getvalue())
    return path


def picture(path: Path, draw: Callable[[], AnyFigure | None]) -> Path | None:
    """What a command draws by the way, saved; None where there is nothing, or, with a note, no matplotlib."""
    if not installed():
        log.warning(f"no picture: matplotlib is not installed; {EXTRA}")
        return None
    figure = draw()
    return None if figure is None else save(figure, path)
