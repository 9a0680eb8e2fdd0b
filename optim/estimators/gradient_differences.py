"""The curvature from two gradients on one batch, as Barzilai and Borwein's step sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optim.estimators.estimator import Estimator
from optim.line import Estimate, Line
from optim.trial import Trial


@dataclass(frozen=True)
class GradientDifferences(Estimator):
    """``d^T H d ~ (<d, g(theta)> - <d, g(theta - eta d)>) / eta``, eta about the step to come.

    The secant curvature that Barzilai-Borwein step sizes are made of, with both gradients on the
    same batch as in Step-Tuned SGD (Castera, Bolte, Févotte, Pauwels 2022; reference [8] of
    *Adaptive scaling of the learning rate*), for any base optimizer. It needs no second
    derivative, and one more gradient; of samples one by one it knows nothing.

    Example:
        >>> import torch
        >>> from optim import Rescaled
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        >>> optimizer = Rescaled(torch.optim.SGD([x]), estimator=GradientDifferences())
        >>> _ = optimizer.step(lambda: (x**2).sum())
        >>> round(optimizer.records[-1].curvature, 6)
        40.0
    """

    def estimate(self, trial: Trial, line: Line, reach: float) -> Estimate | str:
        slope = trial.slope_after(reach)
        if not math.isfinite(slope):
            return "the gradient at a probe is NaN or infinite"
        curvature = (line.slope - slope) / reach
        return Estimate(line.slope, curvature, abs(curvature))
