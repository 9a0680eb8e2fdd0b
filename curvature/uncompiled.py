"""Run compiled code as it was written, where a second derivative is asked of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode

from curvature.compilations import something_compiled


def uncompiled() -> AbstractContextManager[Any]:
    """Inside, code that ``torch.compile`` has made runs as it was written.

    The compiler's backward passes have no derivative. Needs PyTorch 2.6; with an older one compiled
    code runs compiled, and a second derivative of it is refused.

    Example:
        >>> with uncompiled():
        ...     pass
    """
    # Nothing is compiled where the compiler was not even imported, which takes seconds.
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()
    return _eager()


def evaluated_again_uncompiled() -> AbstractContextManager[Any]:
    """Inside, what ran :func:`uncompiled` runs so again; all else takes none of its time.

    Within a mode each of the many operations of a tangent pass goes through Python.
    """
    return uncompiled() if something_compiled() else nullcontext()


@contextmanager
def _eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"), _ControlFlow():
        yield


class _ControlFlow(TorchFunctionMode):
    """Inside, ``torch.cond`` and its like keep the gradient of what their functions close over.

    It is the compiler that makes these tensors inputs of the operator.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not isinstance(func, HigherOrderOperator) or torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        if func.name() == "flex_attention":  # type: ignore[no-untyped-call]
            args = args[:7]  # the compiler adds what its functions close over
        with torch.compiler.set_stance("default"):
            captured = torch.compile(_call, backend="eager", fullgraph=True)
            return captured(func, *args, **(kwargs or {}))


def _call(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)
