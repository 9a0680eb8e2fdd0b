"""One evaluation of the loss and its gradient, and what a step of the wrapper may ask of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from operator import is_
from typing import TypeVar, cast

import torch
from torch import Tensor

from curvature import NonFiniteLoss, SideEffects
from optim.again import losses_again
from optim.evaluation import (
    Batch,
    Closure,
    Evaluation,
    Plain,
    Recorder,
    accumulate,
    differentiated,
    evaluate,
)
from optim.grads import without_grads
from optim.inner import inner, rough_inner
from optim.penalty import Penalty
from optim.sharded import is_sharded, local

R = TypeVar("R", bound=Recorder)

_MODERATE = 2.0**16  # the longest d that is left as it is; the shortest is one over it


@dataclass(frozen=True, eq=False)
class Trial:
    """A batch, what its closures gave, and the direction d that followed.

    What it answers of the loss has the penalty in it.
    """

    batch: Batch
    evaluation: Evaluation
    penalty: Penalty
    direction: list[Tensor]

    @property
    def params(self) -> list[Tensor]:
        return self.evaluation.params

    def aside(self) -> SideEffects:
        """A block after which buffers and random numbers are as they are now."""
        return SideEffects({*self.batch.setting.called, *self.batch.effects.called})

    def measured(
        self, recorder: Callable[[], R], measure: Callable[[R, float], list[float]]
    ) -> list[float]:
        """The mean over all closures and ranks of what is measured on the record of each.

        Several closures are run again, one at a time: their graphs together might not fit.

        Args:
            measure: a function of what has recorded a closure and of the ``weight`` of its loss
                there, as in :class:`optim.evaluation.Evaluation`.

        Raises:
            NonFiniteLoss: a loss is NaN or infinite then.
        """
        found = self.evaluation
        if found.recorder is not None:
            parts = [measure(cast(R, found.recorder), found.weight)]
        else:
            self.batch.effects.rewind()
            parts = [self._measured_again(c, recorder(), measure) for c in self.batch.closures]
        shared = [[k * x for x in part] for k, part in zip(found.shares, parts, strict=True)]
        return self.means(*map(sum, zip(*shared, strict=True)))

    def _measured_again(
        self, closure: Closure, recorder: R, measure: Callable[[R, float], list[float]]
    ) -> list[float]:
        with self._without_grads():
            part = differentiated(closure, recorder, self.params, self.batch.setting)
        if part.unusable is not None:
            raise NonFiniteLoss(part.unusable)
        return measure(recorder, part.weight)

    def loss_at(self, values: Sequence[Tensor]) -> Tensor:
        """The mean loss with other values in the parameters, by the same random numbers."""
        with self.aside(), self._moved_to(values):
            losses = losses_again(self.batch, partial(accumulate, self.evaluation))
        shares = self.evaluation.shares
        local = sum(k * _mean(x) for k, x in zip(shares, losses, strict=True))
        (mean,) = self.means(local)
        return torch.tensor(mean + self.penalty.value(values), dtype=torch.float64)

    def value(self) -> float:
        """The mean loss at theta."""
        return self._over_ranks(self.evaluation.losses) + self.penalty.value(self.params)

    def _over_ranks(self, losses: Tensor) -> float:
        """The mean, over all ranks, of numbers that are one for each loss."""
        share = losses.numel() * self.batch.setting.ranks.size / self.evaluation.count
        (mean,) = self.means(share * _mean(losses))
        return mean

    def means(self, *numbers: float) -> list[float]:
        """The mean of each number over the ranks."""
        return self.batch.setting.ranks.means(*numbers)

    def slope_and_squared_norm(self) -> tuple[float, float]:
        """The derivative <d, g> of the mean loss along d, and ‖d‖²."""
        d, g = self.direction, self.evaluation.grads
        if all(map(is_, d, g)):
            # Plain gradient descent: each of these sums reads all parameters' worth of memory.
            slope = squared_norm = self.evaluation.squared_norm
        else:
            slope, squared_norm = inner(d, g), inner(d, d)
        return slope + self.penalty.slope(self.params, d), squared_norm

    def slope_along(self, way: Sequence[Tensor]) -> float:
        """The derivative of the mean loss along another direction, to a few digits."""
        return rough_inner(way, self.evaluation.grads) + self.penalty.slope(self.params, way)

    def loss_after(self, step: float) -> float:
        """The mean loss at theta - step d, also if it is NaN or infinite."""
        return self.loss_at(self._after(step)).item()

    def rounding(self, loss: float) -> float:
        """How far apart ``loss`` and the mean loss here may be by rounding alone."""
        found = self.evaluation
        # Under autocast each sample is rounded by itself, as far as the samples are known.
        relative = 8 * torch.finfo(found.losses.dtype).eps + found.eps / math.sqrt(found.count)
        return relative * max(abs(loss), self._size)

    @cached_property
    def _size(self) -> float:
        """The mean of the losses' absolute values, on all ranks."""
        return self._over_ranks(self.evaluation.losses.abs())

    @torch.no_grad()
    def is_flat(self) -> bool:
        """Whether a step of 1 plus its size in each entry changes the loss by rounding alone."""
        sizes = [1 + p.abs() for p in self.params]
        change = inner(sizes, [None if g is None else g.abs() for g in self.evaluation.grads])
        return change <= self.rounding(0.0)

    def slope_after(self, step: float) -> float:
        """The derivative of the mean loss along d at theta - step d.

        Raises:
            NonFiniteLoss: the loss there is NaN or infinite.
        """
        values = self._after(step)
        with self._moved_to(values):
            found = evaluate(self.batch, Plain)
        if found.unusable is not None:
            raise NonFiniteLoss(found.unusable)
        return inner(self.direction, found.grads) + self.penalty.slope(values, self.direction)

    @torch.no_grad()
    def _after(self, step: float) -> Sequence[Tensor]:
        return torch._foreach_add(self.params, self.direction, alpha=-step)

    @contextmanager
    def _moved_to(self, values: Sequence[Tensor]) -> Iterator[None]:
        own = [local(p.detach()).clone() if is_sharded(p) else p.data for p in self.params]
        self.batch.effects.rewind()
        try:
            for p, value in zip(self.params, values, strict=True):
                _set(p, local(value))
            with self._without_grads():
                yield
        finally:
            for p, data in zip(self.params, own, strict=True):
                _set(p, data)

    def _without_grads(self) -> AbstractContextManager[None]:
        return without_grads([*self.params, *self.evaluation.others])

    def share(self, share: float, squared_norm: float) -> float:
        """How far along d is that share of 1 + ‖theta‖, in units of d."""
        size = 1 + math.sqrt(inner(self.params, self.params))
        return share * size / math.sqrt(squared_norm)

    def unit(self, squared_norm: float) -> tuple[list[Tensor], float]:
        """d over a power of two that makes it about unit length, and that power.

        d^T H d itself may leave the range of single precision, unless d is of moderate length.
        """
        length = 2.0 ** round(math.log2(squared_norm) / 2)
        if 1 / _MODERATE <= length <= _MODERATE:
            return self.direction, 1.0
        return list(torch._foreach_div(self.direction, length)), length


def _mean(losses: Tensor) -> float:
    return losses.item() if losses.ndim == 0 else losses.double().mean().item()


@torch.no_grad()
def _set(p: Tensor, value: Tensor) -> None:
    if is_sharded(p):
        # The memory itself is what whole parameters are gathered from.
        local(p).copy_(value)
    else:
        p.data = value
