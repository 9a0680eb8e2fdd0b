"""Whether ``torch.compile`` was used, and how often it has made code."""

from __future__ import annotations

import sys

import torch


def compilations() -> int:
    """0 where nothing was handed to ``torch.compile``; otherwise a number that grows with its code.

    Example:
        >>> before = compilations()
        >>> _ = torch.tanh(torch.ones(2))
        >>> compilations() == before
        True
    """
    if not something_compiled():
        return 0
    return 1 + int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def something_compiled() -> bool:
    """Whether anything was handed to ``torch.compile``."""
    if "torch._dynamo" not in sys.modules:
        return False
    # What is kept from being compiled has None for a backend here.
    backends = getattr(torch._dynamo.eval_frame, "cached_backends", {"unknown": True})
    return any(backend is not None for backend in backends.values())
