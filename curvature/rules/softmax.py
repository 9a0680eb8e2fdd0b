"""Softmax and its logarithm."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.rule import IN_CACHE, Rule, add, against
from curvature.rules.table import general, register


class _LogSoftmax(Rule):
    """y = x - log sum exp x.

    With p = exp y: y' = x' - E_p x' and y'' = x'' - E_p x'' - Var_p x'.
    """

    needs_sums = True

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        out = _like_output(call)
        for rows, p in _blocks(call):
            _centre(p, _at(call, dots[0])[rows], call.dim, out[rows])
        return (out.view(call.shape()),)

    def jet(self, call: Call, dots: Tensors, ddots: Tensors) -> tuple[Tensors, Tensors]:
        out, second, dim = _like_output(call), _like_output(call), call.dim
        for rows, p in _blocks(call):
            variance = _centre(p, _at(call, dots[0])[rows], dim, out[rows])
            if ddots[0] is None:
                second[rows] = variance.neg_()
            else:
                _centre(p, _at(call, ddots[0])[rows], dim, second[rows])
                second[rows] -= variance
        return (out.view(call.shape()),), (second.view(call.shape()),)

    def adjoint(
        self, call: Call, dots: Tensors, cotangents: Tensors
    ) -> tuple[Tensors, Tensor | None]:
        if cotangents[0] is None:
            return self.tangent(call, dots), None
        out, dim = _like_output(call), call.dim
        number = out.new_zeros(())
        for rows, p in _blocks(call):
            variance = _centre(p, _at(call, dots[0])[rows], dim, out[rows])
            number -= (variance * _at(call, cotangents[0])[rows].sum(dim, True)).sum()
        return (out.view(call.shape()),), number

    def tangent_with_residual(self, call: Call, dots: Tensors) -> tuple[Tensors, Tensor]:
        (out,) = self.tangent(call, dots)
        assert out is not None
        return (out,), out

    def pullback_tangent(
        self,
        call: Call,
        dots: Tensors,
        cotangents: Tensors,
        cotangent_dots: Tensors,
        residual: Tensor,
    ) -> Tensors:
        """The backward pass is x^ = y^ - p sum y^, and p' = p y'."""
        back, dim = _like_output(call), call.dim
        for rows, p in _blocks(call):
            if cotangents[0] is not None:
                sums = _at(call, cotangents[0])[rows].sum(dim, True)
                torch.mul(p, _at(call, residual)[rows], out=back[rows]).mul_(-sums)
            else:
                back[rows].zero_()
            if cotangent_dots[0] is not None:
                change = _at(call, cotangent_dots[0])[rows]
                back[rows].add_(change).addcmul_(p, change.sum(dim, True), value=-1)
        return (back.view(call.shape()),)


def _centre(p: Tensor, x: Tensor, dim: int, out: Tensor) -> Tensor:
    """Write x - E_p x, and return Var_p x."""
    torch.sub(x, (p * x).sum(dim, True), out=out)
    # Once more, without the common part of x: where p is nearly 1, it would drown in its rounding.
    weighted = p * out
    rest = weighted.sum(dim, True)
    variance = weighted.mul_(out).sum(dim, True).sub_(rest * rest)
    out.sub_(rest)
    return variance


def _blocks(call: Call) -> Iterator[tuple[slice, Tensor]]:
    y = _at(call, call.result)
    if y.numel() == 0:
        return
    step = len(y) if call.dim % y.ndim == 0 else max(1, IN_CACHE // y[:1].numel())
    for start in range(0, len(y), step):
        rows = slice(start, start + step)
        yield rows, y[rows].exp()


def _at(call: Call, t: Tensor | None) -> Tensor:
    # A single number is a vector of one class.
    assert t is not None
    return t.view(1) if t.ndim == 0 else t


def _like_output(call: Call) -> Tensor:
    return torch.empty_like(_at(call, call.result))


class _Softmax(Rule):
    """With c = x' - E_p x': p' = p c and p'' = p (c² - E_p c²) + J x''."""

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        (x,) = dots
        assert x is not None
        return (_project(call, x),)

    def jet(self, call: Call, dots: Tensors, ddots: Tensors) -> tuple[Tensors, Tensors]:
        c = self._centred(call, dots)
        bent = c * c if ddots[0] is None else torch.addcmul(ddots[0], c, c)
        return (call.result * c,), (_project(call, bent),)

    def _centred(self, call: Call, dots: Tensors) -> Tensor:
        (x,) = dots
        assert x is not None
        return x - (call.result * x).sum(call.dim, True)

    def tangent_with_residual(self, call: Call, dots: Tensors) -> tuple[Tensors, Tensor]:
        c = self._centred(call, dots)
        return (call.result * c,), c

    def pullback_tangent(
        self,
        call: Call,
        dots: Tensors,
        cotangents: Tensors,
        cotangent_dots: Tensors,
        residual: Tensor,
    ) -> Tensors:
        """The backward pass is x^ = p (p^ - E_p p^)."""
        (y,), (change,) = cotangents, cotangent_dots
        if y is not None:
            centred = y - (call.result * y).sum(call.dim, True)
            change = add(change, centred.mul_(residual))
        return (None if change is None else _project(call, change),)


def _project(call: Call, t: Tensor) -> Tensor:
    """p (t - E_p t)."""
    p = call.result
    return torch.ops.aten._softmax_backward_data(t, p, call.dim, p.dtype)


@general("LogsumexpBackward0")
def _logsumexp(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor] | Tensor:
    """With p = exp(x - y): y' = E_p x' and y'' = E_p (x' - y')²."""
    (x,) = dots
    assert x is not None
    dims, y = call.dim, call.result
    # Of nothing but -inf: all of p is 0 then.
    y = y.masked_fill(y == -math.inf, 0)
    p = (call.self - against(x, y, dims)).exp()
    out = (p * x).sum(dims, True)
    second = (p * (x - out).square()).sum(dims, True) if bend else out
    shape = call.shape()
    return (out.view(shape), second.view(shape)) if bend else out.view(shape)


register("LogSoftmaxBackward0", _LogSoftmax())
register("SoftmaxBackward0", _Softmax())
register("SafeSoftmaxBackward0", _Softmax())
