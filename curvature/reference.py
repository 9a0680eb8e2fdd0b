"""The reference engine: derivatives by PyTorch's double backward, slow and obviously right.

Nothing here uses nested forward mode: ``torch.func.jvp`` of ``jvp`` is silently wrong through
layer, batch and instance normalisation. Double backward is right wherever PyTorch offers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from curvature.differentiable import derivative_mode, obstacle
from curvature.errors import NotTwiceDifferentiable

_NO_SECOND_DERIVATIVE = (
    "is not implemented",
    "double backward",
    "don't support automatic differentiation",  # a backward pass that writes with out=
)


class DoubleBackward:
    """Derivatives of ``losses`` (a scalar, or one per sample) with respect to ``params``.

    The gradient is taken with a weight vector u, so that it is the linear map
    ``u -> sum_b u_b grad(J_b)``. What is asked of the mean loss is evaluated at u = 1/B; what
    is asked per sample is the derivative with respect to u, since <g(u), v> = sum_b u_b slope_b
    and v^T H(u) v = sum_b u_b curvature_b.
    """

    def __init__(self, losses: Tensor, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._mode = partial(derivative_mode, losses.device)
        with self._mode():
            self._weights = torch.full_like(losses, 1 / losses.numel(), requires_grad=True)
            self._gradient = _differentiate(losses, self._params, self._weights, create_graph=True)
        # Linear in u, each entry requires grad or is zero, unless it lost its graph on the way.
        if any(g is not None and not g.requires_grad and g.any() for g in self._gradient):
            raise _refusal("a backward pass cuts its own graph (custom Function, sparse tensor)")

    def directional(
        self, direction: Sequence[Tensor], *, per_sample: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Slope and curvature of the mean loss, then of each sample's if asked."""
        with self._mode():
            slope = _inner(self._gradient, direction, like=self._weights)
            hessian_vector = self._second(slope, create_graph=per_sample)
            curvature = _inner(hessian_vector, direction, like=self._weights)
            slopes = self._split(slope) if per_sample else None
            curvatures = self._split(curvature) if per_sample else None
        return slope.detach(), curvature.detach(), slopes, curvatures

    def hvp(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """H v of the mean loss."""
        with self._mode():
            slope = _inner(self._gradient, vector, like=self._weights)
            product = self._second(slope, create_graph=False)
        return [
            torch.zeros_like(p) if h is None else h
            for h, p in zip(product, self._params, strict=True)
        ]

    def _second(self, slope: Tensor, *, create_graph: bool) -> Sequence[Tensor | None]:
        if not slope.requires_grad:
            return [None] * len(self._params)
        return _differentiate(slope, self._params, None, create_graph=create_graph)

    def _split(self, weighted_sum: Tensor) -> Tensor:
        parts: Tensor | None = None
        if weighted_sum.requires_grad:
            (parts,) = _differentiate(weighted_sum, [self._weights], None, create_graph=False)
        return torch.zeros_like(self._weights) if parts is None else parts


def _differentiate(
    output: Tensor, inputs: Sequence[Tensor], weights: Tensor | None, *, create_graph: bool
) -> Sequence[Tensor | None]:
    try:
        result = torch.autograd.grad(
            output,
            inputs,
            weights,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    except RuntimeError as error:
        message = str(error)
        if not any(sign in message for sign in _NO_SECOND_DERIVATIVE):
            raise
        raise _refusal(message.splitlines()[0].rstrip(".")) from error
    reason = obstacle([output, *result]) if create_graph else None
    if reason is not None:
        raise _refusal(reason)
    return result


def _refusal(reason: str) -> NotTwiceDifferentiable:
    return NotTwiceDifferentiable(
        f"PyTorch cannot differentiate the loss twice: {reason}. Replace that operation by "
        "others, or use curvature.fit, which needs only forward passes."
    )


def _inner(left: Sequence[Tensor | None], right: Sequence[Tensor], *, like: Tensor) -> Tensor:
    """<left, right> over all leaves, on the loss's device and in its dtype; None is zero."""
    terms = [
        (a * b).sum().to(device=like.device, dtype=like.dtype)
        for a, b in zip(left, right, strict=True)
        if a is not None
    ]
    return torch.stack(terms).sum() if terms else like.new_zeros(())
