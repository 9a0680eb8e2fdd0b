"""Closures that run again, for their losses or the modules that they call alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature import SideEffects, evaluation_mode, uncompiled
from optim.autocast import forget_casts
from optim.evaluation import Batch, Closure, Setting
from optim.grads import without_grads
from optim.intercept import intercepted
from optim.sharded import resharded


def losses_again(batch: Batch, backward: Callable[[], None]) -> list[Tensor]:
    """The losses of each closure.

    Args:
        backward: what stands in for the backward pass of closures that make one.
    """
    found: list[Tensor] = []

    def called(loss: Tensor) -> None:
        found.append(loss)
        backward()

    def run(closure: Closure) -> Tensor:
        found.clear()
        result: Tensor = _run(closure, called, batch.setting)
        return (found[0] if found else result).detach()

    return _all(batch.closures, run, batch.setting, batch.effects)


def learn_calls(closures: Sequence[Closure], params: Sequence[Tensor], setting: Setting) -> None:
    """Run the closures as they were written, and remember the modules that they call.

    All else that they do is taken back.
    """

    def called(loss: Tensor) -> None:
        # There to be clipped.
        for p in params:
            p.grad = torch.zeros_like(p) if p.requires_grad else None

    with uncompiled(), SideEffects(setting.called) as effects, without_grads(params):
        _all(closures, lambda closure: _run(closure, called, setting), setting, effects)
    setting.called.learn(effects.called)


def _all(
    closures: Sequence[Closure],
    run: Callable[[Closure], Any],
    setting: Setting,
    effects: SideEffects,
) -> list[Any]:
    """Each run, without a graph unless a closure asks for one on its way to its loss."""
    graph = setting.differentiates
    try:
        return [run(closure) for closure in closures]
    except RuntimeError as error:
        if graph or not _lacks_graph(error):
            raise
    setting.differentiates = True
    effects.rewind()
    return _all(closures, run, setting, effects)


def _run(closure: Closure, called: Callable[[Tensor], None], setting: Setting) -> Any:
    forget_casts()
    graph = setting.differentiates
    with intercepted(called), evaluation_mode(graph=graph), resharded():
        return closure()


def _lacks_graph(error: RuntimeError) -> bool:
    """Whether a closure asked for a graph where it was run without one."""
    return any(sign in str(error) for sign in _SIGNS)


_SIGNS = (
    "does not require grad",  # torch.autograd.grad
    "that doesn't require gradient",  # Tensor.register_hook
    "can't retain_grad",
)
