"""Whether closures give losses, and a gradient, of one function of the parameters."""

from __future__ import annotations

import math

import torch

from optim.line import Line
from optim.trial import Trial

_NEAR = 1e-3  # times the parameters
_NEARER = 8.0


@torch.no_grad()
def check_consistent(trial: Trial, line: Line) -> None:
    """Refuse closures whose losses and gradient are not those of one function of the parameters.

    Raises:
        ValueError: the loss is another at the same parameters, or the same at others, or falls
            otherwise than its gradient says.
    """
    again, rounding = trial.loss_after(0.0), 100 * trial.rounding(line.value)
    if not abs(again - line.value) <= rounding:
        raise ValueError(
            f"the closure gave the loss {line.value:.6g}, and {again:.6g} when called again for "
            "the same parameters: draw the batch outside it, and random numbers from the global "
            "generators of torch, numpy or Python, which are set back in between, as buffers of "
            "modules are; what a call leaves to the next elsewhere, as in self.hidden, is not: "
            "make it a buffer by register_buffer"
        )
    t = trial.share(_NEAR, line.squared_norm)
    if t * abs(line.slope) <= rounding:
        return
    found = []
    for step in (t, t / _NEARER, -t / _NEARER):
        found.append((again - trial.loss_after(step)) / (step * line.slope))
        if not math.isfinite(found[-1]) or 1 / 2 < found[-1] < 2:
            return
    if found == [0, 0, 0]:
        raise ValueError(
            "the closure gives the same loss for other parameters, though its gradient is not "
            "zero: compute the loss, and all that it is made of, inside the closure; of what "
            "only a straight-through estimator differentiates, there is no loss ahead to see"
        )
    # At a kink the two sides differ, and where the loss bends at once the two lengths.
    if max(found) - min(found) < 1 / 4:
        raise ValueError(
            f"along the direction the loss falls {found[1]:.2g} times as fast as its gradient "
            "says, which is then not that of the loss, as where a backward pass reverses it, "
            "a hook changes it, or a straight-through estimator or detach() stands in for it: "
            "no step length follows from the two"
        )
