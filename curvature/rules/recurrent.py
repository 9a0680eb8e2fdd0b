"""The fused LSTM layer of the CPU, one direction of one layer a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.local import LocalDoubleBackward
from curvature.rules.precision import multiply
from curvature.rules.table import register

_LSTM = 2  # as torch numbers its kinds of recurrent layers


def _linear(call: Call, x: Tensor, w: Tensor) -> Tensor:
    return x.flatten(0, 1) @ w.t()


@dataclass
class _Pass:
    """The layer's forward pass, evaluated again: all gates at once, only the cell step by step.

    ``a = x W^T + h_before U^T + b``; ``i, f, o = sigmoid(a)`` and ``g = tanh(a)`` in their
    quarters; ``c = f c_before + i g``, ``h = o tanh(c)``. Time runs along the first dimension, in
    the direction of the layer.
    """

    call: Call

    def __post_init__(self) -> None:
        call = self.call
        self.x, self.w, self.u = self.along_time(call.input), call.weight0, call.weight1
        h = self.along_time(call.result0)
        steps, batch, size = h.shape
        self.shape = (steps, batch, 4, size)
        self.h_before = torch.cat([call.hx_.view(1, batch, size), h[:-1]])
        a = _linear(call, self.x, self.w).addmm_(self.h_before.flatten(0, 1), self.u.t())
        if call.has_biases:
            a.add_(call.weight2 + call.weight3)
        a = a.view(self.shape)
        self.s = torch.sigmoid(a)
        self.s[:, :, 2] = torch.tanh(a[:, :, 2])
        i, f, g, o = self.s.unbind(2)
        added = i * g
        self.c = torch.empty(steps + 1, batch, size, dtype=h.dtype)
        self.c[0] = call.cx_.view(batch, size)
        for t in range(steps):
            torch.addcmul(added[t], f[t], self.c[t], out=self.c[t + 1])
        self.tanh_c = torch.tanh(self.c[1:])
        # First and second derivatives of the gates' functions.
        self.slope = self.s * (1 - self.s)
        self.slope[:, :, 2] = 1 - g * g
        self.bend = self.slope * (1 - 2 * self.s)
        self.bend[:, :, 2] = -2 * g * self.slope[:, :, 2]
        # c' = f c'_before + <(g, c_before, i), (i', f', g')>, h' = tanh(c) o' + o (1 - tanh²c) c'
        self.weights = torch.stack([g, self.c[:-1], i], 2)
        self.out_slope = o * (1 - self.tanh_c * self.tanh_c)

    def along_time(self, sequence: Tensor) -> Tensor:
        return sequence.flip(0) if self.call.reverse else sequence

    def tangent(self, dots: Tensors) -> _Moved:
        x, w, u, b0, b1, h0, c0 = dots
        call, (steps, batch, _, size) = self.call, self.shape
        a = self.s.new_zeros(steps * batch, 4 * size)
        if x is not None:
            x = self.along_time(x)
            a.add_(multiply(_linear, call, x, self.w))
        if w is not None:
            a.add_(multiply(_linear, call, self.x, w))
        if u is not None:
            a.add_(multiply(_linear, call, self.h_before, u))
        for b in (b0, b1):
            if b is not None:
                a.add_(b)
        a = a.view(steps, batch, 4 * size)
        s = torch.empty(self.shape, dtype=a.dtype)
        c = torch.zeros_like(self.c)
        h = torch.zeros_like(self.c)
        if h0 is not None:
            h[0] = h0.view(batch, size)
        if c0 is not None:
            c[0] = c0.view(batch, size)
        f, o_scale, transposed = self.s[:, :, 1], self.out_slope, self.u.t().contiguous()
        for t in range(steps):
            a[t].addmm_(h[t], transposed)
            torch.mul(a[t].view(self.shape[1:]), self.slope[t], out=s[t])
            gain = (s[t, :, :3] * self.weights[t]).sum(1)
            torch.addcmul(gain, f[t], c[t], out=c[t + 1])
            torch.mul(self.tanh_c[t], s[t, :, 3], out=h[t + 1])
            h[t + 1].addcmul_(o_scale[t], c[t + 1])
        return _Moved(x, a, s, c, h)

    def backward(
        self, outputs: Tensor, last_h: Tensor | None, last_c: Tensor | None
    ) -> _Cotangents:
        """Cotangents of a, s, c and h at each step, given those of the outputs."""
        steps, batch, _, size = self.shape
        h = self.along_time(outputs).clone()
        c = torch.zeros_like(h)
        if last_h is not None:
            h[-1] += last_h.view(batch, size)
        if last_c is not None:
            c[-1] += last_c.view(batch, size)
        s = torch.empty(self.shape, dtype=h.dtype)
        a = torch.empty(self.shape, dtype=h.dtype)
        f = self.s[:, :, 1]
        for t in range(steps - 1, -1, -1):
            c[t].addcmul_(self.out_slope[t], h[t])
            torch.mul(self.weights[t], c[t].unsqueeze(1), out=s[t, :, :3])
            torch.mul(self.tanh_c[t], h[t], out=s[t, :, 3])
            torch.mul(s[t], self.slope[t], out=a[t])
            if t > 0:
                h[t - 1].addmm_(a[t].view(batch, 4 * size), self.u)
                c[t - 1].addcmul_(f[t], c[t])
        return _Cotangents(a, s, c, h)


@dataclass
class _Moved:
    """Tangents: x, a and s per step, c and h from before the first step."""

    x: Tensor | None
    a: Tensor
    s: Tensor
    c: Tensor
    h: Tensor


@dataclass
class _Cotangents:
    a: Tensor
    s: Tensor
    c: Tensor
    h: Tensor


class _Lstm(LocalDoubleBackward):
    """Sums over all steps, with only the two recurrences step by step.

    PyTorch's own double backward, which serves packed sequences and the passes other than these,
    takes ten times as long.
    """

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        if not _served(call):
            return super().tangent(call, dots)
        evaluated = _Pass(call)
        return _outputs(evaluated, evaluated.tangent(dots))

    def adjoint(
        self, call: Call, dots: Tensors, cotangents: Tensors
    ) -> tuple[Tensors, Tensor | None]:
        if not _served(call):
            return super().adjoint(call, dots, cotangents)
        evaluated = _Pass(call)
        moved = evaluated.tangent(dots)
        outputs, last_h, last_c = cotangents
        if outputs is None:
            outputs = torch.zeros_like(evaluated.c[1:])
        back = evaluated.backward(outputs, last_h, last_c)
        _, w, u, *_ = dots
        i, f, g, o = moved.s.unbind(2)
        c, tanh_c = moved.c[1:], evaluated.tanh_c
        # The bends of the gates, of c = f c_before + i g, and of h = o tanh(c).
        numbers = [
            (back.s * evaluated.bend * moved.a.view(evaluated.shape).square()).sum(),
            2 * (back.c * (f * moved.c[:-1] + i * g)).sum(),
            2 * (back.h * c * ((1 - tanh_c * tanh_c) * o - evaluated.out_slope * tanh_c * c)).sum(),
        ]
        cotangent = back.a.flatten(2).flatten(0, 1)
        if moved.x is not None and w is not None:
            numbers.append(2 * (multiply(_linear, call, moved.x, w) * cotangent).sum())
        if u is not None:
            numbers.append(2 * (multiply(_linear, call, moved.h[:-1], u) * cotangent).sum())
        return _outputs(evaluated, moved), torch.stack(numbers).sum()


def _served(call: Call) -> bool:
    return bool(call.mode == _LSTM and not call.batch_sizes and call.input.dtype == torch.float32)


def _outputs(evaluated: _Pass, moved: _Moved) -> Tensors:
    return evaluated.along_time(moved.h[1:]), moved.h[-1], moved.c[-1]


register("MkldnnRnnLayerBackward0", _Lstm())
