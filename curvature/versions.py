"""Whether tensors have changed, or hold the same."""

from __future__ import annotations

import torch
from torch import Tensor

_COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


def version(tensor: Tensor) -> int:
    """How often it was written to; -1 of an inference tensor, which does not count."""
    return -1 if tensor.is_inference() else tensor._version


def comparable(tensor: Tensor) -> bool:
    """Whether ``torch.equal`` can read it."""
    strided = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta
    return strided and tensor.dtype != torch.complex32


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are known to hold the same."""
    if a.layout != b.layout or a.shape != b.shape:
        return False
    if a.layout in _COMPRESSED:
        a, b = a.to_sparse(), b.to_sparse()
    if a.layout == torch.sparse_coo:
        a, b = a.coalesce(), b.coalesce()
        return torch.equal(a.indices(), b.indices()) and torch.equal(a.values(), b.values())
    return comparable(a) and torch.equal(a, b)
