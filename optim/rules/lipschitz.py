"""Algorithm 1 of *Adaptive scaling of the learning rate*, as published."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optim.line import Estimate, Line
from optim.ranges import check_decay, take_floats
from optim.rules.rule import Rule, State

NO_CURVATURE = (
    "the estimator finds no curvature along the direction, so no step length follows: the loss has "
    "none there, and GeN finds one where it bends farther on, or rounding hides it"
)


@dataclass(frozen=True)
class Lipschitz(Rule):
    """The step from the stabilised curvature (de Gournay, Gossard 2022, Algorithm 1).

    ::

        c = mean_b |d^T H_b d| / ‖d‖²                  curvature per unit length
        L = max(c, bias-corrected moving average of c with beta3)
        r = 2 |<d, g>| / (‖d‖² L)

    The factor 2 is that of equation (11), by which ell = 1/2 minimises the quadratic along d and
    ell = 1 is the largest step that does not raise it; as printed, equation (10) and line 7
    contradict it. Where <d, g> < 0, as with momentum, |r| is the step that would suit the
    opposite direction (appendix C.1, which advises ell = 1 - beta1 then).

    Args:
        beta3: decay of the moving average of the curvature, in [0, 1).

    Raises:
        ValueError: beta3 is out of range.

    Example:
        >>> from optim.line import Estimate, Line
        >>> line = Line(iteration=1, value=9.0, slope=4.0, squared_norm=1.0)
        >>> r, _ = Lipschitz().choose(line, Estimate(4.0, 2.0, 2.0), {})
        >>> r
        4.0
    """

    beta3: float = 0.9

    def __post_init__(self) -> None:
        check_decay("beta3", self.beta3)
        take_floats(self, "beta3")

    def choose(
        self, line: Line, estimate: Estimate | None, state: State
    ) -> tuple[float | str, State]:
        if line.squared_norm == 0:
            return 0.0, state
        state = self.averaged(line, estimate, state)
        r = newton_step(2 * abs(line.slope), line.squared_norm * state.get("lipschitz", 0.0))
        return r, state

    def averaged(self, line: Line, estimate: Estimate | None, state: State) -> State:
        """The state with L renewed, if there is an estimate."""
        if estimate is None:
            return state
        c = estimate.magnitude / line.squared_norm
        count = state.get("count", 0) + 1
        average = self.beta3 * state.get("average", 0.0) + (1 - self.beta3) * c
        lipschitz = max(c, average / (1 - self.beta3**count))
        return {**state, "count": count, "average": average, "lipschitz": lipschitz}


def newton_step(slope: float, curvature: float) -> float | str:
    """Their ratio, or that there is none."""
    r = math.inf if curvature == 0 else slope / curvature
    if not math.isfinite(r):
        return NO_CURVATURE
    return r
