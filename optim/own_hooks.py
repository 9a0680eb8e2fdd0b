"""Hooks of parameters themselves: like clipping, they change the direction and not the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def own_hooks_off(params: Sequence[Tensor]) -> Iterator[None]:
    """Inside, gradients of these are those of the loss."""
    hooks = [p._backward_hooks for p in params if p._backward_hooks]
    own = [dict(each) for each in hooks]
    try:
        for each in hooks:
            each.clear()
        yield
    finally:
        for each, content in zip(hooks, own, strict=True):
            each.update(content)


def hooked(p: Tensor, g: Tensor) -> Tensor:
    """What the hooks of a parameter make of its gradient, which stays as it is."""
    hooks = list((p._backward_hooks or {}).values())
    g = g.clone() if hooks else g
    for hook in hooks:
        changed = hook(g)
        g = g if changed is None else changed
    return g
