"""Convolutions, transposed ones included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.graph import Call
from curvature.rules.bilinear import Bilinear, added_onto
from curvature.rules.table import register


def _options(call: Call) -> tuple[Any, ...]:
    return (
        call.stride,
        call.padding,
        call.dilation,
        call.transposed,
        call.output_padding,
        call.groups,
    )


def _convolution(
    call: Call, x: Tensor, w: Tensor, onto: Tensor | None = None, plus: Tensor | None = None
) -> Tensor:
    bias = None if plus is None else plus.flatten()
    return added_onto(onto, torch.convolution(x, w, bias, *_options(call)))


def _convolution_left(call: Call, y: Tensor, w: Tensor, onto: Tensor | None) -> Tensor:
    return added_onto(onto, _back(call, y, call.input, w, (True, False, False))[0])


def _convolution_right(call: Call, y: Tensor, x: Tensor, onto: Tensor | None) -> Tensor:
    return added_onto(onto, _back(call, y, x, call.weight, (False, True, False))[1])


def _back(call: Call, y: Tensor, x: Tensor, w: Tensor, mask: tuple[bool, bool, bool]) -> Any:
    return torch.ops.aten.convolution_backward(y, x, w, None, *_options(call), mask)


def _channels(call: Call, bias: Tensor) -> Tensor:
    return bias.view(-1, *(1,) * (len(call.shape()) - 2))


def _over_channels(call: Call, y: Tensor) -> Tensor:
    return y.sum([k for k in range(y.ndim) if k != 1])


def _places(call: Call, x: Tensor) -> Tensor:
    # What a window sums over moves at most as its fastest place, and at least as its slowest.
    # Not by vector_norm, which takes ten times as long over a dimension in the middle.
    return x.square().view(len(x), call.groups, -1, *x.shape[2:]).sum(2).sqrt_()


def _kernels(call: Call, w: Tensor) -> Tensor:
    return torch.linalg.vector_norm(w.flatten(1), dim=1)


register(
    "ConvolutionBackward0",
    Bilinear(
        "input",
        "weight",
        _convolution,
        _convolution_left,
        _convolution_right,
        added=_channels,
        summed=_over_channels,
        lengths=(_places, _kernels),
    ),
)
