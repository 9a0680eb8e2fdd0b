"""The scale of a loss whose gradients pass through half precision."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.amp import GradScaler


class LossScale:
    """Lets a :class:`torch.amp.GradScaler` scale the losses of a step, and tells it how that went.

    The scaler's own order of calls (scale, backward, unscale, step, update) has no place for a
    step that evaluates the loss itself.
    """

    def __init__(self, scaler: GradScaler | None) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.steady = 0  # steps since the scale was changed

    @property
    def used(self) -> bool:
        return self._scaler is not None

    def scaled(self, losses: Tensor) -> tuple[Tensor, float]:
        """The losses times the scale, and the scale."""
        if self._scaler is None or not isinstance(losses, Tensor):
            return losses, 1.0
        # Half precision would not hold the product.
        return self._scaler.scale(losses.float()), float(self._scaler.get_scale())

    def update(self, *, overflowed: bool) -> None:
        """Lower the scale where gradients overflowed, and raise it after many that did not."""
        if self._scaler is None:
            return
        scale = self._scaler.get_scale()
        self.steady = 0 if overflowed else self.steady + 1
        if overflowed:
            self._scaler.update(scale * self._scaler.get_backoff_factor())
        elif self.steady == self._scaler.get_growth_interval():
            self._scaler.update(scale * self._scaler.get_growth_factor())
            self.steady = 0


def check_unscaled(result: Any, loss: Tensor) -> None:
    """Refuse a loss that a GradScaler of the closure has multiplied."""
    if isinstance(result, Tensor) and result.numel() == loss.numel() == 1 and result.item() != 0:
        scale = loss.item() / result.item()
        if scale >= 2**8 and math.log2(scale).is_integer():
            raise ValueError(
                f"the closure calls backward on {scale:.0f} times the loss that it returns, as a "
                "GradScaler does; give the scaler to the wrapper, scaler=, and leave it out of the "
                "closure"
            )
