"""What step a base optimizer proposes, apart from how far it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer

from optim.from_origin import BLIND, FromOrigin
from optim.inherited import torch_kind
from optim.linear_in_rate import LinearInRate


@runtime_checkable
class Proposer(Protocol):
    """An optimizer's step in two halves: where to, and how far.

    An optimizer that has these methods (as :class:`optim.INNAprop`) is wrapped through them;
    any other through :class:`FromOrigin` or :class:`LinearInRate`.
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
    check_hooks(base)
    inner = [k for k, v in vars(base).items() if isinstance(v, Optimizer)]
    if inner:
        raise TypeError(
            f"{type(base).__name__} cannot be wrapped: it holds another optimizer as "
            f"{inner[0]!r}, whose state would advance unseen; wrap that one"
        )
    if isinstance(base, Proposer):
        return base
    reason = getattr(base, "not_linear", _NOT_LINEAR.get(torch_kind(base) or ""))
    if reason is not None:
        raise TypeError(f"{type(base).__name__} cannot be wrapped: {reason}")
    return FromOrigin(base) if type(base) in BLIND else LinearInRate(base)


def check_hooks(base: Optimizer) -> None:
    """Refuse hooks on the base's steps, which would run on copies or not at all."""
    if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        raise ValueError(
            "step hooks are attached to the base optimizer; attach them to the wrapper"
        )


_MOST_MOMENTUM = 0.999  # 1 would remember for ever

# Torch's own, and why; others say it themselves in an attribute not_linear.
_NOT_LINEAR = {
    "LBFGS": "it evaluates the loss several times and chooses its own step",
    "Rprop": "its lr only sets the first step sizes, which then adapt on their own",
    "ASGD": "its state (the averaged point and its own decay of lr) depends on lr",
    "Adafactor": "it chooses its own step relative to the size of the parameters",
    "SparseAdam": "it needs sparse gradients, which have no curvature here",
}


def momentum(base: Optimizer) -> float:
    """The share of the last direction in the next, as far as the base's groups name it.

    The largest ``momentum``, or first of ``betas``, of its groups, or what it says itself by an
    attribute ``inertia``; 0 where there is none.
    """
    shares = [float(getattr(base, "inertia", 0.0))]
    for group in base.param_groups:
        if "betas" in group:
            shares.append(float(group["betas"][0]))
        shares.append(float(group.get("momentum", 0)))
    return min(max(shares), _MOST_MOMENTUM)
