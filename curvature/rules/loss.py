"""Losses."""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.table import general


@general("MseLossBackward0")
def _mse_loss(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor] | Tensor:
    # (a - b)², reduced
    a, b = dots
    moved = torch.zeros_like(call.self)
    if a is not None:
        moved = moved + a
    if b is not None:
        moved = moved - b
    out = _reduced(call, 2 * (call.self - call.target) * moved)
    return (out, _reduced(call, 2 * moved * moved)) if bend else out


def _reduced(call: Call, losses: Tensor) -> Tensor:
    # As torch numbers its reductions: none, mean, sum.
    if call.reduction == 0:
        return losses
    return losses.mean() if call.reduction == 1 else losses.sum()
