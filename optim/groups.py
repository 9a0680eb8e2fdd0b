"""What a wrapper asks of the parameter groups of its base optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optim.apart import check_apart
from optim.ranges import check_number
from optim.rate import rate
from optim.sharded import check_sharding


def check_wrappable(
    new: Sequence[dict[str, Any]],
    others: Sequence[dict[str, Any]],
    *,
    several: bool,
    exact: str | None,
) -> None:
    """Refuse new groups that cannot be wrapped, by themselves or together with others.

    Args:
        others: the groups that are wrapped already.
        several, exact: as for :func:`optim.sharded.check_sharding`.
    """
    for group in new:
        check_group(group)
    check_together([*others, *new])
    for group in new:
        check_sharding(group["params"], several=several, exact=exact)


def check_rate(group: dict[str, Any]) -> None:
    """Refuse a group whose lr is no factor on a step."""
    if "lr" not in group:
        raise TypeError("the base optimizer has no lr in its groups, by which to set its step")
    check_number("lr", group["lr"])
    if not 0 <= rate(group) < math.inf:
        raise ValueError(f"lr is {group['lr']}; it must be finite and at least 0")


def check_options(group: dict[str, Any]) -> None:
    """Refuse options with which no step can be taken; a caller may set them between steps."""
    check_rate(group)
    if "momentum" in group:
        check_number("momentum", group["momentum"])
    if "betas" in group:
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or not betas:
            raise TypeError(f"betas is {betas!r}; give a tuple of numbers")
        check_number("betas[0]", betas[0])
    if group.get("maximize"):
        raise ValueError("maximize=True cannot be wrapped; negate the loss instead")
    if group.get("differentiable"):
        raise ValueError("differentiable=True cannot be wrapped: no graph is kept of a step")


def check_group(group: dict[str, Any]) -> None:
    """Refuse a group that cannot be wrapped."""
    check_options(group)
    if "initial_lr" in group:
        raise ValueError(
            "a scheduler is attached to the base optimizer already, or was when its state was "
            "saved: attach it to the wrapper, after wrapping, where lr is the factor ell; delete "
            "what it has left, 'initial_lr' of each group"
        )
    for i, p in enumerate(group["params"]):
        if p.dtype not in (torch.float32, torch.float64):
            hint = (
                "Make a real parameter of it, as by torch.view_as_real, and view_as_complex in the "
                "model"
                if p.is_complex()
                else "For half precision leave it in float32 and evaluate the loss under "
                "torch.autocast"
            )
            raise TypeError(
                f"{_described(i, p)} has dtype {p.dtype}; only float32 and float64 can be used. "
                + hint
            )


def check_together(groups: Sequence[dict[str, Any]]) -> None:
    """Refuse groups whose parameters cannot be stepped together."""
    check_devices(groups)
    check_apart(groups)


def check_devices(groups: Sequence[dict[str, Any]]) -> None:
    """Refuse parameters without values, and on several devices."""
    placed = [(i, p) for group in groups for i, p in enumerate(group["params"])]
    for i, p in placed:
        if p.is_meta:
            raise TypeError(
                f"{_described(i, p)} is on the meta device and has no values: load the model, or "
                "call its to_empty and initialise it, before making the optimizer"
            )
        if p.device != placed[0][1].device:
            raise TypeError(
                f"{_described(i, p)} is on {p.device} and {_described(*placed[0])} on "
                f"{placed[0][1].device}; move all parameters to one device"
            )


def _described(i: int, p: Tensor) -> str:
    return f"parameter {i} of its group, of shape {tuple(p.shape)},"
