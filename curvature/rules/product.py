"""Products and quotients, entry by entry with broadcasting."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.rule import add
from curvature.rules.table import General, register


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
    if not bend:
        return out
    return out, None if a is None or b is None else a * b * 2


register("MulBackward0", _Mul())


class _Div(General):
    def __init__(self) -> None:
        super().__init__(_div)

    def ahead(self, call: Call, dots: Tensors) -> tuple[Tensors, Tensors]:
        outputs = self.tangent(call, dots)
        return outputs, outputs

    def turn(
        self,
        call: Call,
        dots: Tensors,
        cotangents: Tensors,
        turned: Tensors,
        kept: Tensors,
    ) -> Tensors:
        """The backward pass is a^ = y^ / b, b^ = -a^ y; so a^' = (y^' - a^ b') / b."""
        (_, b), (y,), (change,) = dots, cotangents, turned
        back = None if y is None else y / call.other
        if back is not None and b is not None:
            change = add(change, -back * b)
        to_a = None if change is None else change / call.other
        to_b = None
        if call.inputs[1] is not None:
            to_b = add(_times(to_a, call.self / call.other), _times(back, kept[0]))
        return call.fitted([to_a, None if to_b is None else -to_b])


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


register("DivBackward0", _Div())
