"""Scaled dot-product attention in its fused kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.precision import multiply
from curvature.rules.rule import IN_CACHE, Rule, real_dot
from curvature.rules.table import register

_ROWS = 64  # of S at a time, where not all are needed or they are too many
_KEPT = 4  # times as many keys as features: up to there P is no larger than what autograd saved


class _Heads:
    """Some samples of O = P V with P = softmax(S), S = scale Q K^T + mask, and tangents.

    Samples and heads are one dimension. Values and tangents lie side by side, so that what is
    bilinear in them comes by one product: ``q_Q`` holds (Q', Q), times the scale; ``K_k`` holds
    (K, K'), and ``V_v`` (V, V').
    """

    def __init__(self, call: Call, some: slice, dots: Tensors) -> None:
        self.call, self.some = call, some
        self.scale = 1 / math.sqrt(call.query.shape[-1]) if call.scale is None else call.scale
        Q, K, V = (self._for_all(x[some]) for x in (call.query, call.key, call.value))
        q, k, v = self._filled(dots)
        self.q_Q = torch.cat([q, Q], -1).mul_(self.scale).flatten(0, 1)
        self.K_k = torch.cat([K, k], -1).flatten(0, 1)
        self.V_v = torch.cat([V, v], -1).flatten(0, 1)
        self.mask = None
        if call.attn_mask is not None:
            shape = (*call.query.shape[:-1], call.key.shape[-2])
            self.mask = call.attn_mask.expand(shape)[some].flatten(0, 1)

    def _filled(self, dots: Tensors) -> list[Tensor]:
        values = (self.call.query, self.call.key, self.call.value)
        pairs = zip(values, dots, strict=False)
        each = ((torch.zeros_like(x) if d is None else d)[self.some] for x, d in pairs)
        return [self._for_all(x) for x in each]

    def _for_all(self, x: Tensor) -> Tensor:
        """With the keys or values of each head of the queries, some of which may share them."""
        heads = self.call.query.shape[1]
        return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)

    def second(self, ddots: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """(Q'', Q), times the scale, (K, K'') and V''."""
        q, k, v = (t.flatten(0, 1) for t in self._filled(ddots))
        Q, K = self.q_Q.chunk(2, -1)[1], self.K_k.chunk(2, -1)[0]
        return torch.cat([q * self.scale, Q], -1), torch.cat([K, k], -1), v

    def blocks(self, height: int) -> Iterator[_Rows]:
        for start in range(0, self.q_Q.shape[1], height):
            yield _Rows(self, slice(start, start + height))


class _Rows:
    """Some rows of S, without the columns that causal attention masks in all of them."""

    def __init__(self, heads: _Heads, rows: slice) -> None:
        self.heads, self.rows = heads, rows
        self.columns = slice(0, rows.stop if heads.call.is_causal else None)
        self.q_Q, self.K_k = heads.q_Q[:, rows], heads.K_k[:, self.columns]
        self.V_v = heads.V_v[:, self.columns]
        self.q, self.Q = self.q_Q.chunk(2, -1)
        self.K, self.k = self.K_k.chunk(2, -1)
        self.V, self.v = self.V_v.chunk(2, -1)
        self.P, self.c = self._evaluated()

    def _evaluated(self) -> tuple[Tensor, Tensor]:
        """P, and c with which P' = P c."""
        heads = self.heads
        S = torch.bmm(self.Q, self.K.mT)
        if heads.call.is_causal:
            corner = S[..., self.rows.start :]
            corner += corner.new_full(corner.shape[1:], -math.inf).triu_(1)
        elif heads.mask is not None:
            S += heads.mask[:, self.rows]
        # A row that is masked throughout has no weights, and zeros for its output.
        P = torch.softmax(S, -1) if heads.mask is None else torch._safe_softmax(S, -1)
        S1 = multiply(self.q_Q, self.K_k.mT)
        return P, S1.sub_((P * S1).sum(-1, True))

    def of(self, x: Tensor) -> Tensor:
        """These rows of a tensor like the queries or the output."""
        return x[self.heads.some, :, self.rows].flatten(0, 1)

    def add(self, x: Tensor, rows: slice, part: Tensor) -> None:
        at = x[self.heads.some, :, rows]
        at.add_(part.view_as(at))

    def moved(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """O' = P' V + P V', and P' V'; takes the memory of c."""
        out, mixed = multiply(c.mul_(self.P), self.V_v).chunk(2, -1)
        return multiply(self.P, self.v, out.contiguous()), mixed

    def bent(self) -> Tensor:
        """W = P (c² + S''), for Q'' = K'' = 0."""
        return multiply(self.q, self.k.mT).mul_(2).addcmul_(self.c, self.c).mul_(self.P)

    def back(self, cotangent: Tensor) -> Tensor:
        """R - D with R = O^ V^T and D = E_P R = sum O^ O."""
        D = (cotangent * self.of(self.heads.call.output)).sum(-1, True)
        return multiply(cotangent, self.V.mT).sub_(D)


class _Attention(Rule):
    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        out = _like_output(call)
        for block in _blocks(call, dots):
            _write(out, block, block.moved(block.c)[0])
        return (out,)

    def jet(self, call: Call, dots: Tensors, ddots: Tensors) -> tuple[Tensors, Tensors]:
        """O'' = P'' V + 2 P' V' + P V'', in which P'' V = W V - O sum W."""
        out, second = _like_output(call), _like_output(call)
        still = all(d is None for d in ddots[:3])
        heads = None
        for block in _blocks(call, dots):
            W = block.bent()
            if not still:
                if heads is not block.heads:
                    heads = block.heads
                    qq_Q, K_kk, vv = heads.second(ddots)
                W.addcmul_(torch.bmm(qq_Q[:, block.rows], K_kk[:, block.columns].mT), block.P)
            moved, mixed = block.moved(block.c)
            bend = torch.baddbmm(mixed, W, block.V, beta=2)
            bend.addcmul_(block.of(call.output), W.sum(-1, True), value=-1)
            if not still:
                bend.baddbmm_(block.P, vv[:, block.columns])
            _write(out, block, moved)
            _write(second, block, bend)
        return (out,), (second,)

    def adjoint(
        self, call: Call, dots: Tensors, cotangents: Tensors
    ) -> tuple[Tensors, Tensor | None]:
        """<O^, O''> = <R - D, W> + 2 <O^, P' V'>."""
        cotangent = cotangents[0]
        if cotangent is None:
            return self.tangent(call, dots), None
        out, numbers = _like_output(call), []
        for block in _blocks(call, dots):
            y = block.of(cotangent)
            numbers.append(real_dot(block.bent(), block.back(y)))
            moved, mixed = block.moved(block.c)
            numbers.append(2 * real_dot(y, mixed))
            _write(out, block, moved)
        return (out,), sum(numbers[1:], numbers[0])

    def tangent_with_residual(
        self, call: Call, dots: Tensors
    ) -> tuple[Tensors, list[_Rows] | None]:
        if call.key.shape[-2] > _KEPT * call.key.shape[-1]:
            return self.tangent(call, dots), None
        out, residual = _like_output(call), list(_blocks(call, dots))
        for block in residual:
            _write(out, block, block.moved(block.c.clone())[0])
        return (out,), residual

    def pullback_tangent(
        self,
        call: Call,
        dots: Tensors,
        cotangents: Tensors,
        cotangent_dots: Tensors,
        residual: list[_Rows] | None,
    ) -> Tensors:
        """The backward pass is V^ = P^T O^, S^ = P (R - D), Q^ = scale S^ K, K^ = scale S^T^ Q.

        With M = R' + c (R - D) the cotangent of S moves by S^' = P (M - E_P M).
        """
        change = cotangent_dots[0]
        if cotangents[0] is None:
            return (None,) * len(dots) if change is None else call.pull(change)
        heads = call.query.shape[1]
        to_q, to_k, to_v = (
            x.new_zeros(len(x), heads, *x.shape[2:]) for x in (call.query, call.key, call.value)
        )
        for block in _blocks(call, dots) if residual is None else residual:
            P, c, y = block.P, block.c, block.of(cotangents[0])
            S = block.back(y)
            M = torch.bmm(y, block.v.mT).addcmul_(c, S)
            S.mul_(P)
            v_part = torch.bmm((P * c).mT, y)
            if change is not None:
                M.baddbmm_(block.of(change), block.V.mT)
                v_part.baddbmm_(P.mT, block.of(change))
            S1 = torch.ops.aten._softmax_backward_data(M, P, -1, M.dtype)
            q_part = torch.bmm(S1, block.K).baddbmm_(S, block.k).mul_(block.heads.scale)
            k_part = torch.bmm(S1.mT, block.Q).baddbmm_(S.mT, block.q)
            block.add(to_q, block.rows, q_part)
            block.add(to_k, block.columns, k_part)
            block.add(to_v, block.columns, v_part)
        to_k, to_v = (
            to.unflatten(1, (x.shape[1], -1)).sum(2) if x.shape[1] < heads else to
            for to, x in ((to_k, call.key), (to_v, call.value))
        )
        return (to_q, to_k, to_v, *[None] * (len(dots) - 3))


def _blocks(call: Call, dots: Tensors) -> Iterator[_Rows]:
    samples, heads, rows = call.query.shape[:3]
    size = heads * rows * call.key.shape[-2]
    height = _ROWS if call.is_causal or size > IN_CACHE else rows
    step = max(1, IN_CACHE * rows // (size * height))
    for start in range(0, samples, step):
        yield from _Heads(call, slice(start, start + step), dots).blocks(height)


def _like_output(call: Call) -> Tensor:
    samples, heads, rows, size = call.shape()
    # In the layout that the kernel gives its output.
    return call.query.new_empty(samples, rows, heads, size).transpose(1, 2)


def _write(x: Tensor, block: _Rows, rows: Tensor) -> None:
    at = x[block.heads.some, :, block.rows]
    at.copy_(rows.view_as(at))


register("ScaledDotProductFlashAttentionForCpuBackward0", _Attention())
