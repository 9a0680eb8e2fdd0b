"""Parameters that share memory: a step of one moves the other, which no slope tells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from optim.sharded import local


class _Placed(NamedTuple):
    start: int
    end: int
    name: str
    p: Tensor


def places(params: Sequence[Tensor]) -> list[int] | None:
    """Where the memory of each begins, to see cheaply if any has moved; None if one has none."""
    try:
        return [p.data_ptr() for p in params]
    except ValueError:  # of a lazy module
        return None


def check_apart(groups: Sequence[dict[str, Any]]) -> None:
    """Refuse a parameter that is listed twice, and two that share memory.

    Views of one buffer that have no entry in common are apart.
    """
    named = [
        (f"parameter {i} of group {k}", p)
        for k, group in enumerate(groups)
        for i, p in enumerate(group["params"])
    ]
    listed: dict[int, str] = {}
    for name, p in named:
        if id(p) in listed:
            raise ValueError(
                f"{name} is {listed[id(p)]} again, which would be stepped twice: list it once"
            )
        listed[id(p)] = name
    held = [(name, local(p.detach())) for name, p in named if not is_lazy(p)]
    placed = [_placed(name, p) for name, p in held if p.numel()]
    for some in _touching(sorted(placed, key=lambda one: one.start)):
        _check_entries(some)


def _placed(name: str, p: Tensor) -> _Placed:
    reach = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
    start = p.data_ptr()
    return _Placed(start, start + (1 + reach) * p.element_size(), name, p)


def _touching(placed: Sequence[_Placed]) -> Iterator[list[_Placed]]:
    """Sets of parameters whose ranges of memory overlap."""
    some: list[_Placed] = []
    end = 0
    for one in placed:
        if some and one.start >= end:
            yield some
            some = []
        some.append(one)
        end = max(end, one.end)
    yield some


def _check_entries(some: Sequence[_Placed]) -> None:
    if len(some) < 2:
        return
    start, end = some[0].start, max(one.end for one in some)
    owners = torch.full((end - start,), -1, dtype=torch.int32)  # of each byte
    for i, (begin, _, name, p) in enumerate(some):
        size = p.element_size()
        strides = (*(size * stride for stride in p.stride()), 1)
        own = owners.as_strided((*p.shape, size), strides, begin - start)
        other = int(own.max())
        if other >= 0:
            raise ValueError(
                f"{name}, of shape {tuple(p.shape)}, shares memory with {some[other].name}, so "
                "that a step of one moves the other: make them one parameter, as by "
                "decoder.weight = encoder.weight, or give each its own, as by p.data.clone()"
            )
        own.fill_(i)
