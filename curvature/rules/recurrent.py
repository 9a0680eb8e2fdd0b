"""The fused LSTM layer of the CPU, one direction of one layer a call."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.matmul import matmul
from curvature.rules.precision import multiply
from curvature.rules.rule import Rule
from curvature.rules.table import register

_LSTM = 2  # as torch numbers its kinds of recurrent layers


class _Layer:
    """The layer's forward pass, evaluated again: all gates at once, only the cell step by step.

    ``a = x W^T + h_before U^T + b``; ``i, f, o = sigmoid(a)`` and ``g = tanh(a)`` in their
    quarters; ``c = f c_before + i g``, ``h = o tanh(c)``. Time runs along the first dimension, in
    the direction of the layer; ``c[0]`` is the state before the first step.

    Attributes:
        slope: of the gates' functions, and ``bend`` their second derivative.
        weights: ``c' = f c'_before + <weights, (i', f', g')>``.
        out_slope: ``h' = tanh(c) o' + out_slope c'``.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.w, self.u = call.weight0, call.weight1
        h = self.along_time(call.result0)
        self.steps, self.batch, self.size = h.shape
        self.x = self.rows(call.input)
        first = call.hx_.view(1, self.batch, self.size)
        self.h_before = torch.cat([first, h[:-1]]).flatten(0, 1)
        a = matmul(self.h_before, self.u.t(), matmul(self.x, self.w.t()))
        if call.has_biases:
            a.add_(call.weight2 + call.weight3)
        a = a.view(self.steps, self.batch, 4, self.size)
        self.s = torch.sigmoid(a)
        self.s[:, :, 2] = torch.tanh(a[:, :, 2])
        i, f, g, o = self.s.unbind(2)
        added = i * g
        self.c = h.new_empty(self.steps + 1, self.batch, self.size)
        self.c[0] = call.cx_.view(self.batch, self.size)
        for t in range(self.steps):
            torch.addcmul(added[t], f[t], self.c[t], out=self.c[t + 1])
        self.tanh_c = torch.tanh(self.c[1:])
        self.tanh_slope = 1 - self.tanh_c * self.tanh_c
        self.slope = self.s * (1 - self.s)
        self.slope[:, :, 2] = 1 - g * g
        self.weights = torch.stack([g, self.c[:-1], i], 2)
        self.out_slope = o * self.tanh_slope

    @cached_property
    def bend(self) -> Tensor:
        bend = self.slope * (1 - 2 * self.s)
        bend[:, :, 2] = -2 * self.s[:, :, 2] * self.slope[:, :, 2]
        return bend

    def along_time(self, sequence: Tensor) -> Tensor:
        return sequence.flip(0) if self.call.reverse else sequence

    def rows(self, sequence: Tensor) -> Tensor:
        """A sequence in the direction of the layer, as a matrix."""
        return self.along_time(sequence).flatten(0, 1)

    def linear(self, dots: Tensors) -> Tensor:
        """How a moves with x, W, U and b: all but what comes by h_before."""
        x, w, u, b0, b1, *_ = dots
        a = None
        for left, right in (
            (None if x is None else self.rows(x), self.w),
            (self.x, w),
            (self.h_before, u),
        ):
            if left is not None and right is not None:
                a = multiply(left, right.t(), a)
        a = self.x.new_zeros(len(self.x), 4 * self.size) if a is None else a
        for b in (b0, b1):
            if b is not None:
                a.add_(b)
        return a

    def push(
        self,
        a: Tensor,
        h: Tensor | None,
        c: Tensor | None,
        added: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> _Moved:
        """The linear recurrence of tangents along time.

        Args:
            a: what moves a besides h_before; it is written to.
            h, c: of the states before the first step.
            added: what is added to s, c and h at each step.
        """
        shape = (self.steps + 1, self.batch, self.size)
        s, cs, hs = torch.empty_like(self.s), a.new_zeros(shape), a.new_zeros(shape)
        if h is not None:
            hs[0] = h.view(shape[1:])
        if c is not None:
            cs[0] = c.view(shape[1:])
        a = a.view(self.steps, self.batch, -1)
        f, transposed = self.s[:, :, 1], self.u.t().contiguous()
        for t in range(self.steps):
            a[t].addmm_(hs[t], transposed)
            torch.mul(a[t].view_as(s[t]), self.slope[t], out=s[t])
            if added is not None:
                s[t] += added[0][t]
            gain = (s[t, :, :3] * self.weights[t]).sum(1)
            torch.addcmul(gain, f[t], cs[t], out=cs[t + 1])
            if added is not None:
                cs[t + 1] += added[1][t]
            torch.mul(self.tanh_c[t], s[t, :, 3], out=hs[t + 1])
            hs[t + 1].addcmul_(self.out_slope[t], cs[t + 1])
            if added is not None:
                hs[t + 1] += added[2][t]
        return _Moved(a.view_as(s), s, cs, hs)

    def second(self, dots: Tensors, ddots: Tensors, moved: _Moved) -> _Moved:
        """The second derivatives, by the same recurrence with what bends added."""
        x, w, u, *_ = dots
        i, f, g, o = moved.s.unbind(2)
        c = moved.c[1:]
        added = (
            self.bend * moved.a.square(),
            2 * (f * moved.c[:-1] + i * g),
            2 * self.tanh_slope * c * (o - self.s[:, :, 3] * self.tanh_c * c),
        )
        a = self.linear(ddots)
        if x is not None and w is not None:
            a = multiply(2 * self.rows(x), w.t(), a)
        if u is not None:
            a = multiply(2 * moved.h_before, u.t(), a)
        return self.push(a, ddots[5], ddots[6], added)

    def pull(self, h: Tensor, c: Tensor, added: Tensor | None = None) -> _Cotangents:
        """The linear recurrence of cotangents against time.

        Args:
            h, c: what comes to each step's h and c from outside; they are written to.
            added: what is added to the cotangent of a.
        """
        a, s = torch.empty_like(self.s), torch.empty_like(self.s)
        f = self.s[:, :, 1]
        for t in range(self.steps - 1, -1, -1):
            c[t].addcmul_(self.out_slope[t], h[t])
            torch.mul(self.weights[t], c[t].unsqueeze(1), out=s[t, :, :3])
            torch.mul(self.tanh_c[t], h[t], out=s[t, :, 3])
            torch.mul(s[t], self.slope[t], out=a[t])
            if added is not None:
                a[t] += added[t]
            if t > 0:
                h[t - 1].addmm_(a[t].flatten(1), self.u)
                c[t - 1].addcmul_(f[t], c[t])
        return _Cotangents(a, s, c, h)

    def arriving(self, cotangents: Tensors) -> tuple[Tensor, Tensor]:
        """What the outputs' cotangents bring to h and c of each step."""
        outputs, last_h, last_c = cotangents
        c = torch.zeros_like(self.tanh_c)
        h = torch.zeros_like(c) if outputs is None else self.along_time(outputs).clone()
        if last_h is not None:
            h[-1] += last_h.view_as(h[-1])
        if last_c is not None:
            c[-1] += last_c.view_as(c[-1])
        return h, c

    def outputs(self, moved: _Moved) -> Tensors:
        ends = (self.along_time(moved.h[1:]), moved.h[-1], moved.c[-1])
        return tuple(end.reshape(self.call.shape(k)) for k, end in enumerate(ends))


class _Moved:
    """Tangents of a and s per step, and of c and h from before the first step."""

    def __init__(self, a: Tensor, s: Tensor, c: Tensor, h: Tensor) -> None:
        self.a, self.s, self.c, self.h = a, s, c, h
        self.h_before = h[:-1].flatten(0, 1)


class _Cotangents:
    """Of a, s, c and h per step."""

    def __init__(self, a: Tensor, s: Tensor, c: Tensor, h: Tensor) -> None:
        self.rows, self.s, self.c, self.h = a.flatten(2).flatten(0, 1), s, c, h


class _Lstm(Rule):
    """Sums over all steps, with only the recurrences step by step."""

    def of(self, call: Call) -> Rule | None:
        plain = call.mode == _LSTM and not call.batch_sizes and call.input.dtype == torch.float32
        return self if plain else None

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        return self.ahead(call, dots)[0]

    def ahead(self, call: Call, dots: Tensors) -> tuple[Tensors, tuple[_Layer, _Moved]]:
        layer = _Layer(call)
        moved = layer.push(layer.linear(dots), dots[5], dots[6])
        return layer.outputs(moved), (layer, moved)

    def jet(self, call: Call, dots: Tensors, ddots: Tensors) -> tuple[Tensors, Tensors]:
        outputs, (layer, moved) = self.ahead(call, dots)
        return outputs, layer.outputs(layer.second(dots, ddots, moved))

    def adjoint(
        self, call: Call, dots: Tensors, cotangents: Tensors
    ) -> tuple[Tensors, Tensor | None]:
        outputs, (layer, moved) = self.ahead(call, dots)
        back = layer.pull(*layer.arriving(cotangents))
        x, w, u, *_ = dots
        i, f, g, o = moved.s.unbind(2)
        c = moved.c[1:]
        # The bends of the gates, of c = f c_before + i g, and of h = o tanh(c).
        bend = o - layer.s[:, :, 3] * layer.tanh_c * c
        numbers = [
            (back.s * layer.bend * moved.a.square()).sum(),
            2 * (back.c * (f * moved.c[:-1] + i * g)).sum(),
            2 * (back.h * layer.tanh_slope * c * bend).sum(),
        ]
        # <a^, x' W'^T> in the order that makes the smaller product.
        if x is not None and w is not None:
            numbers.append(2 * (multiply(back.rows, w) * layer.rows(x)).sum())
        if u is not None:
            numbers.append(2 * (multiply(back.rows, u) * moved.h_before).sum())
        return outputs, torch.stack(numbers).sum()

    def turn(
        self,
        call: Call,
        dots: Tensors,
        cotangents: Tensors,
        turned: Tensors,
        kept: Any,
    ) -> Tensors:
        """The derivative of the recurrence of cotangents is the same with what bends added."""
        layer, moved = kept
        x, w, u, *_ = dots
        x = None if x is None else layer.rows(x)
        back = layer.pull(*layer.arriving(cotangents))
        i, f, g, o = moved.s.unbind(2)
        c, tau = moved.c[1:], layer.tanh_slope
        h_change, c_change = layer.arriving(turned)
        if u is not None:
            h_change[:-1] += (back.rows @ u).view_as(moved.h[1:])[1:]
        c_change[:-1] += f[1:] * back.c[1:]
        c_change += back.h * tau * (o - 2 * layer.s[:, :, 3] * layer.tanh_c * c)
        s_change = torch.stack([g, moved.c[:-1], i, tau * c], 2)
        s_change[:, :, :3] *= back.c.unsqueeze(2)
        s_change[:, :, 3] *= back.h
        added = s_change.mul_(layer.slope).addcmul_(back.s * layer.bend, moved.a)
        change = layer.pull(h_change, c_change, added)
        # Where the state before the first step is an input, so is its cotangent an output.
        first, first_change = (t.rows[: layer.batch] for t in (back, change))
        to_h = _turned(first_change, layer.u, first, u)
        to_c = layer.s[0, :, 1] * change.c[0] + f[0] * back.c[0]
        to_x = _turned(change.rows, layer.w, back.rows, w)
        to_w = _turned(change.rows.t(), layer.x, back.rows.t(), x)
        to_u = _turned(change.rows.t(), layer.h_before, back.rows.t(), moved.h_before)
        to_b = change.rows.sum(0)
        to_x = layer.along_time(to_x.view(layer.steps, layer.batch, -1))
        shapes = (call.input, call.weight0, call.weight1, to_b, to_b, call.hx_, call.cx_)
        parts = (to_x, to_w, to_u, to_b, to_b, to_h, to_c)
        return tuple(part.view_as(like) for part, like in zip(parts, shapes, strict=True))


def _turned(change: Tensor, factor: Tensor, cotangent: Tensor, moved: Tensor | None) -> Tensor:
    """How the cotangent times the factor changes, if either moves."""
    product = matmul(change, factor)
    return product if moved is None else matmul(cotangent, moved, product)


register("MkldnnRnnLayerBackward0", _Lstm())
