"""Normalisation: subtract the mean, divide by the deviation, scale and shift."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.rule import add, inner
from curvature.rules.table import General, general, register


@dataclass
class _Normalised:
    """y = w z + b with z = (x - mean) / s and s² = var + eps, over ``dims``.

    Attributes:
        project: t -> (t - mean(t) - z mean(z t)) / s, the Jacobian of z, which is symmetric.
    """

    z: Tensor
    rstd: Tensor
    weight: Tensor | None
    dims: list[int]
    project: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        # One buffer for all entrywise products: fresh ones would cost more than the arithmetic.
        self._buffer = torch.empty_like(self.z)

    def _mean(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mul(a, b, out=self._buffer).mean(self.dims, True)

    def _rates(self, x: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """s' / s and s'' / s.

        s' = mean(z x') and s s'' = var(x') - s'², in which x' - mean(x') = s z' + s' z, and
        mean(z z') = (1 - mean(z²)) s' / s, which is not zero for the eps in s.
        """
        slope = self._mean(self.z, x) * self.rstd
        rest = 1 - self._mean(self.z, self.z)
        return slope, self._mean(moved, moved) + slope**2 * rest

    def push(
        self, x: Tensor | None, w: Tensor | None, b: Tensor | None, bend: bool
    ) -> tuple[Tensor, Tensor | None]:
        """From s z = x - mean: s z'' = -2 s' z' - s'' z."""
        moved = None if x is None else self.project(x)
        second = None
        if bend and x is not None:
            assert moved is not None
            slope, stretch = self._rates(x, moved)
            second = (moved * (-2 * slope)).addcmul_(self.z, stretch, value=-1)
            if self.weight is not None:
                second.mul_(self.weight)
            if w is not None:
                second.addcmul_(w, moved, value=2)
        return self._scaled(moved, w, b), second

    def _scaled(self, moved: Tensor | None, w: Tensor | None, b: Tensor | None) -> Tensor:
        """y' = w z' + w' z + b'; takes the memory of z'."""
        out = moved if moved is None or self.weight is None else moved.mul_(self.weight)
        if w is not None:
            out = self.z * w if out is None else out.addcmul_(self.z, w)
        if b is not None:
            out = b.expand_as(self.z) if out is None else out.add_(b)
        assert out is not None
        return out

    def adjoint(
        self, x: Tensor | None, w: Tensor | None, b: Tensor | None, cotangent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """y' and <y^, y''> with y'' = w z'' + 2 w' z', by sums over the normalised entries."""
        if x is None:
            return self._scaled(None, w, b), self.z.new_zeros(())
        moved = self.project(x)
        slope, stretch = self._rates(x, moved)
        first, extra = self._weighted_sums(torch.mul(cotangent, moved, out=self._buffer), w)
        still, _ = self._weighted_sums(torch.mul(cotangent, self.z, out=self._buffer), None)
        number = (-2 * slope * first - stretch * still).sum()
        return self._scaled(moved, w, b), number if extra is None else number + 2 * extra

    def _weighted_sums(self, t: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The sums of t weight over the normalised entries, and that of t w over all."""
        extra = None if w is None else (t.sum_to_size(w.shape) * w).sum()
        t = t if self.weight is None else t.mul_(self.weight)
        return t.sum(self.dims, True), extra

    def turn(
        self, x: Tensor | None, w: Tensor | None, cotangent: Tensor, turned: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """How the cotangents of x, w and b change, before the last two are summed.

        With g = y^ w: x^ = project(g), w^ = sum(y^ z), b^ = sum(y^).
        """
        g = cotangent if self.weight is None else cotangent * self.weight
        change = None if w is None else cotangent * w
        if turned is not None:
            if self.weight is None:
                change = turned if change is None else change.add_(turned)
            else:
                change = (
                    turned * self.weight if change is None else change.addcmul_(turned, self.weight)
                )
        inner = None if change is None else self.project(change)
        scale = None if turned is None else turned * self.z
        if x is not None:
            moved = self.project(x)
            # The derivative of project(g) along x': z and s move.
            back = self.project(g).mul_(-self._mean(self.z, x))
            back.addcmul_(moved, self._mean(self.z, g), value=-1)
            back.addcmul_(self.z, self._mean(moved, g), value=-1).mul_(self.rstd)
            inner = back if inner is None else inner.add_(back)
            moved.mul_(cotangent)
            scale = moved if scale is None else scale.add_(moved)
        assert inner is not None
        return inner, torch.zeros_like(self.z) if scale is None else scale, turned


def _layer_norm(call: Call) -> _Normalised:
    mean, rstd, shape = call.result1, call.result2, call.normalized_shape
    x = call.input.to(mean.dtype)  # the statistics of half precision are in single

    def project(t: Tensor) -> Tensor:
        return _LAYER_NORM_BACKWARD(t, x, shape, mean, rstd, None, None, _INPUT_ONLY)[0]

    dims = list(range(-len(shape), 0))
    return _Normalised((x - mean).mul_(rstd), rstd, call.weight, dims, project)


_LAYER_NORM_BACKWARD = torch.ops.aten.native_layer_norm_backward
_BATCH_NORM_BACKWARD = torch.ops.aten.native_batch_norm_backward
_INPUT_ONLY = (True, False, False)


def _push_layer_norm(
    call: Call, dots: Tensors, bend: bool
) -> tuple[Tensor, Tensor | None] | Tensor:
    normalised = _layer_norm(call)
    x, w, b = (None if d is None else d.to(normalised.z.dtype) for d in dots)
    out, second = normalised.push(x, w, b, bend)
    out = out.to(call.input.dtype)
    return (out, second) if bend else out


def _adjoint_layer_norm(call: Call, dots: Tensors, cotangents: Tensors) -> tuple[Tensor, Tensor]:
    normalised = _layer_norm(call)
    x, w, b = (None if d is None else d.to(normalised.z.dtype) for d in dots)
    (cotangent,) = cotangents
    assert cotangent is not None
    out, number = normalised.adjoint(x, w, b, cotangent.to(normalised.z.dtype))
    return out.to(call.input.dtype), number


def _turn_layer_norm(call: Call, dots: Tensors, cotangents: Tensors, turned: Tensors) -> Tensors:
    (x, w, _), (cotangent,), (change,) = dots, cotangents, turned
    assert cotangent is not None
    back, scale, shift = _layer_norm(call).turn(x, w, cotangent, change)
    shape = call.normalized_shape
    return back, scale.sum_to_size(shape), None if shift is None else shift.sum_to_size(shape)


register(
    "NativeLayerNormBackward0",
    General(_push_layer_norm, adjoint=_adjoint_layer_norm, turn=_turn_layer_norm, light=True),
)


def _batch_norm(call: Call) -> _Normalised:
    x, mean, rstd, eps = call.input, call.result1, call.result2, call.eps

    def project(t: Tensor) -> Tensor:
        # Its kernel wants the memory format of x.
        t = t.contiguous()
        return _BATCH_NORM_BACKWARD(t, x, None, None, None, mean, rstd, True, eps, _INPUT_ONLY)[0]

    z = (x - _channels(mean, x)).mul_(_channels(rstd, x))
    dims = [0, *range(2, x.ndim)]
    return _Normalised(z, _channels(rstd, x), _channels(call.weight, x), dims, project)


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


def _adjoint_batch_norm(call: Call, dots: Tensors, cotangents: Tensors) -> tuple[Tensor, Tensor]:
    value, (cotangent,) = call.input, cotangents
    assert cotangent is not None
    if not call.training:
        out, second = _push_batch_norm(call, dots, True)
        number = inner(cotangents, (second,))
        return out, out.new_zeros(()) if number is None else number
    x, w, b = dots[0], _channels(dots[1], value), _channels(dots[2], value)
    return _batch_norm(call).adjoint(x, w, b, cotangent)


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
    return add(pulled[0], by_weight), add(pulled[1], by_input), pulled[2]


register(
    "NativeBatchNormBackward0",
    General(_push_batch_norm, adjoint=_adjoint_batch_norm, turn=_turn_batch_norm, light=True),
)


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
