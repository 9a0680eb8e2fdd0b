"""Choose the variants of operations that PyTorch differentiates twice, and differentiates right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, attention uses its math kernel, and some normalisations their plain formula.

    The fused attention kernels have no second derivative. The fused kernel of weight
    normalisation has a wrong one, since its backward pass takes the norms for constants; so has
    every normalisation with a bias but no weight. The caller's choice of attention kernels is
    restored at the end.
    """
    with sdpa_kernel(SDPBackend.MATH), _Plain():
        yield


@contextmanager
def derivative_mode(device: torch.device) -> Iterator[None]:
    """Inside, derivatives are built and keep their precision, whatever surrounds the caller.

    Under ``no_grad`` the gradient would have no graph, and its derivative be taken for zero;
    under ``autocast`` the products of the derivatives would be rounded to half precision.
    """
    around = torch.is_autocast_enabled(device.type)
    plain = torch.autocast(device.type, enabled=False) if around else nullcontext()
    with torch.enable_grad(), plain:
        yield


class _Plain(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        if func in _NORMALISATIONS:
            return _bias_apart(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


# Where weight and bias stand among their arguments.
_NORMALISATIONS = {
    F.layer_norm: (2, 3),
    torch.layer_norm: (2, 3),
    F.group_norm: (2, 3),
    torch.group_norm: (2, 3),
    F.batch_norm: (3, 4),
    torch.batch_norm: (1, 2),
    F.instance_norm: (3, 4),
    torch.instance_norm: (1, 2),
}


def _bias_apart(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A bias without a weight, added afterwards."""
    weight, bias = (
        args[place] if len(args) > place else kwargs.get(name)
        for place, name in zip(_NORMALISATIONS[func], ("weight", "bias"), strict=True)
    )
    if weight is not None or bias is None:
        return func(*args, **kwargs)
    place = _NORMALISATIONS[func][1]
    if len(args) > place:
        args = (*args[:place], None, *args[place + 1 :])
    else:
        kwargs = {**kwargs, "bias": None}
    out = func(*args, **kwargs)
    if func in (F.layer_norm, torch.layer_norm):
        return out + bias
    return out + bias.view(-1, *[1] * (out.ndim - 2))
