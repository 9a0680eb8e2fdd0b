"""Refusals of arguments that are out of range or of the wrong kind."""

from __future__ import annotations

import math
from typing import Any


def check_number(name: str, value: Any) -> None:
    """Refuse what is no number; a tensor of one entry is one."""
    try:
        if isinstance(value, str):
            raise TypeError
        float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is {value!r}; it must be a number") from error


def check_decay(name: str, value: float) -> None:
    """Refuse what is no decay of a moving average."""
    check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; it must be in [0, 1)")


def check_positive(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be positive")


def check_count(name: str, count: int, least: int = 1) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        raise ValueError(f"{name} is {count!r}; it must be an integer of at least {least}")


def take_floats(frozen: Any, *names: str) -> None:
    """Make plain numbers of attributes that numpy or a tensor may have given.

    ``torch.load`` refuses others in a checkpoint.
    """
    for name in names:
        object.__setattr__(frozen, name, float(getattr(frozen, name)))


def check_kind(name: str, value: Any, kind: type, hint: str) -> None:
    """Refuse what is not of this class; the hint says what to give."""
    if not isinstance(value, kind):
        given = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise TypeError(f"{name} is {given}; give {hint}")


def check_param_group(param_group: Any) -> None:
    """Refuse what is no group of parameters."""
    if not isinstance(param_group, dict):
        kind = type(param_group).__name__
        raise TypeError(f"param_group is a {kind}; give a dictionary, as {{'params': [p]}}")
    if "params" not in param_group:
        raise ValueError(f"param_group holds {list(param_group)} and lacks 'params'")
