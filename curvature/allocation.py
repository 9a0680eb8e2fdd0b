"""What the C library does with freed memory.

Every training step allocates what the last one has freed. glibc gives memory back to the system
in between, whose pages then cost more to fetch again than the arithmetic on them; large blocks
it fetches from the system one by one. Where memory counts more than time, that is what one wants:
blocks of its own heap that differ in size and lifetime leave gaps that nothing fits into.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as malloc.h numbers mallopt's parameters
_KEPT = 2**30  # bytes that a process may hold beyond what it uses
_LARGE = 2**25  # bytes; the most that glibc takes from memory that it keeps
_SMALL = 2**18  # bytes; from here on, blocks come from the system where memory counts
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@cache
def _glibc() -> Any:
    """The library, unless it is another one, or the environment has set its thresholds."""
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _SETTINGS):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") else None


def keep_freed_memory() -> None:
    """Fast: from now on, freed memory serves the next pass."""
    if _glibc() is not None:
        _glibc().mallopt(_TRIM_THRESHOLD, _KEPT)
        _glibc().mallopt(_MMAP_THRESHOLD, _LARGE)


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Small: inside, large blocks come from the system and go back to it at once."""
    if _glibc() is None:
        yield
        return
    _glibc().mallopt(_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        _glibc().mallopt(_MMAP_THRESHOLD, _LARGE)
