"""What every estimator of the curvature answers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from optim.evaluation import Plain, Recorder
from optim.line import Estimate, Line
from optim.trial import Trial

_FIRST_REACH = 1e-3  # relative to the parameters


class Estimator(ABC):
    """Measures the curvature of the loss along a direction, after its gradient is known."""

    @property
    def needs_graph(self) -> bool:
        """Whether it differentiates the graph of the step's own evaluation once more."""
        return False

    def recorder(self) -> Recorder:
        """What runs the closure and differentiates its losses, at steps with an estimate."""
        return Plain()

    def first_reach(self, trial: Trial, line: Line) -> float:
        """How far along d to look before any step was taken; infinite if only at theta."""
        if self.needs_graph:
            return math.inf
        return trial.share(_FIRST_REACH, line.squared_norm)

    @abstractmethod
    def estimate(self, trial: Trial, line: Line, reach: float) -> Estimate | str:
        """The loss to second order along the trial's direction, or why it is not known.

        Args:
            reach: about how far along the direction the step will go.

        Raises:
            NonFiniteLoss: a loss on the way is NaN or infinite.
        """
