"""INNAprop written with a momentum, as RMSprop with momentum is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optim.preconditioned import Preconditioned, mean_of_squares, moments
from optim.ranges import check_decay
from optim.rate import rate


class INNApropMomentum(Preconditioned):
    """The variant of INNAprop with momentum, equations (20) to (22) of its appendix C.2.

    (Bolte, Boustany, Pauwels, Purica 2024.) With gamma the learning rate ::

        v     <- sigma v + (1 - sigma) g²,   p = g / (sqrt(v) + eps)
        m     <- (1 - alpha gamma) m + gamma² (1 - alpha beta) / (1 - alpha gamma) p
        theta <- theta - m - gamma (beta - gamma) / (1 - alpha gamma) p

    At constant gamma these are the iterates of :class:`optim.INNAprop` without its bias
    correction, in exact arithmetic. The paper does not recommend it: where gamma² p is below the
    rounding of m, as late in a cosine schedule in single precision, training stalls. Nor is its
    step linear in gamma, so that :class:`optim.Rescaled` takes INNAprop instead.

    Args:
        params: parameters or groups, as for any torch optimizer; real floating-point.
        lr: gamma, below beta, and alpha gamma below 1.
        alpha: viscous damping, at least 0.
        beta: Newtonian damping, positive.
        sigma: decay of the mean of squared gradients, in [0, 1).
        eps: added to the root; positive.
        weight_decay: lambda; decoupled, theta <- (1 - lambda gamma) theta before the step.

    Raises:
        ValueError: a hyperparameter is out of range; also at a step if a scheduler takes lr out
            of its range.
        TypeError: a parameter is complex or integer, or a gradient sparse.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -3.0]))
        >>> optimizer = INNApropMomentum([x], lr=0.01)
        >>> for _ in range(1000):
        ...     optimizer.zero_grad()
        ...     (x**2).sum().backward()
        ...     optimizer.step()
        >>> bool((x.abs() < 2e-2).all())
        True
    """

    not_linear = "its step is not linear in lr; INNAprop takes the same iterates and can be"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        alpha: float = 0.1,
        beta: float = 0.9,
        sigma: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "beta": beta,
            "sigma": sigma,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_decay("sigma", group["sigma"])
        gamma = rate(group)
        if not gamma < group["beta"]:
            raise ValueError(f"lr is {gamma} and beta is {group['beta']}: lr must stay below beta")
        if not group["alpha"] * gamma < 1:
            raise ValueError(
                f"lr is {gamma} and alpha is {group['alpha']}: their product must stay below 1"
            )

    def _move(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Any]],
    ) -> None:
        gamma, alpha, beta = rate(group), group["alpha"], group["beta"]
        kept = 1 - alpha * gamma
        p = list(torch._foreach_sqrt(mean_of_squares(states, grads, group["sigma"])))
        torch._foreach_add_(p, group["eps"])
        p = list(torch._foreach_div(grads, p))
        m = moments(states, grads, "m")
        torch._foreach_mul_(m, kept)
        torch._foreach_add_(m, p, alpha=gamma**2 * (1 - alpha * beta) / kept)
        torch._foreach_sub_(params, m)
        torch._foreach_add_(params, p, alpha=-gamma * (beta - gamma) / kept)
