"""Operations that are linear in what moves: views, indices, sums, pooling, copies."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from curvature.graph import Call
from curvature.rules.local import Transposition
from curvature.rules.table import linear, register


@linear("TBackward0", light=True)
def _t(call: Call, x: Tensor) -> Tensor:
    return x.t()


@linear("TransposeBackward0", light=True)
def _transpose(call: Call, x: Tensor) -> Tensor:
    return x.transpose(call.dim0, call.dim1)


@linear("PermuteBackward0", light=True)
def _permute(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.dims)


@linear("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", light=True)
def _view(call: Call, x: Tensor) -> Tensor:
    return x.reshape(call.shape())


@linear("ExpandBackward0")
def _expand(call: Call, x: Tensor) -> Tensor:
    return x.expand(call.shape())


@linear("CloneBackward0", "AliasBackward0", light=True)
def _same(call: Call, x: Tensor) -> Tensor:
    return x


@linear("UnbindBackward0")
def _unbind(call: Call, x: Tensor) -> tuple[Tensor, ...]:
    return x.unbind(call.dim)


@linear("AddBackward0", light=True)
def _add(call: Call, x: Tensor | None, y: Tensor | None = None) -> Tensor:
    return _weighted_sum(call, x, y, call.alpha)


@linear("SubBackward0", light=True)
def _sub(call: Call, x: Tensor | None, y: Tensor | None = None) -> Tensor:
    return _weighted_sum(call, x, y, -call.alpha)


def _weighted_sum(call: Call, x: Tensor | None, y: Tensor | None, alpha: float) -> Tensor:
    if x is not None and y is not None:
        return torch.add(x, y, alpha=alpha)
    if x is not None:
        return x.expand(call.shape())
    assert y is not None
    return (y if alpha == 1 else y * alpha).expand(call.shape())


@linear("SumBackward0")
def _sum(call: Call, x: Tensor) -> Tensor:
    return x.sum()


@linear("SumBackward1")
def _sum_over(call: Call, x: Tensor) -> Tensor:
    return x.sum(call.dim, call.keepdim)


@linear("MeanBackward0")
def _mean(call: Call, x: Tensor) -> Tensor:
    return x.mean()


@linear("MeanBackward1")
def _mean_over(call: Call, x: Tensor) -> Tensor:
    return x.mean(call.dim, call.keepdim)


@linear("EmbeddingBackward0")
def _embedding(call: Call, weight: Tensor) -> Tensor:
    rows = F.embedding(call.indices, weight)
    if call.padding_idx >= 0:
        # Autograd holds the padding row constant.
        rows = rows.masked_fill((call.indices == call.padding_idx).unsqueeze(-1), 0)
    return rows


@linear("AvgPool2DBackward0")
def _avg_pool2d(call: Call, x: Tensor) -> Tensor:
    return F.avg_pool2d(
        x,
        call.kernel_size,
        call.stride,
        call.padding,
        call.ceil_mode,
        call.count_include_pad,
        call.divisor_override,
    )


@linear("MaxPool2DWithIndicesBackward0")
def _max_pool2d(call: Call, x: Tensor) -> Tensor:
    indices = call.result1
    return x.flatten(-2).gather(-1, indices.flatten(-2)).view_as(indices)


# Cheap either way, or rare: their own transpose transposed.
for _name in (
    "AdaptiveAvgPool2DBackward0",
    "AdaptiveAvgPool3DBackward0",
    "AsStridedBackward0",
    "AvgPool3DBackward0",
    "CatBackward0",
    "ConstantPadNdBackward0",
    "CumsumBackward0",
    "DiagonalBackward0",
    "FlipBackward0",
    "GatherBackward0",
    "IndexBackward0",
    "IndexSelectBackward0",
    "MaskedFillBackward0",
    "MaskedSelectBackward0",
    "MaxBackward0",
    "MinBackward0",
    "NegBackward0",
    "ReflectionPad1DBackward0",
    "ReflectionPad2DBackward0",
    "RepeatBackward0",
    "ReplicationPad2DBackward0",
    "RollBackward0",
    "SelectBackward0",
    "SliceBackward0",
    "SortBackward0",
    "SplitBackward0",
    "SplitWithSizesBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "SqueezeBackward4",
    "StackBackward0",
    "ToCopyBackward0",
    "TopkBackward0",
    "TraceBackward0",
    "TrilBackward0",
    "TriuBackward0",
    "UnfoldBackward0",
    "UnsqueezeBackward0",
    "UpsampleBilinear2DBackward0",
    "UpsampleNearest2DBackward0",
    "WhereBackward0",
):
    register(_name, Transposition())
