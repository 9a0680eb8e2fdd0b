"""Run compiled code as it was written, where a second derivative is asked of it."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def uncompiled() -> AbstractContextManager[Any]:
    """Inside, code that ``torch.compile`` has made runs as it was written.

    The compiler's backward passes have no derivative. Needs PyTorch 2.6; with an older one compiled
    code runs compiled, and a second derivative of it is refused.

    Example:
        >>> with uncompiled():
        ...     pass
    """
    # Nothing was compiled where the compiler was not even imported, which takes seconds.
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
