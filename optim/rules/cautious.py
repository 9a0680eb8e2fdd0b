"""The step from the curvature that also suits directions with momentum."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optim.line import Estimate, Line
from optim.rules.caution import cautioned
from optim.rules.lipschitz import newton_step
from optim.rules.rule import Rule, State
from optim.rules.slope import lower_slope

_LEAST_AGREEMENT = 0.1
_LEAST_MEMORY = 1 / 2


@dataclass(frozen=True)
class Cautious(Rule):
    """Algorithm 1 of *Adaptive scaling*, its memory as long as the base's momentum mu.

    ::

        b = <d, g> / ‖d‖                               slope per unit length
        B = max(0, min(b, moving average of b))
        c = mean_b |d^T H_b d| / ‖d‖²
        L = max(c, moving average of c, m² times the last L),  m = max(mu, 1/2)
        a = moving average of d^T H d / ‖d‖² over that of c, at least 1/10
        r = (1 - mu^k) q 2 B a^(1/3) / (‖d‖ L)

    with bias-corrected averages that decay with mu. A direction with momentum holds the
    gradients of about 1 / (1 - mu) steps, so that one batch knows less of it: its own gradient
    counts in b as if the loss fell by it for all batches, and a batch whose curvature is small
    says nothing of those before. So the lower slope and the higher curvature are taken, over the
    time that the direction remembers, and the first steps are shorter, until it has filled.
    Without momentum little is remembered: a curvature falls to a quarter a step at most. a tells
    how far the curvatures of the samples agree: where they cancel, the step is beyond what a
    quadratic tells. q in [0.01, 1] falls where the steps overshoot the minimum of nearly every new
    batch (optim.rules.caution). Between estimates the step r ‖d‖ may fall but not grow, since a
    steeper slope tells of a curvature that has grown.

    Found by experiment: see docs/robustness.md.

    Example:
        >>> from optim.line import Estimate, Line
        >>> line = Line(iteration=1, value=9.0, slope=4.0, squared_norm=1.0, momentum=0.75)
        >>> r, _ = Cautious().choose(line, Estimate(4.0, 2.0, 2.0), {})
        >>> r  # a quarter of the first step
        1.0
    """

    @property
    def needs_hindsight(self) -> bool:
        return True

    def choose(
        self, line: Line, estimate: Estimate | None, state: State
    ) -> tuple[float | str, State]:
        if line.squared_norm == 0:
            return 0.0, state
        length = math.sqrt(line.squared_norm)
        lower, filled, state = lower_slope(line, state)
        if estimate is not None:
            state = _measured(estimate, line, state)
        state = cautioned(line, state)
        agreement = max(_LEAST_AGREEMENT, _ratio(state["signed"], state["average"]))
        reduced = filled * state["caution"] * 2 * lower * agreement ** (1 / 3)
        r = newton_step(reduced, length * state["lipschitz"])
        if isinstance(r, str):
            return r, state
        if estimate is None:
            r = min(r, state["length"] / length)
        return r, {**state, "length": r * length}


def _measured(estimate: Estimate, line: Line, state: State) -> State:
    mu = line.momentum
    c, signed = (x / line.squared_norm for x in (estimate.magnitude, estimate.curvature))
    unseen = mu * state.get("unseen", 1.0)
    average = mu * state.get("average", 0.0) + (1 - mu) * c
    # Both averages lack the same weight, which cancels in their ratio.
    signed = mu * state.get("signed", 0.0) + (1 - mu) * signed
    held = max(mu, _LEAST_MEMORY) ** 2 * state.get("lipschitz", 0.0)
    highest = max(c, average / (1 - unseen), held)
    return {**state, "unseen": unseen, "average": average, "signed": signed, "lipschitz": highest}


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 1.0
