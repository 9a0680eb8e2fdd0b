"""What a wrapper asks of the parameter groups of its base optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch


def check_rate(group: dict[str, Any]) -> None:
    """Refuse a group whose lr is no factor on a step."""
    if "lr" not in group:
        raise TypeError("the base optimizer has no lr in its groups, by which to set its step")
    if not 0 <= float(group["lr"]) < math.inf:
        raise ValueError(f"lr is {group['lr']}; it must be finite and at least 0")


def check_group(group: dict[str, Any]) -> None:
    """Refuse a group that cannot be wrapped."""
    if group.get("maximize"):
        raise ValueError("maximize=True cannot be wrapped; negate the loss instead")
    if group.get("differentiable"):
        raise ValueError("differentiable=True cannot be wrapped: no graph is kept of a step")
    if "initial_lr" in group:
        raise ValueError(
            "a scheduler is attached to the base optimizer already; attach it to the wrapper, "
            "after wrapping: there lr is the factor ell"
        )
    for p in group["params"]:
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"a parameter has dtype {p.dtype}; only float32 and float64 can be used"
            )
