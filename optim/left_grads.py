"""The gradients that a step leaves in ``p.grad``, told from those that others put there."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.utils.weak import TensorWeakRef


class LeftGrads:
    """Clears what the last step left, and nothing else.

    Gradients of other parts of a batch, accumulated outside the step, are not the step's to drop.
    """

    def __init__(self) -> None:
        self._left: dict[int, tuple[TensorWeakRef, int]] = {}

    def note(self, params: Iterable[Tensor]) -> None:
        """At the end of a step: these gradients are its own."""
        grads = [p.grad for p in params if p.grad is not None]
        self._left = {id(g): (TensorWeakRef(g), g._version) for g in grads}

    def clear(self, params: Iterable[Tensor]) -> None:
        """Set to None the gradients that the last step left and nobody wrote to since."""
        for p in params:
            ref, version = self._left.get(id(p.grad), (None, 0))
            if ref is not None and ref() is p.grad and p.grad._version == version:
                p.grad = None

    def __getstate__(self) -> dict[str, object]:
        return {"_left": {}}
