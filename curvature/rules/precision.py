"""The dtype in which rules multiply matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from curvature.graph import Call

product_dtype: ContextVar[torch.dtype | None] = ContextVar("product_dtype", default=None)


@contextmanager
def products_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, rules multiply matrices in this dtype, and round the result to the tangents'."""
    token = product_dtype.set(dtype)
    try:
        yield
    finally:
        product_dtype.reset(token)


def multiply(product: Callable[..., Tensor], call: Call, a: Tensor, b: Tensor) -> Tensor:
    """``product(call, a, b)`` in the dtype that :func:`products_in` asks for."""
    dtype = product_dtype.get()
    if dtype is None:
        return product(call, a, b)
    return product(call, a.to(dtype), b.to(dtype)).to(a.dtype)
