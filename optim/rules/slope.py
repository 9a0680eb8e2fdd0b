"""The slope along a direction with momentum, of which one batch knows only a part."""

from __future__ import annotations

import math

from optim.line import Line
from optim.rules.rule import State


def lower_slope(line: Line, state: State) -> tuple[float, float, State]:
    """max(0, min(b, bias-corrected moving average of b with mu)), b = <d, g> / ‖d‖.

    This batch's own gradient is part of d, so that b is larger here than for other batches; the
    slopes over the time that the direction remembers bound it.

    Returns:
        The lower slope, 1 - mu^k, and the state with its averages renewed.
    """
    mu = line.momentum
    b = line.slope / math.sqrt(line.squared_norm)
    # What is missing of full weight: a product, since mu may change from step to step.
    missing = mu * state.get("missing", 1.0)
    slopes = mu * state.get("slopes", 0.0) + (1 - mu) * b
    state = {**state, "missing": missing, "slopes": slopes}
    return max(0.0, min(b, slopes / (1 - missing))), 1 - missing, state
