"""The step rule of *Gradient descent with generalized Newton's method*, as published."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optim.line import Estimate, Line
from optim.ranges import check_decay, check_positive, take_floats
from optim.rules.rule import Rule, State


@dataclass(frozen=True)
class Newton(Rule):
    """Algorithm 1 of GeN (Bu, Xu), lines 8 to 10.

    With b and A as estimated, and if both are positive ::

        eta <- gamma eta + (1 - gamma) b / A

    and r = eta. Otherwise, and at steps without an estimate, eta keeps its value. The first
    estimate is made at step Phi. Where a probe is NaN or infinite, which the paper leaves open,
    eta is halved.

    Args:
        eta: the first learning rate; None takes the one that the estimator searches out, at the
            first step and without a fit there, or the fit if it does not search.
        gamma: smoothing, in [0, 1); 0 takes each estimate as it is.

    Raises:
        ValueError: eta or gamma is out of range.

    Example:
        >>> from optim.line import Estimate, Line
        >>> line = Line(iteration=8, value=9.0, slope=4.0, squared_norm=1.0)
        >>> Newton(eta=1.0, gamma=0.5).choose(line, Estimate(4.0, 2.0, 2.0), {})
        (1.5, {'eta': 1.5})
    """

    eta: float | None = 1e-3
    gamma: float = 0.9

    def __post_init__(self) -> None:
        if self.eta is not None:
            check_positive("eta", self.eta)
            take_floats(self, "eta")
        check_decay("gamma", self.gamma)
        take_floats(self, "gamma")

    def choose(
        self, line: Line, estimate: Estimate | None, state: State
    ) -> tuple[float | str, State]:
        eta = self.reach(line, state)
        if eta is None:
            if estimate is None:  # of a direction that is zero
                return 0.0, state
            eta = estimate.reach
            if eta == math.inf:
                return _unsearched(estimate)
            return eta, {"eta": eta}
        if estimate is not None and estimate.curvature > 0 and estimate.slope > 0:
            eta = self.gamma * eta + (1 - self.gamma) * estimate.slope / estimate.curvature
        return eta, {"eta": eta}

    def due(self, iteration: int, every: int, state: State) -> bool:
        searching = self.eta is None and not state
        return searching or iteration % every == 0

    def reach(self, line: Line, state: State) -> float | None:
        return state.get("eta", self.eta)

    def after_bad_probe(self, state: State) -> State:
        eta = state.get("eta", self.eta)
        return state if eta is None else {"eta": eta / 2}


def _unsearched(estimate: Estimate) -> tuple[float | str, State]:
    if estimate.curvature > 0 and estimate.slope > 0:
        eta = estimate.slope / estimate.curvature
        return eta, {"eta": eta}
    return "slope or curvature is not positive, and there is no learning rate yet", {}
