"""The losses along a line, by forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from curvature.differentiable import evaluation_mode
from curvature.errors import NonFiniteLoss
from curvature.losses import check_losses, describe_non_finite, is_finite
from curvature.side_effects import SideEffects
from curvature.trees import Flat


class Along:
    """J(theta + t v) as a function of t, evaluated without a graph.

    But where the function itself differentiates on its way, as for a penalty on gradients.
    """

    def __init__(
        self, func: Callable[[Any], Tensor], params: Flat, direction: Sequence[Tensor]
    ) -> None:
        self._func, self._params, self._direction = func, params, direction
        self._differentiates = False

    def __call__(self, t: float) -> Tensor:
        """The losses there, without graph.

        Raises:
            TypeError, ValueError: they are no losses.
            NonFiniteLoss: one is NaN or infinite; the message names the step.
        """
        losses = self._at(t)
        if not is_finite(losses):
            raise NonFiniteLoss(f"at step {t}, {describe_non_finite(losses)}")
        return losses

    def _at(self, t: float) -> Tensor:
        try:
            return self._evaluated(t)
        except RuntimeError as error:
            if self._differentiates or "does not require grad" not in str(error):
                raise
        self._differentiates = True
        return self._evaluated(t)

    def _evaluated(self, t: float) -> Tensor:
        pairs = zip(self._params.leaves, self._direction, strict=True)
        with SideEffects(), evaluation_mode(graph=self._differentiates):
            moved = [
                (p.detach() + t * v).detach().requires_grad_(self._differentiates) for p, v in pairs
            ]
            return check_losses(self._func(self._params.rebuild(moved)), graph=False).detach()
