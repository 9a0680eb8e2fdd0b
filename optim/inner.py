"""Inner products of lists of tensors, in single precision and yet exact."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.sharded import is_sharded, local, sum_of_parts

_SMALL = 1e-25
_BLOCK = 2**12  # entries; of longer sums single precision loses digits
_WHOLE = 2**15  # up to here their own kernel sums in several parts anyway


def inner(left: Sequence[Tensor], right: Sequence[Tensor | None]) -> float:
    """<left, right>, summed in float64, over all processes where sharded; None is zero."""
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if b is not None]
    sharded = [(a, b) for a, b in pairs if is_sharded(a)]
    if not sharded:
        return _inner(pairs)
    whole = _inner([(a, b) for a, b in pairs if not is_sharded(a)])
    part = _inner([(local(a), local(b)) for a, b in sharded])
    return whole + sum_of_parts(part, sharded[0][0])


def _inner(tensors: Sequence[tuple[Tensor, Tensor]]) -> float:
    pairs = [(a.flatten(), b.flatten()) for a, b in tensors]
    found = total([_blockwise(a, b) for a, b in _joined(pairs)])
    if not _SMALL <= abs(found) < math.inf:
        # Products of single precision may have left its range.
        found = total([torch.dot(a.double(), b.double()) for a, b in pairs])
    return found


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same entries with those of short vectors, of which models have many, in one."""
    short: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for a, b in pairs:
        if len(a) > _WHOLE:
            yield a, b
        else:
            short.setdefault((a.dtype, a.device), []).append((a, b))
    for some in short.values():
        left, right = zip(*some, strict=True)
        yield torch.cat(left), torch.cat(right)


def _blockwise(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype != torch.float32 or len(a) <= _WHOLE:
        return torch.dot(a, b).double()
    whole = len(a) - len(a) % _BLOCK
    blocks = a[:whole].view(-1, _BLOCK), b[:whole].view(-1, _BLOCK)
    sums: Tensor = torch.linalg.vecdot(*blocks)
    return sums.double().sum() + torch.dot(a[whole:], b[whole:]).double()


def total(numbers: Sequence[Tensor]) -> float:
    """The sum of scalars that may be on different devices."""
    if not numbers:
        return 0.0
    return torch.stack([x.to(numbers[0].device) for x in numbers]).sum().item()
