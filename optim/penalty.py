"""The L2 penalty on the weights that a base optimizer's coupled weight decay stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from optim.inherited import torch_kind
from optim.inner import inner

# Torch's that add it to the gradient; others say so in an attribute coupled_weight_decay.
_COUPLED = {"SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Adam", "NAdam", "RAdam"}


@dataclass(frozen=True, eq=False)
class Penalty:
    """``sum_i lambda_i/2 ‖theta_i‖²`` over the parameters of a step, one lambda for each.

    Weight decay that is added to the gradient minimises the loss plus this, so that value, slope
    and curvature must have it too (section 4 of *Adaptive scaling*). Decoupled decay is no
    gradient of anything and stays part of d alone.
    """

    weights: Sequence[float]

    def value(self, values: Sequence[Tensor]) -> float:
        """The penalty at these values of the parameters."""
        return self._inner(values, values) / 2

    def slope(self, values: Sequence[Tensor], direction: Sequence[Tensor]) -> float:
        """Its derivative along the direction, from these values."""
        return self._inner(values, direction)

    def curvature(self, direction: Sequence[Tensor]) -> float:
        """Its second derivative along the direction."""
        return self._inner(direction, direction)

    def _inner(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
        return sum(
            weight * inner([a.detach()], [b])
            for weight, a, b in zip(self.weights, left, right, strict=True)
            if weight
        )


def is_coupled(base: Optimizer, group: dict[str, Any]) -> bool:
    """Whether ``base`` adds this group's weight decay to the gradients, as far as is known."""
    coupled = getattr(base, "coupled_weight_decay", torch_kind(base) in _COUPLED)
    return bool(coupled and not group.get("decoupled_weight_decay"))


def penalty_of(base: Optimizer, params: Sequence[Tensor]) -> Penalty:
    """The penalty of ``base``'s weight decay on ``params``; zero where that is not coupled."""
    weights = {
        p: float(group["weight_decay"])
        for group in base.param_groups
        if group.get("weight_decay") and is_coupled(base, group)
        for p in group["params"]
    }
    if not weights:
        return Penalty([0.0] * len(params))
    return Penalty([weights.get(p, 0.0) for p in params])
