"""Keep tangents in float16's range, and in the dtype of the output that they belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SHORTER = 1 / 8  # than the parameters: squares of activations in the hundreds do not overflow


def in_range(
    direction: Sequence[Tensor], params: Sequence[Tensor]
) -> tuple[Sequence[Tensor], float]:
    """The direction times a factor, so that float16 can hold its tangents and their squares."""
    size, length = _length(params), _length(direction)
    if not 0 < size * length < math.inf:
        return direction, 1.0
    # By a power of two all digits stay as they are.
    s = 2.0 ** round(math.log2(_SHORTER * size / length))
    return [v * s for v in direction], s


def _length(tensors: Sequence[Tensor]) -> float:
    norms = torch._foreach_norm([t.detach() for t in tensors])
    # At once: on a GPU each number that is asked for waits for all that runs there.
    return float(torch.stack([n.to(norms[0].device, torch.float64) for n in norms]).norm())


def over(t: Tensor, s: float) -> Tensor:
    """t / s, without a copy where s is 1."""
    return t if s == 1 else t / s


def promoted(tangent: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype of what moves, where a part alone that moves has a lower one."""
    if tangent.dtype == dtype or not (tangent.is_floating_point() and dtype.is_floating_point):
        return tangent
    return tangent.to(dtype)
