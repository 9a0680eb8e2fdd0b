"""Products, quotients and powers, entry by entry with broadcasting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.rule import add
from curvature.rules.table import General, general, register


class _Mul(General):
    def __init__(self) -> None:
        super().__init__(_mul)

    def turn(
        self,
        call: Call,
        dots: Tensors,
        cotangents: Tensors,
        turned: Tensors,
        kept: Any,
    ) -> Tensors:
        """The backward pass is a^ = y^ b, b^ = y^ a."""
        (a, b), (y,), (change,) = dots, cotangents, turned
        to_a = to_b = None
        if call.inputs[0] is not None:
            to_a = add(_times(change, call.other), _times(y, b))
        if call.inputs[1] is not None:
            to_b = add(_times(change, call.self), _times(y, a))
        return call.fitted([to_a, to_b])


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a * b


def _mul(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor | None] | Tensor:
    a, b = dots
    out = None if a is None else a * call.other
    if b is not None:
        out = b * call.self if out is None else out + b * call.self
    assert out is not None
    return (out, _times(a, None if b is None else b * 2)) if bend else out


register("MulBackward0", _Mul())


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
