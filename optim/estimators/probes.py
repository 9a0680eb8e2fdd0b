"""The curvature from losses at points along the direction, by forward passes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from curvature import fit
from optim.estimators.estimator import Estimator
from optim.line import Estimate, Line
from optim.ranges import check_count, check_number
from optim.trial import Trial

_GRID: list[float] = [10.0 ** (k / 2) for k in range(-12, 5)]


@dataclass(frozen=True)
class Probes(Estimator):
    """Least squares through losses at theta - eta p d: equation (3.4) of GeN (Bu, Xu).

    The losses are taken on the step's batch, with the same random numbers and without touching
    parameters or buffers. Probing calls the closure again: draw the batch outside it.

    The first eta is searched from 1e-6 to 1e2, as printed, whatever the length of d: of a loss that
    is multiplied by 1e-30 rounding hides all that such probes could tell. :class:`Secant` searches
    relative to the parameters.

    The estimator of :class:`optim.rules.Newton`, which takes slope and curvature from one fit.
    Other rules know the exact slope, and where the loss grows linearly far out a symmetric fit
    sees no curvature that would hold them back: around SGD such steps may diverge, and
    :class:`Secant` is the one to take.

    Args:
        points: p, in units of eta, the step that the rule expects to take. (-1, 1) is the
            paper's Algorithm 1, (-2, -1, 1, 2) its five points; the loss at 0 is known.
        degree: of the polynomial.
        exact_slope: take <d, g> for b instead of fitting it; then (1,) is enough, one forward
            pass.

    Raises:
        TypeError: the points are no numbers.
        ValueError: the points do not determine the polynomial.

    Example:
        >>> import torch
        >>> from optim import Rescaled
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        >>> probes = Probes(points=(1.0,), exact_slope=True)
        >>> optimizer = Rescaled(torch.optim.SGD([x]), estimator=probes)
        >>> _ = optimizer.step(lambda: (x**2).sum())
        >>> round(optimizer.records[-1].curvature, 6)
        40.0
    """

    points: tuple[float, ...] = (-1.0, 1.0)
    degree: int = 2
    exact_slope: bool = False

    def __post_init__(self) -> None:
        check_count("degree", self.degree, 2)
        if not isinstance(self.points, (tuple, list)):
            raise TypeError(f"points is {self.points!r}; give a tuple of numbers, as (-1.0, 1.0)")
        for point in self.points:
            check_number("a point", point)
        telling = {float(p) for p in self.points if math.isfinite(p) and p != 0}
        unknown = self.degree - self.exact_slope
        if len(telling) < max(unknown, len(self.points)):
            raise ValueError(
                f"points is {self.points}; a polynomial of degree {self.degree} needs at least "
                f"{unknown} of them here, finite, different, and none of them 0, where the loss "
                "is known"
            )
        object.__setattr__(self, "points", tuple(map(float, self.points)))

    def first_reach(self, trial: Trial, line: Line) -> float:
        """The learning rate from 1e-6 to 1e2 with the lowest loss (GeN's appendix C.4.2).

        One at which the loss at some point is NaN or infinite is left out.
        """
        losses = {eta: trial.loss_after(eta) for eta in _GRID}
        finite = [eta for eta in _GRID if math.isfinite(losses[eta])]
        for eta in sorted(finite, key=lambda eta: losses[eta]):
            if all(math.isfinite(trial.loss_after(eta * p)) for p in self.points if p != 1):
                return eta
        return _GRID[0]

    def estimate(self, trial: Trial, line: Line, reach: float) -> Estimate | str:
        quadratic = fit(
            trial.loss_at,
            trial.params,
            trial.direction,
            steps=[-reach * p for p in self.points],
            degree=self.degree,
            value=line.value,
            slope=line.slope if self.exact_slope else None,
        )
        curvature = quadratic.curvature.item()
        return Estimate(quadratic.slope.item(), curvature, abs(curvature))
