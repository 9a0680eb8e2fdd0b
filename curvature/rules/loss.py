"""Softmax and the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.table import general

_BLOCK = 2**18  # entries at a time, so that the temporaries stay in the cache


@general("LogSoftmaxBackward0")
def _log_softmax(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor] | Tensor:
    # y = x - log sum exp x: with p = exp y, y' = x' - E_p x' and y'' = -Var_p x'
    (x,) = dots
    assert x is not None
    y = call.result
    step = max(1, _BLOCK // max(1, y[:1].numel())) if y.ndim > 1 and call.dim % y.ndim else len(y)
    outs, variances = [], []
    for x_rows, y_rows in zip(torch.split(x, step), torch.split(y, step), strict=True):
        p = y_rows.exp()
        # Measured from the likeliest class: where p is nearly 1, y' would drown in rounding.
        out = x_rows - x_rows.gather(call.dim, y_rows.argmax(call.dim, True))
        out = out - (p * out).sum(call.dim, True)
        outs.append(out)
        if bend:
            variances.append((p * out * out).sum(call.dim, True))
    out = torch.cat(outs)
    return (out, -torch.cat(variances).expand_as(out)) if bend else out


@general("SoftmaxBackward0")
def _softmax(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor] | Tensor:
    # With c = x' - E_p x': p' = p c and p'' = p (c² - E_p c²)
    (x,) = dots
    assert x is not None
    p = call.result
    c = x - (p * x).sum(call.dim, True)
    out = p * c
    if not bend:
        return out
    square = out * c
    return out, square - p * square.sum(call.dim, True)


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
