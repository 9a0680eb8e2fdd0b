"""Refusals of arguments that are out of range."""

from __future__ import annotations

import math


def check_decay(name: str, value: float) -> None:
    """Of a moving average."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; it must be in [0, 1)")


def check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be positive")


def check_count(name: str, count: int, least: int = 1) -> None:
    if not isinstance(count, int) or count < least:
        raise ValueError(f"{name} is {count}; it must be an integer of at least {least}")
