"""Rescaling of the learning rate by the exact curvature along the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from curvature import Tape
from optim.wrapper import Choice, Line, Trial, Wrapper


class _Tape(Tape):
    """Keeps no cotangents where the curvature will be asked per sample."""

    def backward(self, losses: Tensor, params: Any, *, cotangents: bool = True) -> Any:
        scalar = not isinstance(losses, Tensor) or losses.ndim == 0
        return super().backward(losses, params, cotangents=cotangents and scalar)


class Rescaled(Wrapper[Tape]):
    """Algorithm 1 of *Adaptive scaling of the learning rate* (de Gournay, Gossard 2022).

    Around any optimizer whose step is ``theta <- theta - lr d``, the step becomes ``ell r d``::

        c   = mean_b |d^T H_b d| / ‖d‖²                  curvature per unit length
        L   = max(c, bias-corrected moving average of c with beta3)
        r   = 2 <d, g> / (‖d‖² L)

    ell = 1/2 minimises the quadratic model along d and ell = 1 is the largest step that does
    not raise it (equation 11, which fixes the factor 2: as printed, equation 10 and line 7
    contradict it). Rescaling d by any factor leaves the iterates unchanged.

    ``group["lr"]`` is ell: any torch scheduler drives it. Where <d, g> < 0 (momentum), the
    paper's rule is followed: ``|r|``, the step that would suit the opposite direction; where
    it is 0, r is 0. With momentum beta1 the paper advises ell = 1 - beta1 (appendix C.1).

    J is the loss that the closure returns. A decay of weights by the base optimizer is part of
    d, not of J: add the penalty to the losses to have it in slope and curvature. A step of INNA
    or INNAprop moves theta and psi together, by at most beta; under their weight decay it
    follows d to first order in the step.

    Args:
        base: an optimizer whose step is linear in lr (SGD, RMSprop, AdamW, ...), or one that
            can propose and move, as INNA and INNAprop. Its lr serves only for ratios of groups.
        ell: the factor that ``group["lr"]`` is set to; 1/2 to 1.
        beta3: decay of the moving average of the curvature, in [0, 1).

    If the closure returns one loss per sample, the absolute value is taken per sample, as in
    the paper; curvatures of opposite sign then do not cancel. With a scalar loss it is taken of
    the batch's curvature, which is cheaper and takes longer steps.

    Where L is 0 (the loss is linear along d and along every d that the average remembers), no
    step length follows from it: the step is skipped and recorded.

    Raises:
        TypeError: base's step is known not to be linear in lr, or a parameter is not float32 or
            float64.
        ValueError: ell or beta3 is out of range, or base cannot be wrapped as it is set up.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = Rescaled(torch.optim.SGD([x]), ell=0.5)
        >>> _ = optimizer.step(lambda: 50 * (x - 3).square().sum())  # one Newton step
        >>> x.detach(), optimizer.records[-1].step
        (tensor([3., 3.]), 0.01)
    """

    def __init__(self, base: Optimizer, *, ell: float = 0.5, beta3: float = 0.9) -> None:
        if not 0 <= beta3 < 1:
            raise ValueError(f"beta3 is {beta3}; it must be in [0, 1)")
        super().__init__(base, ell=ell)
        self.beta3 = beta3
        self._average = 0.0
        self._count = 0

    def _recorder(self) -> Tape:
        return _Tape()

    def _choose(self, trial: Trial[Tape], line: Line) -> Choice | str:
        if line.squared_norm == 0:
            return Choice(r=0.0, curvature=0.0)
        per_sample = trial.losses.ndim == 1
        # Along d of about unit length: d^T H d itself may leave the range of float32.
        length = 2.0 ** round(math.log2(line.squared_norm) / 2)
        unit = list(torch._foreach_div(line.direction, length))
        quadratic = trial.recorder.directional(unit, per_sample=per_sample)
        samples = quadratic.per_sample or quadratic
        curvature = samples.curvature.double().abs().mean().item() * length**2
        c = curvature / line.squared_norm
        if not math.isfinite(c):
            return "the curvature along the direction is NaN or infinite"
        average = self.beta3 * self._average + (1 - self.beta3) * c
        corrected = average / (1 - self.beta3 ** (self._count + 1))
        lipschitz = max(corrected, c)
        r = math.inf if lipschitz == 0 else 2 * line.slope / (line.squared_norm * lipschitz)
        if not math.isfinite(r):
            return "the loss has no curvature along the direction, so no step length follows"
        self._average, self._count = average, self._count + 1
        return Choice(r=abs(r), curvature=curvature)

    def _own_state(self) -> dict[str, Any]:
        own = {"beta3": self.beta3, "average": self._average, "count": self._count}
        return {**super()._own_state(), **own}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        super()._load_own_state(state)
        self.beta3, self._average, self._count = state["beta3"], state["average"], state["count"]
