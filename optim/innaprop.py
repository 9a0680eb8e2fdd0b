"""INNAprop: INNA with RMSprop's gradient scaling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from optim.din import DIN
from optim.preconditioned import mean_of_squares
from optim.ranges import check_decay


class INNAprop(DIN):
    """INNAprop, Algorithm 1 of *A second-order-like optimizer with adaptive gradient scaling*.

    (Bolte, Boustany, Pauwels, Purica 2024.) In the same coordinates, without its division by
    beta - gamma::

        theta <- (1 - lambda gamma) theta
        v     <- sigma v + (1 - sigma) g²,   v_hat = v / (1 - sigma^k)
        psi   <- psi   + gamma ((1/beta - alpha) theta - psi/beta)
        theta <- theta + gamma ((1/beta - alpha) theta - psi/beta - beta g / (sqrt(v_hat) + eps))

    with the old theta and psi in the last two lines, and psi_0 = (1 - alpha beta) theta_0.
    alpha = beta = 1 is AdamW without momentum. Two state tensors per parameter with a gradient,
    as AdamW. The paper advises (alpha, beta) = (0.1, 0.9) for short training and language
    models, (2, 2) for long training of image classifiers.

    Args:
        params: parameters or groups, as for any torch optimizer; real floating-point.
        lr: gamma, below beta.
        alpha: viscous damping, at least 0.
        beta: Newtonian damping, positive.
        sigma: decay of the mean of squared gradients, in [0, 1).
        eps: added to the root, after bias correction; positive.
        weight_decay: lambda, decoupled.
        maximize: climb instead.
        foreach: ``False`` works one parameter at a time, with less memory; otherwise in groups.

    Raises:
        ValueError: a hyperparameter is out of range; also at a step if a scheduler takes lr to
            beta or above.
        TypeError: a parameter is complex or integer, or a gradient sparse.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -3.0]))
        >>> optimizer = INNAprop([x], lr=0.01)
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
        sigma: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "alpha": alpha,
                "beta": beta,
                "sigma": sigma,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "foreach": foreach,
            },
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_decay("sigma", group["sigma"])
        if not 0 < group["eps"] < math.inf:
            raise ValueError(f"eps is {group['eps']}; it must be finite and positive")

    def _precondition(
        self, group: dict[str, Any], grads: list[Tensor], states: list[dict[str, Any]]
    ) -> list[Tensor]:
        for state in states:
            state["step"] = state.get("step", 0) + 1
        mean_of_squares(states, grads, group["sigma"])
        return list(torch._foreach_div(grads, self._metric(group, states)))

    def _metric(self, group: dict[str, Any], states: list[dict[str, Any]]) -> list[Tensor]:
        root = list(torch._foreach_sqrt([state["v"] for state in states]))
        torch._foreach_div_(root, [(1 - group["sigma"] ** s["step"]) ** 0.5 for s in states])
        torch._foreach_add_(root, group["eps"])
        return root
