"""What the closures of a step give: their losses, and the gradient of the mean of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from curvature import NonFiniteLoss, SideEffects, gradient, parameter_hooks_off
from optim.accumulated import accumulated_hooks_off
from optim.autocast import autocast_noted, forget_casts
from optim.called import Called
from optim.grads import check_no_grads, set_grads, without_grads
from optim.inner import inner
from optim.intercept import intercepted
from optim.loss_graph import check_same_loss, other_leaves
from optim.loss_scale import LossScale, check_unscaled
from optim.ranks import Ranks
from optim.weighed import Weighed, weighed

Closure = Callable[[], Any]


class Recorder(Protocol):
    """Runs a closure and gives the gradient; :class:`curvature.Tape` is one."""

    def __enter__(self) -> Any: ...

    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> None: ...

    def backward(self, losses: Tensor, params: Any, *, accumulate: bool = False) -> Any: ...


class Plain(torch.enable_grad):
    """An ordinary forward and backward pass, without a record for second derivatives."""

    def backward(self, losses: Tensor, params: Any, *, accumulate: bool = False) -> Any:
        return gradient(losses, params, accumulate=accumulate)


@dataclass(eq=False)
class Setting:
    """What surrounds every evaluation of a wrapper.

    Attributes:
        differentiates: whether a closure was seen to differentiate on its way to the loss.
    """

    loss_scale: LossScale
    ranks: Ranks
    called: Called
    differentiates: bool = False


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch: the closures that give its losses, and what they are evaluated in.

    Attributes:
        params: all parameters of the base optimizer, also those that are frozen by now.
        effects: evaluated again, the closures find random numbers and buffers as they did at
            first, before the block of these.
    """

    closures: Sequence[Closure]
    params: Sequence[Tensor]
    setting: Setting
    effects: SideEffects


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one closure gave, or several that have a part of the batch each.

    Attributes:
        result: what the closure returned; of several, their losses.
        losses: a scalar, one for each sample, or one for each closure, without graph; of this
            process alone.
        count: how many losses there are on all ranks together.
        params: the parameters that require a gradient now.
        grads: the gradient of the mean of the losses of all ranks, for each of these.
        shares: how much each closure's mean counts in that mean; on average over the ranks they
            add up to 1.
        recorder: what has recorded a single closure; None of several.
        weight: the factor by which the recorded loss is larger than the closure's.
        eps: the coarsest rounding of autocast, 0 without it.
        accumulated: the closure called backward itself, and ``p.grad`` is as it left it.
        others: leaves outside params that the closure's backward also gave a gradient.
        unusable: why there are no gradients, if a loss is NaN or infinite.
    """

    result: Any
    losses: Tensor
    count: float
    params: list[Tensor]
    grads: list[Tensor | None]
    shares: list[float]
    recorder: Recorder | None
    weight: float = 1.0
    eps: float = 0.0
    accumulated: bool = False
    others: Sequence[Tensor] = ()
    unusable: str | None = None

    @cached_property
    def squared_norm(self) -> float:
        """‖g‖²."""
        known = [g for g in self.grads if g is not None]
        return inner(known, known)


def evaluate(
    batch: Batch, recorder: Callable[[], Recorder], *, all_leaves: bool = False
) -> Evaluation:
    """Run each closure forward and backward, with no more than one graph at a time.

    Args:
        all_leaves: give a gradient to whatever else requires one, where the closure calls
            ``backward``.

    Raises:
        TypeError, ValueError: a closure gave no usable loss; the message says why.
    """
    closures, params, setting = batch.closures, batch.params, batch.setting
    if len(closures) == 1:
        return differentiated(closures[0], recorder(), params, setting, all_leaves=all_leaves)
    parts: list[Evaluation] = []
    sums: dict[Tensor, Tensor] = {}
    for closure in closures:
        part = differentiated(closure, recorder(), params, setting)
        if part.unusable is not None:
            return part
        if part.accumulated:
            raise ValueError(
                "one of several closures calls backward; let each return the loss of its part of "
                "the batch"
            )
        if parts and part.losses.ndim != parts[0].losses.ndim:
            raise ValueError("some closures return a scalar, others one loss per sample")
        for p, g in zip(part.params, part.grads, strict=True):
            if g is not None:
                sums[p] = sums[p].add_(g, alpha=part.count) if p in sums else g * part.count
        # The next part's graph needs the memory of this one's.
        part = replace(part, grads=[], recorder=None)
        parts.append(part)
    count = sum(part.count for part in parts)
    losses = torch.cat([part.losses.reshape(-1) for part in parts])
    now = [p for p in params if p.requires_grad]
    return Evaluation(
        result=losses,
        losses=losses,
        count=count,
        params=now,
        grads=[sums[p].div_(count) if p in sums else None for p in now],
        shares=[part.shares[0] * part.count / count for part in parts],
        recorder=None,
        eps=max(part.eps for part in parts),
    )


def differentiated(
    closure: Closure,
    recorder: Recorder,
    params: Sequence[Tensor],
    setting: Setting,
    *,
    all_leaves: bool = False,
) -> Evaluation:
    """Run one closure forward, and backward unless it does so itself."""
    found: list[Evaluation] = []
    differentiated_loss: list[Tensor] = []

    def called(loss: Tensor) -> None:
        if found:
            raise ValueError(
                "the closure calls backward more than once; for several parts of a batch give "
                "step a list of closures that return the loss of a part each"
            )
        differentiated_loss.append(loss)
        own = weighed(loss, setting.loss_scale, setting.ranks)
        found.append(_backward(own, recorder, params, setting, all_leaves=all_leaves))
        if found[0].unusable is not None:
            for p in found[0].params:
                p.grad = torch.full_like(p, torch.nan)
        else:
            accumulate(found[0])

    forget_casts()
    with recorder:
        with intercepted(called), autocast_noted(params) as precision:
            result = closure()
        returned = None if found else weighed(result, setting.loss_scale, setting.ranks)
    if returned is not None:
        check_no_grads(params)
        return replace(_backward(returned, recorder, params, setting), eps=precision.eps)
    check_same_loss(result, differentiated_loss.pop())
    result = result.detach() if isinstance(result, Tensor) else result
    check_unscaled(result, found[0].losses)
    return replace(found[0], result=result, eps=precision.eps, accumulated=True)


def accumulate(found: Evaluation) -> None:
    """Do what ``backward`` would have done."""
    check_no_grads(found.params)
    # Copies, since clipping works in place.
    set_grads(found.params, found.grads, copied=True)


def _backward(
    weighed: Weighed,
    recorder: Recorder,
    params: Sequence[Tensor],
    setting: Setting,
    *,
    all_leaves: bool = False,
) -> Evaluation:
    """The gradient of the mean of the losses of all ranks."""
    now = [p for p in params if p.requires_grad]
    grads: list[Tensor | None] = [None] * len(now)
    others: list[Tensor] = []
    unusable = weighed.unusable
    if unusable is None:
        # Of a scaled loss others would get the scaled gradient.
        whole = setting.ranks.several or (all_leaves and weighed.scale == 1)
        others = other_leaves(weighed.product, now) if whole else []
        aside = without_grads(now) if whole else nullcontext()
        try:
            with aside, parameter_hooks_off(now), accumulated_hooks_off(now):
                grads = recorder.backward(weighed.product, now, accumulate=whole)
        except NonFiniteLoss as error:
            unusable = str(error)
        _check_dense(grads)
        if weighed.scale != 1 or setting.ranks.several:
            # Also at 1: those of a process group may be views of memory that is used again.
            grads = [None if g is None else g / weighed.scale for g in grads]
    losses = weighed.losses.detach()
    return Evaluation(
        result=losses,
        losses=losses,
        count=weighed.count,
        params=now,
        grads=grads,
        shares=[weighed.share],
        recorder=recorder,
        weight=weighed.weight,
        others=others,
        unusable=unusable,
    )


def _check_dense(grads: Sequence[Tensor | None]) -> None:
    for g in grads:
        if g is not None and g.layout != torch.strided:
            raise TypeError(
                f"the gradient of a parameter of shape {tuple(g.shape)} is sparse, and such a one "
                "has neither direction nor curvature here; make its layer with sparse=False"
            )
