"""INNA: an inertial Newton algorithm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from optim.din import DIN


class INNA(DIN):
    """INNA (Castera, Bolte, Févotte, Pauwels), as in Castera's slides and table 5 of *INNAprop*.

    ::

        psi   <- psi   + gamma ((1/beta - alpha) theta - psi/beta)
        theta <- theta + gamma ((1/beta - alpha) theta - psi/beta - beta g)

    with the old theta and psi on the right and psi_0 = (1 - alpha beta) theta_0. One state
    tensor per parameter with a gradient.

    Args:
        params: parameters or groups, as for any torch optimizer; real floating-point.
        lr: gamma, below beta.
        alpha: viscous damping, at least 0.
        beta: Newtonian damping, positive.
        weight_decay: lambda; decoupled, theta <- (1 - lambda gamma) theta before the step.
        maximize: climb instead.
        foreach: ``False`` works one parameter at a time, with less memory; otherwise in groups.

    Raises:
        ValueError: a hyperparameter is out of range; also at a step if a scheduler takes lr to
            beta or above.
        TypeError: a parameter is complex or integer, or a gradient sparse.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = INNA([x], lr=0.05)
        >>> for _ in range(400):
        ...     optimizer.zero_grad()
        ...     (2 * x**2).sum().backward()
        ...     optimizer.step()
        >>> bool(x.abs() < 1e-2)
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        *,
        alpha: float = 0.5,
        beta: float = 0.1,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "alpha": alpha,
                "beta": beta,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "foreach": foreach,
            },
        )

    def _precondition(
        self, group: dict[str, Any], grads: list[Tensor], states: list[dict[str, Any]]
    ) -> list[Tensor]:
        return grads
