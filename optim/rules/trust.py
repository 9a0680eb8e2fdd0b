"""The step that goes no farther than measurements have borne out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from optim.line import Estimate, Line
from optim.rules.caution import cautioned
from optim.rules.lipschitz import NO_CURVATURE, Lipschitz
from optim.rules.rule import State
from optim.rules.slope import lower_slope

_GROWTH = 4.0  # of the trusted length at an estimate
_LEAST = 0.5  # of the trusted length that an estimate leaves
_BENT = 2.0  # times the curvature known so far: a surprise


@dataclass(frozen=True)
class Trust(Lipschitz):
    """Steps of a trusted length at most, which grows geometrically while estimates say so.

    ::

        b = <d, g> / ‖d‖                               slope per unit length
        B = max(0, min(b, bias-corrected moving average of b with the base's momentum mu))
        L = max(c, bias-corrected moving average of c with beta3),  c = |d^T H d| / ‖d‖²
        l = min(2 B / L, 4 T) at an estimate, where T becomes max(l, T / 2) if l > 0
        l = min(2 B / L, T)   between estimates
        q in [0.01, 1] falls where steps overshoot nearly every new batch (optim.rules.caution)
        r = (1 - mu^k) q l / ‖d‖

    An estimate is also taken at the step after one that asked for four times T or more than doubled
    L, and at the step after a loss above twice the average of the last ten. Where the loss ahead
    was NaN or infinite, c is L at least; where the rounding of the losses hid both slope and
    curvature, nothing changes once L is known. T is no longer than the base allows.

    T is the distance at which estimators that probe take the next loss; where none is taken, the
    first step is as long as the curvature says. A parabola without curvature, or with its minimum
    far off, makes T four times as long and no more; a step that one batch wants short makes all
    shorter until the next estimate.

    The rule of :class:`optim.GeN`. Found by experiment: see docs/robustness.md.

    Args:
        beta3: decay of the moving average of the curvature, in [0, 1).

    Raises:
        ValueError: beta3 is out of range.

    Example:
        >>> from optim.line import Estimate, Line
        >>> line = Line(iteration=1, value=9.0, slope=4.0, squared_norm=1.0)
        >>> r, _ = Trust().choose(line, Estimate(4.0, 2.0, 2.0, reach=0.5), {})
        >>> r  # the parabola says 4.0, it was looked at as far as 0.5
        2.0
    """

    beta3: float = 0.7

    @property
    def needs_hindsight(self) -> bool:
        return True

    def choose(
        self, line: Line, estimate: Estimate | None, state: State
    ) -> tuple[float | str, State]:
        if line.squared_norm == 0:
            return 0.0, state
        length = math.sqrt(line.squared_norm)
        known = state.get("lipschitz", math.inf)
        if estimate is not None and known < math.inf:
            if estimate.blind:
                estimate = None
            elif estimate.at_least:
                magnitude = max(estimate.magnitude, known * line.squared_norm)
                estimate = replace(estimate, magnitude=magnitude)
        state = self.averaged(line, estimate, state)
        lower, filled, state = lower_slope(line, state)
        lipschitz = state.get("lipschitz", 0.0)
        wanted = 2 * lower / lipschitz if lipschitz > 0 else math.inf if lower > 0 else 0.0
        if estimate is None:
            going = min(wanted, state["trusted"])
            state = {**state, "unsettled": 0.0}
        else:
            trusted = state.get("trusted", estimate.reach * length)
            going = min(wanted, _GROWTH * trusted)
            if going == math.inf:
                return NO_CURVATURE, state
            unsettled = going >= _GROWTH * trusted or lipschitz > _BENT * known
            if going > 0:
                trusted = going if trusted == math.inf else max(going, _LEAST * trusted)
                trusted = min(trusted, line.largest_r * length)
            state = {**state, "trusted": trusted, "unsettled": float(unsettled)}
        state = cautioned(line, state)
        return filled * state["caution"] * going / length, state

    def due(self, iteration: int, every: int, state: State) -> bool:
        if super().due(iteration, every, state):
            return True
        return bool(state["surprised"] or state["unsettled"])

    def reach(self, line: Line, state: State) -> float | None:
        return state["trusted"] / math.sqrt(line.squared_norm) if "trusted" in state else None

    def after_bad_probe(self, state: State) -> State:
        return {**state, "trusted": state["trusted"] / _GROWTH} if "trusted" in state else state
