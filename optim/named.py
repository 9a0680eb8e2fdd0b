"""Methods of the literature that are a choice of rule, estimator and schedule."""

from __future__ import annotations

from torch.optim import Optimizer

from optim.estimators import Exact, Probes
from optim.rescaled import Rescaled
from optim.rules import Newton


def lqa(base: Optimizer, *, eta: float = 1e-3) -> Rescaled:
    """Local quadratic approximation: three losses at every step (Zhu et al. 2021).

    ::

        eta <- eta/2 (L(w + eta d) - L(w - eta d)) / (L(w + eta d) - 2 L(w) + L(w - eta d))

    Equation (3.5) of *Gradient descent with generalized Newton's method* (Bu, Xu), whose
    Algorithm 1 it is with gamma = 0 and Phi = 1; LQA itself is for SGD. Where numerator or
    denominator are not positive, eta keeps its value.

    Args:
        base: an optimizer whose step is linear in lr.
        eta: the first learning rate.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        >>> optimizer = lqa(torch.optim.SGD([x]), eta=0.004)
        >>> _ = optimizer.step(lambda: 50 * (x - 3).square().sum())
        >>> round(optimizer.records[-1].step, 9)
        0.01
    """
    return _every_step(base, Probes(), eta)


def qlabgrad(base: Optimizer, *, eta: float = 1e-3) -> Rescaled:
    """Quadratic loss approximation by one more loss (Fu, Wu 2024), for any base.

    ::

        eta <- eta²/2 <d, g> / (L(w - eta d) - L(w) + eta <d, g>)

    Appendix D.4 of *Gradient descent with generalized Newton's method*; for SGD, where d = g, it
    is QLABGrad's own. Where it is not positive, eta keeps its value.

    Args:
        base: an optimizer whose step is linear in lr.
        eta: the first learning rate.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        >>> optimizer = qlabgrad(torch.optim.SGD([x]), eta=0.004)
        >>> _ = optimizer.step(lambda: 50 * (x - 3).square().sum())
        >>> round(optimizer.records[-1].step, 9)
        0.01
    """
    return _every_step(base, Probes(points=(1.0,), exact_slope=True), eta)


def gen_hod(base: Optimizer, *, eta: float = 1e-3) -> Rescaled:
    """GeN by higher-order differentiation: ``eta = <d, g> / d^T H d`` at every step.

    Algorithm 2 of *Gradient descent with generalized Newton's method* (Bu, Xu), its curvature by
    one tangent pass in place of a Hessian-vector product; around SGD it is ADLER (Balboni,
    Bacciu 2023). Where slope or curvature are not positive, as equation (3.2) asks, eta keeps its
    value.

    Args:
        base: an optimizer whose step is linear in lr.
        eta: the learning rate until both were positive once.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = gen_hod(torch.optim.SGD([x]))
        >>> _ = optimizer.step(lambda: 50 * (x - 3).square().sum())
        >>> optimizer.records[-1].step
        0.01
    """
    return _every_step(base, Exact(per_sample=False), eta)


def _every_step(base: Optimizer, estimator: Exact | Probes, eta: float) -> Rescaled:
    rule = Newton(eta=eta, gamma=0.0)
    return Rescaled(base, ell=1.0, rule=rule, estimator=estimator, checked=0)
