"""The step at the edge of stability, by averaged slope and curvature."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optim.line import Estimate, Line
from optim.ranges import check_decay, check_positive, take_floats
from optim.rules.lipschitz import newton_step
from optim.rules.rule import Rule, State


@dataclass(frozen=True)
class Edge(Rule):
    """Curvature Dynamics Aware Tuning (CDAT, Roulet, Agarwala et al., arXiv 2407.06183).

    ::

        n = moving average of max(<d, g>, 0) / ‖d‖
        c = moving average of |d^T H d| / ‖d‖²
        r = factor n / (‖d‖ c)

    With factor 1 it is the minimum along d of the quadratic, with 2 the largest step that does
    not raise it, which keeps the sharpness from growing. Slope and curvature are averaged per
    unit length here, so that rescaling d by any factor leaves the rule's steps unchanged.

    Args:
        factor: sigma of the paper, positive.
        beta: decay of both averages, in [0, 1).

    Raises:
        ValueError: factor or beta is out of range.

    Example:
        >>> from optim.line import Estimate, Line
        >>> line = Line(iteration=1, value=9.0, slope=4.0, squared_norm=1.0)
        >>> r, _ = Edge().choose(line, Estimate(4.0, -2.0, 2.0), {})
        >>> round(r, 6)
        4.0
    """

    factor: float = 2.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        check_positive("factor", self.factor)
        check_decay("beta", self.beta)
        take_floats(self, "factor", "beta")

    def choose(
        self, line: Line, estimate: Estimate | None, state: State
    ) -> tuple[float | str, State]:
        if line.squared_norm == 0:
            return 0.0, state
        length = math.sqrt(line.squared_norm)
        state = self._averaged("slope", max(line.slope, 0.0) / length, state)
        if estimate is not None:
            c = abs(estimate.curvature) / line.squared_norm
            state = self._averaged("curvature", c, state)
        slope, curvature = (self._corrected(name, state) for name in ("slope", "curvature"))
        return newton_step(self.factor * slope, length * curvature), state

    def _averaged(self, name: str, value: float, state: State) -> State:
        count = state.get(f"{name}_count", 0) + 1
        average = self.beta * state.get(name, 0.0) + (1 - self.beta) * value
        return {**state, name: average, f"{name}_count": count}

    def _corrected(self, name: str, state: State) -> float:
        count = state.get(f"{name}_count", 0)
        return state[name] / (1 - self.beta**count) if count else 0.0
