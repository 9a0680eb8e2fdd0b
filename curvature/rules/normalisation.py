"""Layer, group and batch normalisation: centre, divide by the deviation, scale and shift."""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.table import general


def _normalised(
    x: Tensor,
    xdot: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dims: list[int],
    weight: Tensor | None,
    wdot: Tensor | None,
    bdot: Tensor | None,
    bend: bool,
) -> tuple[Tensor, Tensor | None]:
    """ydot and bend of y = w z + b, z = (x - mean) / s with s² = var + eps.

    With c = x' - mean(x'): s' = mean(z c), s s'' = mean(c²) - s'², and by differentiating
    s z = x - mean, s z' = c - s' z and s z'' = -2 s' z' - s'' z.
    """
    z = (x - mean) * rstd
    out: Tensor | None = None
    second: Tensor | None = None
    if xdot is not None:
        c = xdot - xdot.mean(dims, True)
        slope = (z * c).mean(dims, True)
        moved = torch.addcmul(c, z, slope, value=-1) * rstd
        if bend:
            stretch = ((c * c).mean(dims, True) - slope * slope) * rstd
            second = torch.addcmul(moved * (-2 * slope * rstd), z, stretch * rstd, value=-1)
            if weight is not None:
                second = second * weight
            if wdot is not None:
                second = torch.addcmul(second, wdot, moved, value=2)
        out = moved if weight is None else moved * weight
    if wdot is not None:
        out = z * wdot if out is None else torch.addcmul(out, z, wdot)
    if bdot is not None:
        out = bdot.expand_as(x) if out is None else out + bdot
    assert out is not None
    return out, second


@general("NativeLayerNormBackward0")
def _layer_norm(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor | None] | Tensor:
    x, w, b = dots
    dims = list(range(-len(call.normalized_shape), 0))
    result = _normalised(call.input, x, call.result1, call.result2, dims, call.weight, w, b, bend)
    return result if bend else result[0]


@general("NativeBatchNormBackward0")
def _batch_norm(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor | None] | Tensor:
    x, w, b = dots
    value = call.input
    shape = [1, -1, *[1] * (value.ndim - 2)]

    def channels(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.view(shape)

    weight, wdot, bdot = channels(call.weight), channels(w), channels(b)
    if call.training:
        mean, rstd = call.result1.view(shape), call.result2.view(shape)
        dims = [0, *range(2, value.ndim)]
        result = _normalised(value, x, mean, rstd, dims, weight, wdot, bdot, bend)
        return result if bend else result[0]
    # With fixed statistics it is affine in x, and bilinear in x and w.
    mean = call.running_mean.view(shape)
    rstd = (call.running_var.view(shape) + call.eps).rsqrt()
    moved = None if x is None else x * rstd
    out = moved if moved is None or weight is None else moved * weight
    if wdot is not None:
        scaled = (value - mean) * rstd * wdot
        out = scaled if out is None else out + scaled
    if bdot is not None:
        out = bdot.expand_as(value) if out is None else out + bdot
    assert out is not None
    second = None if moved is None or wdot is None else 2 * wdot * moved
    return (out, second) if bend else out


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
