"""The loss along a step, as it is and as the parabola by which the step is chosen has it."""

from __future__ import annotations

from dataclasses import dataclass

from optim.stepper import Plan

_SHARE = 0.01  # of the parameters' length, where no step tells how far to look


@dataclass(frozen=True)
class Ahead:
    """What a wrapper's next step looks at; figure 2 of *Generalized Newton's method* draws it.

    Attributes:
        steps: how far along d, from before the parameters to beyond the step at ell = 1.
        losses: the mean loss at theta - step d for each of these, NaN or infinite where it is.
        value: the loss at theta.
        slope: <d, g>, or what the estimator fits for it.
        curvature: d^T H d, as estimated.
        step: the one that would be taken, by this curvature.

    Example: see :meth:`optim.GeN.look_ahead`.
    """

    steps: list[float]
    losses: list[float]
    value: float
    slope: float
    curvature: float
    step: float

    @property
    def parabola(self) -> list[float]:
        """``value - t slope + t² curvature / 2`` at each step t."""
        return [self.value - t * self.slope + t * t / 2 * self.curvature for t in self.steps]


def along(plan: Plan, *, points: int, reach: float) -> Ahead:
    """Evaluate the loss along the direction of a step that is not taken.

    Raises:
        ValueError: there is no such step.
    """
    record, estimate = plan.record, plan.estimate
    if record.skipped is not None or estimate is None:
        raise ValueError(f"no step lies ahead: {record.skipped or 'the direction is zero'}")
    span = record.r or 0.0
    if span <= 0:
        span = plan.trial.share(_SHARE, plan.line.squared_norm)
    start, end = -0.25 * span, reach * max(span, record.step)
    steps = [start + (end - start) * k / (points - 1) for k in range(points)]
    losses = [plan.trial.loss_after(t) for t in steps]
    return Ahead(steps, losses, plan.line.value, estimate.slope, estimate.curvature, record.step)
