"""A base optimizer's step, taken on tensors beside the parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optim.global_hooks import global_hooks_off
from optim.sharded import local


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
        """Advance the base's state once, and return d."""

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
        """Take the base's own step on the twins, at a rate for each group."""
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


def twin_of(p: Tensor) -> Tensor:
    """A copy that a base takes for the parameter: of its class, with its attributes."""
    twin = p.detach().clone()
    if type(twin) is not type(p):
        twin = twin.as_subclass(type(p))
    for name, value in vars(p).items():
        vars(twin).setdefault(name, value)
    return twin


def told_apart(base: Optimizer, twins: Mapping[Tensor, Tensor]) -> set[str]:
    """Where the base keeps something by a parameter's identity or attribute.

    Its twin would not find it there.
    """
    tensors = [*twins, *twins.values()]
    names = {*map(id, tensors), *(local(t).data_ptr() for t in tensors if t.numel())}
    state: Mapping[Any, Any] = base.state
    others = {k: v for k, v in vars(base).items() if k not in ("state", "param_groups")}
    found = {f"its attribute {k!r}" for k, v in others.items() if _is_keyed(v, names)}
    if any(isinstance(key, int) and key in names for key in state):
        found.add("its state by a number")
    for p, twin in twins.items():
        here, there = vars(p), vars(twin)
        # A subclass may hold its values as attributes.
        for name in () if hasattr(p, "__tensor_flatten__") else there:
            if name not in here or here[name] is not there[name]:
                found.add(f"their attribute {name!r}")
    return found


def _is_keyed(value: Any, names: AbstractSet[int]) -> bool:
    keys = value if isinstance(value, (Mapping, AbstractSet)) else ()
    if any(id(key) in names or (isinstance(key, int) and key in names) for key in keys):
        return True
    entries = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, (Mapping, list, tuple, deque)) and any(
        _is_keyed(entry, names) for entry in entries
    )
