"""What is known of the loss along the step that a base optimizer proposes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optim.energy import Kinetic


@dataclass(frozen=True)
class Line:
    """The loss along theta - t d as far as one gradient tells, in numbers.

    Attributes:
        iteration: which step this is, from 1.
        value: the mean loss at theta.
        slope: <d, g>, positive if the step descends.
        squared_norm: ‖d‖².
        momentum: the share of the last direction that the base keeps in this one.
        ell: the user's factor on the step, the largest ``group["lr"]``.
        kinetic: the energy of the base's inertia, if the rule asks for it.
        limit: the largest step that the base allows.
        hindsight: <g, w> to a few digits, w the way of the last steps; positive if the loss of
            this batch still falls along it, 0 if none is known or the rule does not ask for it.
    """

    iteration: int
    value: float
    slope: float
    squared_norm: float
    momentum: float = 0.0
    ell: float = 1.0
    kinetic: Kinetic | None = None
    limit: float = math.inf
    hindsight: float = 0.0

    @property
    def largest_r(self) -> float:
        """The largest r that the base allows."""
        return self.limit / self.ell if self.ell > 0 else math.inf


@dataclass(frozen=True)
class Estimate:
    """The loss along theta - t d to second order, value - t slope + t²/2 curvature.

    Attributes:
        slope: <d, g>, or what was fitted for it.
        curvature: d^T H d of the mean loss.
        magnitude: the mean over samples of abs(d^T H_b d) where they are known one by one, else
            abs(curvature).
        reach: how far along d it was to be measured, in units of d.
        blind: the rounding of the losses hid all that there was to be seen.
        at_least: the loss at the end was NaN or infinite, and the curvature may be larger.
    """

    slope: float
    curvature: float
    magnitude: float
    reach: float = 0.0
    blind: bool = False
    at_least: bool = False
