"""Operations that choose among entries: linear, as long as the choice stands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature.graph import Call
from curvature.rules.rule import against
from curvature.rules.table import linear


@linear("SortBackward0", "TopkBackward0")
def _sort(call: Call, x: Tensor) -> Tensor:
    return x.gather(call.dim, call.indices)


@linear("MaxBackward0", "MinBackward0")
def _extreme(call: Call, x: Tensor) -> Tensor:
    if call.keepdim or x.ndim == 0:
        return _sort(call, x)
    return x.gather(call.dim, call.indices.unsqueeze(call.dim)).squeeze(call.dim)


@linear("MaxPool2DWithIndicesBackward0", "AdaptiveMaxPool2DBackward0")
def _max_pool2d(call: Call, x: Tensor) -> Tensor:
    indices = call.result1
    return x.flatten(-2).gather(-1, indices.flatten(-2)).view_as(indices)


@linear("MaxPool3DWithIndicesBackward0", "AdaptiveMaxPool3DBackward0")
def _max_pool3d(call: Call, x: Tensor) -> Tensor:
    indices = call.result1
    return x.flatten(-3).gather(-1, indices.flatten(-3)).view_as(indices)


@linear("AmaxBackward0", "AminBackward0")
def _amax(call: Call, x: Tensor) -> Tensor:
    return _chosen(call, x, call.dim or tuple(range(x.ndim)))


@linear("MaxBackward1", "MinBackward1")
def _max_of_all(call: Call, x: Tensor) -> Tensor:
    return _chosen(call, x, tuple(range(x.ndim)))


def _chosen(call: Call, x: Tensor, dims: Sequence[int]) -> Tensor:
    """The mean over those that tie."""
    ties = (call.self == against(x, call.result, dims)).to(x.dtype)
    return ((x * ties).sum(dims, True) / ties.sum(dims, True)).view(call.shape())


@linear("MaximumBackward0")
def _maximum(call: Call, x: Tensor | None, y: Tensor | None) -> Tensor:
    return _blended(call, call.self > call.other, x, y)


@linear("MinimumBackward0")
def _minimum(call: Call, x: Tensor | None, y: Tensor | None) -> Tensor:
    return _blended(call, call.self < call.other, x, y)


def _blended(call: Call, first: Tensor, x: Tensor | None, y: Tensor | None) -> Tensor:
    """x where it is chosen, y where it is not, and half of each where they tie."""
    share = torch.where(call.self == call.other, 0.5, first.to(call.kinds[0][1]))
    out = torch.zeros_like(share)
    if x is not None:
        out = out + share * x
    return out if y is None else out + (1 - share) * y
