"""Losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.table import Linear, general, register


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


class _NllLoss(Linear):
    """-w_t x_t summed or averaged, t the target of each sample: a cotangent of few entries."""

    def __init__(self) -> None:
        super().__init__(_nll_loss, light=True)

    def pull_sums(self, call: Call, cotangents: Tensors, dim: int) -> Tensors:
        (y,), classes = cotangents, call.self.ndim > 1
        if y is None or dim % call.self.ndim != classes:
            return call.pull(y)
        known = call.target != call.ignore_index
        weights = known.to(call.self.dtype)
        if call.weight is not None:
            weights *= call.weight[call.target.where(known, 0)]
        if call.reduction == 1:
            weights /= call.total_weight
        return ((-weights * y).unsqueeze(int(classes)),)


def _nll_loss(call: Call, x: Tensor) -> Any:
    function = torch.ops.aten.nll_loss_forward if x.ndim < 4 else torch.ops.aten.nll_loss2d_forward
    return function(x, call.target, call.weight, call.reduction, call.ignore_index)[0]


register("NllLossBackward0", _NllLoss())
register("NllLoss2DBackward0", _NllLoss())
