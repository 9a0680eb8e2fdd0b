"""The two refusals that are about the function, not about its arguments."""

from __future__ import annotations


class NonFiniteLoss(ValueError):
    """A loss was NaN or infinite, so no derivative or fit of it means anything."""


class NotTwiceDifferentiable(RuntimeError):
    """PyTorch has no second derivative for an operation that the loss uses."""
