"""Linear layers, convolutions and other products of two inputs."""

from __future__ import annotations

from collections.abc import Callable
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.precision import product_dtype
from curvature.rules.rule import Rule, real_dot
from curvature.rules.table import register

Rows = slice | EllipsisType

_BLOCK = 2**20  # entries of a product at a time, so that sums over them stay in the cache


class Bilinear(Rule):
    """y = B(a, b), plus an input that is only added: the bend is 2 B(adot, bdot).

    Args:
        left, right: names of the saved a and b.
        product: B(call, a, b).
        transposed: (call, a, b, yhat) -> the cotangents of a and b.
        inputs: where a and b stand among the inputs.
        added: (call, cdot) -> what a moving third input adds to ydot.
        rowwise: whether the rows of y are those of a, each times b, and the same is added to all.
    """

    def __init__(
        self,
        left: str,
        right: str,
        product: Callable[[Call, Tensor, Tensor], Tensor],
        transposed: Callable[[Call, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
        *,
        inputs: tuple[int, int] = (0, 1),
        added: Callable[[Call, Tensor], Tensor] | None = None,
        rowwise: bool = False,
    ) -> None:
        self._left, self._right, self._inputs = left, right, inputs
        self._product, self._transposed, self._added = product, transposed, added
        self._rowwise = rowwise

    def _split(self, dots: Tensors) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        a, b = self._inputs
        rest = [d for i, d in enumerate(dots) if i not in self._inputs]
        return dots[a], dots[b], rest[0] if rest else None

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        a, b, c = self._split(dots)
        out, _ = self._products(call, a, b, bend=False)
        return (self._plus(call, out, c),)

    def jet(self, call: Call, dots: Tensors) -> tuple[Tensors, Tensors]:
        out, halves = self._with_half(call, dots, lambda _, half: half.mul_(2))
        return (out,), (_joined(halves) if halves else None,)

    def adjoint(
        self, call: Call, dots: Tensors, cotangents: Tensors
    ) -> tuple[Tensors, Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return self.tangent(call, dots), None
        out, halves = self._with_half(
            call, dots, lambda rows, half: real_dot(cotangent[rows], half)
        )
        return (out,), 2 * sum(halves[1:], halves[0]) if halves else None

    def _with_half(
        self, call: Call, dots: Tensors, use: Callable[[Rows, Tensor], Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """ydot, and what ``use`` makes of B(adot, bdot), half of the bend, given with its rows."""
        a, b, c = self._split(dots)
        known = None if call.product is None else call.product()
        if known is not None and a is not None and b is not None:
            return self._from_known(call, a, b, c, *known, use)
        out, half = self._products(call, a, b, bend=True)
        return self._plus(call, out, c), [] if half is None else [use(..., half)]

    def _from_known(
        self,
        call: Call,
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        y: Tensor,
        bias: Tensor | None,
        use: Callable[[Rows, Tensor], Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """One product instead of two for B(a, B) + B(A, b), where y = B(A, B) + bias is known.

        B(A + t a, B + t b) = B(A, B) + t (B(A, b) + B(a, B)) + t² B(a, b), as in Karatsuba's
        product. With t² = ‖A‖ ‖B‖ / (‖a‖ ‖b‖) the rounding of the difference is at most that of
        the two products, since the geometric mean of their sizes is at most the larger.
        """
        A, B = getattr(call, self._left), getattr(call, self._right)
        y = y.reshape(call.shape())
        t = _balance([A, B], [a, b])
        moved = torch.addcmul(B, b, t)
        step = max(1, _BLOCK // y[:1].numel()) if self._rowwise else len(y)
        outs, used = [], []
        for start in range(0, len(y), step):
            rows = slice(start, start + step)
            half = self._product(call, a[rows], b)
            out = self._product(call, torch.addcmul(A[rows], a[rows], t), moved).sub_(y[rows])
            self._plus(call, out, bias).div_(t).addcmul_(half, t, value=-1)
            outs.append(self._plus(call, out, c))
            used.append(use(rows, half))
        return _joined(outs), used

    def _plus(self, call: Call, out: Tensor | None, c: Tensor | None) -> Tensor:
        """Add the tangent of the input that is only added."""
        if c is not None:
            assert self._added is not None
            third = self._added(call, c)
            out = third.expand(call.shape()) if out is None else out.add_(third)
        assert out is not None
        return out

    def _products(
        self, call: Call, a: Tensor | None, b: Tensor | None, *, bend: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """B(a, B) + B(A, b), and B(a, b), in the dtype of :func:`products_in`."""
        dtype = product_dtype.get()
        kept = next((t.dtype for t in (a, b) if t is not None), None)
        out = half = None
        if dtype is not None:
            a, b = (None if t is None else t.to(dtype) for t in (a, b))
        if a is not None:
            out = self._product(call, a, getattr(call, self._right).to(a.dtype))
        if b is not None:
            other = self._product(call, getattr(call, self._left).to(b.dtype), b)
            out = other if out is None else out.add_(other)
        if bend and a is not None and b is not None:
            half = self._product(call, a, b)
        if dtype is None:
            return out, half
        return None if out is None else out.to(kept), None if half is None else half.to(kept)

    def turn(
        self, call: Call, dots: Tensors, cotangents: Tensors | None, turned: Tensors | None
    ) -> list[Tensors]:
        parts = super().turn(call, dots, cotangents, turned)
        if len(parts) < 2:
            return parts
        pulled, crossed = parts
        return [
            tuple(
                a if b is None else b if a is None else b.add_(a)
                for a, b in zip(pulled, crossed, strict=True)
            )
        ]

    def cross(self, call: Call, dots: Tensors, cotangents: Tensors) -> Tensors:
        result: list[Tensor | None] = [None] * len(dots)
        a, b, _ = self._split(dots)
        (y,) = cotangents
        if a is not None and b is not None and y is not None:
            left, right = self._inputs
            result[left], result[right] = self._transposed(call, a, b, y)
        return tuple(result)


def _joined(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _balance(factors: list[Tensor], moves: list[Tensor]) -> Tensor:
    """The power of two next to sqrt(‖A‖ ‖B‖ / (‖a‖ ‖b‖)); a tensor that is zero has no say."""
    norms = torch.stack(torch._foreach_norm([*factors, *moves])).log2()
    ratios = norms[:2] - norms[2:]
    ratios = torch.where(ratios.isfinite(), ratios, ratios.flip(0))
    return ratios.nan_to_num(0, 0, 0).mean().round().clamp(-60, 60).exp2()


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


def _options(call: Call) -> tuple[Any, ...]:
    return (
        call.stride,
        call.padding,
        call.dilation,
        call.transposed,
        call.output_padding,
        call.groups,
    )


def _convolution(call: Call, x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.aten.convolution(x, w, None, *_options(call))


def _convolution_transposed(call: Call, x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    both = (True, True, False)
    result = torch.ops.aten.convolution_backward(y, x, w, None, *_options(call), both)
    return result[0], result[1]


def _channels(call: Call, bias: Tensor) -> Tensor:
    return bias.view(-1, *(1,) * (len(call.shape()) - 2))


register(
    "ConvolutionBackward0",
    Bilinear("input", "weight", _convolution, _convolution_transposed, added=_channels),
)
