"""Scaled dot-product attention in its fused kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.table import General, register

_BLOCK = 2**18  # entries of S at a time, so that the temporaries stay in the cache


class _Block:
    """O = P V with P = softmax(S), S = scale Q K^T + mask, for a few samples."""

    def __init__(self, call: Call, some: slice) -> None:
        self.Q, self.K, self.V = call.query[some], call.key[some], call.value[some]
        self.scale = 1 / math.sqrt(self.Q.shape[-1]) if call.scale is None else call.scale
        S = (self.Q @ self.K.mT) * self.scale
        mask = call.attn_mask
        if call.is_causal:
            S = S.masked_fill(torch.ones(S.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        elif mask is not None:
            S = S + (mask[some] if mask.ndim == 4 and len(mask) > 1 else mask)
        self.P = torch.softmax(S, -1)

    def centred(self, q: Tensor | None, k: Tensor | None) -> Tensor | None:
        """c = S' - E_P S', so that P' = P c."""
        if q is not None and k is not None:
            S1 = torch.cat([q, self.Q], -1) @ torch.cat([self.K, k], -1).mT
        elif q is not None:
            S1 = q @ self.K.mT
        elif k is not None:
            S1 = self.Q @ k.mT
        else:
            return None
        S1.mul_(self.scale)
        return S1.sub_((self.P * S1).sum(-1, True))

    def push(
        self, q: Tensor | None, k: Tensor | None, v: Tensor | None, bend: bool
    ) -> tuple[Tensor, Tensor | None]:
        """P'' = P (c² - E_P c² + S'' - E_P S'') and O'' = P'' V + 2 P' V'."""
        c = self.centred(q, k)
        out = None if v is None else self.P @ v
        if c is None:
            assert out is not None
            return out, None
        P1 = self.P * c
        out = P1 @ self.V if out is None else out + P1 @ self.V
        if not bend:
            return out, None
        inner = P1 * c
        if q is not None and k is not None:
            inner = torch.addcmul(inner, self.P, q @ k.mT, value=2 * self.scale)
        P2 = torch.addcmul(inner, self.P, inner.sum(-1, True), value=-1)
        second = P2 @ self.V
        return out, second if v is None else torch.add(second, P1 @ v, alpha=2)

    def turn(
        self,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        cotangent: Tensor,
        turned: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The derivative of the backward pass along (q, k, v) and the cotangent's own.

        With R the cotangent of P and D = E_P R: V^ = P^T O^, R = O^ V^T, S^ = P (R - D),
        Q^ = scale S^ K, K^ = scale S^T^ Q.
        """
        P, zero = self.P, torch.zeros_like(self.P)
        c = self.centred(q, k)
        P1 = zero if c is None else P * c
        R = cotangent @ self.V.mT
        R1 = zero if v is None else cotangent @ v.mT
        V1 = P1.mT @ cotangent
        if turned is not None:
            R1 = R1 + turned @ self.V.mT
            V1 = V1 + P.mT @ turned
        D = (P * R).sum(-1, True)
        D1 = (P1 * R + P * R1).sum(-1, True)
        S = P * (R - D) * self.scale
        S1 = (P1 * (R - D) + P * (R1 - D1)) * self.scale
        Q1 = S1 @ self.K if k is None else S1 @ self.K + S @ k
        K1 = S1.mT @ self.Q if q is None else S1.mT @ self.Q + S.mT @ q
        return Q1, K1, V1


def _blocks(call: Call) -> Iterator[tuple[_Block, slice]]:
    samples, heads, rows = call.query.shape[:3]
    step = max(1, _BLOCK // (heads * rows * call.key.shape[-2]))
    for start in range(0, samples, step):
        some = slice(start, start + step)
        yield _Block(call, some), some


def _rows(dots: Tensors, some: slice) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    q, k, v = (None if d is None else d[some] for d in dots[:3])
    return q, k, v


def _push(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor | None] | Tensor:
    pairs = [block.push(*_rows(dots, some), bend) for block, some in _blocks(call)]
    out = torch.cat([out for out, _ in pairs])
    seconds = [second for _, second in pairs if second is not None]
    return (out, torch.cat(seconds) if seconds else None) if bend else out


def _turn(call: Call, dots: Tensors, cotangents: Tensors, turned: Tensors) -> Tensors:
    cotangent, change = cotangents[0], turned[0]
    assert cotangent is not None
    triples = [
        block.turn(*_rows(dots, some), cotangent[some], None if change is None else change[some])
        for block, some in _blocks(call)
    ]
    q, k, v = (torch.cat(parts) for parts in zip(*triples, strict=True))
    return (q, k, v, *[None] * (len(dots) - 3))


register("ScaledDotProductFlashAttentionForCpuBackward0", General(_push, turn=_turn))
