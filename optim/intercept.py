"""Closures that call ``backward`` themselves, as those for ``torch.optim.LBFGS`` do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_Handle = Callable[[Tensor], None]
_handles: dict[int, _Handle] = {}  # by thread
_originals: list[Callable[..., None]] = []
_lock = threading.Lock()


@contextmanager
def intercepted(handle: _Handle) -> Iterator[None]:
    """Inside, a loss on which this thread calls ``backward`` goes to ``handle`` instead.

    Raises:
        ValueError: ``backward`` is called in a way that leaves open what the loss is.
    """
    with _handled_by(handle):
        yield


@contextmanager
def _handled_by(handle: _Handle | None) -> Iterator[None]:
    """Inside, this thread has this handle, or none."""
    thread = threading.get_ident()
    outer = _handles.get(thread)
    _set(thread, handle)
    try:
        yield
    finally:
        _set(thread, outer)


def _set(thread: int, handle: _Handle | None) -> None:
    # Several threads may train at once, and end in any order.
    with _lock:
        _handles.pop(thread, None)
        if handle is not None:
            _handles[thread] = handle
        if _handles and not _originals:
            # Tensor.backward calls it too; a mode of torch's would be seen by compiled models.
            _originals.append(torch.autograd.backward)
            torch.autograd.backward = _backward
        elif _originals and not _handles:
            torch.autograd.backward = _originals.pop()


def _backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
    handle = _handles.get(threading.get_ident())
    if handle is None:
        with _lock:
            original = _originals[0] if _originals else torch.autograd.backward
        original(tensors, *args, **kwargs)
        return
    loss = _loss(tensors, *args, **kwargs)
    # Handling it may need the real one.
    with _handled_by(None):
        handle(loss)


def _loss(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> Tensor:
    """The scalar that a call of :func:`torch.autograd.backward` with these arguments is about."""
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    given = {"create_graph": create_graph, "inputs": inputs, "gradient": _entry(grad_tensors)}
    odd = [name for name, value in given.items() if value is not None and value is not False]
    if odd or len(roots) != 1 or roots[0].numel() != 1:
        raise ValueError(
            "the closure calls backward "
            + (f"with {', '.join(odd)}" if odd else "on something else than one number")
            + "; call it plainly on the loss, or return the loss without calling backward"
        )
    return roots[0] if roots[0].ndim == 0 else roots[0].reshape(())


def _entry(value: Any) -> Any:
    """The only entry of a sequence; anything else as it is."""
    if isinstance(value, Sequence) and len(value) == 1:
        return value[0]
    return value
