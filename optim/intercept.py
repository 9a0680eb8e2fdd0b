"""Closures that call ``backward`` themselves, as those for ``torch.optim.LBFGS`` do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def intercepted(handle: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, a loss on which this thread calls ``backward`` goes to ``handle`` instead.

    Raises:
        ValueError: ``backward`` is called in a way that leaves open what the loss is.
    """
    original = torch.autograd.backward
    thread = threading.get_ident()

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() != thread:
            original(tensors, *args, **kwargs)
            return
        loss = _loss(tensors, *args, **kwargs)
        # Handling it may need the real one.
        torch.autograd.backward = original
        try:
            handle(loss)
        finally:
            torch.autograd.backward = backward

    # Tensor.backward calls it too; a mode of torch's would be seen by compiled models.
    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = original


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
    return roots[0].reshape(())


def _entry(value: Any) -> Any:
    """Of a sequence of one, its entry."""
    if isinstance(value, Sequence) and len(value) == 1:
        return value[0]
    return value
