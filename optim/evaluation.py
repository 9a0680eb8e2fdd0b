"""What the closures of a step give: their losses, and the gradient of the mean of these."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from curvature import NonFiniteLoss, gradient, parameter_hooks_off
from optim.autocast import autocast_noted, forget_casts
from optim.called import Called
from optim.inner import inner
from optim.intercept import intercepted
from optim.loss_graph import check_same_loss, other_leaves
from optim.loss_scale import LossScale
from optim.own_hooks import hooked
from optim.ranks import Ranks
from optim.sharded import local, resharded

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
class Evaluation:
    """Of one closure, or of several that have a part of the batch each.

    Attributes:
        result: what the closure returned; of several, their losses.
        losses: a scalar, one for each sample, or one for each closure, without graph; of this
            process alone.
        count: how many these are on all ranks together.
        params: those that require a gradient by now.
        grads: of the mean of the losses of all ranks, for each of these.
        shares: of each closure's mean in that mean; over all ranks they add up to their number.
        recorder: of a single closure.
        scale: by which the recorder's loss is larger, so that half precision holds its gradients.
        eps: the coarsest rounding of autocast, 0 without it.
        accumulated: the closure called backward itself, and ``p.grad`` is as it left it.
        others: what else got its gradient from that.
        unusable: why there are no gradients, if a loss is NaN or infinite.
    """

    result: Any
    losses: Tensor
    count: float
    params: list[Tensor]
    grads: list[Tensor | None]
    shares: list[float]
    recorder: Recorder | None
    scale: float = 1.0
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
    closures: Sequence[Closure],
    recorder: Callable[[], Recorder],
    params: Sequence[Tensor],
    setting: Setting,
    *,
    all_leaves: bool = False,
) -> Evaluation:
    """Run each closure forward and backward, with no more than one graph at a time.

    Args:
        all_leaves: give a gradient to whatever else requires one, where the closure calls
            ``backward``.

    Raises:
        TypeError, ValueError: a closure gave no usable loss; the message says why.
    """
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
        objective = _objective(loss, setting)
        found.append(_backward(objective, recorder, params, setting, all_leaves=all_leaves))
        if found[0].unusable is not None:
            for p in found[0].params:
                p.grad = torch.full_like(p, torch.nan)
        else:
            accumulate(found[0])

    forget_casts()
    with recorder:
        with intercepted(called), autocast_noted(params) as precision:
            result = closure()
        objective = None if found else _objective(result, setting)
    if objective is not None:
        _check_none_left(params)
        return replace(_backward(objective, recorder, params, setting), eps=precision.eps)
    check_same_loss(result, differentiated_loss.pop())
    result = result.detach() if isinstance(result, Tensor) else result
    _check_unscaled(result, found[0].losses)
    return replace(found[0], result=result, eps=precision.eps, accumulated=True)


def _check_unscaled(result: Any, loss: Tensor) -> None:
    """Refuse a loss that a GradScaler of the closure has multiplied."""
    if isinstance(result, Tensor) and result.numel() == loss.numel() == 1 and result.item() != 0:
        scale = loss.item() / result.item()
        if scale >= 2**8 and math.log2(scale).is_integer():
            raise ValueError(
                f"the closure calls backward on {scale:.0f} times the loss that it returns, as a "
                "GradScaler does; give the scaler to the wrapper, scaler=, and leave it out of the "
                "closure"
            )


@dataclass(frozen=True, eq=False)
class _Objective:
    """What is differentiated, as the recorder has to see it made.

    Attributes:
        losses: as the closure gave them.
        count: how many these are on all ranks together.
        share: of this rank's mean in that of all.
        weighed: the losses times share, and times the scale of half precision.
        scale: that one alone.
    """

    losses: Tensor
    count: float
    share: float
    weighed: Tensor
    scale: float = 1.0
    unusable: str | None = None


def _objective(losses: Tensor, setting: Setting) -> _Objective:
    count, share, unusable = _weighed(losses, setting.ranks)
    if unusable is not None:
        return _Objective(losses, count, share, losses, unusable=unusable)
    weighed, scale = setting.loss_scale.scaled(losses if share == 1 else losses * share)
    return _Objective(losses, count, share, weighed, scale)


def _backward(
    objective: _Objective,
    recorder: Recorder,
    params: Sequence[Tensor],
    setting: Setting,
    *,
    all_leaves: bool = False,
) -> Evaluation:
    """The gradient of the mean of the losses of all ranks."""
    now = [p for p in params if p.requires_grad]
    weighed, scale, unusable = objective.weighed, objective.scale, objective.unusable
    grads: list[Tensor | None] = [None] * len(now)
    others: list[Tensor] = []
    if unusable is None:
        try:
            # Of a scaled loss others would get the scaled gradient.
            whole = setting.ranks.several or (all_leaves and scale == 1)
            others = other_leaves(weighed, now) if whole else []
            with parameter_hooks_off(now), without_grads(now) if whole else nullcontext():
                grads = recorder.backward(weighed, now, accumulate=whole)
        except NonFiniteLoss as error:
            unusable = str(error)
        for g in grads:
            if g is not None and g.layout != torch.strided:
                raise TypeError(
                    f"the gradient of a parameter of shape {tuple(g.shape)} is sparse, and such a "
                    "one has neither direction nor curvature here; make its layer with sparse=False"
                )
        if scale != 1 or setting.ranks.several:
            # Also at 1: those of a process group may be views of memory that is used again.
            grads = [None if g is None else g / scale for g in grads]
    losses = objective.losses
    result = losses.detach() if isinstance(losses, Tensor) else losses
    return Evaluation(
        result,
        result,
        objective.count,
        now,
        grads,
        [objective.share],
        recorder,
        scale * objective.share,
        unusable=unusable,
        others=others,
    )


def _weighed(losses: Any, ranks: Ranks) -> tuple[float, float, str | None]:
    """How many losses the ranks have, the weight of this one's mean, and what forbids a step."""
    count = losses.numel() if isinstance(losses, Tensor) else 0
    if not ranks.several:
        return count, 1.0, None
    finite = isinstance(losses, Tensor) and bool(torch.isfinite(losses).all())
    counts, finites = zip(*ranks.gather([count, float(finite)]), strict=True)
    if 0 in counts:
        raise ValueError(
            f"rank {counts.index(0)} gave no loss: each rank needs a part of the batch"
        )
    bad = [str(rank) for rank, each in enumerate(finites) if not each]
    unusable = f"a loss of rank {', '.join(bad)} is NaN or infinite" if bad else None
    return sum(counts), count * ranks.size / sum(counts), unusable


@contextmanager
def without_grads(params: Sequence[Tensor]) -> Iterator[None]:
    """Inside, ``p.grad`` starts at None; what is done to it there is undone."""
    own = [p.grad for p in params]
    try:
        for p in params:
            p.grad = None
        yield
    finally:
        for p, g in zip(params, own, strict=True):
            p.grad = g


def accumulate(found: Evaluation) -> None:
    """Do what ``backward`` would have done."""
    _check_none_left(found.params)
    for p, g in zip(found.params, found.grads, strict=True):
        # A copy, since clipping works in place.
        p.grad = None if g is None else hooked(p, g.clone())


def _check_none_left(params: Sequence[Tensor]) -> None:
    """Refuse gradients from elsewhere, which the step could only drop; zeros are none."""
    if any(p.grad is not None and bool(local(p.grad).any()) for p in params):
        raise ValueError(
            "p.grad holds gradients that were computed outside this step's closure; call zero_grad "
            "in it, or, to accumulate several parts of a batch, give step a list of closures, or, "
            "where a hook of steps clips what the last one left, give the wrapper clip="
        )


def lacks_graph(error: RuntimeError) -> bool:
    """Whether a closure asked for a graph where it was run without one."""
    return any(sign in str(error) for sign in _SIGNS)


_SIGNS = (
    "does not require grad",  # torch.autograd.grad
    "that doesn't require gradient",  # Tensor.register_hook
    "can't retain_grad",
)


def losses_again(closure: Closure, known: Evaluation, *, graph: bool) -> Tensor:
    """The losses of a closure that is run again; its gradients are those known."""
    found: list[Tensor] = []

    def called(loss: Tensor) -> None:
        found.append(loss)
        accumulate(known)

    forget_casts()
    with intercepted(called), torch.set_grad_enabled(graph), resharded():
        result: Tensor = closure()
    return (found[0] if found else result).detach()
