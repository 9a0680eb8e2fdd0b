"""Normalisation: subtract the mean, divide by the deviation, scale and shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.table import General, general, register


@dataclass
class _Normalised:
    """y = w z + b with z = (x - mean) / s and s² = var + eps, over ``dims``.

    With c = x' - mean(x'): s' = mean(z c), s s'' = mean(c²) - s'²; and by differentiating
    s z = x - mean, s z' = c - s' z and s z'' = -2 s' z' - s'' z.
    """

    z: Tensor
    rstd: Tensor
    weight: Tensor | None
    dims: list[int]

    def _first(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c, s' and z'."""
        c = x - x.mean(self.dims, True)
        slope = (self.z * c).mean(self.dims, True)
        return c, slope, torch.addcmul(c, self.z, slope, value=-1).mul_(self.rstd)

    def push(
        self, x: Tensor | None, w: Tensor | None, b: Tensor | None, bend: bool
    ) -> tuple[Tensor, Tensor | None]:
        out: Tensor | None = None
        second: Tensor | None = None
        if x is not None:
            c, slope, moved = self._first(x)
            if bend:
                stretch = (c.square_().mean(self.dims, True) - slope * slope) * self.rstd
                second = (moved * (-2 * slope * self.rstd)).addcmul_(
                    self.z, stretch * self.rstd, value=-1
                )
                if self.weight is not None:
                    second.mul_(self.weight)
                if w is not None:
                    second.addcmul_(w, moved, value=2)
            out = moved if self.weight is None else moved.mul_(self.weight)
        if w is not None:
            out = self.z * w if out is None else out.addcmul_(self.z, w)
        if b is not None:
            out = b.expand_as(self.z) if out is None else out.add_(b)
        assert out is not None
        return out, second

    def turn(
        self, x: Tensor | None, w: Tensor | None, cotangent: Tensor, turned: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """How the cotangents of x, w and b change, before the last two are summed.

        With g = y^ w: x^ = (g - mean(g) - z mean(z g)) / s, w^ = sum(y^ z), b^ = sum(y^).
        """
        g = cotangent if self.weight is None else cotangent * self.weight
        change = turned if turned is None or self.weight is None else turned * self.weight
        if w is not None:
            change = cotangent * w if change is None else change + cotangent * w
        aligned = (self.z * g).mean(self.dims, True)
        inner = None
        if x is not None:
            _, slope, moved = self._first(x)
            inner = (moved * aligned).addcmul_(self.z, (moved * g).mean(self.dims, True)).neg_()
            back = torch.addcmul(g - g.mean(self.dims, True), self.z, aligned, value=-1)
            inner.addcmul_(back, slope * self.rstd, value=-1)
        if change is not None:
            along = (self.z * change).mean(self.dims, True)
            flat = torch.addcmul(change - change.mean(self.dims, True), self.z, along, value=-1)
            inner = flat if inner is None else inner.add_(flat)
        assert inner is not None
        scale = torch.zeros_like(self.z) if x is None else moved * cotangent
        if turned is not None:
            scale = scale.addcmul_(turned, self.z)
        return inner.mul_(self.rstd), scale, turned


def _layer_norm(call: Call) -> _Normalised:
    dims = list(range(-len(call.normalized_shape), 0))
    rstd = call.result2
    return _Normalised((call.input - call.result1).mul_(rstd), rstd, call.weight, dims)


def _push_layer_norm(
    call: Call, dots: Tensors, bend: bool
) -> tuple[Tensor, Tensor | None] | Tensor:
    x, w, b = dots
    result = _layer_norm(call).push(x, w, b, bend)
    return result if bend else result[0]


def _turn_layer_norm(call: Call, dots: Tensors, cotangents: Tensors, turned: Tensors) -> Tensors:
    (x, w, _), (cotangent,), (change,) = dots, cotangents, turned
    assert cotangent is not None
    back, scale, shift = _layer_norm(call).turn(x, w, cotangent, change)
    shape = call.normalized_shape
    return back, scale.sum_to_size(shape), None if shift is None else shift.sum_to_size(shape)


register("NativeLayerNormBackward0", General(_push_layer_norm, _turn_layer_norm))


def _batch_norm(call: Call) -> _Normalised:
    x = call.input
    mean, rstd = _channels(call.result1, x), _channels(call.result2, x)
    dims = [0, *range(2, x.ndim)]
    return _Normalised((x - mean).mul_(rstd), rstd, _channels(call.weight, x), dims)


def _channels(t: Any, x: Tensor) -> Any:
    return None if t is None else t.view(1, -1, *[1] * (x.ndim - 2))


def _push_batch_norm(
    call: Call, dots: Tensors, bend: bool
) -> tuple[Tensor, Tensor | None] | Tensor:
    value = call.input
    x, w, b = dots[0], _channels(dots[1], value), _channels(dots[2], value)
    if call.training:
        result = _batch_norm(call).push(x, w, b, bend)
        return result if bend else result[0]
    # With fixed statistics it is affine in x, and bilinear in x and w.
    weight = _channels(call.weight, value)
    rstd = (_channels(call.running_var, value) + call.eps).rsqrt()
    moved = None if x is None else x * rstd
    out = moved if moved is None or weight is None else moved * weight
    if w is not None:
        scaled = (value - _channels(call.running_mean, value)) * rstd * w
        out = scaled if out is None else out + scaled
    if b is not None:
        out = b.expand_as(value) if out is None else out + b
    assert out is not None
    return (out, None if moved is None or w is None else 2 * w * moved) if bend else out


def _turn_batch_norm(call: Call, dots: Tensors, cotangents: Tensors, turned: Tensors) -> Tensors:
    value = call.input
    (x, w, _), (cotangent,), (change,) = dots, cotangents, turned
    assert cotangent is not None
    dims = [0, *range(2, value.ndim)]
    if call.training:
        w = _channels(w, value)
        back, scale, shift = _batch_norm(call).turn(x, w, cotangent, change)
        return back, scale.sum(dims), None if shift is None else shift.sum(dims)
    rstd = (_channels(call.running_var, value) + call.eps).rsqrt()
    pulled = call.pull(change) if change is not None else (None, None, None)
    by_weight = None if w is None else cotangent * rstd * _channels(w, value)
    by_input = None if x is None else (cotangent * x * rstd).sum(dims)
    return _plus(pulled[0], by_weight), _plus(pulled[1], by_input), pulled[2]


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


register("NativeBatchNormBackward0", General(_push_batch_norm, _turn_batch_norm))


@general("WeightNormInterfaceBackward0")
def _weight_norm(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor] | Tensor:
    """y = v s with s = g / n and n = ‖v‖; n n' = <v, v'>, n n'' = <v', v'> - n'², s n = g."""
    v, g = dots
    n, value = call.result1, call.v
    s = call.g / n
    dims = [k for k in range(value.ndim) if k != call.dim % value.ndim]
    n1 = torch.zeros_like(n) if v is None else (value * v).sum(dims, True) / n
    s1 = (-s * n1 if g is None else g - s * n1) / n
    out = value * s1 if v is None else value * s1 + v * s
    if not bend:
        return out
    n2 = torch.zeros_like(n) if v is None else ((v * v).sum(dims, True) - n1 * n1) / n
    s2 = -(2 * s1 * n1 + s * n2) / n
    return out, value * s2 if v is None else value * s2 + 2 * v * s1
