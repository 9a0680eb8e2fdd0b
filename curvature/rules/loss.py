"""Losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from curvature.graph import Call, Tensors
from curvature.rules.families import Linear
from curvature.rules.table import general, register


@general("MseLossBackward0")
def _mse_loss(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor] | Tensor:
    # (a - b)², reduced
    moved = _difference(call, dots)
    out = _reduced(call, 2 * (call.self - call.target) * moved)
    return (out, _reduced(call, 2 * moved * moved)) if bend else out


def _difference(call: Call, dots: Tensors) -> Tensor:
    """How the residual moves."""
    a, b = dots
    moved = torch.zeros_like(call.self)
    if a is not None:
        moved = moved + a
    return moved if b is None else moved - b


@general("SmoothL1LossBackward0")
def _smooth_l1_loss(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor] | Tensor:
    # r²/(2 beta) for a residual r = a - b within beta, abs(r) - beta/2 beyond
    return _huber(call, dots, bend, call.beta, 1.0)


@general("HuberLossBackward0")
def _huber_loss(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor] | Tensor:
    return _huber(call, dots, bend, call.delta, call.delta)


def _huber(
    call: Call, dots: Tensors, bend: bool, inside: float, steepest: float
) -> tuple[Tensor, Tensor] | Tensor:
    """Of an even loss whose slope rises to its steepest where the residual reaches ``inside``."""
    residual, moved = call.self - call.target, _difference(call, dots)
    # Without an inside this is abs(r).
    rate = steepest / inside if inside > 0 else 0.0
    within = residual.abs() < inside
    out = _reduced(call, torch.where(within, rate * residual, steepest * residual.sign()) * moved)
    return (out, _reduced(call, torch.where(within, rate * moved * moved, 0))) if bend else out


@general("BinaryCrossEntropyWithLogitsBackward0")
def _bce_with_logits(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor] | Tensor:
    # (1 - t) z + c log(1 + exp(-z)) with c = 1 + (pos_weight - 1) t
    (x, y), z, t = dots, call.self, call.target
    extra = 0 if call.pos_weight is None else call.pos_weight - 1
    # Not 1 minus the other, which loses the digits of a loss that is nearly zero.
    s, rest = torch.sigmoid(z), torch.sigmoid(-z)
    weight = 1 if call.weight is None else call.weight
    out, second = torch.zeros_like(z), torch.zeros_like(z)
    if x is not None:
        out = out + ((1 - t) * s - (1 + extra) * t * rest) * x
        second = (1 + extra * t) * s * rest * x * x
    if y is not None:
        out = out + (-extra * F.logsigmoid(z) - z) * y
    if x is not None and y is not None:
        second = second - 2 * (1 + extra * rest) * x * y
    out = _reduced(call, weight * out)
    return (out, _reduced(call, weight * second)) if bend else out


def _reduced(call: Call, losses: Tensor) -> Tensor:
    # As torch numbers its reductions: none, mean, sum.
    if call.reduction == 0:
        return losses
    return losses.mean() if call.reduction == 1 else losses.sum()


class _NllLoss(Linear):
    """-w_t x_t summed or averaged, t the target of each sample: a cotangent of few entries."""

    def __init__(self) -> None:
        super().__init__(_nll_loss, rematerialised=True)

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
