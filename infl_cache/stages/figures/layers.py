"""Which layers carry the effect: a bar for each layer's share of all influences, and how test samples differ in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from infl_cache.stages.figures.canvas import HARMFUL, HELPFUL, LINE, PALE, one_axes, plain, tidied
from infl_cache.stages.layers import MODEL, LayerShares

if TYPE_CHECKING:
    from infl_cache.stages.figures.canvas import AnyFigure, Axes

MOST = 25
# Characters of a name that are shown: its end tells layers apart.
WIDTH = 40


def draw_layers(shares: LayerShares, k: int = MOST, axes: Axes | None = None) -> AnyFigure:
    """The k layers of largest share in the model's order; a line over the middle half of the test samples."""
    largest = np.argsort(-np.abs(np.nan_to_num(shares.share_of_all)), kind="stable")[:k]
    shown = np.sort(largest)
    names = [shares.names[layer] or MODEL for layer in shown]
    names = [name if len(name) <= WIDTH else "…" + name[1 - WIDTH :] for name in names]
    texts = [f"{plain(name)} ({shares.parameters[layer]:,})" for name, layer in zip(names, shown, strict=True)]
    figure, axes = one_axes(axes, 5.6 + 0.07 * max(map(len, texts), default=0), 1.6 + 0.3 * max(2, len(shown)))
    whole = 100 * np.nan_to_num(shares.share_of_all[shown])
    axes.barh(range(len(shown)), whole, color=[HELPFUL if share >= 0 else HARMFUL for share in whole], height=0.7)
    for place, layer in enumerate(shown.tolist()):
        each = shares.share[layer][np.isfinite(shares.share[layer])]
        if len(each):
            low, high = 100 * np.quantile(each, (0.25, 0.75))
            axes.plot((low, high), (place, place), color=LINE, linewidth=1.6, solid_capstyle="butt")
    axes.set_yticks(range(len(shown)), texts, fontsize=9)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.axvline(0, color=PALE, linewidth=0.8, zorder=0)
    axes.set_xlabel("share of all influences, %\n(line: the middle half of the test samples)")
    left = f": {len(shown)} of {len(shares.names)}" if len(shown) < len(shares.names) else ""
    axes.set_title(f"Which layers (parameters) carry the effect{left}", fontsize=11)
    tidied(axes)
    return figure
