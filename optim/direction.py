"""What step a base optimizer proposes, apart from how far it is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from curvature import RandomState
from optim.snapshot import Snapshot


@runtime_checkable
class Proposer(Protocol):
    """An optimizer's step in two halves: where to, and how far.

    An optimizer that has these methods (as :class:`optim.INNAprop`) is wrapped through them;
    any other through :class:`LinearInRate`.
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
        TypeError: ``base`` is no optimizer, or its step is not linear in lr, so that no direction
            can be told from it.
        ValueError: step hooks are attached to it, which would run on copies or not at all.
    """
    if not isinstance(base, Optimizer):
        raise TypeError(f"base is a {type(base).__name__}, not a torch.optim.Optimizer")
    if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        raise ValueError(
            "step hooks are attached to the base optimizer; attach them to the wrapper"
        )
    inner = [k for k, v in vars(base).items() if isinstance(v, Optimizer)]
    if inner:
        raise TypeError(
            f"{type(base).__name__} cannot be wrapped: it holds another optimizer as "
            f"{inner[0]!r}, whose state would advance unseen; wrap that one"
        )
    if isinstance(base, Proposer):
        return base
    reason = getattr(base, "not_linear", _NOT_LINEAR.get(type(base).__name__))
    if reason is not None:
        raise TypeError(f"{type(base).__name__} cannot be wrapped: {reason}")
    return LinearInRate(base)


_MOST_MOMENTUM = 0.999  # 1 would remember for ever

# Of torch's optimizers; others say it themselves in an attribute not_linear.
_NOT_LINEAR = {
    "LBFGS": "it evaluates the loss several times and chooses its own step",
    "Rprop": "its lr only sets the first step sizes, which then adapt on their own",
    "ASGD": "its state (the averaged point and its own decay of lr) depends on lr",
    "Adafactor": "it chooses its own step relative to the size of the parameters",
    "SparseAdam": "it needs sparse gradients, which have no curvature here",
}


def momentum(base: Optimizer) -> float:
    """The share of the last direction in the next, as far as the base's groups name it.

    The largest ``momentum``, or first of ``betas``, of its groups; 0 where there is neither.
    """
    shares = [0.0]
    for group in base.param_groups:
        if "betas" in group:
            shares.append(float(group["betas"][0]))
        shares.append(float(group.get("momentum", 0)))
    return min(max(shares), _MOST_MOMENTUM)


class LinearInRate:
    """The direction of an optimizer whose step is linear in ``group["lr"]``.

    The optimizer steps copies of the parameters once with a large lr: d is the displacement
    over that lr. A large lr keeps the digits of d down to 1e-18 of theta, where theta - lr d
    with a small one would round them away against theta. The first steps that move are taken
    from the same state at two large rates and at rate 0 besides, and refused if the
    displacements are not proportional, if rate 0 moves, or if the states differ.
    """

    RATE = 2.0**60
    PROOFS = 10  # more than one, for optimizers that do something else at every k-th step

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        self._proofs = 0
        self._direction: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def propose(self, ratios: Sequence[float]) -> dict[Tensor, Tensor]:
        if self._proofs < self.PROOFS and self._prove(ratios):
            self._proofs += 1
        self._direction = self._displacement(ratios, self.RATE)
        if self._direction:
            torch._foreach_mul_(list(self._direction.values()), -1 / self.RATE)
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
        """Where the base's next step at this rate leads to, its state advancing: -rate d."""
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
        moved = [copy.detach() for copy in copies.values()]
        torch._foreach_sub_(moved, params)
        return dict(zip(params, moved, strict=True))

    def _prove(self, ratios: Sequence[float]) -> bool:
        """Refuse a step that is not linear in lr; false if there was no step to tell from."""
        name = type(self._base).__name__
        start = Snapshot(self._base)
        params = [p for group in self._base.param_groups for p in group["params"]]
        versions = [p._version for p in params]
        values = [p.detach().clone() for p in params]
        random = RandomState()
        try:
            at_rest = self._displacement(ratios, 0.0)
            start.restore()
            random.restore()
            once = self._displacement(ratios, self.RATE)
            after = Snapshot(self._base)
            start.restore()
            random.restore()
            twice = self._displacement(ratios, 2 * self.RATE)
            same_state = after.equals(Snapshot(self._base))
        except (TypeError, LookupError, AttributeError) as error:
            raise TypeError(
                f"{name} cannot be wrapped: it cannot step copies of its parameters, given their "
                f"gradients: {error!r}"
            ) from error
        finally:
            start.restore()
            random.restore()
        if versions != [p._version for p in params]:
            for p, value in zip(params, values, strict=True):
                p.copy_(value)
            raise TypeError(
                f"{name} cannot be wrapped: it steps other tensors than those in its param_groups"
            )
        if not all(bool(torch.isfinite(x).all()) for x in twice.values()):
            return False
        proportional = all(_is_double(twice[p], once[p], p) for p in once)
        if not (proportional and same_state) or any(bool(x.any()) for x in at_rest.values()):
            raise TypeError(
                f"{name} cannot be wrapped: its step is not linear in lr; give it methods propose, "
                "move and limit, as optim.direction.Proposer describes"
            )
        return any(bool(x.any()) for x in once.values())


def _copy_with_grad(p: Tensor) -> Tensor:
    twin = p.detach().clone().requires_grad_()
    twin.grad = p.grad
    return twin


def _is_double(twice: Tensor, once: Tensor, p: Tensor) -> bool:
    # A displacement is known to the rounding of the parameters that it starts from.
    eps = torch.finfo(p.dtype).eps
    return bool((twice - 2 * once).norm() <= eps * (1e3 * twice.norm() + 8 * p.norm()))
