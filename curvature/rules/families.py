"""The families that carry the algebra of most rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.rule import IN_CACHE, Rule, real_dot

Rows = slice | EllipsisType


class Linear(Rule):
    """F is linear: the tangent is F of the tangents."""

    linear = True

    def __init__(self, apply: Callable[..., Any], *, rematerialised: bool = False) -> None:
        self._apply, self.rematerialised = apply, rematerialised

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        return _as_tuple(self._apply(call, *dots))

    def jet(self, call: Call, dots: Tensors, ddots: Tensors) -> tuple[Tensors, Tensors]:
        outputs = self.tangent(call, dots)
        return outputs, self.plus_tangent(call, ddots, (None,) * len(outputs))


class Elementwise(Rule):
    """y = f(x) entry by entry. The Jacobian is diagonal, so J xdot is autograd's own J^T xdot.

    Args:
        bend: f''(x) xdot, given the call, xdot and ydot = f'(x) xdot; or None where f'' is zero.
        factor: what the bend is still to be multiplied by, which then takes no pass of its own.
    """

    def __init__(
        self, bend: Callable[[Call, Tensor, Tensor], Tensor] | None, *, factor: float = 1.0
    ) -> None:
        self._bend, self._factor = bend, factor
        self.linear = bend is None

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        return (call.pull(dots[0])[0],)

    def jet(self, call: Call, dots: Tensors, ddots: Tensors) -> tuple[Tensors, Tensors]:
        (x,), (y,) = dots, self.tangent(call, dots)
        (second,) = (None,) if ddots[0] is None else self.tangent(call, ddots)
        if self._bend is None or x is None or y is None:
            return (y,), (second,)
        second = torch.zeros_like(y) if second is None else second
        for rows, bend in self._bends(call, x, y):
            second[rows].addcmul_(bend, x[rows], value=self._factor)
        return (y,), (second,)

    def adjoint(
        self, call: Call, dots: Tensors, cotangents: Tensors
    ) -> tuple[Tensors, Tensor | None]:
        (x,), (y,), (cotangent,) = dots, self.tangent(call, dots), cotangents
        if cotangent is None or x is None or y is None:
            return (y,), None
        parts = [
            real_dot(cotangent[rows], bend.mul_(x[rows])) for rows, bend in self._bends(call, x, y)
        ]
        return (y,), sum(parts[1:], parts[0]) * self._factor

    def tangent_with_residual(self, call: Call, dots: Tensors) -> tuple[Tensors, Tensors]:
        outputs = self.tangent(call, dots)
        return outputs, outputs

    def pullback_tangent(
        self,
        call: Call,
        dots: Tensors,
        cotangents: Tensors,
        cotangent_dots: Tensors,
        residual: Tensors,
    ) -> Tensors:
        (x,), (y,) = dots, residual
        change = None if cotangent_dots[0] is None else call.pull(*cotangent_dots)[0]
        (cotangent,) = cotangents
        if self._bend is None or cotangent is None or x is None or y is None:
            return (change,)
        change = torch.zeros_like(y) if change is None else change
        for rows, bend in self._bends(call, x, y):
            change[rows].addcmul_(bend, cotangent[rows], value=self._factor)
        return (change,)

    def _bends(self, call: Call, x: Tensor, y: Tensor) -> Iterator[tuple[Rows, Tensor]]:
        assert self._bend is not None
        if y.numel() <= IN_CACHE:
            yield ..., self._bend(call, x, y)
            return
        step = max(1, IN_CACHE // y[:1].numel())
        for start in range(0, len(y), step):
            rows = slice(start, start + step)
            yield rows, self._bend(_Part(call, rows), x[rows], y[rows])  # type: ignore[arg-type]


class Singular(Elementwise):
    """Where f may have an infinite slope: what does not move there, as padding, stays."""

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        (x,), (y,) = dots, super().tangent(call, dots)
        return (y if x is None or y is None else y.masked_fill_(x == 0, 0),)

    def _bends(self, call: Call, x: Tensor, y: Tensor) -> Iterator[tuple[Rows, Tensor]]:
        for rows, bend in super()._bends(call, x, y):
            yield rows, bend.masked_fill_(x[rows] == 0, 0)


class _Part:
    """Some rows of what an entrywise call saved."""

    def __init__(self, call: Call, rows: slice) -> None:
        self._call, self._rows, self._shape = call, rows, call.shape()

    def __getattr__(self, name: str) -> Any:
        saved = getattr(self._call, name)
        whole = isinstance(saved, Tensor) and saved.shape == self._shape
        return saved[self._rows] if whole else saved


class General(Rule):
    """Any other operation.

    Args:
        push: (call, dots, bend) -> ydot, or with ``bend`` the pair of ydot and D²F[xdot, xdot];
            each a tensor, None, or a tuple of these for several outputs. Written with operations
            that autograd differentiates, it serves the cross term too.
    """

    def __init__(self, push: Callable[[Call, Tensors, bool], Any]) -> None:
        self._push = push

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        return _as_tuple(self._push(call, dots, False))

    def jet(self, call: Call, dots: Tensors, ddots: Tensors) -> tuple[Tensors, Tensors]:
        outputs, bends = self._push(call, dots, True)
        return _as_tuple(outputs), self.plus_tangent(call, ddots, _as_tuple(bends))


def _as_tuple(value: Any) -> Tensors:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
