"""DINAdam: Adam's recipe applied to the dynamical inertial Newton system."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optim.preconditioned import Preconditioned, mean_of_squares, moments
from optim.ranges import check_decay
from optim.rate import rate


class DINAdam(Preconditioned):
    """DINAdam, Algorithm 4 and equations (27) to (33) of appendix C.3 of *INNAprop*.

    (Bolte, Boustany, Pauwels, Purica 2024.) With g the gradient ::

        v     <- sigma2 v + (1 - sigma2) g²
        m     <- sigma1 m + (1 - sigma1 + alpha beta sigma1 - alpha beta) g
        theta <- theta - lr (m + alpha beta g) / sqrt(v + eps)

    The paper's m is shifted by alpha beta g, so that its equation (28), theta - lr m, becomes the
    last line with a plus; (30), (33) and the algorithm print a minus. alpha beta = 0 is Adam
    without bias correction; in between, the direction mixes Adam's with the gradient, as NAdam.

    Args:
        params: parameters or groups, as for any torch optimizer; real floating-point.
        lr: eta.
        alpha: viscous damping, at least 0.
        beta: Newtonian damping, at least 0.
        betas: sigma1 and sigma2, in [0, 1).
        eps: under the root, as printed; positive.
        weight_decay: lambda; decoupled, theta <- (1 - lambda lr) theta before the step.

    Raises:
        ValueError: a hyperparameter is out of range.
        TypeError: a parameter is complex or integer, or a gradient sparse.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -3.0]))
        >>> optimizer = DINAdam([x], lr=0.01)
        >>> for _ in range(1000):
        ...     optimizer.zero_grad()
        ...     (x**2).sum().backward()
        ...     optimizer.step()
        >>> bool((x.abs() < 2e-2).all())
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        alpha: float = 0.1,
        beta: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "beta": beta,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for i, sigma in enumerate(group["betas"]):
            check_decay(f"betas[{i}]", sigma)

    def _move(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Any]],
    ) -> None:
        sigma1, sigma2 = group["betas"]
        product = group["alpha"] * group["beta"]
        v = mean_of_squares(states, grads, sigma2)
        m = moments(states, grads, "m")
        torch._foreach_mul_(m, sigma1)
        torch._foreach_add_(m, grads, alpha=(1 - sigma1) * (1 - product))
        d = list(torch._foreach_add(m, grads, alpha=product))
        root = list(torch._foreach_add(v, group["eps"]))
        torch._foreach_sqrt_(root)
        torch._foreach_addcdiv_(params, d, root, value=-rate(group))
