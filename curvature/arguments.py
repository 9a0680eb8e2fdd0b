"""Refusals of arguments of the wrong kind."""

from __future__ import annotations

from typing import Any


def check_callable(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name} is a {type(value).__name__}; give a function")


def as_number(name: str, value: Any) -> float:
    """The value as a float; a tensor of one entry is a number too."""
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is {value!r}; give a number") from error
