"""The table that finds the rule of a call, and how rules get into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

from torch._ops import OpOverload

from curvature.graph import Call
from curvature.rules.families import Elementwise, General, Linear, Singular
from curvature.rules.local import LocalDoubleBackward
from curvature.rules.rule import Rule

Key = str | type | OpOverload

_TABLE: dict[Key, Rule] = {}
_ANY = LocalDoubleBackward()


def register(name: Key, rule: Rule) -> None:
    """Let ``rule`` serve the calls of this name, class of Python functions, or custom operator.

    Raises:
        ValueError: there is a rule for it already.
    """
    if name in _TABLE:
        raise ValueError(f"there is a rule for {name} already")
    _TABLE[name] = rule


def linear(
    *names: str, rematerialised: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register F of the tangents as a :class:`Linear` rule."""
    return _registering(partial(Linear, rematerialised=rematerialised), names)


def elementwise(
    *names: str, factor: float = 1.0
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register f''(x) xdot, but for a factor, as an :class:`Elementwise` rule."""
    return _registering(partial(Elementwise, factor=factor), names)


def singular(
    *names: str, factor: float = 1.0
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register f''(x) xdot, but for a factor, as a :class:`Singular` rule."""
    return _registering(partial(Singular, factor=factor), names)


def general(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ydot and bend as a :class:`General` rule."""
    return _registering(General, names)


def _registering(
    family: Callable[[Callable[..., Any]], Rule], names: Sequence[str]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            register(name, family(function))
        return function

    return decorate


def rule_of(call: Call) -> Rule:
    """The rule for a call; its own double backward where there is none, or a number is complex."""
    rule = None if call.is_complex() else _find(call)
    return (None if rule is None else rule.of(call)) or _ANY


def _find(call: Call) -> Rule | None:
    function = call.function
    rule = None if function is None else _TABLE.get(_operator(function) or function)
    return rule or _TABLE.get(call.name)


def _operator(function: Any) -> OpOverload | None:
    """The custom operator that a class of Python functions was made for."""
    # Its name does not tell a_b::c from a::b_c.
    waiting = [function.forward] if function.__name__.startswith("GeneratedBackwardFor_") else []
    while waiting:
        for cell in waiting.pop().__closure__ or ():
            if isinstance(cell.cell_contents, OpOverload):
                return cell.cell_contents
            if isinstance(cell.cell_contents, FunctionType):
                waiting.append(cell.cell_contents)
    return None


def registered() -> list[Key]:
    """What has a rule."""
    return list(_TABLE)
