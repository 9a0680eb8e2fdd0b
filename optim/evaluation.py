"""What the closures of a step give: their losses, and the gradient of the mean of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from curvature import NonFiniteLoss, gradient
from optim.autocast import autocast_noted
from optim.intercept import intercepted
from optim.loss_scale import LossScale

Closure = Callable[[], Any]


class Recorder(Protocol):
    """Runs a closure and gives the gradient; :class:`curvature.Tape` is one."""

    def __enter__(self) -> Any: ...

    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> None: ...

    def backward(self, losses: Tensor, params: Any) -> Any: ...


class Plain(torch.enable_grad):
    """An ordinary forward and backward pass, without a record for second derivatives."""

    def backward(self, losses: Tensor, params: Any) -> Any:
        return gradient(losses, params)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Of one closure, or of several that have a part of the batch each.

    Attributes:
        result: what the closure returned; of several, their losses.
        losses: a scalar, one for each sample, or one for each closure, without graph.
        params: those that require a gradient by now.
        grads: of the mean of the losses, for each of these.
        shares: of each closure in the mean.
        scale: by which the recorder's loss is larger, so that half precision holds its gradients.
        eps: the rounding of autocast, 0 without it.
        recorder: of a single closure.
        accumulated: the closure called backward itself, and ``p.grad`` is as it left it.
        unusable: why there are no gradients, if a loss is NaN or infinite.
    """

    result: Any
    losses: Tensor
    params: list[Tensor]
    grads: list[Tensor | None]
    shares: list[float]
    recorder: Recorder | None
    scale: float = 1.0
    eps: float = 0.0
    accumulated: bool = False
    unusable: str | None = None


def evaluate(
    closures: Sequence[Closure],
    recorder: Callable[[], Recorder],
    params: Sequence[Tensor],
    loss_scale: LossScale,
) -> Evaluation:
    """Run each closure forward and backward, with no more than one graph at a time.

    Raises:
        TypeError, ValueError: a closure gave no usable loss; the message says why.
    """
    if len(closures) == 1:
        return differentiated(closures[0], recorder(), params, loss_scale)
    losses: list[Tensor] = []
    sums: dict[Tensor, Tensor] = {}
    for closure in closures:
        part = differentiated(closure, recorder(), params, loss_scale)
        if part.unusable is not None:
            return part
        if part.accumulated:
            raise ValueError(
                "one of several closures calls backward; let each return the loss of its part of "
                "the batch"
            )
        losses.append(part.losses)
        if part.losses.ndim != losses[0].ndim:
            raise ValueError("some closures return a scalar, others one loss per sample")
        for p, g in zip(part.params, part.grads, strict=True):
            if g is not None:
                weight = part.losses.numel()
                sums[p] = sums[p].add_(g, alpha=weight) if p in sums else g * weight
    count = sum(x.numel() for x in losses)
    together = torch.cat([x.reshape(-1) for x in losses])
    now = [p for p in params if p.requires_grad]
    grads = [sums[p].div_(count) if p in sums else None for p in now]
    shares = [x.numel() / count for x in losses]
    return Evaluation(together, together, now, grads, shares, None, part.scale, part.eps)


def differentiated(
    closure: Closure, recorder: Recorder, params: Sequence[Tensor], loss_scale: LossScale
) -> Evaluation:
    """Run one closure forward, and backward unless it does so itself."""
    found: list[Evaluation] = []

    def backward(losses: Tensor) -> None:
        now = [p for p in params if p.requires_grad]
        scaled, scale = loss_scale.scaled(losses)
        try:
            grads, unusable = recorder.backward(scaled, now), None
        except NonFiniteLoss as error:
            grads, unusable = [None] * len(now), str(error)
        if scale != 1:
            grads = [None if g is None else g / scale for g in grads]
        losses = losses.detach()
        found.append(
            Evaluation(losses, losses, now, grads, [1.0], recorder, scale, unusable=unusable)
        )

    def called(loss: Tensor) -> None:
        if found:
            raise ValueError(
                "the closure calls backward more than once; for several parts of a batch give "
                "step a list of closures that return the loss of a part each"
            )
        backward(loss)
        if found[0].unusable is not None:
            for p in found[0].params:
                p.grad = torch.full_like(p, torch.nan)
        else:
            accumulate(found[0])

    with recorder, intercepted(called), autocast_noted(params) as precision:
        result = closure()
        if not found:
            backward(result)
            return replace(found[0], eps=precision.eps)
    result = result.detach() if isinstance(result, Tensor) else result
    return replace(found[0], result=result, eps=precision.eps, accumulated=True)


def accumulate(found: Evaluation) -> None:
    """Do what ``backward`` would have done."""
    if any(p.grad is not None for p in found.params):
        raise ValueError(
            "p.grad holds gradients that were computed outside this step's closure; call zero_grad "
            "in it, or, to accumulate several parts of a batch, give step a list of closures"
        )
    for p, g in zip(found.params, found.grads, strict=True):
        # A copy, since clipping works in place.
        p.grad = None if g is None else g.clone()


def losses_again(closure: Closure, known: Evaluation) -> Tensor:
    """The losses of a closure that is run again without a graph; its gradients are those known."""
    found: list[Tensor] = []

    def called(loss: Tensor) -> None:
        found.append(loss)
        accumulate(known)

    with intercepted(called), torch.no_grad():
        result = closure()
    return found[0] if found else result
