"""Linear layers, convolutions and other products of two inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.graph import Call
from curvature.rules.table import Bilinear, register


def _matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _matmul_transposed(call: Call, a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return y @ b.mT, a.mT @ y


register("MmBackward0", Bilinear("self", "mat2", _matmul, _matmul_transposed, rowwise=True))
register("BmmBackward0", Bilinear("self", "mat2", _matmul, _matmul_transposed))


def _scaled(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return a @ b if call.alpha == 1 else (a @ b).mul_(call.alpha)


def _scaled_transposed(call: Call, a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return _matmul_transposed(call, a, b, y if call.alpha == 1 else y * call.alpha)


def _beta(call: Call, c: Tensor) -> Tensor:
    return c if call.beta == 1 else c * call.beta


register(
    "AddmmBackward0",
    Bilinear("mat1", "mat2", _scaled, _scaled_transposed, inputs=(1, 2), added=_beta, rowwise=True),
)
register(
    "BaddbmmBackward0",
    Bilinear("batch1", "batch2", _scaled, _scaled_transposed, inputs=(1, 2), added=_beta),
)


def _mv(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _mv_transposed(call: Call, a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.outer(y, b), a.t() @ y


def _dot_transposed(call: Call, a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return y * b, y * a


register("MvBackward0", Bilinear("self", "vec", _mv, _mv_transposed))
register("DotBackward0", Bilinear("self", "tensor", _mv, _dot_transposed))


def _convolution(call: Call, x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.aten.convolution(
        x,
        w,
        None,
        call.stride,
        call.padding,
        call.dilation,
        call.transposed,
        call.output_padding,
        call.groups,
    )


def _convolution_transposed(call: Call, x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    result = torch.ops.aten.convolution_backward(
        y,
        x,
        w,
        None,
        call.stride,
        call.padding,
        call.dilation,
        call.transposed,
        call.output_padding,
        call.groups,
        (True, True, False),
    )
    return result[0], result[1]


def _channels(call: Call, bias: Tensor) -> Tensor:
    return bias.view(-1, *(1,) * (len(call.shape()) - 2))


register(
    "ConvolutionBackward0",
    Bilinear("input", "weight", _convolution, _convolution_transposed, added=_channels),
)
