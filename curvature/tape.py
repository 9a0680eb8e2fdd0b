"""Forward and gradient first, the direction afterwards: how a training step asks for curvature."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from curvature.differentiable import derivative_mode, twice_differentiable
from curvature.errors import NonFiniteLoss
from curvature.losses import check_losses, describe_non_finite, is_finite
from curvature.quadratic import Quadratic
from curvature.reference import DoubleBackward
from curvature.trees import Flat, flatten_direction, flatten_params


class Tape:
    """Record one forward pass, give its gradient, then its curvature along chosen directions.

    Run any user code inside the ``with`` block. :meth:`backward` gives the gradient;
    :meth:`directional` and :meth:`hvp` then answer for as many directions as wanted, without
    evaluating the model again. Inside the block gradients are enabled, attention uses its
    math kernel and weight normalisation its plain formula, the variants that PyTorch
    differentiates twice; the caller's choices are restored at its end. Random numbers and
    buffers advance as in any forward pass.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> with Tape() as tape:
        ...     losses = x**3  # one per sample
        >>> (gradient,) = tape.backward(losses, [x])  # of the mean
        >>> gradient
        tensor([1.5000, 6.0000])
        >>> q = tape.directional([torch.ones(2)], per_sample=True)
        >>> q.curvature, q.per_sample.curvature
        (tensor(9.), tensor([ 6., 12.]))
    """

    def __init__(self) -> None:
        self._recorded = False
        self._losses: Tensor | None = None
        self._params: Flat | None = None
        self._reference: DoubleBackward | None = None

    def __enter__(self) -> Tape:
        if self._recorded:
            raise RuntimeError("a Tape records one forward pass; make a new one for the next")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("inference_mode records no graph; leave it to compute curvature")
        self._recorded = True
        self._stack = ExitStack()
        self._stack.enter_context(torch.enable_grad())
        self._stack.enter_context(twice_differentiable())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def backward(self, losses: Tensor, params: Any) -> Any:
        """The gradient of the mean loss, as :func:`torch.autograd.grad` gives it.

        Args:
            losses: what the block computed: a scalar, or a vector with one loss per sample.
            params: pytree of the tensors that the block used, float32 or float64, each with
                ``requires_grad``.

        Returns:
            A pytree like params, without graph; ``None`` for a tensor that the loss does not use.

        Raises:
            TypeError, ValueError: losses or params cannot be used; the message says why.
            NonFiniteLoss: a loss is NaN or infinite.
        """
        check_losses(losses, graph=True)
        flat = flatten_params(params)
        frozen = [n for n, p in zip(flat.names, flat.leaves, strict=True) if not p.requires_grad]
        if frozen:
            raise ValueError(f"{', '.join(frozen)} does not require grad; leave it out of params")
        if not is_finite(losses):
            raise NonFiniteLoss(describe_non_finite(losses))
        gradient = _gradient(losses, flat.leaves)
        if all(g is None for g in gradient):
            raise ValueError(
                "the loss does not depend on any tensor of params; a function of params must use "
                "the tensors it is given (see curvature.Objective or torch.func.functional_call)"
            )
        self._losses, self._params, self._reference = losses, flat, None
        return flat.rebuild(gradient)

    def directional(self, direction: Any, *, per_sample: bool = False) -> Quadratic:
        """Value, slope <g, v> and curvature v^T H v along ``direction``.

        Algorithm 2 of *Adaptive scaling of the learning rate*, computed by double backward.

        Args:
            direction: pytree like params, or a list of tensors in params' order; not normalised.
            per_sample: also give the three numbers of each sample's loss; the losses must then
                be a vector. Coupling of samples by batch normalisation is included: the
                curvature of sample b is v^T H_b v with H_b the Hessian of its loss.

        Raises:
            ValueError, TypeError: direction does not fit params; the message names the entry.
            NotTwiceDifferentiable: PyTorch has no second derivative for an operation.
        """
        losses, params = self._state()
        if per_sample and losses.ndim == 0:
            raise ValueError(
                "per_sample=True needs one loss per sample, but the loss is a scalar; "
                'use reduction="none" and leave the mean to this package'
            )
        leaves = flatten_direction(direction, params)
        slope, curvature, slopes, curvatures = self._engine().directional(
            leaves, per_sample=per_sample
        )
        samples = None
        if slopes is not None and curvatures is not None:
            samples = Quadratic(losses.detach(), slopes, curvatures, "reference")
        return Quadratic(losses.detach().mean(), slope, curvature, "reference", samples)

    def hvp(self, vector: Any) -> Any:
        """The Hessian-vector product H v of the mean loss, a pytree like params.

        Raises:
            ValueError, TypeError: vector does not fit params; the message names the entry.
            NotTwiceDifferentiable: PyTorch has no second derivative for an operation.
        """
        _, params = self._state()
        leaves = flatten_direction(vector, params, argument="vector")
        return params.rebuild(self._engine().hvp(leaves))

    def _state(self) -> tuple[Tensor, Flat]:
        if self._losses is None or self._params is None:
            raise RuntimeError("call backward(losses, params) before asking for curvature")
        return self._losses, self._params

    def _engine(self) -> DoubleBackward:
        # Built on demand: a gradient alone must not pay for the graph of its derivative.
        if self._reference is None:
            losses, params = self._state()
            self._reference = DoubleBackward(losses, params.leaves)
        return self._reference


def _gradient(losses: Tensor, params: list[Tensor]) -> list[Any]:
    weights = torch.full_like(losses, 1 / losses.numel())
    try:
        with derivative_mode(losses.device):
            return list(
                torch.autograd.grad(losses, params, weights, retain_graph=True, allow_unused=True)
            )
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise ValueError(
            "the graph of the loss is gone: return the loss without calling backward on it"
        ) from error
