"""The dtype in which rules multiply matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from curvature.rules.matmul import matmul

product_dtype: ContextVar[torch.dtype | None] = ContextVar("product_dtype", default=None)


@contextmanager
def products_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, rules multiply matrices in this dtype, and round the result to the tangents'."""
    token = product_dtype.set(dtype)
    try:
        yield
    finally:
        product_dtype.reset(token)


def multiply(a: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
    """a @ b + onto, multiplied in the dtype that :func:`products_in` asks for."""
    dtype = product_dtype.get()
    if dtype is None:
        return matmul(a, b, onto)
    product = matmul(a.to(dtype), b.to(dtype)).to(a.dtype)
    return product if onto is None else onto.add_(product)
