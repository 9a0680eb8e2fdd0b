"""The direction of an optimizer whose step is linear in its learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from curvature import RandomState
from optim.inner import inner
from optim.snapshot import Snapshot
from optim.twins import OnTwins, told_apart, twin_of


class LinearInRate(OnTwins):
    """The direction of an optimizer whose step is linear in ``group["lr"]``.

    The optimizer steps copies of the parameters once with a large lr: d is the displacement
    over that lr. A large lr keeps the digits of d down to 1e-18 of theta, where theta - lr d
    with a small one would round them away against theta. The first steps that move are taken
    from the same state at half that lr, at one that moves theta by about its own length and at 0
    besides, and refused if the displacements are not proportional, if rate 0 moves, or if the
    states differ.
    """

    RATE = 2.0**60
    MODERATE = 2.0**10  # at most, so that a decay times it rounds within the bounds of a proof
    PROOFS = 10  # more than one, for optimizers that do something else at every k-th step

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base)
        self._proofs = 0
        self._proved = False  # by the last proposal
        self._told: set[str] = set()

    def _propose(self, ratios: Sequence[float]) -> dict[Tensor, Tensor]:
        self._proved = self._proofs < self.PROOFS and self._prove(ratios)
        return self._rescaled(ratios, self.RATE)

    def move(self, step: float) -> None:
        super().move(step)
        # A step that is only looked at would be proved again at the next.
        self._proofs += self._proved
        self._proved = False

    def _rescaled(self, ratios: Sequence[float], rate: float) -> dict[Tensor, Tensor]:
        """d, told from a step at this rate."""
        direction = self._displacement(ratios, rate)
        if direction:
            torch._foreach_mul_(list(direction.values()), -1 / rate)
        return direction

    def _displacement(self, ratios: Sequence[float], rate: float) -> dict[Tensor, Tensor]:
        """How far the base's next step at this rate moves, -rate d; its state advances."""
        grads = self._grads()
        twins = {p: twin_of(p) for p in grads}
        try:
            self._step(twins, grads, [rate * ratio for ratio in ratios])
        finally:
            if self._proofs < self.PROOFS:
                self._told |= told_apart(self._base, twins)
        moved = {p: twin.data for p, twin in twins.items()}
        if moved:
            torch._foreach_sub_(list(moved.values()), list(moved))
        return moved

    def _prove(self, ratios: Sequence[float]) -> bool:
        """Refuse a step that is not linear in lr; false if there was no step to tell from."""
        start, random = Snapshot(self._base), RandomState()
        params = [p for group in self._base.param_groups for p in group["params"]]
        kept = [(p, p.data, p.detach().clone()) for p in params]
        linear, length, failure = True, 0.0, None
        self._told.clear()
        try:
            linear, length = self._compare(ratios, start, random)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            failure = error
        finally:
            start.restore()
            random.restore()
            written = _put_back(kept)
        reason = None
        if written:
            reason = "it steps other tensors than those in its param_groups"
        elif self._told:
            reason = (
                f"it keeps something for its parameters in {' and '.join(sorted(self._told))}, and "
                "is made to step copies of them; keep it in param_groups, or in state by the "
                "parameter"
            )
        elif failure is not None:
            reason = (
                "it cannot step copies of its parameters, given their gradients and no closure: "
                f"{failure!r}"
            )
        elif not linear and math.isfinite(length):
            reason = (
                "its step is not linear in lr; give it methods propose, move and limit, as "
                "optim.direction.Proposer describes"
            )
        if reason is not None:
            name = type(self._base).__name__
            raise TypeError(f"{name} cannot be wrapped: {reason}") from failure
        return 0 < length < math.inf

    def _compare(
        self, ratios: Sequence[float], start: Snapshot, random: RandomState
    ) -> tuple[bool, float]:
        """Whether the next step is linear in lr, as far as one can see, and the length of d."""
        linear = not any(bool(x.any()) for x in self._displacement(ratios, 0.0).values())
        start.restore()
        random.restore()
        d = self._rescaled(ratios, self.RATE)
        after = Snapshot(self._base)
        length = math.sqrt(inner([*d.values()], [*d.values()]))
        for rate, rounding in ((self.RATE / 2, 8), (self._moderate(d, length), 1e3)):
            start.restore()
            random.restore()
            found = self._rescaled(ratios, rate)
            linear &= all(_agree(found[p], d[p], p, rounding / rate) for p in d)
        return linear and after.equals(Snapshot(self._base)), length

    def _moderate(self, d: dict[Tensor, Tensor], length: float) -> float:
        """A rate at which d moves the parameters by about their own length."""
        from_origin = math.sqrt(inner([*d], [*d]))
        if not (from_origin > 0 and 0 < length < math.inf):
            return 1.0
        # By powers of two all digits stay as they are.
        return min(2.0 ** math.floor(math.log2(from_origin / length)), self.MODERATE)


def _put_back(kept: list[tuple[Tensor, Tensor, Tensor]]) -> bool:
    """Give each parameter its memory and values again, and tell whether any had others."""
    written = False
    for p, data, value in kept:
        # Writes through p.data leave no version to tell them by.
        if bool(((p != value) & ~value.isnan()).any()):
            written = True
            p.data = data
            p.copy_(value)
    return written


def _agree(found: Tensor, d: Tensor, p: Tensor, rounding: float) -> bool:
    # In double precision, where squares of a single one overflow.
    error, size, start = (
        torch.linalg.vector_norm(x, dtype=torch.float64) for x in (found - d, d, p)
    )
    return bool(error <= torch.finfo(p.dtype).eps * (1e3 * size + rounding * start))
