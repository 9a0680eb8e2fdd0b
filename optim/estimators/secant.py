"""The curvature of the chord to where the step would end, by a forward pass or two."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optim.estimators.estimator import Estimator
from optim.line import Estimate, Line
from optim.trial import Trial

_SHORTEST = 1e-6  # first probe of the search, relative to the parameters
_FACTOR = 4.0  # between two probes of the search
_PROBES = 14  # of the search in either direction: 1e-6 to 1e2 times the parameters
_SHORT = 0.25  # of the way, where a direction with momentum is measured besides
_LEAST = 16.0  # of slope / reach: the curvature taken where the loss is NaN or infinite


@dataclass(frozen=True)
class Secant(Estimator):
    """2 (L(theta - t d) - L(theta) + t <d, g>) / t², with t about the step to come.

    The curvature of the parabola through the loss here, its exact slope, and the loss at the end
    of the step, on the step's batch and with the same random numbers: equation (3.4) of GeN
    (Bu, Xu) with the slope known, so that one forward pass is enough. It tells of the whole step,
    where d^T H d tells of its beginning. Along directions with momentum a second chord, to a
    quarter of the way, is measured too and the larger taken; found by experiment, see
    docs/robustness.md.

    What the rounding of the losses hides counts as no curvature, and the estimate as blind where
    it hides the slope as well. Where the loss is NaN or infinite, the curvature is taken to be at
    least 16 <d, g> / t, so that the next steps are shorter.
    Before any step was taken, t is searched from 1e-6 times the parameters upwards by factors
    of four, up to 1e2: the automatic search of GeN's appendix C.4.2.

    Probing calls the closure again: draw the batch outside it.

    Example:
        >>> import torch
        >>> from optim import Rescaled
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        >>> optimizer = Rescaled(torch.optim.SGD([x]), estimator=Secant())
        >>> _ = optimizer.step(lambda: (x**2).sum())
        >>> round(optimizer.records[-1].curvature, 6)
        40.0
    """

    def first_reach(self, trial: Trial, line: Line) -> float:
        if line.slope <= 0:
            return super().first_reach(trial, line)
        t = trial.share(_SHORTEST, line.squared_norm)
        for _ in range(_PROBES):
            if t * _chord(trial, line, t) <= line.slope:
                break
            t /= _FACTOR
        for _ in range(_PROBES):
            bend = _FACTOR * t * _chord(trial, line, _FACTOR * t)
            if bend > 4 * line.slope:
                break
            t *= _FACTOR
            # The minimum of the parabola is at most twice as far.
            if 2 * bend >= line.slope:
                break
        return t

    def estimate(self, trial: Trial, line: Line, reach: float) -> Estimate | str:
        shares = (1.0,) if line.momentum == 0 else (1.0, _SHORT)
        chords = [_chord(trial, line, share * reach) for share in shares]
        hidden = reach * abs(line.slope) <= trial.rounding(line.value) and not any(chords)
        off_the_map = not all(map(math.isfinite, chords))
        least = _LEAST * abs(line.slope) / reach
        chords = [c if math.isfinite(c) else least for c in chords]
        magnitude = max(map(abs, chords))
        return Estimate(line.slope, chords[0], magnitude, blind=hidden, at_least=off_the_map)


def _chord(trial: Trial, line: Line, t: float) -> float:
    """The curvature of the chord to theta - t d; infinite if the loss there is NaN or infinite."""
    loss = trial.loss_after(t)
    if not math.isfinite(loss):
        return math.inf
    rise = loss - line.value + t * line.slope
    return 2 * (rise / t) / t if abs(rise) > trial.rounding(loss) else 0.0
