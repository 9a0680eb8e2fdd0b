"""The way of the last steps, as far back as the base's momentum remembers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.sharded import local

_SHORT = 2.0**-20  # of ``length``; below it the tensors are scaled anew


class Held:
    """A tensor, and whether it was written to since."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._version = tensor, tensor._version

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy has no versions in common with what it was copied from.
        return Held, (self.tensor,)

    def is_intact(self) -> bool:
        return self.tensor._version == self._version


class Trail:
    """``w <- mu w + step d`` for each parameter, mu the largest momentum of the base's groups.

    Without momentum it is the last step alone. With it a step that is too long goes on
    oscillating in those after it, so that the slope along the last step alone has either sign;
    along as many steps as momentum remembers the overshoot shows. Under weight decay INNA and
    INNAprop follow d to first order in the step, and so does w.

    w is ``length`` times a tensor, so that a step reads d once, or not at all: without momentum
    the tensor is d itself, p.grad in plain gradient descent, unless it is part of a larger one.
    Where it is written to before the next step, as where gradients are zeroed in place, w is
    unknown at that step, and from then on d is copied.
    """

    def __init__(self) -> None:
        self._way: dict[Tensor, Held] = {}
        self._length = 1.0
        self._owned = True  # whether nobody else has the tensors of the way
        self._copied = False

    def along(self, params: Sequence[Tensor]) -> tuple[float, list[Tensor]] | None:
        """w as a length and tensors, zeros for what was not moved; None where nothing was."""
        known = self.saved(params)
        if all(way is None for way in known):
            return None
        return self._length, [
            torch.zeros_like(p) if way is None else way
            for p, way in zip(params, known, strict=True)
        ]

    def before(
        self, params: Sequence[Tensor], direction: Sequence[Tensor], mu: float
    ) -> list[Held]:
        """d, so that :meth:`after` has it when the step is done, and needs no memory."""
        if mu > 0 and not self._owned:
            self._way = {p: Held(way.tensor.clone()) for p in self._way if (way := self._known(p))}
            self._owned = True
        known = map(self._known, params)
        return [
            Held(d.clone() if self._copied or (way is None if mu > 0 else _is_part(d)) else d)
            for d, way in zip(direction, known, strict=True)
        ]

    @torch.no_grad()
    def after(self, params: Sequence[Tensor], held: Sequence[Held], step: float, mu: float) -> None:
        """Add a step of these parameters; that of others fades."""
        if not all(d.is_intact() for d in held):
            self._copied, self._way = True, {}
            return
        if mu == 0:
            self._way, self._length = dict(zip(params, held, strict=True)), step
            self._owned = False
            return
        self._way = {p: way for p in self._way if (way := self._known(p)) is not None}
        self._length = self._length * mu if self._way else 1.0
        if self._length < _SHORT:
            torch._foreach_mul_([way.tensor for way in self._way.values()], self._length)
            self._length = 1.0
        share = step / self._length
        known = [
            (self._way[p].tensor, d.tensor)
            for p, d in zip(params, held, strict=True)
            if p in self._way
        ]
        if known:
            torch._foreach_add_(*map(list, zip(*known, strict=True)), alpha=share)
        new = {p: d for p, d in zip(params, held, strict=True) if p not in self._way}
        if new:
            torch._foreach_mul_([d.tensor for d in new.values()], share)
        self._way = {p: Held(way.tensor) for p, way in (self._way | new).items()}

    def saved(self, params: Iterable[Tensor]) -> list[Tensor | None]:
        """For a checkpoint: the tensor of each parameter, None where it was not moved."""
        known = map(self._known, params)
        return [None if way is None else way.tensor for way in known]

    def numbers(self) -> dict[str, Any]:
        """For a checkpoint, after :meth:`saved`: what is no tensor."""
        return {"trail_length": float(self._length), "trail_copied": self._copied}

    def load(self, params: Sequence[Tensor], saved: Sequence[Any], own: Mapping[str, Any]) -> None:
        """Take up what :meth:`saved` and :meth:`numbers` gave."""
        pairs = zip(params, saved, strict=True)
        self._way = {p: Held(t.to(p.device, p.dtype, copy=True)) for p, t in pairs if t is not None}
        self._length, self._copied = own["trail_length"], own["trail_copied"]
        self._owned = True

    def _known(self, p: Tensor) -> Held | None:
        way = self._way.get(p)
        if way is None:
            return None
        if not way.is_intact():
            self._copied = True
            return None
        # A parameter may be converted between two steps, or given another shape.
        t = way.tensor
        fits = t.shape == p.shape and (t.device, t.dtype) == (p.device, p.dtype)
        return way if fits else None


def _is_part(d: Tensor) -> bool:
    """Whether others have memory in common with it, and may write to that unseen.

    As the reducer of DistributedDataParallel does, whose gradients are parts of its buckets.
    """
    part = local(d)
    return part.untyped_storage().nbytes() != part.nbytes
