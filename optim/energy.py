"""The kinetic energy of inertial methods, which falls together with the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch.optim import SGD, Optimizer

from optim.inner import inner


@dataclass(frozen=True)
class Kinetic:
    """The kinetic energy K before a step, and after one of length s along the proposal.

    Attributes:
        before: K as the last step left it.
        value, slope, curvature: K after s is ``value + s slope + s²/2 curvature``, and the share
            1 - s/r of ``before - value``, which is used up by r, the step at ell = 1.
    """

    before: float
    value: float
    slope: float
    curvature: float

    def after(self, s: float, r: float) -> float:
        kept = 1 - s / r if s < r else 0.0
        # Powers of numbers overflow by an error, products do not.
        moved = s * (self.slope + s / 2 * self.curvature)
        return self.value + kept * (self.before - self.value) + moved


@runtime_checkable
class Energetic(Protocol):
    """A base optimizer that knows the kinetic energy of its last proposal."""

    def kinetic(self) -> Kinetic:
        """The kinetic energy of the last proposal, in units in which J + K is what falls."""


def kinetic_of(base: Optimizer) -> Callable[[Sequence[float], float], Kinetic]:
    """What gives the kinetic energy of ``base``'s last proposal.

    It takes the ratios of the groups, and the kinetic energy that the last step left. Copied
    together with the base, it belongs to the copy.

    Raises:
        TypeError, ValueError: no energy is known for this optimizer, as it is set up.
    """
    if isinstance(base, Energetic):
        for group in base.param_groups:
            check_no_decay(group)
        return partial(_own, base)
    if type(base) is SGD:
        for group in base.param_groups:
            _check_heavy_ball(group)
        return partial(_heavy_ball, base)
    raise TypeError(
        f"{type(base).__name__} has no energy that is known to fall: INNA, INNAprop and SGD with "
        "momentum have; or give it a method kinetic, as optim.energy.Energetic describes"
    )


def _own(base: Energetic, ratios: Sequence[float], last: float) -> Kinetic:
    return base.kinetic()


def check_no_decay(group: dict[str, Any]) -> None:
    """Refuse decoupled weight decay, which is not in the energy."""
    if group.get("weight_decay"):
        raise ValueError(
            f"weight_decay is {group['weight_decay']}: the energy falls without it; set it to 0, "
            "and add a penalty on the weights to the loss"
        )


def _check_heavy_ball(group: dict[str, Any]) -> None:
    for name in ("dampening", "nesterov"):
        if group[name]:
            raise ValueError(
                f"{name} is {group[name]}: the energy is that of plain heavy-ball momentum"
            )
    if not 0 < group["momentum"] < 1:
        raise ValueError(f"momentum is {group['momentum']}: heavy ball is between 0 and 1")


def _heavy_ball(base: SGD, ratios: Sequence[float], last: float) -> Kinetic:
    """K = sum over groups of s_i/2 ‖m_i‖² at ell = 1, where m_i <- mu m_i + g_i moves by s_i.

    s_i = ratio_i s. A shorter step brings K a part of the way there, for the reason that
    :class:`optim.rules.Lyapunov` gives.
    """
    slope = 0.0
    for group, ratio in zip(base.param_groups, ratios, strict=True):
        _check_heavy_ball(group)
        buffers = [base.state[p]["momentum_buffer"] for p in group["params"] if p.grad is not None]
        slope += ratio / 2 * inner(buffers, buffers)
    return Kinetic(before=last, value=0.0, slope=slope, curvature=0.0)
