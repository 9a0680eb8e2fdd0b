"""Forward and gradient first, the direction afterwards: how a training step asks for curvature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.graph import GradientEdge

from curvature.allocation import large_blocks_apart
from curvature.differentiable import derivative_mode, twice_differentiable
from curvature.engines import Engines
from curvature.errors import tells_that_the_graph_is_gone
from curvature.forward import Forward
from curvature.gradient import check_differentiable, gradients
from curvature.hooks import check_slope
from curvature.nested import NestedDerivatives
from curvature.quadratic import Quadratic
from curvature.reevaluation import Reevaluation
from curvature.sweep import Sweep
from curvature.trees import flatten_direction
from curvature.uncompiled import evaluated_again_uncompiled, uncompiled

_ENGINES = ("auto", "reference")
_PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Tape:
    """Record one forward pass, give its gradient, then its curvature along chosen directions.

    Run any user code inside the ``with`` block. :meth:`backward` gives the gradient, by one
    ordinary backward pass; :meth:`directional` and :meth:`hvp` then answer for as many
    directions as wanted, without evaluating the model again, by passes over the graph that
    autograd has recorded (Algorithm 2 of *Adaptive scaling of the learning rate*). Inside the
    block gradients are enabled. Random numbers and buffers advance as in any forward pass.

    An operation without a rule is differentiated by its own double backward, or the whole graph
    is where that does not suffice; :attr:`Quadratic.engine` says so. What ``torch.compile`` has
    made runs uncompiled inside the block, since it has no second derivative. The losses' graph is
    kept as long as the tape.

    Args:
        engine: ``"auto"``, or ``"reference"`` for double backward through the whole graph. The
            latter needs attention's math kernel, and chooses it inside the block. With PyTorch
            older than 2.5 ``"auto"`` is the reference.
        low_memory: keep no cotangents, give large blocks back to the system at once, and free
            the graph during the first :meth:`directional`, so that it answers once. Curvature
            then takes a second-order tangent pass and up to 0.4 gradients more; a Hessian-vector
            product another backward pass.
        tangent_dtype: multiply matrices of the tangent passes in this dtype and round the
            products to the tangents' own. With ``torch.bfloat16`` the curvature is good to about
            1 % and, where such products are fast, cheaper.

    Raises:
        ValueError, TypeError: an unknown engine, or an option that the reference does not have.

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

    def __init__(
        self,
        *,
        engine: str = "auto",
        low_memory: bool = False,
        tangent_dtype: torch.dtype | None = None,
    ) -> None:
        if engine not in _ENGINES:
            known = ", ".join(map(repr, _ENGINES))
            raise ValueError(f"engine is {engine!r}; it must be one of {known}")
        if engine == "reference" and (low_memory or tangent_dtype is not None):
            raise ValueError("the reference engine has neither low_memory nor tangent_dtype")
        if tangent_dtype is not None and tangent_dtype not in _PRECISIONS:
            known = ", ".join(map(str, _PRECISIONS))
            raise TypeError(f"tangent_dtype is {tangent_dtype}; it must be one of {known}")
        fast = engine == "auto" and Sweep.available()
        self._forward = Forward(freeing=low_memory) if fast else None
        # No rule serves the fused attention kernels of CUDA.
        plain = not fast or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._variants = twice_differentiable if plain else nullcontext
        self._allocation = large_blocks_apart if low_memory else nullcontext
        self._low_memory, self._tangent_dtype = low_memory, tangent_dtype
        self._recorded = False
        self._reevaluation = Reevaluation()
        self._engines: Engines | None = None
        self._hooked_gradient: list[Tensor | None] | None = None

    def __enter__(self) -> Tape:
        if self._recorded:
            raise RuntimeError("a Tape records one forward pass; make a new one for the next")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("inference_mode records no graph; leave it to compute curvature")
        self._recorded = True
        self._stack = ExitStack()
        self._stack.enter_context(uncompiled())
        self._stack.enter_context(self._allocation())
        self._stack.enter_context(torch.enable_grad())
        self._stack.enter_context(self._variants())
        self._stack.enter_context(self._reevaluation.recording())
        watch = NestedDerivatives() if self._forward is None else self._forward.noted()
        self._stack.enter_context(watch)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        if self._low_memory and "saved tensor hooks" in str(error):
            raise RuntimeError(
                "low_memory=True holds what autograd saves, which torch.func inside the loss does "
                "not allow: use Tape()"
            ) from error

    def backward(
        self, losses: Tensor, params: Any, *, cotangents: bool = True, accumulate: bool = False
    ) -> Any:
        """The gradient of the mean loss, as :func:`curvature.gradient` gives it.

        Args:
            losses: what the block computed: a scalar, or a vector with one loss per sample.
            params: pytree of the tensors that the block used, float32 or float64, each with
                ``requires_grad``.
            cotangents: keep those that :meth:`directional` and :meth:`hvp` need. Without them
                curvature takes a second-order pass, as it does per sample anyway, and a
                Hessian-vector product another backward pass.
            accumulate: let it pass through ``.grad`` of all leaves, as :func:`curvature.gradient`
                does on demand.

        Returns:
            A pytree like params, without graph; ``None`` for a tensor that the loss does not use.

        Raises:
            TypeError, ValueError, NonFiniteLoss: as :func:`curvature.gradient`.
            NotTwiceDifferentiable: an operation has no second derivative; nothing is computed.

        Example:
            >>> import torch
            >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
            >>> with Tape() as tape:
            ...     loss = x.square().sum()
            >>> tape.backward(loss, {"x": x})
            {'x': tensor([2., 4.])}
        """
        flat = check_differentiable(losses, params)
        self._engines, self._hooked_gradient = None, None
        with self._deriving(losses):
            engines = Engines(losses, flat, self._forward, self._tangent_dtype)
            sweep = engines.sweep
            keep = cotangents and not self._low_memory
            with sweep.cotangents.collecting() if sweep and keep else nullcontext():
                leaves = gradients(losses, flat, retain_graph=True, accumulate=accumulate)
        if sweep is not None:
            leaves = sweep.checked(leaves)
            # Hooks of parameters change their gradients alone, several processes take their mean.
            changed = any(p._backward_hooks for p in flat.leaves) or (
                accumulate and distributed.is_available() and distributed.is_initialized()
            )
            if sweep.doubtful() and not changed:
                self._hooked_gradient = [None if g is None else g.clone() for g in leaves]
        self._engines = engines
        return flat.rebuild(leaves)

    def directional(self, direction: Any, *, per_sample: bool = False) -> Quadratic:
        """Value, slope <g, v> and curvature v^T H v along ``direction``.

        By Algorithm 2 of *Adaptive scaling of the learning rate*: one tangent pass.

        Args:
            direction: pytree like params, or a list of tensors in params' order; not normalised.
            per_sample: also give the three numbers of each sample's loss; the losses must then
                be a vector. Coupling of samples by batch normalisation is included: the
                curvature of sample b is v^T H_b v with H_b the Hessian of its loss.

        Raises:
            ValueError, TypeError: direction does not fit params; the message names the entry; or
                a hook made the gradient another than that of the loss.
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
        engines = self._answering()
        if per_sample and engines.losses.ndim == 0:
            raise ValueError(
                "per_sample=True needs one loss per sample, but the loss is a scalar; "
                'use reduction="none" and leave the mean to this package'
            )
        leaves = flatten_direction(direction, engines.params)
        with self._asking(engines):
            q = engines.directional(leaves, per_sample=per_sample, again=not self._low_memory)
        if self._hooked_gradient is not None and engines.sweep is not None:
            exact = engines.sweep.in_double()
            check_slope(q.slope, self._hooked_gradient, leaves, exact=exact)
        return q

    def gauss_newton(
        self, direction: Any, outputs: Tensor | GradientEdge | Sequence[Tensor | GradientEdge]
    ) -> Quadratic:
        """Value, slope and the curvature v^T G v of the generalised Gauss-Newton matrix.

        ``G = J^T H_loss J`` with J the Jacobian of the model's outputs: the curvature of the
        loss alone, with the outputs moving linearly. It is never negative if the loss is convex
        in them, and cheaper than v^T H v. What of the losses does not pass through the outputs,
        as a penalty on the parameters, counts with its full curvature.

        Args:
            direction: pytree like params, or a list of tensors in params' order; not normalised.
            outputs: what the model returned inside the block, before the loss. Where the loss
                writes to it in place, its edge from before: ``torch.autograd.graph``'s
                ``get_gradient_edge(output)``.

        Raises:
            ValueError, TypeError: direction or outputs do not fit; the message says why.
            NotTwiceDifferentiable: an operation has neither a rule nor a second derivative.

        Example:
            >>> import torch
            >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
            >>> with Tape() as tape:
            ...     output = x**3
            ...     loss = output.square().sum() / 2
            >>> _ = tape.backward(loss, [x])
            >>> tape.gauss_newton([torch.ones(2)], output).curvature  # sum of (3 x^2)^2
            tensor(153.)
        """
        engines = self._answering()
        leaves = flatten_direction(direction, engines.params)
        single = isinstance(outputs, (Tensor, GradientEdge, type(None)))
        given: list[Any] = [outputs] if single else list(outputs)
        if not given or not all(
            isinstance(y, GradientEdge) or (isinstance(y, Tensor) and y.requires_grad)
            for y in given
        ):
            raise TypeError(
                "outputs must be tensors with a graph: what the model returned inside the block"
            )
        with self._asking(engines):
            return engines.gauss_newton(leaves, given)

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
        engines = self._answering()
        leaves = flatten_direction(vector, engines.params, argument="vector")
        with self._asking(engines):
            return engines.params.rebuild(engines.ask(lambda engine: engine.hvp(leaves)))

    def _answering(self) -> Engines:
        if self._engines is None:
            raise RuntimeError("call backward(losses, params) before asking for curvature")
        return self._engines

    @contextmanager
    def _asking(self, engines: Engines) -> Iterator[None]:
        try:
            with self._deriving(engines.losses):
                yield
        except RuntimeError as error:
            written = "modified by an inplace operation" in str(error)
            if not (written or tells_that_the_graph_is_gone(error)):
                raise
            raise RuntimeError(
                "what the graph saved has been written to or freed since: ask a tape before the "
                f"optimizer's step, and before a backward() of your own. {error}"
            ) from error

    @contextmanager
    def _deriving(self, losses: Tensor) -> Iterator[None]:
        # What checkpointing evaluates again must take the same variants as in the forward pass.
        with (
            evaluated_again_uncompiled(),
            self._allocation(),
            self._reevaluation.compared(),
            derivative_mode(losses.device),
            self._variants(),
            nullcontext() if self._forward is None else self._forward.evaluated_again(),
        ):
            yield
