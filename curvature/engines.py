"""The engine that answers for recorded losses: the sweep, or double backward where it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvature.errors import NotTwiceDifferentiable
from curvature.forward import Forward
from curvature.hooks import parameter_hooks_off
from curvature.losses import is_finite
from curvature.quadratic import Quadratic
from curvature.reference import DoubleBackward
from curvature.sweep import Sweep
from curvature.trees import Flat

Answer = TypeVar("Answer")


class Engines:
    """Both engines of one recorded loss.

    Args:
        losses: with a graph, a scalar or one per sample.
        params: what they were computed from.
        forward: what was noted in the forward pass; None for double backward alone.
        tangent_dtype: the dtype in which the sweep multiplies matrices, if not the tangents' own.

    Raises:
        NotTwiceDifferentiable: an operation has no second derivative.

    Attributes:
        sweep: None where double backward serves.
        refusal: why it does, if the sweep was to serve.
    """

    def __init__(
        self,
        losses: Tensor,
        params: Flat,
        forward: Forward | None,
        tangent_dtype: torch.dtype | None,
    ) -> None:
        self.losses, self.params = losses, params
        self.sweep: Sweep | None = None
        self.refusal: NotTwiceDifferentiable | None = None
        if forward is not None:
            with parameter_hooks_off(params.leaves):
                try:
                    self.sweep = Sweep(losses, params.leaves, forward, tangent_dtype)
                except NotTwiceDifferentiable as refusal:
                    self._prove(refusal)
                    # Its frames hold the graph, and this.
                    self.refusal = refusal.with_traceback(None)

    @cached_property
    def _reference(self) -> DoubleBackward:
        # On demand: a gradient alone must not pay for the graph of its derivative.
        return DoubleBackward(self.losses, self.params.leaves)

    def _prove(self, refusal: NotTwiceDifferentiable) -> None:
        """Raise the refusal unless double backward serves; only a derivative tells whether."""
        try:
            self._reference.hvp([torch.zeros_like(p) for p in self.params.leaves])
        except NotTwiceDifferentiable:
            raise refusal from None

    def ask(self, question: Callable[[Sweep | DoubleBackward], Answer]) -> Answer:
        """The sweep's answer, or double backward's where one operation's share has none.

        Raises:
            NotTwiceDifferentiable: neither has one.
        """
        with parameter_hooks_off(self.params.leaves):
            if self.sweep is None:
                return question(self._reference)
            try:
                return question(self.sweep)
            except NotTwiceDifferentiable as refusal:
                self._prove(refusal)
                try:
                    return question(self._reference)
                except NotTwiceDifferentiable:
                    raise refusal from None

    def gauss_newton(
        self, direction: Sequence[Tensor], outputs: Sequence[Tensor | GradientEdge]
    ) -> Quadratic:
        """The sweep's answer; double backward has none.

        Raises:
            NotTwiceDifferentiable: what the sweep has refused.
            ValueError: there is none.
        """
        if self.sweep is None:
            raise self.refusal or ValueError("the reference has no Gauss-Newton curvature")
        with parameter_hooks_off(self.params.leaves):
            return self.sweep.gauss_newton(direction, outputs)

    def directional(self, direction: list[Tensor], *, per_sample: bool, again: bool) -> Quadratic:
        """Slope and curvature; with ``again`` by the other engine where they are not finite.

        A tangent of zero may have met a slope that is infinite.
        """
        q = self.ask(lambda engine: engine.directional(direction, per_sample=per_sample))
        if self.sweep is None or not again or _is_finite(q):
            return q
        with parameter_hooks_off(self.params.leaves):
            try:
                known = self._reference.directional(direction, per_sample=per_sample)
            except NotTwiceDifferentiable:
                return q
        return known if _is_finite(known) or not is_finite(q.slope) else q


def _is_finite(q: Quadratic) -> bool:
    numbers = q if q.per_sample is None else q.per_sample
    return is_finite(numbers.slope) and is_finite(numbers.curvature)
