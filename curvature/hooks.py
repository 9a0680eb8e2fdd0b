"""Keep parameters' own hooks out of derivatives, and tell other hooks by the slope."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

_EXACT, _ROUGH = 1e-6, 2e-2  # of the sum of absolute values: in double precision, and otherwise


@contextmanager
def parameter_hooks_off(params: Sequence[Tensor]) -> Iterator[None]:
    """Inside, derivatives in these parameters are those of the loss, without their own hooks.

    Like clipping, such a hook changes a gradient and not the loss.

    Raises:
        TypeError: params hold something else than tensors.

    Example:
        >>> import torch
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> _ = x.register_hook(lambda g: g.clamp(max=1.0))
        >>> with parameter_hooks_off([x]):
        ...     torch.autograd.grad(x**2, x)
        (tensor(4.),)
    """
    if not all(isinstance(p, Tensor) for p in params):
        raise TypeError("params must hold tensors alone")
    hooks = [p._backward_hooks for p in params if p._backward_hooks]
    own = [dict(each) for each in hooks]
    try:
        for each in hooks:
            each.clear()
        yield
    finally:
        for each, content in zip(hooks, own, strict=True):
            each.update(content)


def check_slope(
    slope: Tensor,
    gradient: Sequence[Tensor | None],
    direction: Sequence[Tensor],
    *,
    exact: bool,
) -> None:
    """Compare <g, v> with the slope as a tangent pass has it, in which hooks take no part.

    Args:
        exact: all was computed in double precision.

    Raises:
        ValueError: they differ by more than rounding.
    """
    pairs = zip(gradient, direction, strict=True)
    terms = [g.double() * v.double() for g, v in pairs if g is not None]
    along = sum(term.sum().item() for term in terms)
    size = abs(slope.item()) + sum(term.abs().sum().item() for term in terms)
    if not abs(along - slope.item()) <= (_EXACT if exact else _ROUGH) * size:
        raise ValueError(
            f"the loss has slope {slope.item():.6g} along the direction, but its gradient gives "
            f"{along:.6g}: a backward hook or the backward pass of a function of your own has "
            "changed it, as to clip it or to solve for a fixed point, or a rule of your own is "
            "wrong; mend that, or use curvature.fit, which needs only forward passes"
        )
