"""The step from the curvature that also suits directions with momentum."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optim.line import Estimate, Line
from optim.rules.lipschitz import Lipschitz, newton_step
from optim.rules.rule import State
from optim.rules.slope import lower_slope

_LEAST_AGREEMENT = 0.1


@dataclass(frozen=True)
class Cautious(Lipschitz):
    """:class:`Lipschitz` with bounds that remember as long as the base's momentum mu.

    ::

        b = <d, g> / ‖d‖                               slope per unit length
        B = max(0, min(b, bias-corrected moving average of b with mu))
        c = mean_b |d^T H_b d| / ‖d‖²
        L = max(c, bias-corrected moving average of c with beta3, mu times the last L)
        a = moving average of d^T H d / ‖d‖² over that of c, at least 1/10
        r = (1 - mu^k) 2 B sqrt(a) / (‖d‖ L)

    A direction with momentum holds the gradients of about 1 / (1 - mu) steps, so that one batch
    knows less of it: its own gradient counts in b as if the loss fell by it for all batches, and
    a batch whose curvature is small says nothing of those before. So the lower slope and the
    higher curvature are taken, over the time that the direction remembers, and the first steps
    are shorter, until it has filled. a tells how far the curvatures of the samples agree: where
    they cancel, the step is beyond what a quadratic tells. Between estimates the step r ‖d‖ may
    fall but not grow, since a steeper slope tells of a curvature that has grown.

    Without momentum and with a = 1 this is Algorithm 1 of *Adaptive scaling of the learning
    rate*. Found by experiment: see docs/robustness.md.

    Args:
        beta3: decay of the moving average of the curvature, in [0, 1).

    Raises:
        ValueError: beta3 is out of range.

    Example:
        >>> from optim.line import Estimate, Line
        >>> line = Line(iteration=1, value=9.0, slope=4.0, squared_norm=1.0, momentum=0.75)
        >>> r, _ = Cautious().choose(line, Estimate(4.0, 2.0, 2.0), {})
        >>> r  # a quarter of the first step
        1.0
    """

    def choose(
        self, line: Line, estimate: Estimate | None, state: State
    ) -> tuple[float | str, State]:
        if line.squared_norm == 0:
            return 0.0, state
        mu, last = line.momentum, state.get("lipschitz", 0.0)
        state = self.averaged(line, estimate, state)
        if estimate is not None:
            c = estimate.curvature / line.squared_norm
            signed = self.beta3 * state.get("signed", 0.0) + (1 - self.beta3) * c
            highest = max(state["lipschitz"], mu * last)
            state = {**state, "lipschitz": highest, "signed": signed}
        length = math.sqrt(line.squared_norm)
        lower, filled, state = lower_slope(line, state)
        # Both averages lack the same weight, which cancels.
        agreement = _ratio(state.get("signed", 0.0), state.get("average", 0.0))
        reduced = filled * 2 * lower * math.sqrt(max(agreement, _LEAST_AGREEMENT))
        r = newton_step(reduced, length * state.get("lipschitz", 0.0))
        if isinstance(r, str):
            return r, state
        if estimate is None:
            r = min(r, state["length"] / length)
        return r, {**state, "length": r * length}


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 1.0
