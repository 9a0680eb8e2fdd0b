"""Normalisation: subtract the mean, divide by the deviation, scale and shift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvature.differentiable import WeightNorm
from curvature.graph import Call, Tensors
from curvature.rules.families import General
from curvature.rules.normalised import (
    BatchNormalised,
    GroupNormalised,
    LayerNormalised,
    Normalised,
    channels,
)
from curvature.rules.rule import Rule, add
from curvature.rules.table import register


class _Normalisation(Rule):
    def __init__(self, statistics: Callable[[Call], Normalised]) -> None:
        self._statistics = statistics

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        n = self._statistics(call)
        x, w, b = _as(n, dots)
        return (_like_output(call, n.scaled(None if x is None else n.project(x), w, b)),)

    def jet(self, call: Call, dots: Tensors, ddots: Tensors) -> tuple[Tensors, Tensors]:
        """From s z = x - mean: s z'' = -2 s' z' - s'' z; and y'' = w z'' + 2 w' z'."""
        n = self._statistics(call)
        x, w, b = _as(n, dots)
        moved = second = None
        if x is not None:
            moved, along = n.moved(x)
            slope, stretch = n.rates(moved, along)
            second = (moved * (-2 * slope)).addcmul_(n.z, stretch, value=-1)
            if n.weight is not None:
                second.mul_(n.weight)
            if w is not None:
                second.addcmul_(w, moved, value=2)
        out = _like_output(call, n.scaled(moved, w, b))
        if any(d is not None for d in ddots):
            x, w, b = _as(n, ddots)
            second = add(n.scaled(None if x is None else n.project(x), w, b), second)
        return (out,), (None if second is None else _like_output(call, second),)

    def adjoint(
        self, call: Call, dots: Tensors, cotangents: Tensors
    ) -> tuple[Tensors, Tensor | None]:
        """<y^, y''> by sums over what is normalised, without forming y''."""
        n = self._statistics(call)
        (x, w, b), (y, *_) = _as(n, dots), cotangents
        moved = number = None
        if x is not None and y is not None:
            moved, along = n.moved(x)
            y = _laid(n, y)
            slope, stretch = n.rates(moved, along)
            first, extra = n.sums(y, moved, w)
            still, _ = n.sums(y, n.z, None)
            number = (-2 * slope * first - stretch * still).sum()
            number = number if extra is None else number + 2 * extra
        elif x is not None:
            moved = n.project(x)
        return (_like_output(call, n.scaled(moved, w, b)),), number

    def tangent_with_residual(self, call: Call, dots: Tensors) -> tuple[Tensors, Any]:
        n = self._statistics(call)
        x, w, b = _as(n, dots)
        moved, along = (None, None) if x is None else n.moved(x)
        return (_like_output(call, n.scaled(moved, w, b)),), (moved, along)

    def pullback_tangent(
        self,
        call: Call,
        dots: Tensors,
        cotangents: Tensors,
        cotangent_dots: Tensors,
        residual: Any,
    ) -> Tensors:
        """With g = y^ w the backward pass is x^ = project(g), w^ = sum(y^ z), b^ = sum(y^).

        The derivative of project(g) along x' is -s'/s project(g) - (mean(z g) z' + mean(z' g) z)/s.
        """
        n, (moved, along) = self._statistics(call), residual
        _, w, _ = _as(n, dots)
        y, change = (None if t is None else _laid(n, t) for t in (cotangents[0], cotangent_dots[0]))
        g = None if change is None else n.weighted(change)
        to_weight = None if change is None else n.over_weight(change, n.z)
        back = None
        if y is not None:
            factor = w if moved is None else add(w, -n.weighted(along * n.rstd))
            if factor is not None:
                g = y * factor if g is None else g.addcmul_(y, factor)
            if moved is not None:
                (first, _), (still, _) = n.sums(y, moved, None), n.sums(y, n.z, None)
                scale = -n.rstd / n.count
                back = (moved * (still * scale)).addcmul_(n.z, first * scale)
                to_weight = add(to_weight, n.over_weight(y, moved))
        to_bias = None if change is None else n.over_bias(change)
        if g is not None:
            back = n.project(g) if back is None else back.add_(n.project(g))
        return call.fitted([None if back is None else back.view(call.shape()), to_weight, to_bias])


def _as(n: Normalised, dots: Tensors) -> Tensors:
    x, w, b = dots
    return None if x is None else _laid(n, x), n.shaped(w), n.shaped(b)


def _laid(n: Normalised, t: Tensor) -> Tensor:
    return t.to(n.rstd.dtype).reshape(n.shape)


def _like_output(call: Call, t: Tensor) -> Tensor:
    return t.to(call.input.dtype).view(call.shape())


class _GroupNorm(_Normalisation):
    def of(self, call: Call) -> Rule | None:
        # The means and deviations are outputs too, which a model hardly ever uses.
        return self if call.used <= {0} else None


class _BatchNorm(_Normalisation):
    """With the statistics of the batch, or fixed ones."""

    def of(self, call: Call) -> Rule:
        return self if call.training else _FIXED


def _fixed(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor | None] | Tensor:
    # With fixed statistics it is affine in x, and bilinear in x and w.
    x, value = dots[0], call.input
    w, b, weight = (None if t is None else channels(t, value) for t in (*dots[1:], call.weight))
    rstd = (channels(call.running_var, value) + call.eps).rsqrt()
    moved = None if x is None else x * rstd
    out = moved if moved is None or weight is None else moved * weight
    if w is not None:
        scaled = (value - channels(call.running_mean, value)) * rstd * w
        out = scaled if out is None else out + scaled
    if b is not None:
        out = b.expand_as(value) if out is None else out + b
    assert out is not None
    return (out, None if moved is None or w is None else 2 * w * moved) if bend else out


_FIXED = General(_fixed)
register("NativeLayerNormBackward0", _Normalisation(LayerNormalised))
register("NativeBatchNormBackward0", _BatchNorm(BatchNormalised))
register("NativeGroupNormBackward0", _GroupNorm(GroupNormalised))


def _weight_norm(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor] | Tensor:
    """y = v s with s = g / n and n = ‖v‖; n n' = <v, v'>, n n'' = <v', v'> - n'², s n = g."""
    v, g = dots
    fused = call.function is None
    scale, value, n = (call.g, call.v, call.result1) if fused else call.saved_tensors
    s = scale / n
    dims = [k for k in range(value.ndim) if k != call.dim % value.ndim]
    n1 = torch.zeros_like(n) if v is None else (value * v).sum(dims, True) / n
    s1 = (-s * n1 if g is None else g - s * n1) / n
    out = value * s1 if v is None else value * s1 + v * s
    if not bend:
        return out
    n2 = torch.zeros_like(n) if v is None else ((v * v).sum(dims, True) - n1 * n1) / n
    s2 = -(2 * s1 * n1 + s * n2) / n
    return out, value * s2 if v is None else value * s2 + 2 * v * s1


register("WeightNormInterfaceBackward0", General(_weight_norm))
register(WeightNorm, General(_weight_norm))
