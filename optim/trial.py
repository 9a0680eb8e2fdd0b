"""One evaluation of the loss and its gradient, and what a step of the wrapper may ask of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from typing import TypeVar, cast

import torch
from torch import Tensor

from curvature import NonFiniteLoss, SideEffects
from optim.evaluation import (
    Closure,
    Evaluation,
    Plain,
    Recorder,
    Setting,
    differentiated,
    evaluate,
    lacks_graph,
    losses_again,
    without_grads,
)
from optim.inner import inner
from optim.penalty import Penalty
from optim.sharded import is_sharded, local

R = TypeVar("R", bound=Recorder)

_NEAR = 1e-3  # times the parameters
_NEARER = 8.0
_MODERATE = 2.0**16  # times 1, up or down


@dataclass(frozen=True, eq=False)
class Trial:
    """The closures, what they gave and what recorded it, and the direction d that followed.

    What it answers of the loss has the penalty in it. Evaluated again, the closures find random
    numbers and buffers as they did at first, before the block of ``effects``.
    """

    closures: Sequence[Closure]
    setting: Setting
    effects: SideEffects
    evaluation: Evaluation
    penalty: Penalty
    direction: list[Tensor]

    @property
    def params(self) -> list[Tensor]:
        return self.evaluation.params

    def aside(self) -> SideEffects:
        """A block after which buffers and random numbers are as they are now."""
        return SideEffects({*self.setting.called, *self.effects.called})

    def measured(
        self, recorder: Callable[[], R], measure: Callable[[R, float], list[float]]
    ) -> list[float]:
        """The mean over all closures and ranks of what is measured on the record of each.

        Several closures are run again, one at a time: their graphs together might not fit.

        Args:
            measure: of what has recorded a closure, and of the factor by which the loss was
                larger there.

        Raises:
            NonFiniteLoss: a loss is NaN or infinite then.
        """
        found = self.evaluation
        if found.recorder is not None:
            parts = [measure(cast(R, found.recorder), found.scale)]
        else:
            self.effects.rewind()
            parts = [self._measured_again(c, recorder(), measure) for c in self.closures]
        shared = [[k * x for x in part] for k, part in zip(found.shares, parts, strict=True)]
        return self.means(*map(sum, zip(*shared, strict=True)))

    def _measured_again(
        self, closure: Closure, recorder: R, measure: Callable[[R, float], list[float]]
    ) -> list[float]:
        with self._without_grads():
            part = differentiated(closure, recorder, self.params, self.setting)
        if part.unusable is not None:
            raise NonFiniteLoss(part.unusable)
        return measure(recorder, part.scale)

    def loss_at(self, values: Sequence[Tensor]) -> Tensor:
        """The mean loss with other values in the parameters, by the same random numbers."""
        with self.aside(), self._moved_to(values):
            losses = self._losses_again()
        shares = self.evaluation.shares
        local = sum(k * _mean(x) for k, x in zip(shares, losses, strict=True))
        (mean,) = self.means(local)
        return torch.tensor(mean + self.penalty.value(values), dtype=torch.float64)

    def _losses_again(self) -> list[Tensor]:
        """Without a graph, unless a closure asks for one on its way, as to differentiate."""
        graph = self.setting.differentiates
        try:
            return [losses_again(c, self.evaluation, graph=graph) for c in self.closures]
        except RuntimeError as error:
            if graph or not lacks_graph(error):
                raise
        self.setting.differentiates = True
        self.effects.rewind()
        return self._losses_again()

    def value(self) -> float:
        """The mean loss at theta."""
        return self._over_ranks(self.evaluation.losses) + self.penalty.value(self.params)

    def _over_ranks(self, losses: Tensor) -> float:
        """The mean of numbers that belong to the losses, over those of all ranks."""
        share = losses.numel() * self.setting.ranks.size / self.evaluation.count
        (mean,) = self.means(share * _mean(losses))
        return mean

    def means(self, *numbers: float) -> list[float]:
        """The mean of each number over the ranks."""
        return self.setting.ranks.means(*numbers)

    def slope_and_squared_norm(self) -> tuple[float, float]:
        """The derivative <d, g> of the mean loss along d, and ‖d‖²."""
        d, g = self.direction, self.evaluation.grads
        if all(map(is_, d, g)):
            # Plain gradient descent: each of these sums reads all parameters' worth of memory.
            slope = squared_norm = self.evaluation.squared_norm
        else:
            slope, squared_norm = inner(d, g), inner(d, d)
        return slope + self.penalty.slope(self.params, d), squared_norm

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
        """Whether the gradient over a step as long as 1 and the parameters is rounding."""
        sizes = [1 + p.abs() for p in self.params]
        change = inner(sizes, [None if g is None else g.abs() for g in self.evaluation.grads])
        return change <= self.rounding(0.0)

    @torch.no_grad()
    def check_repeats(self, value: float, slope: float, squared_norm: float) -> None:
        """Refuse closures that do not give the loss as a function of the parameters.

        Raises:
            ValueError: the loss is another at the same parameters, or the same at others, or falls
                otherwise than its gradient says.
        """
        again, rounding = self.loss_after(0.0), 100 * self.rounding(value)
        if not abs(again - value) <= rounding:
            raise ValueError(
                f"the closure gave the loss {value:.6g}, and {again:.6g} when called again for the "
                "same parameters: draw the batch outside it, and random numbers from the global "
                "generators of torch, numpy or Python, which are set back in between"
            )
        t = self.share(_NEAR, squared_norm)
        if t * abs(slope) <= rounding:
            return
        found = []
        for step in (t, t / _NEARER, -t / _NEARER):
            found.append((again - self.loss_after(step)) / (step * slope))
            if not math.isfinite(found[-1]) or 1 / 2 < found[-1] < 2:
                return
        if found == [0, 0, 0]:
            raise ValueError(
                "the closure gives the same loss for other parameters, though its gradient is not "
                "zero: compute the loss, and all that it is made of, inside the closure; of what "
                "only a straight-through estimator differentiates, there is no loss ahead to see"
            )
        # At a kink the two sides differ, and where the loss bends at once the two lengths.
        if max(found) - min(found) < 1 / 4:
            raise ValueError(
                f"along the direction the loss falls {found[1]:.2g} times as fast as its gradient "
                "says, which is then not that of the loss, as where a backward pass reverses it, "
                "a hook changes it, or a straight-through estimator or detach() stands in for it: "
                "no step length follows from the two"
            )

    def slope_after(self, step: float) -> float:
        """The derivative of the mean loss along d at theta - step d.

        Raises:
            NonFiniteLoss: the loss there is NaN or infinite.
        """
        values = self._after(step)
        with self._moved_to(values):
            found = evaluate(self.closures, Plain, self.params, self.setting)
        if found.unusable is not None:
            raise NonFiniteLoss(found.unusable)
        return inner(self.direction, found.grads) + self.penalty.slope(values, self.direction)

    @torch.no_grad()
    def _after(self, step: float) -> Sequence[Tensor]:
        return torch._foreach_add(self.params, self.direction, alpha=-step)

    @contextmanager
    def _moved_to(self, values: Sequence[Tensor]) -> Iterator[None]:
        own = [local(p.detach()).clone() if is_sharded(p) else p.data for p in self.params]
        self.effects.rewind()
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
