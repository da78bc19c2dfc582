r"""The minimum of a smooth convex function from its gradients alone, to where rounding ends.

L-BFGS (Nocedal & Wright 2006, algorithm 7.4). Values of the function are never compared: near the minimum they differ
by less than float64 resolves, while the slope along a step, :math:`\nabla f(x + t d) \cdot d`, which rises with t
where the function is convex, still tells on which side of the best t one is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Gradient = Callable[[Tensor], Tensor]

MEMORY = 30
MAX_ITERATIONS = 1000
# Without a smaller gradient for so many iterations, rounding is all that is left.
STALLED = 50
# A step is taken once the slope at its end is at most this part of the slope at its start.
FLATTER = 0.5
TRIALS = 40


@dataclass(frozen=True)
class Minimum:
    """Where a minimisation ended: the point (P,), the norm of the gradient there, iterations, and whether it is small.

    `converged` says that the norm is at most the one asked for; a stalled or endless one says false.
    """

    point: Tensor
    norm: float
    iterations: int
    converged: bool


def minimise(
    gradient: Gradient, start: Tensor, target: float, solve: Gradient | None = None, most: int = MAX_ITERATIONS
) -> Minimum:
    """Go down from `start` until the gradient's norm is at most `target`.

    Args:
        gradient: of a convex function, at a point (P,).
        start: the first point (P,), float64.
        target: norm of the gradient to stop at.
        solve: `v -> A^-1 v` for a positive definite A like the curvature; makes it a matter of a few iterations.
        most: iterations to stop after.

    Example:
        >>> import torch
        >>> minimise(lambda x: x - 3, torch.zeros(2, dtype=torch.float64), 1e-12).point.tolist()
        [3.0, 3.0]
    """
    point, slope_at = start, gradient(start)
    best = (float(slope_at.norm()), point)
    since = iteration = 0
    pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=MEMORY)
    while best[0] > target and since < STALLED and iteration < most:
        iteration += 1
        step, after = _step(gradient, point, slope_at, -_direction(slope_at, pairs, solve))
        if step is None or after is None:
            break
        if float(step @ (after - slope_at)) > 0:
            pairs.append((step, after - slope_at))
        point, slope_at, norm = point + step, after, float(after.norm())
        since = 0 if norm < 0.9 * best[0] else since + 1
        best = min(best, (norm, point), key=lambda each: each[0])
    return Minimum(best[1], best[0], iteration, best[0] <= target)


def _direction(slope: Tensor, pairs: deque[tuple[Tensor, Tensor]], solve: Gradient | None) -> Tensor:
    """The two-loop recursion: an inverse Hessian made of the last steps, times the gradient."""
    found, weights = slope.clone(), []
    for step, change in reversed(pairs):
        weights.append(float(step @ found) / float(step @ change))
        found -= weights[-1] * change
    if solve is not None:
        found = solve(found)
    elif pairs:
        step, change = pairs[-1]
        found *= float(step @ change) / float(change @ change)
    for (step, change), weight in zip(pairs, reversed(weights), strict=True):
        found += (weight - float(change @ found) / float(step @ change)) * step
    return found


def _step(gradient: Gradient, point: Tensor, slope: Tensor, along: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """`t * along` after which it is flat enough, and the gradient there; the root of the slope in t is bracketed."""
    first = float(slope @ along)
    if not first < 0:
        return None, None
    low, low_slope, high, high_slope, t = 0.0, first, float("inf"), float("nan"), 1.0
    for _ in range(TRIALS):
        after = gradient(point + t * along)
        here = float(after @ along)
        if abs(here) <= -FLATTER * first:
            return t * along, after
        if here < 0:
            low, low_slope = t, here
        else:  # beyond the minimum, or where nothing is finite any more
            high, high_slope = t, here
        if high == float("inf"):
            t = min(10 * low, max(2 * low, low * first / (first - low_slope) if first < low_slope else 10 * low))
        elif high_slope != high_slope or high_slope == float("inf"):
            t = (low + high) / 2
        else:
            part = low_slope / (low_slope - high_slope)
            t = low + (high - low) * min(0.9, max(0.1, part))
    return None, None
