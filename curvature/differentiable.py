"""Choose the variants of operations that PyTorch differentiates twice, and differentiates right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, attention uses its math kernel, and some normalisations their plain formula.

    The fused attention kernels have no second derivative. The caller's choice of them is restored
    at the end.
    """
    with sdpa_kernel(SDPBackend.MATH), PlainFormulas():
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


@contextmanager
def evaluation_mode(*, graph: bool = False) -> Iterator[None]:
    """Inside, a loss is evaluated again as it was with a graph: without one, or with.

    Without a graph PyTorch computes a ``TransformerEncoder`` otherwise, with zeros where its
    input is padded.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> with evaluation_mode():
        ...     x.sum().requires_grad
        False
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.set_grad_enabled(graph):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class PlainFormulas(TorchFunctionMode):
    """Inside, what PyTorch differentiates wrongly is computed otherwise."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        return (otherwise(func, args, kwargs) or func)(*args, **kwargs)


def otherwise(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> Callable[..., Any] | None:
    """What to call in place of a torch function, if PyTorch differentiates this call wrongly.

    PyTorch's second derivative of fused weight_norm takes the norms for constants; that of a
    normalisation with a bias but no weight is wrong, or fails. So is then the gradient of a loss
    that holds a gradient of these.
    """
    if func is torch._weight_norm:
        return _weight_norm
    if func in _NORMALISATIONS and _has_bias_alone(func, args, kwargs):
        return partial(_bias_apart, func)
    return None


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    fused = dim in (0, v.ndim - 1) and torch.float16 not in (v.dtype, g.dtype)
    transformed = peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    if fused and not transformed:
        return WeightNorm.apply(v.contiguous(), g.contiguous(), dim)  # type: ignore[no-any-return, no-untyped-call]
    return v * (g / torch.norm_except_dim(v, 2, dim))


_pull = torch.ops.aten._weight_norm_interface_backward.default


class WeightNorm(torch.autograd.Function):
    """The fused kernels, with a backward pass that autograd differentiates rightly."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, dim: int) -> Tensor:
        out, norms = torch._weight_norm_interface(v, g, dim)
        # In the order of autograd's own node, which checkpointing may put in place of this one.
        ctx.save_for_backward(g, v, norms)
        ctx.dim = dim
        return out

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor, None]:
        g, v, norms = ctx.saved_tensors
        if not torch.is_grad_enabled():
            pulled = _pull(cotangent.contiguous(), v, g, norms, ctx.dim)
            return (*pulled, None)
        n = torch.norm_except_dim(v, 2, ctx.dim)
        u = v / n
        along = (cotangent * u).sum_to_size(g.shape)
        return g / n * (cotangent - along * u), along, None


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
REPLACED = {torch._weight_norm, *_NORMALISATIONS}


def _has_bias_alone(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    weight, bias = (
        args[place] if len(args) > place else kwargs.get(name)
        for place, name in zip(_NORMALISATIONS[func], ("weight", "bias"), strict=True)
    )
    return weight is None and bias is not None


def _bias_apart(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A bias without a weight, added afterwards."""
    place = _NORMALISATIONS[func][1]
    if len(args) > place:
        bias, args = args[place], (*args[:place], None, *args[place + 1 :])
    else:
        bias = kwargs.pop("bias")
    out = func(*args, **kwargs)
    if func in (F.layer_norm, torch.layer_norm):
        return out + bias
    return out + bias.view(-1, *[1] * (out.ndim - 2))
