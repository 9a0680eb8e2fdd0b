"""A base optimizer's step, taken on tensors beside the parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from optim.global_hooks import global_hooks_off


class OnTwins(ABC):
    """Steps ``base`` on a twin of each parameter; a subclass tells the direction from that.

    Not on the parameters themselves: a write to them, even one taken back, would invalidate the
    graph that a curvature is still to be computed from.
    """

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        self._direction: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def propose(self, ratios: Sequence[float]) -> dict[Tensor, Tensor]:
        self._direction = self._propose(ratios)
        return self._direction

    @abstractmethod
    def _propose(self, ratios: Sequence[float]) -> dict[Tensor, Tensor]:
        """The base's state advanced once, and d."""

    @torch.no_grad()
    def move(self, step: float) -> None:
        if self._direction:
            params, d = list(self._direction), list(self._direction.values())
            torch._foreach_add_(params, d, alpha=-step)
        self._direction = {}

    def limit(self, ratios: Sequence[float]) -> float:
        return math.inf

    def _grads(self) -> dict[Tensor, Tensor]:
        """The gradient of each parameter that has one, for the base's step to take."""
        params = (p for group in self._base.param_groups for p in group["params"])
        known = {p: p.grad for p in params if p.grad is not None}
        # The slope is still to be taken from them.
        return {p: g.clone() for p, g in known.items()} if self._writes_gradients() else known

    def _writes_gradients(self) -> bool:
        """Whether the base's step may write to the gradients."""
        return True

    def _step(
        self, twins: dict[Tensor, Tensor], grads: dict[Tensor, Tensor], rates: Sequence[float]
    ) -> None:
        """The base's own step, at a rate for each group, from where the twins are."""
        groups, state = self._base.param_groups, self._base.state
        own = [(group["lr"], group["params"]) for group in groups]
        for p, twin in twins.items():
            twin.requires_grad_().grad = grads[p]
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
                group["params"] = [twins.get(p, p) for p in group["params"]]
            for p, twin in twins.items():
                if p in state:
                    state[twin] = state.pop(p)
            with global_hooks_off():
                self._base.step()
        finally:
            for group, (lr, params) in zip(groups, own, strict=True):
                group["lr"], group["params"] = lr, params
            for p, twin in twins.items():
                twin.requires_grad_(False).grad = None
                if twin in state:
                    state[p] = state.pop(twin)
