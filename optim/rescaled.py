"""Rescaling of the learning rate by the exact curvature along the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from optim.energy import Energetic
from optim.estimators import Estimator, Exact
from optim.rules import Cautious, Rule, Trust
from optim.wrapper import Wrapper

if TYPE_CHECKING:  # some builds of torch are without it
    from torch.distributed import ProcessGroup


class Rescaled(Wrapper):
    """Adaptive scaling of the learning rate (de Gournay, Gossard 2022), made safe.

    Around any optimizer whose step is ``theta <- theta - lr d``, the step becomes ``ell r d``::

        L = mean_b |d^T H_b d| / ‖d‖²                  curvature per unit length
        r = 2 <d, g> / (‖d‖² L)

    ell = 1/2 minimises the quadratic model along d and ell = 1 is the largest step that does
    not raise it (equation 11). Rescaling d by any factor leaves the iterates unchanged, except
    for the first probes of :class:`optim.estimators.Probes`. With momentum, slope and curvature
    are bounded by what the last steps saw; where the samples' curvatures cancel, and where steps
    overshoot nearly every new batch, they are shorter: :class:`optim.rules.Cautious`. The paper's
    rule throughout, which averages L over the steps, is ``rule=Lipschitz(), checked=0``.

    ``group["lr"]`` is ell: any torch scheduler drives it, though none is needed.

    J is the loss that the closure returns, and the L2 penalty where torch's own optimizers add
    their ``weight_decay`` to the gradient (SGD, RMSprop, Adam, ... and what inherits their step;
    another says so by an attribute ``coupled_weight_decay``): it enters value, slope and
    curvature. Decoupled decay (AdamW, INNAprop) is part of d alone. A step of INNA or INNAprop
    moves theta and psi together, by at most beta; under their weight decay it follows d to first
    order in the step.

    Args:
        base: an optimizer whose step is linear in lr (SGD, RMSprop, AdamW, ...), or one that
            can propose and move, as INNA and INNAprop. Its lr serves only for ratios of groups.
        ell: the factor that ``group["lr"]`` is set to.
        rule: how far to go, of :mod:`optim.rules`; by default ``Cautious()``; ``Trust()``
            for INNA and INNAprop, and where several steps share one estimate.
        estimator: how the curvature is measured, of :mod:`optim.estimators`.
        every: how many steps share one estimate of the curvature; the slope is always new.
        checked: at so many first steps the loss is evaluated after the step, on its batch, and
            the step halved until it does not rise: far from the minimum a network's first
            directions leave the range of the quadratic.
        clip: called at each step with the parameters that have a gradient, to clip ``p.grad`` in
            place: ``lambda params: torch.nn.utils.clip_grad_norm_(params, 1.0)``. Slope and
            curvature stay those of the loss.
        scaler: scales the loss where autocast computes in float16, whose range its gradients
            would leave; the step itself calls scale and update. Its state is for the caller to
            save.
        process_group: the processes that have a part of each batch, with the model in a
            :class:`torch.nn.parallel.DistributedDataParallel`, or sharded by ``fully_shard`` for
            estimators that evaluate losses or gradients ahead. All take the step that one process
            would with the joined batch, of all samples where closures return a loss for each, and
            of equal parts where they return a scalar.

    If the closure returns one loss per sample, the absolute value is taken per sample, as in
    the paper; curvatures of opposite sign then do not cancel. With a scalar loss it is taken of
    the batch's curvature, which is cheaper and takes longer steps.

    Where L is 0 (the loss is linear along d and along every d that the average remembers), no
    step length follows from it: the step is skipped and recorded.

    Raises:
        TypeError: base's step is known not to be linear in lr, or a parameter is not float32 or
            float64.
        ValueError: an argument is out of range, or base cannot be wrapped as it is set up.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = Rescaled(torch.optim.SGD([x]), ell=0.5)
        >>> _ = optimizer.step(lambda: 50 * (x - 3).square().sum())  # one Newton step
        >>> x.detach(), optimizer.records[-1].step
        (tensor([3., 3.]), 0.01)
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        ell: float = 0.95,
        rule: Rule | None = None,
        estimator: Estimator | None = None,
        every: int = 1,
        checked: int = 10,
        clip: Callable[[list[Tensor]], Any] | None = None,
        scaler: GradScaler | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            base,
            estimator=Exact() if estimator is None else estimator,
            rule=_default_rule(base, every) if rule is None else rule,
            ell=ell,
            every=every,
            checked=checked,
            clip=clip,
            scaler=scaler,
            process_group=process_group,
        )


def _default_rule(base: Optimizer, every: int) -> Rule:
    # A velocity that the steps themselves feed grows for good by one step that is far too long,
    # so that one batch must not raise the step alone: Trust averages over several.
    return Trust() if every > 1 or isinstance(base, Energetic) else Cautious()
