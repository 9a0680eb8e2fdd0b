"""Scaled dot-product attention in its fused kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.table import general, multiply


def _matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@general("ScaledDotProductFlashAttentionForCpuBackward0")
def _attention(call: Call, dots: Tensors, bend: bool) -> tuple[Tensor, Tensor | None] | Tensor:
    """O = P V with P = softmax(S), S = scale Q K^T + mask, and c = S' - E_P S'.

    P' = P c, P'' = P (c² - E_P c² + S'' - E_P S''), O'' = P'' V + 2 P' V'.
    """
    q, k, v = dots[:3]
    Q, K, V = call.query, call.key, call.value
    scale = 1 / math.sqrt(Q.shape[-1]) if call.scale is None else call.scale

    def times(a: Tensor, b: Tensor) -> Tensor:
        return multiply(_matmul, call, a, b)

    S = (Q @ K.mT).mul_(scale)
    if call.is_causal:
        S.masked_fill_(
            torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).triu(1), -math.inf
        )
    if call.attn_mask is not None:
        S.add_(call.attn_mask)
    P = torch.softmax(S, -1)
    del S
    out = None if v is None else times(P, v)
    if q is None and k is None:
        assert out is not None
        return (out, None) if bend else out
    S1 = None if q is None else times(q, K.mT)
    if k is not None:
        S1 = times(Q, k.mT) if S1 is None else S1 + times(Q, k.mT)
    assert S1 is not None
    S1 = S1 * scale
    c = S1 - (P * S1).sum(-1, True)
    P1 = P * c
    out = times(P1, V) if out is None else out + times(P1, V)
    if not bend:
        return out
    inner = P1 * c
    if q is not None and k is not None:
        inner = torch.addcmul(inner, P, times(q, k.mT), value=2 * scale)
    P2 = torch.addcmul(inner, P, inner.sum(-1, True), value=-1)
    second = times(P2, V)
    if v is not None:
        second = torch.add(second, times(P1, v), alpha=2)
    return out, second
