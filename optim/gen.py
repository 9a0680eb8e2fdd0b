"""Generalized Newton's method: the learning rate from a parabola through probed losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from curvature import NonFiniteLoss, fit, gradient
from optim.record import StepRecord
from optim.wrapper import Choice, Line, Trial, Wrapper

_BAD_PROBE = "the loss at a probe is NaN or infinite; eta is halved"


class _Plain(torch.enable_grad):
    """An ordinary forward and backward pass, without a record for second derivatives."""

    def backward(self, losses: Tensor, params: Any) -> Any:
        return gradient(losses, params)


class GeN(Wrapper[_Plain]):
    """Algorithm 1 of *Gradient descent with generalized Newton's method* (Bu, Xu), as printed.

    Around any optimizer whose step is ``w <- w - lr d``, the step becomes ``ell eta d``. At
    every Phi-th step the losses at ``w - eta d`` and ``w + eta d`` are probed on the same batch,
    with the same random numbers and without touching parameters or buffers; with the known
    loss at w, equation (3.4) fits ``b = <g, d>`` and ``A = d^T H d``; and if both are positive ::

        eta <- gamma eta + (1 - gamma) b / A

    ``group["lr"]`` is ell, 1 by default: a factor on eta for torch's schedulers (as the horizon
    factor of the paper's appendix C.7). Where A or b is not positive (b with momentum), eta
    keeps its value, and the step is taken along d all the same. Where a probe is NaN or infinite,
    which the paper leaves open, the step is skipped and eta halved. Probing calls the closure
    again, without a graph: draw the batch outside it, and put :class:`torch.enable_grad` around
    what differentiates inside it.

    As published the method depends on its start: too large an eta can diverge before its first
    refit, a fit with hardly any curvature sends eta far off, and in float32 the losses at a tiny
    eta differ by rounding alone, which is fitted as if it were curvature.

    Args:
        base: an optimizer whose step is linear in lr, or one that can propose and move. Its lr
            serves only for ratios of groups.
        eta: the first learning rate.
        gamma: smoothing, in [0, 1); 0 takes each fit as it is.
        phi: how many steps share one fit.
        ell: the factor that ``group["lr"]`` is set to.

    Raises:
        TypeError: base's step is known not to be linear in lr, or a parameter is not float32 or
            float64.
        ValueError: a hyperparameter is out of range, or base cannot be wrapped as it is set up.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        >>> optimizer = GeN(torch.optim.SGD([x]), eta=0.004, gamma=0.0, phi=1)
        >>> _ = optimizer.step(lambda: 50 * (x - 3).square().sum())  # exact line search
        >>> round(optimizer.records[-1].step, 12)
        0.01
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        eta: float = 1e-3,
        gamma: float = 0.9,
        phi: int = 8,
        ell: float = 1.0,
    ) -> None:
        if not eta > 0 or not math.isfinite(eta):
            raise ValueError(f"eta is {eta}; it must be positive")
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma is {gamma}; it must be in [0, 1)")
        if not isinstance(phi, int) or phi < 1:
            raise ValueError(f"phi is {phi}; it must be an integer of at least 1")
        super().__init__(base, ell=ell)
        self.eta, self.gamma, self.phi = eta, gamma, phi

    def _recorder(self) -> _Plain:
        return _Plain()

    def _advance(self, trial: Trial[_Plain], grads: list[Tensor | None]) -> StepRecord:
        record = super()._advance(trial, grads)
        if record.skipped == _BAD_PROBE:
            self.eta /= 2
        return record

    def _choose(self, trial: Trial[_Plain], line: Line) -> Choice | str:
        curvature = None
        if trial.iteration % self.phi == 0 and line.squared_norm > 0:
            try:
                quadratic = fit(
                    lambda values: _loss_at(trial, values),
                    trial.params,
                    line.direction,
                    steps=[-self.eta, self.eta],
                    value=line.value,
                )
            except NonFiniteLoss:
                return _BAD_PROBE
            b, curvature = quadratic.slope.item(), quadratic.curvature.item()
            if curvature > 0 and b > 0:
                self.eta = self.gamma * self.eta + (1 - self.gamma) * b / curvature
        return Choice(r=self.eta, curvature=curvature)

    def _own_state(self) -> dict[str, Any]:
        own = {"eta": self.eta, "gamma": self.gamma, "phi": self.phi}
        return {**super()._own_state(), **own}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        super()._load_own_state(state)
        self.eta, self.gamma, self.phi = state["eta"], state["gamma"], state["phi"]


def _loss_at(trial: Trial[_Plain], values: Sequence[Tensor]) -> Tensor:
    """The closure's loss with other values in the parameters, under the step's random numbers."""
    own = [p.data for p in trial.params]
    trial.random.restore()
    try:
        for p, value in zip(trial.params, values, strict=True):
            p.data = value
        with torch.no_grad():
            return trial.closure()
    finally:
        for p, data in zip(trial.params, own, strict=True):
            p.data = data
