"""Which of torch's own optimizers a class inherits its step from."""

from __future__ import annotations

import inspect
from typing import Any

from torch import optim


def torch_kind(optimizer: optim.Optimizer) -> str | None:
    """The name of torch's class whose ``step`` it takes; None where it has a step of its own."""
    own = _step(type(optimizer))
    for kind in type(optimizer).__mro__:
        if getattr(optim, kind.__name__, None) is kind:
            return kind.__name__ if _step(kind) is own else None
    return None


def _step(kind: Any) -> Any:
    # Torch wraps the step of a class at its first instance.
    return inspect.unwrap(kind.step)
