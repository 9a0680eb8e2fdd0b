"""What step a base optimizer proposes, apart from how far it is taken."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer


@runtime_checkable
class Proposer(Protocol):
    """An optimizer's step in two halves: where to, and how far.

    An optimizer that has these methods (as :class:`optim.INNAprop`) is wrapped through them;
    any other through :class:`Linear`.
    """

    def propose(self, ratios: Sequence[float]) -> dict[Tensor, Tensor]:
        """Advance the optimizer's state once and return d, with parameters as they were.

        ``ratios`` holds one factor per group, by which its part of d is multiplied.
        """

    def move(self, step: float) -> None:
        """``theta <- theta - step * d`` for the last proposal."""

    def limit(self, ratios: Sequence[float]) -> float:
        """The largest step for which the optimizer is defined."""


def proposer(base: Optimizer) -> Proposer:
    """The two halves of ``base``'s step.

    Raises:
        TypeError: the step of ``base`` is not linear in lr, so no direction can be told from it.
    """
    if not isinstance(base, Optimizer):
        raise TypeError(f"base is a {type(base).__name__}, not a torch.optim.Optimizer")
    if isinstance(base, Proposer):
        return base
    reason = _NOT_LINEAR.get(type(base).__name__)
    if reason is not None:
        raise TypeError(f"{type(base).__name__} cannot be wrapped: {reason}")
    return Linear(base)


_NOT_LINEAR = {
    "LBFGS": "it evaluates the loss several times and chooses its own step",
    "Rprop": "its lr only sets the first step sizes, which then adapt on their own",
    "ASGD": "its state (the averaged point and its own decay of lr) depends on lr",
    "Adafactor": "it chooses its own step relative to the size of the parameters",
    "SparseAdam": "it needs sparse gradients, which have no curvature here",
}


class Linear:
    """The direction of an optimizer whose step is linear in ``group["lr"]``.

    The optimizer steps copies of the parameters once with a large lr: d is the displacement
    over that lr. A large lr keeps all digits of d, where theta - lr d with a small one would
    round them away against theta. At the first proposal that moves, the step is taken from the
    same state at two large rates and at rate 0, and refused if the displacements are not
    proportional, if rate 0 moves, or if the states differ.
    """

    RATE = 2.0**60

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        self._verified = False
        self._direction: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def propose(self, ratios: Sequence[float]) -> dict[Tensor, Tensor]:
        if not self._verified:
            self._verified = self._verify(ratios)
        self._direction = self._displacement(ratios, self.RATE)
        return self._direction

    @torch.no_grad()
    def move(self, step: float) -> None:
        if self._direction:
            params, d = list(self._direction), list(self._direction.values())
            torch._foreach_add_(params, d, alpha=-step)
        self._direction = {}

    def limit(self, ratios: Sequence[float]) -> float:
        return math.inf

    def _displacement(self, ratios: Sequence[float], rate: float) -> dict[Tensor, Tensor]:
        # The base steps on copies: a write to the parameters themselves, even one taken back,
        # would invalidate the graph that the curvature is still to be computed from.
        groups, state = self._base.param_groups, self._base.state
        originals = [(group["lr"], group["params"]) for group in groups]
        params = [p for _, group in originals for p in group if p.grad is not None]
        copies = {p: _copy_with_grad(p) for p in params}
        try:
            for group, ratio in zip(groups, ratios, strict=True):
                group["lr"] = rate * ratio
                group["params"] = [copies.get(p, p) for p in group["params"]]
            for p, twin in copies.items():
                if p in state:
                    state[twin] = state.pop(p)
            self._base.step()
        finally:
            for group, (lr, own) in zip(groups, originals, strict=True):
                group["lr"], group["params"] = lr, own
            for p, twin in copies.items():
                if twin in state:
                    state[p] = state.pop(twin)
        if not params:
            return {}
        d = list(torch._foreach_sub(params, list(copies.values())))
        if rate != 0:
            torch._foreach_div_(d, rate)
        return dict(zip(params, d, strict=True))

    def _verify(self, ratios: Sequence[float]) -> bool:
        """Refuse a step that is not linear in lr; false if there was no step to tell from."""
        start = copy_state(self._base)
        params = [p for group in self._base.param_groups for p in group["params"]]
        versions = [p._version for p in params]
        values = [p.detach().clone() for p in params]
        try:
            at_rest = self._displacement(ratios, 0.0)
            restore_state(self._base, start)
            d = self._displacement(ratios, self.RATE)
            state = copy_state(self._base)
            restore_state(self._base, start)
            doubled = self._displacement(ratios, 2 * self.RATE)
            linear = all(_close(d[p], doubled[p]) and not at_rest[p].any() for p in d)
            linear = linear and _same(state, copy_state(self._base))
        except TypeError as error:
            raise TypeError(
                f"{type(self._base).__name__} cannot be wrapped: it cannot step from gradients "
                f"alone: {error}"
            ) from error
        finally:
            restore_state(self._base, start)
        if versions != [p._version for p in params]:
            for p, value in zip(params, values, strict=True):
                p.copy_(value)
            raise TypeError(
                f"{type(self._base).__name__} cannot be wrapped: it steps other tensors than those "
                "in its param_groups"
            )
        if not linear:
            raise TypeError(
                f"{type(self._base).__name__} cannot be wrapped: its step is not linear in lr; "
                "give it methods propose, move and limit, as optim.direction.Proposer describes"
            )
        return any(bool(x.any()) for x in d.values())


def _copy_with_grad(p: Tensor) -> Tensor:
    twin = p.detach().clone().requires_grad_()
    twin.grad = p.grad
    return twin


def copy_state(base: Optimizer) -> dict[Tensor, Any]:
    """A copy of the optimizer's state that its next steps do not change."""
    return {p: copy.deepcopy(entry) for p, entry in base.state.items()}


def restore_state(base: Optimizer, state: dict[Tensor, Any]) -> None:
    """Set the optimizer's state to a copy of ``state``."""
    base.state.clear()
    for p, entry in state.items():
        base.state[p] = copy.deepcopy(entry)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-3 * b.norm())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.allclose(a, b, equal_nan=True)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return bool(a == b)
