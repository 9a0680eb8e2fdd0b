"""Operations that are linear in what moves: sums, multiples, pooling, embedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from curvature.audit import obstacle_of
from curvature.errors import NotTwiceDifferentiable
from curvature.graph import Call
from curvature.rules.families import Linear
from curvature.rules.local import TRANSPOSED
from curvature.rules.table import linear, register

_FEW = 3  # entries of a window in a row


@linear("AddBackward0", rematerialised=True)
def _add(call: Call, x: Tensor | None, y: Tensor | None = None) -> Tensor:
    return _weighted_sum(call, x, y, call.alpha)


@linear("SubBackward0", rematerialised=True)
def _sub(call: Call, x: Tensor | None, y: Tensor | None = None) -> Tensor:
    return _weighted_sum(call, x, y, -call.alpha)


def _weighted_sum(call: Call, x: Tensor | None, y: Tensor | None, alpha: float) -> Tensor:
    if x is not None and y is not None:
        return torch.add(x, y, alpha=alpha)
    if x is not None:
        return x.expand(call.shape())
    assert y is not None
    return (y if alpha == 1 else y * alpha).expand(call.shape())


@linear("AddBackward1", "SubBackward1", rematerialised=True)
def _add_number(call: Call, x: Tensor) -> Tensor:
    return x


@linear("RsubBackward0")
def _rsub(call: Call, x: Tensor | None, y: Tensor | None = None) -> Tensor:
    return _weighted_sum(call, y, x, -call.alpha)


@linear("RsubBackward1")
def _rsub_number(call: Call, x: Tensor) -> Tensor:
    return x * -call.alpha


@linear("NegBackward0")
def _neg(call: Call, x: Tensor) -> Tensor:
    return -x


@linear("MulBackward1")
def _mul_number(call: Call, x: Tensor) -> Tensor:
    return x * call.other


@linear("DivBackward1")
def _div_number(call: Call, x: Tensor) -> Tensor:
    return x / call.other


@linear("SumBackward0")
def _sum(call: Call, x: Tensor) -> Tensor:
    return x.sum(dtype=call.kinds[0][1])


@linear("SumBackward1")
def _sum_over(call: Call, x: Tensor) -> Tensor:
    return x.sum(call.dim, call.keepdim, dtype=call.kinds[0][1])


@linear("MeanBackward0")
def _mean(call: Call, x: Tensor) -> Tensor:
    return x.mean(dtype=call.kinds[0][1])


@linear("MeanBackward1")
def _mean_over(call: Call, x: Tensor) -> Tensor:
    return x.mean(call.dim, call.keepdim, dtype=call.kinds[0][1])


@linear("CumsumBackward0")
def _cumsum(call: Call, x: Tensor) -> Tensor:
    return x.cumsum(call.dim, dtype=call.kinds[0][1])


class _Embedding(Linear):
    def check(self, call: Call) -> None:
        reason = obstacle_of(call.node)
        if reason is not None:
            raise NotTwiceDifferentiable(f"{reason}: turn it off")


def _embedding(call: Call, weight: Tensor) -> Tensor:
    rows = F.embedding(call.indices, weight)
    if call.padding_idx >= 0:
        # Autograd holds the padding row constant.
        rows = rows.masked_fill((call.indices == call.padding_idx).unsqueeze(-1), 0)
    return rows


register("EmbeddingBackward0", _Embedding(_embedding))


@linear("AvgPool2DBackward0")
def _avg_pool2d(call: Call, x: Tensor) -> Tensor:
    size, stride, padding = call.kernel_size, call.stride, call.padding
    plain = max(padding) == 0 and not call.ceil_mode and x.element_size() >= 4
    if plain and max(size) <= _FEW:
        # Sums of whole slices: the kernel adds entry by entry, which takes five times as long.
        for dim, k, step in zip((-2, -1), size, stride or size, strict=True):
            x = reduce(torch.add, x.unfold(dim, k, step).unbind(-1))
        return x / (call.divisor_override or math.prod(size))
    return F.avg_pool2d(
        x, size, stride, padding, call.ceil_mode, call.count_include_pad, call.divisor_override
    )


@linear("AdaptiveAvgPool2DBackward0")
def _adaptive_avg_pool2d(call: Call, x: Tensor) -> Tensor:
    return torch.ops.aten._adaptive_avg_pool2d(x, call.shape()[-2:])


def _upsampled(operation: Callable[..., Tensor], call: Call, x: Tensor) -> Tensor:
    corners = [call.align_corners] if hasattr(call.node, "_saved_align_corners") else []
    scales = [call.scales] if x.ndim == 3 else [call.scales_h, call.scales_w]
    if x.ndim == 5:
        scales.insert(0, call.scales_d)
    return operation(x, call.output_size, *corners, *scales)


for _name, _operation in (
    ("UpsampleNearest1DBackward0", torch.ops.aten.upsample_nearest1d),
    ("UpsampleNearest2DBackward0", torch.ops.aten.upsample_nearest2d),
    ("UpsampleNearest3DBackward0", torch.ops.aten.upsample_nearest3d),
    ("UpsampleLinear1DBackward0", torch.ops.aten.upsample_linear1d),
    ("UpsampleBilinear2DBackward0", torch.ops.aten.upsample_bilinear2d),
    ("UpsampleBicubic2DBackward0", torch.ops.aten.upsample_bicubic2d),
    ("UpsampleTrilinear3DBackward0", torch.ops.aten.upsample_trilinear3d),
):
    register(_name, Linear(partial(_upsampled, _operation)))


@linear("Im2ColBackward0")
def _im2col(call: Call, x: Tensor) -> Tensor:
    return F.unfold(x, call.kernel_size, call.dilation, call.padding, call.stride)


@linear("Col2ImBackward0")
def _col2im(call: Call, x: Tensor) -> Tensor:
    size = call.shape()[-2:]
    return F.fold(x, size, call.kernel_size, call.dilation, call.padding, call.stride)


# Rare: their own transpose transposed.
for _name in (
    "AdaptiveAvgPool3DBackward0",
    "AsStridedBackward0",
    "AvgPool3DBackward0",
    "MaskedSelectBackward0",
    "ReflectionPad1DBackward0",
    "ReflectionPad2DBackward0",
    "ReplicationPad2DBackward0",
    "TraceBackward0",
    "UnfoldBackward0",
):
    register(_name, TRANSPOSED)
