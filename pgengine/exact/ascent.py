"""Climbs a smooth function of a few numbers whose gradient is known exactly, in float64.

This is for exact objectives, where a quasi-Newton method is at home; estimates of gradients are followed in training.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float64

__all__ = ["climb"]

Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""A vector to the value there and its gradient; minus infinity where the value does not exist."""


def climb(
    objective: Objective, start: Float64[np.ndarray, "P"], *, iterations: int = 500
) -> tuple[float, Float64[np.ndarray, "P"]]:
    """The highest point that L-BFGS with a line search finds from a start.

    Args:
        objective: What to climb.
        start: Where to begin; the value must exist there.
        iterations: Most steps.

    Returns:
        The value, and where it is.
    """
    best = (-np.inf, start)
    height, slope = objective(start)
    scale = 1.0 / max(float(np.abs(slope).max()), 1e-300)  # the first step is as long as the start is steep
    point = torch.tensor(start, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        [point],
        lr=1.0,
        max_iter=iterations,
        max_eval=4 * iterations,
        tolerance_grad=1e-13,
        tolerance_change=1e-15,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def depth() -> float:
        nonlocal best
        here = point.detach().numpy().copy()
        value, gradient = objective(here)
        if value > best[0]:
            best = (value, here)
        point.grad = torch.as_tensor(-scale * gradient)
        return -scale * value if np.isfinite(value) else float("inf")

    if not slope.any():
        return height, start
    optimizer.step(depth)  # type: ignore[no-untyped-call]
    return best
