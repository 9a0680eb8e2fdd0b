"""Inner products of lists of tensors, in single precision and yet exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.sharded import is_sharded, local, sum_of_parts

Dot = Callable[[Tensor, Tensor], Tensor]

_SMALL = 1e-25
_BLOCK = 2**12  # entries; longer sums lose digits in single precision
_WHOLE = 2**15  # entries; up to here torch.dot itself sums in several parts


def inner(left: Sequence[Tensor], right: Sequence[Tensor | None]) -> float:
    """<left, right>, summed in float64, over all processes where sharded; None is zero."""
    return _over_processes(left, right, _blockwise)


def rough_inner(left: Sequence[Tensor], right: Sequence[Tensor | None]) -> float:
    """<left, right> as torch.dot sums it: for its sign, at half the time of :func:`inner`."""
    return _over_processes(left, right, _at_once)


def _over_processes(left: Sequence[Tensor], right: Sequence[Tensor | None], dot: Dot) -> float:
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if b is not None]
    sharded = [(a, b) for a, b in pairs if is_sharded(a)]
    if not sharded:
        return _inner(pairs, dot)
    whole = _inner([(a, b) for a, b in pairs if not is_sharded(a)], dot)
    part = _inner([(local(a), local(b)) for a, b in sharded], dot)
    return whole + sum_of_parts(part, sharded[0][0])


def _inner(tensors: Sequence[tuple[Tensor, Tensor]], dot: Dot) -> float:
    pairs = [(_flat(a), _flat(b)) for a, b in tensors if a is not b]
    squares = [_flat(a) for a, b in tensors if a is b]
    sums = [dot(*pair) for pair in _joined(pairs)]
    sums += [_square(a) for (a,) in _joined([(a,) for a in squares])]
    found = total(sums)
    if not _SMALL <= abs(found) < math.inf:
        # Products of single precision may have left its range.
        pairs += zip(squares, squares, strict=True)
        found = total([torch.dot(a.double(), b.double()) for a, b in pairs])
    return found


def _flat(a: Tensor) -> Tensor:
    # An expanded tensor would be summed entry by entry, and rounded each time.
    return a.flatten().contiguous()


def _joined(tuples: Sequence[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The same vectors, but for the short ones, of which models have many, joined into one."""
    short: dict[Any, list[tuple[Tensor, ...]]] = {}
    for vectors in tuples:
        if vectors[0].numel() > _WHOLE:
            yield vectors
        else:
            short.setdefault((vectors[0].dtype, vectors[0].device), []).append(vectors)
    for some in short.values():
        yield tuple(map(torch.cat, zip(*some, strict=True)))


def _at_once(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a, b).double()


def _blockwise(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype != torch.float32 or len(a) <= _WHOLE:
        return torch.dot(a, b).double()
    whole = len(a) - len(a) % _BLOCK
    blocks = a[:whole].view(-1, _BLOCK), b[:whole].view(-1, _BLOCK)
    # To a caller's autocast it is a product of matrices.
    with torch.autocast(a.device.type, enabled=False):
        sums: Tensor = torch.linalg.vecdot(*blocks)
    return _with_rest(sums.double().sum(), a[whole:], b[whole:])


def _square(a: Tensor) -> Tensor:
    if a.dtype != torch.float32 or len(a) <= _WHOLE:
        return torch.dot(a, a).double()
    # A norm reads once what a product of two would read and write.
    whole = len(a) - len(a) % _BLOCK
    norms = torch.linalg.vector_norm(a[:whole].view(-1, _BLOCK), dim=1).double()
    return _with_rest(torch.dot(norms, norms), a[whole:], a[whole:])


def _with_rest(blocks: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return blocks + torch.dot(a, b).double() if len(a) else blocks


def total(numbers: Sequence[Tensor]) -> float:
    """The sum of scalars that may be on different devices."""
    if not numbers:
        return 0.0
    if all(x.is_cpu for x in numbers):
        return sum(x.item() for x in numbers)
    return torch.stack([x.to(numbers[0].device) for x in numbers]).sum().item()
