"""The way of the last steps, as far back as the base's momentum remembers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Way = dict[Tensor, Tensor]


class Trail:
    """``w <- mu w + step d`` for each parameter, mu the largest momentum of the base's groups.

    Without momentum it is the last step alone. With it a step that is too long goes on
    oscillating in those after it, so that the slope along the last step alone has either sign;
    along as many steps as momentum remembers the overshoot shows. Under weight decay INNA and
    INNAprop follow d to first order in the step, and so does w.
    """

    def __init__(self) -> None:
        self.way: Way = {}

    def along(self, params: Sequence[Tensor]) -> list[Tensor] | None:
        """w of each parameter, zeros where it was not moved; None where none was."""
        known = self.saved(params)
        if all(way is None for way in known):
            return None
        return [
            torch.zeros_like(p) if way is None else way
            for p, way in zip(params, known, strict=True)
        ]

    @torch.no_grad()
    def after(
        self, params: Sequence[Tensor], direction: Sequence[Tensor], step: float, mu: float
    ) -> Way:
        """What ``way`` becomes by a step of these parameters; that of others fades."""
        known = {p: w for p in self.way if (w := self._known(p)) is not None}
        way: Way = {}
        if known and mu > 0:
            way = dict(zip(known, torch._foreach_mul([*known.values()], mu), strict=True))
        again = [(way[p], d) for p, d in zip(params, direction, strict=True) if p in way]
        if again:
            torch._foreach_add_(*map(list, zip(*again, strict=True)), alpha=step)
        return way | {p: d * step for p, d in zip(params, direction, strict=True) if p not in way}

    def saved(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """For a checkpoint: w of each parameter, None where it was not moved."""
        return [self._known(p) for p in params]

    @staticmethod
    def loaded(saved: Sequence[Tensor | None], params: Sequence[Tensor]) -> Way:
        """``way`` from what :meth:`saved` gave."""
        return {
            p: way.to(p.device, p.dtype)
            for p, way in zip(params, saved, strict=True)
            if way is not None
        }

    def _known(self, p: Tensor) -> Tensor | None:
        way = self.way.get(p)
        # A parameter may be converted between two steps, or given another shape.
        if way is None or way.shape != p.shape or (way.device, way.dtype) != (p.device, p.dtype):
            return None
        return way
