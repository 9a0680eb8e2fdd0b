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
    if x.numel() == 0:
        return (x, x) if bend else x
    # A single number is a vector of one class.
    dim, y = call.dim, call.result
    if y.ndim == 0:
        x, y = x.view(1), y.view(1)
    step = len(y) if dim % y.ndim == 0 else max(1, _BLOCK // y[:1].numel())
    outs, bends = [], []
    for moved, result in zip(torch.split(x, step), torch.split(y, step), strict=True):
        p = result.exp()
        # Measured from the likeliest class: where p is nearly 1, y' would drown in rounding.
        out = moved - moved.gather(dim, result.argmax(dim, True))
        out = out - (p * out).sum(dim, True)
        outs.append(out)
        if bend:
            bends.append((p * out * out).sum(dim, True).neg_())
    out = torch.cat(outs).view(call.shape())
    return (out, torch.cat(bends).expand(y.shape).reshape(out.shape)) if bend else out


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
