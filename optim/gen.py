"""Generalized Newton's method: the learning rate from a parabola through probed losses."""

from __future__ import annotations

from torch.optim import Optimizer

from optim.estimators import Probes
from optim.ranges import check_count
from optim.rules import Newton
from optim.wrapper import Wrapper


class GeN(Wrapper):
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
        check_count("phi", phi)
        super().__init__(
            base,
            estimator=Probes(),
            rule=Newton(eta=eta, gamma=gamma),
            ell=ell,
            every=phi,
            checked=0,
        )

    @property
    def eta(self) -> float:
        """The learning rate that the next step starts from."""
        return float(self.rule.reach(self.rule_state) or 0.0)
