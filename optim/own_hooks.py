"""Hooks of parameters themselves: like clipping, they change the direction and not the loss."""

from __future__ import annotations

from torch import Tensor


def hooked(p: Tensor, g: Tensor) -> Tensor:
    """What the hooks of a parameter make of its gradient, which stays as it is."""
    hooks = list((p._backward_hooks or {}).values())
    g = g.clone() if hooks else g
    for hook in hooks:
        changed = hook(g)
        g = g if changed is None else changed
    return g
