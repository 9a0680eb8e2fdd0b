"""Products and quotients, entry by entry with broadcasting, and what is made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.families import General
from curvature.rules.rule import add
from curvature.rules.table import general, register

Pushed = tuple[Tensor, Tensor | None] | Tensor


class _Mul(General):
    def __init__(self) -> None:
        super().__init__(_mul)

    def pullback_tangent(
        self,
        call: Call,
        dots: Tensors,
        cotangents: Tensors,
        cotangent_dots: Tensors,
        residual: Any,
    ) -> Tensors:
        """The backward pass is a^ = y^ b, b^ = y^ a."""
        (a, b), (y,), (change,) = dots, cotangents, cotangent_dots
        to_a = to_b = None
        if call.inputs[0] is not None:
            to_a = add(_times(change, call.other), _times(y, b))
        if call.inputs[1] is not None:
            to_b = add(_times(change, call.self), _times(y, a))
        return call.fitted([to_a, to_b])


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a * b


def _mul(call: Call, dots: Tensors, bend: bool) -> Pushed:
    a, b = dots
    out = None if a is None else a * call.other
    if b is not None:
        out = b * call.self if out is None else out + b * call.self
    assert out is not None
    if not bend:
        return out
    return out, None if a is None or b is None else a * b * 2


register("MulBackward0", _Mul())


class _Div(General):
    def __init__(self) -> None:
        super().__init__(_div)

    def tangent_with_residual(self, call: Call, dots: Tensors) -> tuple[Tensors, Tensors]:
        outputs = self.tangent(call, dots)
        return outputs, outputs

    def pullback_tangent(
        self,
        call: Call,
        dots: Tensors,
        cotangents: Tensors,
        cotangent_dots: Tensors,
        residual: Tensors,
    ) -> Tensors:
        """The backward pass is a^ = y^ / b, b^ = -a^ y; so a^' = (y^' - a^ b') / b."""
        (_, b), (y,), (change,) = dots, cotangents, cotangent_dots
        back = None if y is None else y / call.other
        if back is not None and b is not None:
            change = add(change, -back * b)
        to_a = None if change is None else change / call.other
        to_b = None
        if call.inputs[1] is not None:
            to_b = add(_times(to_a, call.self / call.other), _times(back, residual[0]))
        return call.fitted([to_a, None if to_b is None else -to_b])


def _div(call: Call, dots: Tensors, bend: bool) -> Pushed:
    # b y = a: y' = (a' - y b') / b and y'' = -2 y' b' / b
    a, b = dots
    if b is None:
        assert a is not None
        out = a / call.other
        return (out, None) if bend else out
    down = call.self / call.other * b
    out = (-down if a is None else a - down) / call.other
    return (out, -2 * out * b / call.other) if bend else out


register("DivBackward0", _Div())


@general("AddcmulBackward0")
def _addcmul(call: Call, dots: Tensors, bend: bool) -> Pushed:
    # c + k a b
    c, a, b = dots
    moved = add(_times(a, call.tensor2), _times(b, call.tensor1))
    out = add(c, None if moved is None else moved * call.value)
    second = None if a is None or b is None else a * b * (2 * call.value)
    return _pushed(call, out, second, bend)


@general("AddcdivBackward0")
def _addcdiv(call: Call, dots: Tensors, bend: bool) -> Pushed:
    # c + k q with q = a / b, q' = (a' - q b') / b and q'' = -2 q' b' / b
    c, a, b = dots
    second = None
    moved = a if b is None else add(a, -(call.tensor1 / call.tensor2 * b))
    if moved is not None:
        moved = moved * call.value / call.tensor2
        second = None if b is None else -2 * moved * b / call.tensor2
    return _pushed(call, add(c, moved), second, bend)


@general("LerpBackward0", "LerpBackward1")
def _lerp(call: Call, dots: Tensors, bend: bool) -> Pushed:
    # a + w (b - a)
    a, b, w = (*dots, None)[:3]
    apart = add(b, None if a is None else -a)
    out = add(a, None if apart is None else apart * call.weight)
    second = None
    if w is not None:
        out = add(out, w * (call.end - call.self))
        second = None if apart is None else 2 * w * apart
    return _pushed(call, out, second, bend)


@general("PreluKernelBackward0")
def _prelu(call: Call, dots: Tensors, bend: bool) -> Pushed:
    # x, or w x where x is not positive
    x, w = dots
    bent = call.self <= 0
    out = None if x is None else torch.where(bent, x * call.weight, x)
    second = None
    if w is not None:
        out = add(out, torch.where(bent, w * call.self, 0))
        second = None if x is None else torch.where(bent, 2 * w * x, 0)
    return _pushed(call, out, second, bend)


@general("GluBackward0")
def _glu(call: Call, dots: Tensors, bend: bool) -> Pushed:
    # a s with s = sigmoid(b)
    (x,) = dots
    assert x is not None
    (value, gate), (a, b) = (t.chunk(2, call.dim) for t in (call.self, x))
    s = torch.sigmoid(gate)
    slope = s * (1 - s) * b
    out = a * s + value * slope
    return (out, slope * (2 * a + value * b * (1 - 2 * s))) if bend else out


def _pushed(call: Call, out: Tensor | None, second: Tensor | None, bend: bool) -> Pushed:
    assert out is not None
    out, shape = out.expand(call.shape()), call.shape()
    return (out, None if second is None else second.expand(shape)) if bend else out
