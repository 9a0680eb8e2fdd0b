"""Forward and gradient first, the direction afterwards: how a training step asks for curvature."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from curvature.differentiable import twice_differentiable
from curvature.gradient import gradient
from curvature.quadratic import Quadratic
from curvature.reevaluation import Reevaluation
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
        self._reevaluation = Reevaluation()
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
        self._stack.enter_context(self._reevaluation.recording())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def backward(self, losses: Tensor, params: Any) -> Any:
        """The gradient of the mean loss, as :func:`curvature.gradient` gives it.

        Args:
            losses: what the block computed: a scalar, or a vector with one loss per sample.
            params: pytree of the tensors that the block used, float32 or float64, each with
                ``requires_grad``.

        Returns:
            A pytree like params, without graph; ``None`` for a tensor that the loss does not use.

        Raises:
            TypeError, ValueError, NonFiniteLoss: as :func:`curvature.gradient`.

        Example:
            >>> import torch
            >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
            >>> with Tape() as tape:
            ...     loss = x.square().sum()
            >>> tape.backward(loss, {"x": x})
            {'x': tensor([2., 4.])}
        """
        with self._reevaluation.compared():
            result = gradient(losses, params, retain_graph=True)
        self._losses, self._params, self._reference = losses, flatten_params(params), None
        return result

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

        Example:
            >>> import torch
            >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
            >>> with Tape() as tape:
            ...     loss = x.prod()
            >>> gradient = tape.backward(loss, [x])
            >>> q = tape.directional(gradient)  # along (2, 1)
            >>> q.slope, q.curvature
            (tensor(5.), tensor(4.))
        """
        losses, params = self._state()
        if per_sample and losses.ndim == 0:
            raise ValueError(
                "per_sample=True needs one loss per sample, but the loss is a scalar; "
                'use reduction="none" and leave the mean to this package'
            )
        leaves = flatten_direction(direction, params)
        with self._reevaluation.compared():
            engine = self._engine()
            slope, curvature, slopes, curvatures = engine.directional(leaves, per_sample=per_sample)
        samples = None
        if slopes is not None and curvatures is not None:
            samples = Quadratic(losses.detach(), slopes, curvatures, engine.name)
        return Quadratic(losses.detach().mean(), slope, curvature, engine.name, samples)

    def hvp(self, vector: Any) -> Any:
        """The Hessian-vector product H v of the mean loss, a pytree like params.

        Raises:
            ValueError, TypeError: vector does not fit params; the message names the entry.
            NotTwiceDifferentiable: PyTorch has no second derivative for an operation.

        Example:
            >>> import torch
            >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
            >>> with Tape() as tape:
            ...     loss = x.prod()
            >>> _ = tape.backward(loss, [x])
            >>> tape.hvp([torch.tensor([2.0, 1.0])])
            [tensor([1., 2.])]
        """
        _, params = self._state()
        leaves = flatten_direction(vector, params, argument="vector")
        with self._reevaluation.compared():
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
