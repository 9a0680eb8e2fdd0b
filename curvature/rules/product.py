"""Products, quotients and powers, entry by entry with broadcasting."""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.table import general


@general("MulBackward0")
def _mul(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor | None] | Tensor:
    a, b = dots
    out = None if a is None else a * call.other
    if b is not None:
        out = b * call.self if out is None else out + b * call.self
    assert out is not None
    if not bend:
        return out
    return out, None if a is None or b is None else a * b * 2


@general("DivBackward0")
def _div(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor | None] | Tensor:
    # b y = a: y' = (a' - y b') / b and y'' = -2 y' b' / b
    a, b = dots
    if b is None:
        assert a is not None
        out = a / call.other
        return (out, None) if bend else out
    down = call.self / call.other * b
    out = (-down if a is None else a - down) / call.other
    return (out, -2 * out * b / call.other) if bend else out


@general("PowBackward0")
def _pow(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor] | Tensor:
    (x,) = dots
    assert x is not None
    k, base = call.exponent, call.self
    out = torch.zeros_like(x) if k == 0 else k * base.pow(k - 1) * x
    if not bend:
        return out
    second = torch.zeros_like(x) if k in (0, 1) else k * (k - 1) * base.pow(k - 2) * x * x
    return out, second
