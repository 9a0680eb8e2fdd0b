"""Hears of every call of a module, without making compiled models compile anew."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from curvature.arguments import check_callable
from curvature.compilations import something_compiled

_Watcher = tuple[int, Callable[[nn.Module], object], Callable[[nn.Module], object]]
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

    Those that another thread of Python calls are not heard; those that autograd's threads call,
    where checkpointing evaluates a module again, are.

    By ``torch.nn.modules.module.register_module_forward_hook``, unless ``torch.compile`` was used:
    the code that it has made checks which hooks there were, so that one that comes and goes makes
    it compile at every call. Then calls are heard at ``torch.nn.Module.__call__``, where that code
    does not look. Of compiled code the outermost module is heard.

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
    watcher = threading.get_ident(), before, after
    with _patched(watcher) if something_compiled() else _hooked(watcher):
        yield


def _is_heard(thread: int) -> bool:
    """Whether what this thread watches is called here."""
    if threading.get_ident() == thread:
        return True
    return isinstance(threading.current_thread(), threading._DummyThread)


@contextmanager
def _hooked(watcher: _Watcher) -> Iterator[None]:
    thread, before, after = watcher

    def at_start(module: nn.Module, _: Any) -> None:
        if _is_heard(thread):
            before(module)

    def at_end(module: nn.Module, *_: Any) -> None:
        if _is_heard(thread):
            after(module)

    handles = []
    if before is not _ignored:
        handles.append(register_module_forward_pre_hook(at_start))
    if after is not _ignored:
        handles.append(register_module_forward_hook(at_end, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _patched(watcher: _Watcher) -> Iterator[None]:
    # A class that changes empties the caches of all its subclasses, which hooks do not.
    if not _watchers:
        _originals.append(nn.Module.__call__)
        # The compiler passes over the function that this one stands for, too.
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
    watchers = [watcher for watcher in _watchers if _is_heard(watcher[0])]
    for _, before, _ in watchers:
        before(module)
    try:
        return _originals[-1](module, *args, **kwargs)
    finally:
        for _, _, after in watchers:
            after(module)
