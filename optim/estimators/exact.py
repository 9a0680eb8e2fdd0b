"""The exact curvature, by one tangent pass over the recorded forward and backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from curvature import Tape
from optim.estimators.estimator import Estimator
from optim.line import Estimate, Line
from optim.trial import Trial


class _Tape(Tape):
    """A tape that keeps no cotangents where the curvature will be asked per sample."""

    def __init__(self, per_sample: bool | None) -> None:
        super().__init__()
        self.per_sample = per_sample

    def backward(
        self, losses: Tensor, params: Any, *, cotangents: bool = True, accumulate: bool = False
    ) -> Any:
        if self.per_sample is None:
            self.per_sample = isinstance(losses, Tensor) and losses.ndim == 1
        keep = cotangents and not self.per_sample
        return super().backward(losses, params, cotangents=keep, accumulate=accumulate)


@dataclass(frozen=True)
class Exact(Estimator):
    """d^T H d by :class:`curvature.Tape`: Algorithm 2 of *Adaptive scaling*, or its jets.

    Args:
        per_sample: True asks for d^T H_b d of each sample, whose absolute values are averaged;
            False for that of the batch, which is cheaper. None takes what the losses offer: per
            sample if the closure returns one loss per sample.

    Example:
        >>> import torch
        >>> from optim import Rescaled
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = Rescaled(torch.optim.SGD([x]), estimator=Exact(per_sample=False))
        >>> _ = optimizer.step(lambda: x**2)
        >>> optimizer.records[-1].curvature
        5.0
    """

    per_sample: bool | None = None

    def __post_init__(self) -> None:
        if self.per_sample not in (None, True, False):
            raise TypeError(f"per_sample is {self.per_sample!r}; it must be True, False or None")

    @property
    def needs_graph(self) -> bool:
        return True

    def recorder(self) -> _Tape:
        return _Tape(self.per_sample)

    def estimate(self, trial: Trial, line: Line, reach: float) -> Estimate | str:
        unit, length = trial.unit(line.squared_norm)
        penalty = trial.penalty.curvature(trial.direction)

        def measure(tape: _Tape, weight: float) -> list[float]:
            quadratic = tape.directional(unit, per_sample=bool(tape.per_sample))
            factor = length * length / weight
            curvature = quadratic.curvature.double().item() * factor
            if quadratic.per_sample is None:
                return [curvature]
            bent = quadratic.per_sample.curvature.double() * factor + penalty
            return [curvature, bent.abs().mean().item()]

        curvature, *magnitude = trial.measured(self.recorder, measure)
        curvature += penalty
        return Estimate(line.slope, curvature, magnitude[0] if magnitude else abs(curvature))
