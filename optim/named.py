"""Methods of the literature that are a choice of rule, estimator and schedule."""

from __future__ import annotations

from torch.optim import Optimizer

from optim.estimators import Exact, Probes
from optim.ranges import check_count
from optim.rescaled import Rescaled
from optim.rules import Newton


def gen_published(
    base: Optimizer,
    *,
    eta: float | None = 1e-3,
    gamma: float = 0.9,
    phi: int = 8,
    points: tuple[float, ...] = (-1.0, 1.0),
    degree: int = 2,
) -> Rescaled:
    """Algorithm 1 of *Gradient descent with generalized Newton's method* (Bu, Xu), as printed.

    The step is ``w - eta d``. At every Phi-th step the losses at ``w - p eta d`` for p in
    ``points`` are probed and equation (3.4) fits ``b = <g, d>`` and ``A = d^T H d``; if both
    are positive ::

        eta <- gamma eta + (1 - gamma) b / A

    Otherwise eta keeps its value. It depends on its start; :class:`optim.GeN` does not.

    Args:
        base: an optimizer whose step is linear in lr.
        eta: the first learning rate, or None to search it at the first step (appendix C.4.2).
        gamma: smoothing, in [0, 1); 0 takes each fit as it is.
        phi: how many steps share one fit.
        points: where to probe, in units of eta; (-2, -1, 1, 2) are the paper's five points.
        degree: of the fitted polynomial.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        >>> optimizer = gen_published(torch.optim.SGD([x]), eta=0.004, gamma=0.5, phi=2)
        >>> for _ in range(2):
        ...     _ = optimizer.step(lambda: 50 * (x - 3).square().sum())
        >>> [round(record.step, 9) for record in optimizer.records]
        [0.004, 0.007]
    """
    check_count("phi", phi)
    return _newton(base, Probes(points=points, degree=degree), eta, gamma, phi)


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
    return gen_published(base, eta=eta, gamma=0.0, phi=1)


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
    return _newton(base, Probes(points=(1.0,), exact_slope=True), eta)


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
    return _newton(base, Exact(per_sample=False), eta)


def _newton(
    base: Optimizer,
    estimator: Exact | Probes,
    eta: float | None,
    gamma: float = 0.0,
    every: int = 1,
) -> Rescaled:
    rule = Newton(eta=eta, gamma=gamma)
    return Rescaled(base, ell=1.0, rule=rule, estimator=estimator, every=every, checked=0)
