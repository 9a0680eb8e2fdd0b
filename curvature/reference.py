"""The reference engine: derivatives by PyTorch's double backward, slow and obviously right.

Nothing here uses nested forward mode: ``torch.func.jvp`` of ``jvp`` is silently wrong through
layer, batch and instance normalisation. Double backward is right wherever PyTorch offers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from curvature.audit import Audit, without_graph
from curvature.differentiable import derivative_mode
from curvature.errors import NotTwiceDifferentiable, tells_no_second_derivative
from curvature.quadratic import Quadratic


class DoubleBackward:
    """Derivatives of ``losses`` (a scalar, or one per sample) with respect to ``params``.

    The gradient is taken with a weight vector u, so that it is the linear map
    ``u -> sum_b u_b grad(J_b)``. What is asked of the mean loss is evaluated at u = 1/B; what
    is asked per sample is the derivative with respect to u, since <g(u), v> = sum_b u_b slope_b
    and v^T H(u) v = sum_b u_b curvature_b.
    """

    name = "reference"

    def __init__(self, losses: Tensor, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._losses = losses.detach().clone()
        self._audit = Audit()
        self._mode = partial(derivative_mode, losses.device)
        with self._mode(), self._audit.cuts_noted(losses) as cuts:
            self._weights = torch.full_like(losses, 1 / losses.numel(), requires_grad=True)
            self._gradient = self._differentiate(
                losses, self._params, self._weights, create_graph=True
            )
        if any(without_graph(g) for g in self._gradient):
            cuts.append("a hook or sparse tensor")
        if cuts:
            raise _refusal(f"the backward pass of {cuts[0]} returns a gradient without graph")

    def directional(self, direction: Sequence[Tensor], *, per_sample: bool) -> Quadratic:
        """Slope and curvature of the mean loss, and of each sample's if asked."""
        with self._mode():
            slope = _inner(self._gradient, direction, like=self._weights)
            *product, slopes = self._differentiate_if_moving(
                slope, [*self._params, self._weights], create_graph=per_sample
            )
            curvature = _inner(product, direction, like=self._weights)
            samples = None
            if per_sample:
                (curvatures,) = self._differentiate_if_moving(curvature, [self._weights])
                zeros = torch.zeros_like(self._weights)
                samples = Quadratic(
                    self._losses,
                    zeros if slopes is None else slopes.detach(),
                    zeros if curvatures is None else curvatures,
                    self.name,
                )
        value = self._losses.mean()
        return Quadratic(value, slope.detach(), curvature.detach(), self.name, samples)

    def hvp(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """H v of the mean loss."""
        with self._mode():
            slope = _inner(self._gradient, vector, like=self._weights)
            product = self._differentiate_if_moving(slope, self._params)
        return [
            torch.zeros_like(p) if h is None else h.to_dense()
            for h, p in zip(product, self._params, strict=True)
        ]

    def _differentiate_if_moving(
        self, output: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False
    ) -> Sequence[Tensor | None]:
        if not output.requires_grad:
            return [None] * len(inputs)
        return self._differentiate(output, inputs, None, create_graph=create_graph)

    def _differentiate(
        self,
        output: Tensor,
        inputs: Sequence[Tensor],
        weights: Tensor | None,
        *,
        create_graph: bool,
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
            if not tells_no_second_derivative(error):
                raise
            raise _refusal(str(error).splitlines()[0].rstrip(".")) from error
        reason = self._audit.obstacle([output, *result]) if create_graph else None
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
