"""Sees every call of a module, where torch's own hooks would make compiled models compile anew."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from curvature.arguments import check_callable

_Watcher = tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]
_watchers: list[_Watcher] = []
_originals: list[Any] = []


def _ignored(module: nn.Module) -> None:
    pass


@contextmanager
def module_calls(
    before: Callable[[nn.Module], object] = _ignored,
    after: Callable[[nn.Module], object] = _ignored,
) -> Iterator[None]:
    """Inside, hear of each module before it is called, and after, also if it raises.

    Like ``torch.nn.modules.module.register_module_forward_hook``. But code that
    ``torch.compile`` has made checks which hooks there were, so that one that comes and goes makes
    it compile at every call; here it sees none. Of compiled code the outermost module is heard.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh())
        >>> with module_calls(lambda module: print(type(module).__name__)):
        ...     _ = model(torch.ones(1, 2))
        Sequential
        Linear
        Tanh
    """
    check_callable("before", before)
    check_callable("after", after)
    watcher = before, after
    if not _watchers:
        _originals.append(nn.Module.__call__)
        if "torch._dynamo" in sys.modules:
            # The compiler passes over the function that it stands for, too.
            torch._dynamo.eval_frame.skip_code(_call.__code__)
        nn.Module.__call__ = _call  # type: ignore[method-assign]
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)
        if not _watchers:
            nn.Module.__call__ = _originals.pop()  # type: ignore[method-assign]


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # A model that was compiled inside the block keeps this function for good.
    if torch.compiler.is_compiling() or not _watchers:
        return nn.Module._wrapped_call_impl(module, *args, **kwargs)  # type: ignore[no-untyped-call]
    watchers = list(_watchers)
    for before, _ in watchers:
        before(module)
    try:
        return _originals[-1](module, *args, **kwargs)
    finally:
        for _, after in watchers:
            after(module)
