"""Generalized Newton's method: the learning rate from losses ahead, made safe."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from optim.estimators import Secant
from optim.ranges import check_count
from optim.rules import Trust
from optim.wrapper import Wrapper

if TYPE_CHECKING:  # some builds of torch are without it
    from torch.distributed import ProcessGroup


class GeN(Wrapper):
    """Generalized Newton's method (Bu, Xu) without a first learning rate, by forward passes alone.

    Around any optimizer whose step is ``w <- w - lr d``, the step becomes ``ell r d``. At every
    Phi-th step the loss where the step would end, on the same batch and with the same random
    numbers, gives with the known slope the parabola along d (equation (3.4) of the paper); its
    minimum is at ``b / A``, and r is twice that, so that ell = 1/2 is the paper's step and
    ell = 1 the longest that the parabola does not see rise.

    As published the method depends on its start and fails for many (:func:`optim.gen_published`
    is it): too large an eta diverges before its first refit, a fit with hardly any curvature
    sends eta far off, smoothing lets it grow by a tenth only, and in float32 the losses at a tiny
    eta differ by rounding alone, which is fitted as if it were curvature. Here the first length
    is searched, rounding counts as no curvature, a length grows up to four times at an estimate
    and no farther than was looked, the slope of a direction with momentum is bounded by its
    average, steps are shorter where they overshoot nearly every new batch, and the first are
    checked: :class:`optim.estimators.Secant`, :class:`optim.rules.Trust`.

    ``group["lr"]`` is ell, for torch's schedulers: ``schedules.cooldown`` for a known number of
    steps, or ``LinearLR(optimizer, 1, 0, steps)``, the horizon factor of the paper's appendix
    C.7 (C.1).

    Args:
        base: an optimizer whose step is linear in lr, or one that can propose and move. Its lr
            serves only for ratios of groups.
        phi: how many steps share one estimate; the slope is always new.
        ell: the factor that ``group["lr"]`` is set to.
        checked: at so many first steps the loss is evaluated after the step, on its batch, and
            the step halved until it does not rise.
        clip: called at each step with the parameters that have a gradient, to clip ``p.grad`` in
            place, as in :class:`optim.Rescaled`.
        scaler: of the loss, for autocast in float16, as in :class:`optim.Rescaled`.
        process_group: the processes that have a part of each batch, likewise.

    Raises:
        TypeError: base's step is known not to be linear in lr, or a parameter is not float32 or
            float64.
        ValueError: a hyperparameter is out of range, or base cannot be wrapped as it is set up.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        >>> optimizer = GeN(torch.optim.SGD([x]), ell=0.5)
        >>> for _ in range(8):
        ...     _ = optimizer.step(lambda: 50 * (x - 3).square().sum())
        >>> x.detach()
        tensor([3., 3.], dtype=torch.float64)
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        phi: int = 8,
        ell: float = 0.95,
        checked: int = 10,
        clip: Callable[[list[Tensor]], Any] | None = None,
        scaler: GradScaler | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_count("phi", phi)
        super().__init__(
            base,
            estimator=Secant(),
            rule=Trust(),
            ell=ell,
            every=phi,
            checked=checked,
            clip=clip,
            scaler=scaler,
            process_group=process_group,
        )
