"""What the variants of INNAprop share: their checks, and RMSprop's mean of squares."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from optim.checked import Checked
from optim.rate import rate


class Preconditioned(Checked):
    """An optimizer that moves a group's parameters at once; a subclass says how."""

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if params:
            if group["weight_decay"] != 0:
                torch._foreach_mul_(params, 1 - rate(group) * group["weight_decay"])
            self._move(group, params, [p.grad for p in params], [self.state[p] for p in params])

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse hyperparameters for which the step is not defined."""
        numbers = {name: float(group[name]) for name in ("alpha", "beta", "weight_decay")}
        for name, number in {"lr": rate(group), **numbers}.items():
            if not 0 <= number < math.inf:
                raise ValueError(f"{name} is {group[name]}; it must be finite and at least 0")
        if not 0 < group["eps"] < math.inf:
            raise ValueError(f"eps is {group['eps']}; it must be finite and positive")

    @abstractmethod
    def _move(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Any]],
    ) -> None:
        """Advance the states, and the parameters with them."""


def moments(states: list[dict[str, Any]], grads: list[Tensor], name: str) -> list[Tensor]:
    """Each state's average of this name, which starts at 0."""
    for state, g in zip(states, grads, strict=True):
        if name not in state:
            state[name] = torch.zeros_like(g)
    return [state[name] for state in states]


def mean_of_squares(
    states: list[dict[str, Any]], grads: list[Tensor], sigma: float
) -> list[Tensor]:
    """v <- sigma v + (1 - sigma) g², from 0."""
    v = moments(states, grads, "v")
    torch._foreach_mul_(v, sigma)
    torch._foreach_addcmul_(v, grads, grads, value=1 - sigma)
    return v
