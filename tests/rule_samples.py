"""Samples of the operations that have rules: a function, and inputs that hypothesis draws.

The files samples_of_*.py fill the list.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor


def size(draw: Any, low: int = 1, high: int = 4) -> int:
    return draw(st.integers(low, high))


def dim_of(draw: Any, ndim: int) -> int:
    return draw(st.integers(-ndim, ndim - 1))


def image(draw: Any, channels: int = 2) -> list[Tensor]:
    return [torch.randn(size(draw, 1, 2), channels, size(draw, 4, 6), size(draw, 4, 6))]


def vectors(draw: Any) -> list[Tensor]:
    return [torch.randn(*(size(draw) for _ in range(draw(st.integers(1, 3)))))]


def positive(draw: Any) -> list[Tensor]:
    return [x.abs() + 0.5 for x in vectors(draw)]


def steep(draw: Any) -> list[Tensor]:
    """Away from the kinks at -1, 0, 0.5 and 1, where a second derivative does not exist."""
    return [
        torch.randint(-4, 4, x.shape) * 0.5 + 0.15 + 0.2 * torch.rand(x.shape)
        for x in vectors(draw)
    ]


def distinct(draw: Any) -> list[Tensor]:
    shape = (size(draw), size(draw, 2, 5))
    return [torch.randperm(shape[0] * shape[1]).view(shape) / 4.0]


def matrices(draw: Any) -> list[Tensor]:
    n, k, m = size(draw), size(draw), size(draw)
    return [torch.randn(n, k), torch.randn(k, m)]


def batches(draw: Any) -> list[Tensor]:
    b, n, k, m = (size(draw) for _ in range(4))
    return [torch.randn(b, n, k), torch.randn(b, k, m)]


def broadcast(draw: Any) -> list[Tensor]:
    n, m = size(draw), size(draw)
    shapes = draw(st.sampled_from([((n, m), (m,)), ((n, 1), (1, m)), ((n, m), (n, m)), ((), (n,))]))
    return [torch.randn(shape) for shape in shapes]


def nonzero(draw: Any) -> list[Tensor]:
    a, b = broadcast(draw)
    return [a, b.sign() * (b.abs() + 0.5)]


Sample = tuple[Callable[..., Tensor], list[Tensor]]
SAMPLES: dict[str, Callable[[Any], Sample]] = {}


def sample(*names: str) -> Callable[[Callable[[Any], Sample]], Callable[[Any], Sample]]:
    def decorate(build: Callable[[Any], Sample]) -> Callable[[Any], Sample]:
        for name in names:
            assert name not in SAMPLES
            SAMPLES[name] = build
        return build

    return decorate


def simple(inputs: Callable[[Any], list[Tensor]], **functions: Callable[..., Tensor]) -> None:
    for name, function in functions.items():
        sample(name)(lambda draw, function=function: (function, inputs(draw)))
