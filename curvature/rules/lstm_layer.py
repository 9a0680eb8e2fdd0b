"""An LSTM layer's recurrences: of its states, of their tangents, and of cotangents."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.karatsuba import balance, karatsuba
from curvature.rules.matmul import matmul
from curvature.rules.precision import multiply, product_dtype


class LstmLayer:
    """The forward pass evaluated again: all gates at once, only the cell step by step.

    ``a = x W^T + h_before U^T + b``; ``i, f, o = sigmoid(a)`` and ``g = tanh(a)`` in their
    quarters; ``c = f c_before + i g``, ``h = o tanh(c)``. Time runs along the first dimension, in
    the direction of the layer; ``c[0]`` is the state before the first step.

    Attributes:
        slope: of the gates; their second derivative is ``slope curl``.
        gains: ``c' = f c'_before + gains_i a_i' + gains_f a_f' + gains_g a_g'``.
        out_slope: ``h' = gains_o a_o' + out_slope c'``.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.w, self.u = call.weight0, call.weight1
        h = self.along_time(call.result0)
        self.steps, self.batch, self.size = h.shape
        self.x = self.rows(call.input)
        first = call.hx_.view(1, self.batch, self.size)
        self.h_before = torch.cat([first, h[:-1]]).flatten(0, 1)
        self.from_x = matmul(self.x, self.w.t())
        a = matmul(self.h_before, self.u.t()).add_(self.from_x)
        if call.has_biases:
            a.add_(call.weight2 + call.weight3)
        a = a.view(self.steps, self.batch, 4, self.size)
        self.s = torch.sigmoid(a)
        self.s[:, :, 2] = torch.tanh(a[:, :, 2].contiguous())
        i, f, g, o = self.s.unbind(2)
        self.c = h.new_empty(self.steps + 1, self.batch, self.size)
        self.c[0] = call.cx_.view(self.batch, self.size)
        torch.mul(i, g, out=self.c[1:])
        c, forget = _by_step(self.c, f)
        for t in range(self.steps):
            c[t + 1].addcmul_(forget[t], c[t])
        self.tanh_c = torch.tanh(self.c[1:])
        self.tanh_slope = 1 - self.tanh_c * self.tanh_c
        self.slope = self.s * (1 - self.s)
        self.slope[:, :, 2] = 1 - g * g
        self.gains = torch.stack([g, self.c[:-1], i, self.tanh_c], 2).mul_(self.slope)
        self.out_slope = o * self.tanh_slope

    @cached_property
    def curl(self) -> Tensor:
        curl = 1 - 2 * self.s
        curl[:, :, 2] = -2 * self.s[:, :, 2]
        return curl

    def along_time(self, sequence: Tensor) -> Tensor:
        return sequence.flip(0) if self.call.reverse else sequence

    def rows(self, sequence: Tensor) -> Tensor:
        """A sequence in the direction of the layer, as a matrix."""
        return self.along_time(sequence).flatten(0, 1)

    def linear(self, dots: Tensors) -> tuple[Tensor, Tensor | None]:
        """How a moves with x, W, U and b, all but what comes by h_before; and x' W'^T."""
        x, w, u, b0, b1, *_ = dots
        x = None if x is None else self.rows(x)
        a = half = None
        if x is not None and w is not None:
            a, half = self._both(x, w)
        elif x is not None:
            a = multiply(x, self.w.t())
        elif w is not None:
            a = multiply(self.x, w.t())
        if u is not None:
            a = multiply(self.h_before, u.t(), a)
        a = self.x.new_zeros(len(self.x), 4 * self.size) if a is None else a
        for b in (b0, b1):
            if b is not None:
                a.add_(b)
        return a, half

    def _both(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """x' W^T + x W'^T, and x' W'^T."""
        lengths = (_lengths(self.x), _lengths(x)), (_lengths(self.w), _lengths(w))
        t = balance(*lengths) if product_dtype.get() is None else None
        if t is None:
            return multiply(x, self.w.t(), multiply(self.x, w.t())), multiply(x, w.t())
        left, right = (self.x, x), (self.w.t(), w.t())
        return karatsuba(matmul, left, right, t, self.from_x, None, lambda half: half)

    def push(
        self,
        a: Tensor,
        h: Tensor | None,
        c: Tensor | None,
        added: tuple[Tensor, Tensor] | None = None,
    ) -> Moved:
        """The linear recurrence of tangents along time.

        Args:
            a: what moves a besides h_before; it is written to.
            h, c: of the states before the first step.
            added: what is added to c and h at each step.
        """
        shape = (self.steps + 1, self.batch, self.size)
        moved = Moved(a.view_as(self.s), a.new_zeros(shape), a.new_zeros(shape))
        if h is not None:
            moved.h[0] = h.view(shape[1:])
        if c is not None:
            moved.c[0] = c.view(shape[1:])
        if added is not None:
            moved.c[1:], moved.h[1:] = added
        u = self.u.t().contiguous()
        rows, cs, hs = _by_step(moved.a.flatten(2), moved.c, moved.h)
        i, f, g, o = _by_step(*moved.a.unbind(2))
        to_i, to_f, to_g, to_o = _by_step(*self.gains.unbind(2))
        forget, out_slope = _by_step(self.s[:, :, 1], self.out_slope)
        for t in range(self.steps):
            rows[t].addmm_(hs[t], u)
            moving = cs[t + 1].addcmul_(to_i[t], i[t]).addcmul_(to_f[t], f[t])
            moving.addcmul_(to_g[t], g[t]).addcmul_(forget[t], cs[t])
            hs[t + 1].addcmul_(to_o[t], o[t]).addcmul_(out_slope[t], moving)
        return moved

    def bends(self, moved: Moved) -> tuple[Tensor, Tensor, Tensor]:
        """What bends the gates by their slope, ``c = f c_before + i g``, and ``h = o tanh(c)``."""
        i, f, g, o = (self.slope * moved.a).unbind(2)
        c = moved.c[1:]
        return (
            moved.a.square().mul_(self.curl),
            2 * (f * moved.c[:-1] + i * g),
            2 * self.tanh_slope * c * (o - self.s[:, :, 3] * self.tanh_c * c),
        )

    def second(self, dots: Tensors, ddots: Tensors, moved: Moved, half: Tensor | None) -> Moved:
        """The second derivatives, by the same recurrence with what bends added."""
        of_a, of_c, of_h = self.bends(moved)
        *to_c, to_h = of_a.mul_(self.gains).unbind(2)
        a, _ = self.linear(ddots)
        if half is not None:
            a.add_(half, alpha=2)
        u = dots[2]
        if u is not None:
            a = multiply(2 * moved.h_before, u.t(), a)
        return self.push(a, ddots[5], ddots[6], (sum(to_c, of_c), to_h.add_(of_h)))

    def pull(self, h: Tensor, c: Tensor, added: Tensor | None = None) -> Cotangents:
        """The linear recurrence of cotangents against time.

        Args:
            h, c: what comes to each step's h and c from outside; they are written to.
            added: what is added to the cotangent of a.
        """
        a = self.gains.clone()
        rows, from_c, from_h = _by_step(a.flatten(2), a[:, :, :3], a[:, :, 3])
        hs, cs, out_slope, forget = _by_step(h, c, self.out_slope, self.s[:, :, 1])
        wide = c.unsqueeze(2).unbind()
        more = None if added is None else added.flatten(2).unbind()
        for t in range(self.steps - 1, -1, -1):
            cs[t].addcmul_(out_slope[t], hs[t])
            from_c[t].mul_(wide[t])
            from_h[t].mul_(hs[t])
            if more is not None:
                rows[t].add_(more[t])
            if t > 0:
                hs[t - 1].addmm_(rows[t], self.u)
                cs[t - 1].addcmul_(forget[t], cs[t])
        return Cotangents(a, c, h)

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

    def outputs(self, moved: Moved) -> Tensors:
        ends = (self.along_time(moved.h[1:]), moved.h[-1], moved.c[-1])
        return tuple(end.reshape(self.call.shape(k)) for k, end in enumerate(ends))


class Moved:
    """Tangents of a per step, and of c and h from before the first step on."""

    def __init__(self, a: Tensor, c: Tensor, h: Tensor) -> None:
        self.a, self.c, self.h = a, c, h
        self.h_before = h[:-1].flatten(0, 1)


class Cotangents:
    """Cotangents of a, c and h per step."""

    def __init__(self, a: Tensor, c: Tensor, h: Tensor) -> None:
        self.a, self.c, self.h = a, c, h
        self.rows = a.flatten(2).flatten(0, 1)


def _lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1)


def _by_step(*sequences: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of each step, made at once: one by one they would take as long as the arithmetic."""
    return [sequence.unbind() for sequence in sequences]
