"""The learning rate of a group, which the rounding of a schedule may take below 0."""

from __future__ import annotations

from typing import Any

_ROUNDING = 1e-12  # of the rate that the schedule began with


def rate(group: dict[str, Any]) -> float:
    """lr, or 0 if only rounding is below it: ``LinearLR(o, 0.9, 0.0, 4)`` ends at -4.7e-17."""
    lr = float(group["lr"])
    rounding = _ROUNDING * float(group.get("initial_lr", 1.0))
    return 0.0 if -rounding <= lr < 0 else lr
