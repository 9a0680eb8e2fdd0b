"""The loss along one direction, to second order: what directional and fit return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from curvature.contributions import Contributions


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The loss along a direction v: J(theta + t v) = value + t slope + t^2/2 curvature + O(t^3).

    Equation (3) of *Adaptive scaling of the learning rate* (de Gournay, Gossard 2022), written
    for theta + t v. The fields carry the units of the loss: ``slope`` is <g, v> and
    ``curvature`` is v^T H v, neither divided by a power of the length of v.

    Attributes:
        value: J(theta); 0-dimensional, or one number per sample inside :attr:`per_sample`.
        slope: <g, v>, same shape.
        curvature: v^T H v, same shape.
        engine: what computed it: ``"tangent"`` (one tangent pass), ``"jet"`` (a second-order one),
            ``"reference"`` (double backward), ``"gauss-newton"``, ``"fit"`` or ``"finite
            differences"``; operations without a rule, which were differentiated by their own
            double backward, follow in brackets.
        per_sample: the same three numbers for each sample's loss, when asked for.
        coefficients: for a fit, all coefficients c_k of ``sum_k c_k t^k``, lowest first;
            ``None`` for an exact engine.
        contributions: which operations the curvature comes from, where the engine is "tangent".

    Example:
        >>> import torch
        >>> q = Quadratic(torch.tensor(3.0), torch.tensor(-2.0), torch.tensor(1.0), "reference")
        >>> q(2.0)
        tensor(1.)
    """

    value: Tensor
    slope: Tensor
    curvature: Tensor
    engine: str
    per_sample: Quadratic | None = None
    coefficients: Tensor | None = None
    contributions: Contributions | None = None

    def __call__(self, t: float | Tensor) -> Tensor:
        """The model's loss at theta + t v, with the higher terms that a fit has kept."""
        if self.coefficients is None:
            return self.value + t * (self.slope + t / 2 * self.curvature)
        result = self.coefficients[-1]
        for coefficient in self.coefficients.flip(0)[1:]:
            result = result * t + coefficient
        return result
