"""Warnings that point to the caller's own line."""

from __future__ import annotations

import os
import sys
import warnings

import torch

_INSIDE = tuple(os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))


def warn(message: str) -> None:
    """Warn of what happens at the innermost line outside torch and this package.

    How many frames lie between differs: decorators and schedulers wrap ``step``.
    """
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
