"""The dynamical inertial Newton (DIN) system that INNA and INNAprop discretise, as an optimizer."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim.checked import Checked
from optim.energy import Kinetic, check_no_decay
from optim.inner import inner
from optim.rate import rate


@dataclass(eq=False)
class _Pending:
    """What one chunk of parameters does once its step size is known."""

    group: dict[str, Any]
    params: list[Tensor]
    psis: list[Tensor]
    preconditioned: list[Tensor]


class DIN(Checked):
    """Explicit Euler for DIN in (theta, psi), with a preconditioned gradient.

    With u = (1/beta - alpha) theta - psi/beta, at the old theta and psi::

        psi   <- psi   + gamma u
        theta <- theta + gamma (u - beta P^-1 g)

    which equals lines 12 and 13 of Algorithm 1 of *INNAprop* (Bolte, Boustany, Pauwels, Purica
    2024), there solved for psi_k so as to divide by beta - gamma. psi starts at
    (1 - alpha beta) theta, which is rest. Before it, theta decays by (1 - lambda gamma).

    A subclass says what P is. Besides :meth:`step`, the step can be taken in two halves:
    :meth:`propose` advances the preconditioner and says where to, :meth:`move` goes there by a
    step chosen in between, theta and psi together. ``inertia`` tells a wrapper that d has a past,
    which is a small part of it until gradients have become small.
    """

    inertia = 0.05  # found by experiment

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._pending: list[tuple[float, _Pending]] = []
        super().__init__(params, defaults)

    def _step_group(self, group: dict[str, Any]) -> None:
        for pending in self._advance(group):
            _euler(pending, rate(group))

    @torch.no_grad()
    def propose(self, ratios: Sequence[float]) -> dict[Tensor, Tensor]:
        """Advance the preconditioner and return d, where ``theta <- theta - s d`` to first order.

        Args:
            ratios: one factor per group; group i will move with gamma = ratios[i] * s.

        Returns:
            For each parameter with a gradient, ``ratio (lambda theta - u + beta P^-1 g)``.

        Raises:
            ValueError: a hyperparameter other than lr, which has no part in d, is out of range.
            TypeError: one is no number, a gradient is sparse, or a parameter has changed its dtype.

        Example:
            >>> import torch
            >>> from optim import INNA
            >>> x = torch.nn.Parameter(torch.tensor([1.0]))
            >>> x.grad = torch.tensor([2.0])
            >>> optimizer = INNA([x])
            >>> optimizer.propose([1.0])[x]
            tensor([0.2000])
            >>> optimizer.move(0.05)
            >>> x.detach()
            tensor([0.9900])
        """
        for group in self.param_groups:
            self._check({**group, "lr": 0.0})
        self._check_gradients()
        self._pending = []
        direction: dict[Tensor, Tensor] = {}
        for group, ratio in zip(self.param_groups, ratios, strict=True):
            for pending in self._advance(group):
                self._pending.append((ratio, pending))
                d = _drift(pending)
                torch._foreach_neg_(d)
                torch._foreach_add_(d, pending.params, alpha=group["weight_decay"])
                torch._foreach_add_(d, pending.preconditioned, alpha=group["beta"])
                torch._foreach_mul_(d, ratio)
                direction.update(zip(pending.params, d, strict=True))
        return direction

    @torch.no_grad()
    def move(self, step: float) -> None:
        """Move theta and psi of the last proposal, with gamma = step times the group's ratio.

        Example: see :meth:`propose`.
        """
        for ratio, pending in self._pending:
            # ratio * limit may round up to beta.
            largest = math.nextafter(pending.group["beta"], 0.0)
            _euler(pending, min(ratio * step, largest))
        self._pending = []

    @torch.no_grad()
    def kinetic(self) -> Kinetic:
        """The kinetic energy ‖v‖²_P / (2 (1 + alpha beta)) of the last proposal.

        With v = (alpha - 1/beta) theta + psi/beta, which a step of gamma moves by
        gamma (-alpha v + (1 - alpha beta) P^-1 g); with the loss it makes the energy that the
        dynamics make fall, over 1 + alpha beta. Each group has its own alpha and beta.

        Raises:
            ValueError: a group has weight decay, for which this does not hold.

        Example:
            >>> import torch
            >>> from optim import INNA
            >>> x = torch.nn.Parameter(torch.tensor([1.0]))
            >>> x.grad = torch.tensor([3.0])
            >>> optimizer = INNA([x], alpha=0.5, beta=1.0)
            >>> _ = optimizer.propose([1.0])
            >>> optimizer.kinetic()  # at rest: v = 0, w = 3/2
            Kinetic(before=0.0, value=0.0, slope=0.0, curvature=1.5)
        """
        value = slope = curvature = 0.0
        for ratio, pending in self._pending:
            group = pending.group
            check_no_decay(group)
            alpha, beta = group["alpha"], group["beta"]
            v = _drift(pending)
            torch._foreach_neg_(v)
            w = list(torch._foreach_mul(v, -alpha))
            torch._foreach_add_(w, pending.preconditioned, alpha=1 - alpha * beta)
            torch._foreach_mul_(w, ratio)
            metric = self._metric(group, [self.state[p] for p in pending.params])
            vp, wp = (x if metric is None else list(torch._foreach_mul(x, metric)) for x in (v, w))
            weight = 1 / (1 + alpha * beta)
            value += weight / 2 * inner(v, vp)
            slope += weight * inner(v, wp)
            curvature += weight * inner(w, wp)
        return Kinetic(before=value, value=value, slope=slope, curvature=curvature)

    def limit(self, ratios: Sequence[float]) -> float:
        """The largest step that keeps every gamma below its beta.

        Example:
            >>> import torch
            >>> from optim import INNA
            >>> optimizer = INNA([torch.nn.Parameter(torch.ones(1))], beta=0.1)
            >>> round(optimizer.limit([0.5]), 9)
            0.2
        """
        return min(
            (
                math.nextafter(group["beta"] / ratio, 0.0)
                for group, ratio in zip(self.param_groups, ratios, strict=True)
                if ratio > 0
            ),
            default=math.inf,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse hyperparameters for which the step is not defined."""
        lr, alpha, beta = rate(group), group["alpha"], group["beta"]
        if not lr >= 0:
            raise ValueError(f"lr is {lr}; it must be at least 0")
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha is {alpha}; the friction must be finite and at least 0")
        if not 0 < beta < math.inf:
            raise ValueError(f"beta is {beta}; it must be finite and positive")
        if not lr < beta:
            raise ValueError(
                f"lr is {lr} and beta is {beta}: the step must stay below beta, or psi overshoots "
                "the point it relaxes to (INNAprop, Algorithm 1, line 3); lower lr or raise beta"
            )
        if not 0 <= group["weight_decay"] < math.inf:
            raise ValueError(
                f"weight_decay is {group['weight_decay']}; it must be finite and at least 0"
            )

    @abstractmethod
    def _precondition(
        self, group: dict[str, Any], grads: list[Tensor], states: list[dict[str, Any]]
    ) -> list[Tensor]:
        """P^-1 g, advancing the preconditioner that ``states`` hold."""

    def _metric(self, group: dict[str, Any], states: list[dict[str, Any]]) -> list[Tensor] | None:
        """The diagonal of P as last advanced; None is the identity."""
        return None

    def _advance(self, group: dict[str, Any]) -> list[_Pending]:
        params = [p for p in group["params"] if p.grad is not None]
        chunks = [[p] for p in params] if group["foreach"] is False else [params] if params else []
        return [self._advance_chunk(group, chunk) for chunk in chunks]

    def _advance_chunk(self, group: dict[str, Any], params: list[Tensor]) -> _Pending:
        grads = [p.grad for p in params if p.grad is not None]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state["psi"] = p.detach() * (1 - group["alpha"] * group["beta"])
        preconditioned = self._precondition(group, grads, states)
        return _Pending(group, params, [state["psi"] for state in states], preconditioned)


def _drift(pending: _Pending) -> list[Tensor]:
    """u = (1/beta - alpha) theta - psi/beta."""
    alpha, beta = pending.group["alpha"], pending.group["beta"]
    u = list(torch._foreach_mul(pending.params, 1 / beta - alpha))
    torch._foreach_add_(u, pending.psis, alpha=-1 / beta)
    return u


def _euler(pending: _Pending, gamma: float) -> None:
    if pending.group["weight_decay"] != 0:
        torch._foreach_mul_(pending.params, 1 - gamma * pending.group["weight_decay"])
    u = _drift(pending)
    torch._foreach_add_(pending.psis, u, alpha=gamma)
    torch._foreach_add_(u, pending.preconditioned, alpha=-pending.group["beta"])
    torch._foreach_add_(pending.params, u, alpha=gamma)
