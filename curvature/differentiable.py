"""Choose the variants of operations that PyTorch differentiates twice, and differentiates right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, attention uses its math kernel and weight normalisation its plain formula.

    The fused attention kernels have no second derivative; the fused kernel of weight
    normalisation has a wrong one, since its backward pass takes the norms for constants. The
    caller's choice of attention kernels is restored at the end.
    """
    with sdpa_kernel(SDPBackend.MATH), _PlainWeightNorm():
        yield


@contextmanager
def derivative_mode(device: torch.device) -> Iterator[None]:
    """Inside, derivatives are built and keep their precision, whatever surrounds the caller.

    Under ``no_grad`` the gradient would have no graph, and its derivative be taken for zero;
    under ``autocast`` the products of the derivatives would be rounded to half precision.
    """
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


class _PlainWeightNorm(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))
