"""The fused LSTM of the CPU, one direction of one layer a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.lstm_layer import LstmLayer, Moved
from curvature.rules.matmul import matmul
from curvature.rules.precision import multiply
from curvature.rules.rule import Rule, real_dot
from curvature.rules.table import register

_LSTM = 2  # as torch numbers its kinds of recurrent layers


class _Lstm(Rule):
    """Sums over all steps, with only the recurrences step by step."""

    def of(self, call: Call) -> Rule | None:
        plain = call.mode == _LSTM and not call.batch_sizes and call.input.dtype == torch.float32
        return self if plain else None

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        layer, moved, _ = self._moved(call, dots)
        return layer.outputs(moved)

    def _moved(self, call: Call, dots: Tensors) -> tuple[LstmLayer, Moved, Tensor | None]:
        layer = LstmLayer(call)
        a, half = layer.linear(dots)
        return layer, layer.push(a, dots[5], dots[6]), half

    def jet(self, call: Call, dots: Tensors, ddots: Tensors) -> tuple[Tensors, Tensors]:
        layer, moved, half = self._moved(call, dots)
        second = layer.second(dots, ddots, moved, half)
        return layer.outputs(moved), layer.outputs(second)

    def adjoint(
        self, call: Call, dots: Tensors, cotangents: Tensors
    ) -> tuple[Tensors, Tensor | None]:
        layer, moved, half = self._moved(call, dots)
        back = layer.pull(*layer.arriving(cotangents))
        numbers = list(map(real_dot, (back.a, back.c, back.h), layer.bends(moved)))
        if half is not None:
            numbers.append(2 * real_dot(back.rows, half))
        u = dots[2]
        if u is not None:
            # <a^, h' U'^T> in the order that makes the smaller product.
            numbers.append(2 * real_dot(multiply(back.rows, u), moved.h_before))
        return layer.outputs(moved), torch.stack(numbers).sum()

    def tangent_with_residual(
        self, call: Call, dots: Tensors
    ) -> tuple[Tensors, tuple[LstmLayer, Moved]]:
        layer, moved, _ = self._moved(call, dots)
        return layer.outputs(moved), (layer, moved)

    def pullback_tangent(
        self,
        call: Call,
        dots: Tensors,
        cotangents: Tensors,
        cotangent_dots: Tensors,
        residual: Any,
    ) -> Tensors:
        """The derivative of the recurrence of cotangents is the same with what bends added."""
        layer, moved = residual
        x, w, u, *_ = dots
        x = None if x is None else layer.rows(x)
        back = layer.pull(*layer.arriving(cotangents))
        i, f, g, o = (layer.slope * moved.a).unbind(2)
        c, tau = moved.c[1:], layer.tanh_slope
        h_change, c_change = layer.arriving(cotangent_dots)
        if u is not None:
            h_change[:-1] += (back.rows @ u).view_as(moved.h[1:])[1:]
        c_change[:-1] += f[1:] * back.c[1:]
        c_change += back.h * tau * (o - 2 * layer.s[:, :, 3] * layer.tanh_c * c)
        s_change = torch.stack([g, moved.c[:-1], i, tau * c], 2)
        s_change[:, :, :3] *= back.c.unsqueeze(2)
        s_change[:, :, 3] *= back.h
        added = s_change.mul_(layer.slope).addcmul_(back.a * layer.curl, moved.a)
        change = layer.pull(h_change, c_change, added)
        # Where the state before the first step is an input, so is its cotangent an output.
        first, first_change = (t.rows[: layer.batch] for t in (back, change))
        to_h = _product_dot(first_change, layer.u, first, u)
        to_c = layer.s[0, :, 1] * change.c[0] + f[0] * back.c[0]
        to_x = _product_dot(change.rows, layer.w, back.rows, w)
        to_w = _product_dot(change.rows.t(), layer.x, back.rows.t(), x)
        to_u = _product_dot(change.rows.t(), layer.h_before, back.rows.t(), moved.h_before)
        to_b = change.rows.sum(0)
        to_x = layer.along_time(to_x.view(layer.steps, layer.batch, -1))
        shapes = (call.input, call.weight0, call.weight1, to_b, to_b, call.hx_, call.cx_)
        parts = (to_x, to_w, to_u, to_b, to_b, to_h, to_c)
        return tuple(part.view_as(like) for part, like in zip(parts, shapes, strict=True))


def _product_dot(change: Tensor, factor: Tensor, cotangent: Tensor, moved: Tensor | None) -> Tensor:
    """How the cotangent times the factor changes, if either moves."""
    product = matmul(change, factor)
    return product if moved is None else matmul(cotangent, moved, product)


register("MkldnnRnnLayerBackward0", _Lstm())
