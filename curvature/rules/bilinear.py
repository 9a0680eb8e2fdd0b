"""Products of two inputs: linear layers, and matrices of any kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.karatsuba import balance, karatsuba
from curvature.rules.matmul import matmul
from curvature.rules.precision import product_dtype
from curvature.rules.rule import Rule, add, real_dot
from curvature.rules.table import register


class Bilinear(Rule):
    """y = B(a, b), plus an input that is only added: the bend is 2 B(adot, bdot).

    Args:
        left, right: names of the saved a and b.
        product: (call, a, b, onto, plus) -> B(a, b), added to ``onto`` or ``plus`` if one of them
            is given: to ``onto`` in its memory, to ``plus`` in new memory, to which it broadcasts.
        to_left: (call, yhat, b, onto) -> the cotangent of a, added to ``onto`` if that is given.
        to_right: (call, yhat, a, onto) -> likewise the cotangent of b.
        inputs: where a and b stand among the inputs.
        added: (call, cdot) -> what a moving third input adds to ydot.
        summed: (call, yhat) -> the cotangent of that third input, before it is summed to its shape.
        lengths: of the rows of a, and of the columns of b, of which each entry of the product is
            an inner product.
    """

    def __init__(
        self,
        left: str,
        right: str,
        product: Callable[..., Tensor],
        to_left: Callable[[Call, Tensor, Tensor, Tensor | None], Tensor],
        to_right: Callable[[Call, Tensor, Tensor, Tensor | None], Tensor],
        *,
        inputs: tuple[int, int] = (0, 1),
        added: Callable[[Call, Tensor], Tensor] | None = None,
        summed: Callable[[Call, Tensor], Tensor] | None = None,
        lengths: tuple[Callable[[Call, Tensor], Tensor], Callable[[Call, Tensor], Tensor]]
        | None = None,
    ) -> None:
        self._left, self._right, self._inputs = left, right, inputs
        self._product, self._to_left, self._to_right = product, to_left, to_right
        self._added, self._summed, self._lengths = added, summed, lengths

    def _split(self, dots: Tensors) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        a, b = self._inputs
        rest = [d for i, d in enumerate(dots) if i not in self._inputs]
        return dots[a], dots[b], rest[0] if rest else None

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        out, _ = self._products(call, dots)
        return (out,)

    def jet(self, call: Call, dots: Tensors, ddots: Tensors) -> tuple[Tensors, Tensors]:
        out, half = self._with_half(call, dots, None)
        second = None if half is None else half.mul_(2)
        if any(d is not None for d in ddots):
            second, _ = self._products(call, ddots, onto=second)
        return (out,), (second,)

    def adjoint(
        self, call: Call, dots: Tensors, cotangents: Tensors
    ) -> tuple[Tensors, Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return self.tangent(call, dots), None
        out, number = self._with_half(call, dots, cotangent)
        return (out,), None if number is None else 2 * number

    def _with_half(
        self, call: Call, dots: Tensors, cotangent: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """ydot and B(adot, bdot), half of the bend, or its inner product with a cotangent."""
        a, b, c = self._split(dots)
        # Products of lower precision cost less than what saves one.
        known = call.product() if call.product and product_dtype.get() is None else None
        if known is not None and a is not None and b is not None:
            t = self._balance(call, a, b, known[1])
            if t is not None:
                return self._from_known(call, a, b, c, t, *known, cotangent)
        out, half = self._products(call, dots, bend=True)
        return out, half if half is None or cotangent is None else real_dot(cotangent, half)

    def _balance(self, call: Call, a: Tensor, b: Tensor, bias: Tensor | None) -> float | None:
        if self._lengths is None:
            return None
        rows, columns = self._lengths
        A, B = getattr(call, self._left), getattr(call, self._right)
        return balance((rows(call, A), rows(call, a)), (columns(call, B), columns(call, b)), bias)

    def _from_known(
        self,
        call: Call,
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        t: float,
        y: Tensor,
        bias: Tensor | None,
        cotangent: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Where y = B(A, B) + bias is known."""
        plus = self._third(call, c)
        if bias is not None and self._added is not None:
            plus = add(self._added(call, bias) / t, plus)
        return karatsuba(
            partial(self._product, call),
            (getattr(call, self._left), a),
            (getattr(call, self._right), b),
            t,
            y.reshape(call.shape()),
            plus,
            lambda half: half if cotangent is None else real_dot(cotangent, half),
        )

    def _third(self, call: Call, c: Tensor | None) -> Tensor | None:
        """What the tangent of the input that is only added adds."""
        if c is None:
            return None
        assert self._added is not None
        return self._added(call, c)

    def _products(
        self, call: Call, dots: Tensors, *, bend: bool = False, onto: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """B(a, B) + B(A, b) + c + onto, and B(a, b), in the dtype of :func:`products_in`."""
        a, b, c = self._split(dots)
        plus = self._third(call, c)
        if a is None and b is None:
            assert plus is not None
            return (plus.expand(call.shape()) if onto is None else onto.add_(plus)), None
        if onto is not None and plus is not None:
            onto, plus = onto.add_(plus), None
        dtype = product_dtype.get()
        if dtype is None:
            return self._sum_of_products(call, a, b, bend, onto, plus)
        kept = next(t.dtype for t in (a, b) if t is not None)
        a, b = (None if t is None else t.to(dtype) for t in (a, b))
        out, half = self._sum_of_products(call, a, b, bend, None, None)
        out, half = out.to(kept), None if half is None else half.to(kept)
        for rest in (onto, plus):
            out = out if rest is None else out.add_(rest)
        return out, half

    def _sum_of_products(
        self,
        call: Call,
        a: Tensor | None,
        b: Tensor | None,
        bend: bool,
        onto: Tensor | None,
        plus: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        out, half = onto, None
        if b is not None:
            left = getattr(call, self._left).to(b.dtype)
            out, plus = self._product(call, left, b, out, plus), None
        if a is not None:
            out = self._product(call, a, getattr(call, self._right).to(a.dtype), out, plus)
        if bend and a is not None and b is not None:
            half = self._product(call, a, b)
        assert out is not None
        return out, half

    def pullback_tangent(
        self,
        call: Call,
        dots: Tensors,
        cotangents: Tensors,
        cotangent_dots: Tensors,
        residual: None,
    ) -> Tensors:
        a, b, _ = self._split(dots)
        (y,), (change,) = cotangents, cotangent_dots
        to: list[Tensor | None] = [None] * len(dots)
        left, right = self._inputs
        for place, saved, other, transposed in (
            (left, self._right, b, self._to_left),
            (right, self._left, a, self._to_right),
        ):
            if call.inputs[place] is None:
                continue
            if change is not None:
                to[place] = transposed(call, change, getattr(call, saved), None)
            if y is not None and other is not None:
                to[place] = transposed(call, y, other, to[place])
        for place, edge in enumerate(call.inputs):
            if place not in self._inputs and edge is not None and change is not None:
                assert self._summed is not None
                to[place] = self._summed(call, change)
        return call.fitted(to)


def _matmul(
    call: Call, a: Tensor, b: Tensor, onto: Tensor | None = None, plus: Tensor | None = None
) -> Tensor:
    return matmul(a, b, onto, plus)


def _matmul_left(call: Call, y: Tensor, b: Tensor, onto: Tensor | None) -> Tensor:
    return matmul(y, b.mT, onto)


def _matmul_right(call: Call, y: Tensor, a: Tensor, onto: Tensor | None) -> Tensor:
    # As the gradient of a linear layer's weight, whose transpose the layer multiplies by.
    return matmul(y.mT, a, None if onto is None else onto.mT).mT


def _as_it_is(call: Call, c: Tensor) -> Tensor:
    return c


def _rows(call: Call, a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=-1)


def _columns(call: Call, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(b, dim=-2)


register(
    "MmBackward0",
    Bilinear(
        "self",
        "mat2",
        _matmul,
        _matmul_left,
        _matmul_right,
        added=_as_it_is,
        lengths=(_rows, _columns),
    ),
)
register(
    "BmmBackward0",
    Bilinear("self", "mat2", _matmul, _matmul_left, _matmul_right, lengths=(_rows, _columns)),
)


def _scaled(
    call: Call, a: Tensor, b: Tensor, onto: Tensor | None = None, plus: Tensor | None = None
) -> Tensor:
    return matmul(a if call.alpha == 1 else a * call.alpha, b, onto, plus)


def _scaled_left(call: Call, y: Tensor, b: Tensor, onto: Tensor | None) -> Tensor:
    return _matmul_left(call, y if call.alpha == 1 else y * call.alpha, b, onto)


def _scaled_right(call: Call, y: Tensor, a: Tensor, onto: Tensor | None) -> Tensor:
    return _matmul_right(call, y if call.alpha == 1 else y * call.alpha, a, onto)


def _beta(call: Call, c: Tensor) -> Tensor:
    return c if call.beta == 1 else c * call.beta


for _name, _left, _right in (
    ("AddmmBackward0", "mat1", "mat2"),
    ("BaddbmmBackward0", "batch1", "batch2"),
):
    register(
        _name,
        Bilinear(
            _left,
            _right,
            _scaled,
            _scaled_left,
            _scaled_right,
            inputs=(1, 2),
            added=_beta,
            summed=_beta,
            lengths=(_rows, _columns),
        ),
    )


def added_onto(onto: Tensor | None, cotangent: Tensor) -> Tensor:
    return cotangent if onto is None else onto.add_(cotangent)


def _mv(call: Call, a: Tensor, b: Tensor, onto: Tensor | None = None, plus: None = None) -> Tensor:
    return added_onto(onto, a @ b)


def _mv_left(call: Call, y: Tensor, b: Tensor, onto: Tensor | None) -> Tensor:
    return added_onto(onto, torch.outer(y, b))


def _mv_right(call: Call, y: Tensor, a: Tensor, onto: Tensor | None) -> Tensor:
    return added_onto(onto, a.t() @ y)


def _dot_back(call: Call, y: Tensor, other: Tensor, onto: Tensor | None) -> Tensor:
    return added_onto(onto, y * other)


register("MvBackward0", Bilinear("self", "vec", _mv, _mv_left, _mv_right))
register("DotBackward0", Bilinear("self", "tensor", _mv, _dot_back, _dot_back))
