"""Hooks by ``register_post_accumulate_grad_hook``, which run once ``p.grad`` is there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from optim.sharded import local

_HINT = "take the hook off, since the wrapper takes the step itself"


@contextmanager
def accumulated_hooks_off(params: Sequence[Tensor]) -> Iterator[None]:
    """Inside, a backward pass leaves the gradients of the loss in ``p.grad``, without these hooks.

    Like clipping, such a hook changes a gradient and not the loss.
    """
    held = [p._post_accumulate_grad_hooks for p in params if hooks_on_accumulated(p)]
    before = [dict(hooks) for hooks in held]
    try:
        for hooks in held:
            for key in [key for key, hook in hooks.items() if not _is_torchs(hook)]:
                del hooks[key]
        yield
    finally:
        for hooks, content in zip(held, before, strict=True):
            hooks.clear()
            hooks.update(content)


def hooks_on_accumulated(p: Tensor) -> list[Callable[[Tensor], Any]]:
    """Those of the caller, in their order."""
    hooks = p._post_accumulate_grad_hooks or {}
    return [hook for hook in hooks.values() if not _is_torchs(hook)]


def _is_torchs(hook: Any) -> bool:
    """Whether the gradient is not whole without it, as in one mode of DistributedDataParallel."""
    while isinstance(hook, partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or "").startswith("torch.nn.parallel.")


@torch.no_grad()
def run_accumulated_hooks(p: Tensor) -> None:
    """Run them on ``p.grad`` as it is now.

    Raises:
        ValueError: one takes a step of its own, or ``p.grad`` away; p is then as before.
    """
    hooks = hooks_on_accumulated(p)
    if not hooks:
        return
    part = local(p.detach())
    before = part.clone()
    with _no_steps():
        for hook in hooks:
            hook(p)
    if not torch.allclose(part, before, rtol=0, atol=0, equal_nan=True):
        part.copy_(before)
        raise ValueError(f"a hook on the gradient of a parameter writes to the parameter: {_HINT}")
    if p.grad is None:
        raise ValueError(
            "a hook on the gradient of a parameter sets p.grad to None, and no direction is left: "
            + _HINT
        )


@contextmanager
def _no_steps() -> Iterator[None]:
    """Inside, no optimizer takes a step in this thread."""
    thread = threading.get_ident()

    def refuse(*_: Any) -> None:
        if threading.get_ident() == thread:
            raise ValueError(f"a hook on the gradient of a parameter steps an optimizer: {_HINT}")

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
