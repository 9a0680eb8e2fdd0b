"""What a loss may look like: a number, or one number per sample, finite and part of a graph."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import Parameter, is_lazy


def check_losses(losses: Any, *, graph: bool) -> Tensor:
    """Return ``losses`` if it is a scalar or a vector of losses; refuse anything else.

    Args:
        losses: what the user's function returned.
        graph: whether a gradient will be asked of it.

    Raises:
        TypeError: not a real floating-point tensor, or not a dense one that holds numbers.
        ValueError: more than one dimension, no entry, or no graph where one is needed.
    """
    if not isinstance(losses, Tensor):
        raise TypeError(
            f"the loss is a {type(losses).__name__}, not a tensor; return the tensor itself "
            "(no .item(), no tuple)"
        )
    if reason := unusable(losses):
        raise TypeError(f"the loss {reason}")
    if not losses.is_floating_point():
        raise TypeError(f"the loss has dtype {losses.dtype}; it must be real and floating-point")
    if losses.ndim > 1:
        raise ValueError(
            f"the loss has shape {tuple(losses.shape)}; return a scalar, or a vector with one loss "
            "per sample (reduce the other dimensions, as in losses.flatten(1).mean(1))"
        )
    if losses.numel() == 0:
        raise ValueError("the loss holds no sample: the batch is empty")
    if graph and not losses.requires_grad:
        raise ValueError(
            "the loss has no graph: it does not depend on params, or was computed under no_grad or "
            "inference_mode, or from .detach(), .data, .item() or numpy; compute it from params "
            "with torch operations"
        )
    return losses


def unusable(tensor: Tensor) -> str | None:
    """Why a tensor is not a dense one that holds numbers, or ``None``."""
    # Both are subclasses, and most tensors are not.
    if type(tensor) is not Tensor and type(tensor) is not Parameter:
        if is_lazy(tensor):
            return "is not initialised yet: call its lazy module once before"
        if isinstance(tensor, FakeTensor):
            return "is a fake tensor, which holds no numbers; compute outside FakeTensorMode"
    if tensor.is_nested:
        return "is a nested tensor; only dense tensors can be used"
    if tensor.layout != torch.strided:
        return f"has layout {tensor.layout}; only dense tensors can be used"
    if tensor.is_meta:
        return "is on the meta device, which holds no numbers; materialise it"
    return None


def is_finite(tensor: Tensor) -> bool:
    # A sum is finite only if its terms are, and many times faster to look at than each of them.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def describe_non_finite(losses: Tensor) -> str:
    """Say which entries of a scalar or per-sample loss are NaN or infinite."""
    if losses.ndim == 0:
        return f"the loss is {losses.item()}"
    bad = torch.nonzero(~torch.isfinite(losses)).flatten().tolist()
    shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
    return f"the loss of {len(bad)} of {losses.numel()} samples is NaN or infinite (sample {shown})"
