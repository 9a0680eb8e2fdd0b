"""One evaluation of the loss and its gradient, and what a step of the wrapper may ask of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from curvature import RandomState, SideEffects, gradient
from optim.inner import inner
from optim.penalty import Penalty


class Recorder(Protocol):
    """Runs the closure and gives the gradient; :class:`curvature.Tape` is one."""

    def __enter__(self) -> Any: ...

    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> None: ...

    def backward(self, losses: Tensor, params: Any) -> Any: ...


@dataclass(frozen=True, eq=False)
class Trial:
    """The closure, what it gave and what recorded it, and the direction d that followed.

    What it answers of the loss has the penalty in it.
    """

    closure: Callable[[], Tensor]
    recorder: Recorder
    random: RandomState
    params: list[Tensor]
    losses: Tensor
    penalty: Penalty
    direction: list[Tensor]

    def loss_at(self, values: Sequence[Tensor]) -> Tensor:
        """The closure's loss with other values in the parameters, and the same random numbers."""
        with self._moved_to(values), torch.no_grad():
            return self.closure() + self.penalty.value(values)

    def value(self) -> float:
        """The mean loss at theta."""
        return self.losses.double().mean().item() + self.penalty.value(self.params)

    def slope(self, grads: Sequence[Tensor | None]) -> float:
        """The derivative of the mean loss along d, from the gradient without the penalty."""
        return inner(self.direction, grads) + self.penalty.slope(self.params, self.direction)

    def loss_after(self, step: float) -> float:
        """The mean loss at theta - step d, also if it is NaN or infinite."""
        with SideEffects():
            return self.loss_at(self._after(step)).double().mean().item()

    def rounding(self, loss: float) -> float:
        """How far apart ``loss`` and the mean loss here may be by rounding alone."""
        eps = torch.finfo(self.losses.dtype).eps
        return 8 * eps * max(abs(loss), self.losses.double().abs().mean().item())

    def slope_after(self, step: float) -> float:
        """The derivative of the mean loss along d at theta - step d."""
        values = self._after(step)
        with self._moved_to(values), torch.enable_grad():
            grads = gradient(self.closure(), self.params)
        return inner(self.direction, grads) + self.penalty.slope(values, self.direction)

    @torch.no_grad()
    def _after(self, step: float) -> Sequence[Tensor]:
        return torch._foreach_add(self.params, self.direction, alpha=-step)

    @contextmanager
    def _moved_to(self, values: Sequence[Tensor]) -> Iterator[None]:
        own = [p.data for p in self.params]
        self.random.restore()
        try:
            for p, value in zip(self.params, values, strict=True):
                p.data = value
            yield
        finally:
            for p, data in zip(self.params, own, strict=True):
                p.data = data

    def share(self, share: float, squared_norm: float) -> float:
        """How far along d is that share of 1 + ‖theta‖, in units of d."""
        size = 1 + math.sqrt(inner(self.params, self.params))
        return share * size / math.sqrt(squared_norm)

    def unit(self, squared_norm: float) -> tuple[list[Tensor], float]:
        """d over a power of two that makes it about unit length, and that power.

        d^T H d itself may leave the range of single precision.
        """
        length = 2.0 ** round(math.log2(squared_norm) / 2)
        return list(torch._foreach_div(self.direction, length)), length
