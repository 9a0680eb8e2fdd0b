"""The families that carry the algebra of most rules, and the table that finds a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.rule import Rule


class Linear(Rule):
    """F is linear: the tangent is F of the tangents."""

    linear = True

    def __init__(self, apply: Callable[..., Any]) -> None:
        self._apply = apply

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        return _as_tuple(self._apply(call, *dots))

    def jet(self, call: Call, dots: Tensors) -> tuple[Tensors, Tensors]:
        outputs = self.tangent(call, dots)
        return outputs, (None,) * len(outputs)


class Elementwise(Rule):
    """y = f(x) entry by entry. The Jacobian is diagonal, so J xdot is autograd's own J^T xdot.

    Args:
        bend: f''(x) xdot, given the call, xdot and ydot = f'(x) xdot; or None where f'' is zero.
    """

    light = True

    def __init__(self, bend: Callable[[Call, Tensor, Tensor], Tensor] | None) -> None:
        self._bend = bend
        self.linear = bend is None

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        return (call.pull(dots[0])[0],)

    def jet(self, call: Call, dots: Tensors) -> tuple[Tensors, Tensors]:
        (x,), (y,) = dots, self.tangent(call, dots)
        if self._bend is None:
            return (y,), (None,)
        assert x is not None
        assert y is not None
        return (y,), (self._bend(call, x, y).mul_(x),)

    def cross(self, call: Call, dots: Tensors, cotangents: Tensors) -> Tensors:
        (x,), (y,), (cotangent,) = dots, self.tangent(call, dots), cotangents
        if self._bend is None or cotangent is None:
            return (None,)
        assert x is not None
        assert y is not None
        return (self._bend(call, x, y).mul_(cotangent),)


class General(Rule):
    """Any other operation.

    Args:
        push: (call, dots, bend) -> ydot, or with ``bend`` the pair of ydot and D²F[xdot, xdot];
            each a tensor, None, or a tuple of these for several outputs. Written with operations
            that autograd differentiates, it serves the cross term too.
        adjoint: (call, dots, cotangents) -> ydot and <yhat, D²F[xdot, xdot]>; where there is a
            cheaper way than to form the bend.
        turn: (call, dots, cotangents, turned) -> J^T turned and the cross term, added; where
            there is a cheaper way than these two one by one. ``turned`` may hold None.
        light: see :class:`Rule`.
    """

    def __init__(
        self,
        push: Callable[[Call, Tensors, bool], Any],
        *,
        light: bool = False,
        adjoint: Callable[[Call, Tensors, Tensors], tuple[Tensor, Tensor]] | None = None,
        turn: Callable[[Call, Tensors, Tensors, Tensors], Tensors] | None = None,
    ) -> None:
        self._push, self._adjoint, self._turn, self.light = push, adjoint, turn, light

    def adjoint(
        self, call: Call, dots: Tensors, cotangents: Tensors
    ) -> tuple[Tensors, Tensor | None]:
        if self._adjoint is None:
            return super().adjoint(call, dots, cotangents)
        output, number = self._adjoint(call, dots, cotangents)
        return (output,), number

    def turn(
        self, call: Call, dots: Tensors, cotangents: Tensors | None, turned: Tensors | None
    ) -> list[Tensors]:
        if self._turn is None or cotangents is None:
            return super().turn(call, dots, cotangents, turned)
        return [self._turn(call, dots, cotangents, turned or (None,) * len(cotangents))]

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        return _as_tuple(self._push(call, dots, False))

    def jet(self, call: Call, dots: Tensors) -> tuple[Tensors, Tensors]:
        outputs, bends = self._push(call, dots, True)
        return _as_tuple(outputs), _as_tuple(bends)


def _as_tuple(value: Any) -> Tensors:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


_TABLE: dict[str | type, Rule] = {}


def register(name: str | type, rule: Rule) -> None:
    """Let ``rule`` serve the calls of this name, or of this class of Python functions.

    Raises:
        ValueError: there is a rule for it already.
    """
    if name in _TABLE:
        raise ValueError(f"there is a rule for {name} already")
    _TABLE[name] = rule


def linear(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register F of the tangents as a :class:`Linear` rule."""
    return _registering(Linear, names)


def elementwise(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register f''(x) xdot as an :class:`Elementwise` rule."""
    return _registering(Elementwise, names)


def general(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ydot and bend as a :class:`General` rule."""
    return _registering(General, names)


def _registering(
    family: type[Rule], names: Sequence[str]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            register(name, family(function))  # type: ignore[call-arg]
        return function

    return decorate


def find(call: Call) -> Rule | None:
    """The rule for a call, if there is one."""
    function = call.function
    return _TABLE.get(call.name if function is None else function) or _TABLE.get(call.name)


def registered() -> list[str | type]:
    """The names and classes that have a rule."""
    return list(_TABLE)
