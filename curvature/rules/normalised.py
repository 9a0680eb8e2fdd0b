"""What normalisation makes of its input, and the Jacobian of that."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from curvature.graph import Call


class Normalised(ABC):
    """y = w z + b with z = (x - mean) / s and s² = var + eps: one call with its statistics.

    Attributes:
        rstd: 1 / s, in a shape that broadcasts against x, as ``weight``, which is w or None.
        count: of what is normalised together.
        shape: of x, as the methods take it.
    """

    rstd: Tensor
    weight: Tensor | None
    count: int
    shape: torch.Size

    @cached_property
    @abstractmethod
    def z(self) -> Tensor:
        """The normalised input."""

    @abstractmethod
    def shaped(self, t: Tensor | None) -> Tensor | None:
        """A weight, or its tangent, so that it broadcasts against x; in the dtype of z."""

    @abstractmethod
    def project(self, t: Tensor) -> Tensor:
        """(t - mean(t) - z mean(z t)) / s, the Jacobian of z, which is symmetric."""

    def moved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z' and s' = mean(z x')."""
        return self.project(x), self.mean(self.z, x)

    @abstractmethod
    def mean(self, a: Tensor, b: Tensor) -> Tensor:
        """The mean of a b over what is normalised."""

    def rest(self) -> Tensor:
        """1 - mean(z²), which is not zero for the eps in s."""
        return 1 - self.mean(self.z, self.z)

    @abstractmethod
    def sums(self, a: Tensor, b: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The sums of a b weight over what is normalised, and the sum of a b w over all."""

    @abstractmethod
    def over_weight(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum of a b, in the shape of the weight."""

    @abstractmethod
    def over_bias(self, a: Tensor) -> Tensor:
        """The sum of a, in the shape of the bias."""

    def weighted(self, t: Tensor) -> Tensor:
        return t.clone() if self.weight is None else t * self.weight

    def scaled(self, moved: Tensor | None, w: Tensor | None, b: Tensor | None) -> Tensor:
        """w z' + w' z + b'."""
        out = None if moved is None else self.weighted(moved)
        if w is not None:
            out = self.z * w if out is None else out.addcmul_(self.z, w)
        if b is not None:
            out = b.expand(self.shape) if out is None else out.add_(b)
        assert out is not None
        return out

    def rates(self, moved: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
        """s' / s and s'' / s, given z' and s'.

        s s'' = var(x') - s'², in which x' - mean(x') = s z' + s' z, and
        mean(z z') = (1 - mean(z²)) s' / s.
        """
        slope = along * self.rstd
        return slope, self.mean(moved, moved) + slope**2 * self.rest()


class LayerNormalised(Normalised):
    """The last dimensions of each sample."""

    def __init__(self, call: Call) -> None:
        self._average, self.rstd, self._shape = call.result1, call.result2, call.normalized_shape
        # The statistics of half precision are in single.
        self._x = call.input.to(self.rstd.dtype)
        self.shape = self._x.shape
        self.weight = self.shaped(call.weight)
        self._dims = list(range(-len(self._shape), 0))
        self.count = math.prod(self._shape)

    @cached_property
    def z(self) -> Tensor:
        return (self._x - self._average).mul_(self.rstd)

    @cached_property
    def _buffer(self) -> Tensor:
        # For all entrywise products: fresh ones would cost more than the arithmetic.
        return torch.empty_like(self.z)

    def shaped(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(self.rstd.dtype)

    def project(self, t: Tensor) -> Tensor:
        return torch.ops.aten.native_layer_norm_backward(
            t, self._x, self._shape, self._average, self.rstd, None, None, (True, False, False)
        )[0]

    def mean(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mul(a, b, out=self._buffer).mean(self._dims, True)

    def sums(self, a: Tensor, b: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor | None]:
        t = torch.mul(a, b, out=self._buffer).reshape(self.rstd.numel(), self.count)
        extra = None if w is None else torch.mv(t, w.reshape(-1)).sum()
        sums = t.sum(1) if self.weight is None else torch.mv(t, self.weight.reshape(-1))
        return sums.view_as(self.rstd), extra

    def over_weight(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum_to_size(self._shape)

    def over_bias(self, a: Tensor) -> Tensor:
        return a.sum_to_size(self._shape)


class BatchNormalised(Normalised):
    """With the statistics of the batch, one set per channel."""

    def __init__(self, call: Call) -> None:
        self._average, self._deviation, self._eps = call.result1, call.result2, call.eps
        # The statistics of half precision are in single.
        self._x = call.input.to(self._deviation.dtype)
        self.shape = self._x.shape
        self.rstd = channels(self._deviation, self._x)
        self.weight = self.shaped(call.weight)
        self._zeros, self._ones = torch.zeros_like(self._average), torch.ones_like(self._average)
        self.count = self._x.numel() // max(1, len(self._average))

    @cached_property
    def z(self) -> Tensor:
        return (self._x - channels(self._average, self._x)).mul_(self.rstd)

    def shaped(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else channels(t.to(self.rstd.dtype), self._x)

    def project(self, t: Tensor) -> Tensor:
        return self.moved(t)[0]

    def moved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = (True, True, False)
        moved, along = self._kernel(x, self._x, self._average, self._deviation, both)
        return moved, along / self.count

    def mean(self, a: Tensor, b: Tensor) -> Tensor:
        return self._sum(a, b) / self.count

    def rest(self) -> Tensor:
        return self._eps * self.rstd**2

    def sums(self, a: Tensor, b: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor | None]:
        t = self._sum(a, b)
        return self.weighted(t), None if w is None else (t * w).sum()

    def over_weight(self, a: Tensor, b: Tensor) -> Tensor:
        return self._sum(a, b).flatten()

    def over_bias(self, a: Tensor) -> Tensor:
        return a.sum([k for k in range(a.ndim) if k != 1])

    def _sum(self, a: Tensor, b: Tensor) -> Tensor:
        return self._kernel(a, b, self._zeros, self._ones, (False, True, False))[1]

    def _kernel(
        self, t: Tensor, x: Tensor, average: Tensor, rstd: Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor]:
        """The projection of t, and by channel the sum of t (x - average) rstd."""
        # It wants one memory format.
        back, along, _ = torch.ops.aten.native_batch_norm_backward(
            t.contiguous(), x.contiguous(), None, None, None, average, rstd, True, self._eps, mask
        )
        return back, channels(along, x)


class GroupNormalised(Normalised):
    """Groups of channels of each sample; tensors as (sample, group, channel of it, place)."""

    def __init__(self, call: Call) -> None:
        self._sizes = call.N, call.C, call.HxW, call.group
        n, c, hw, group = self._sizes
        self.shape = torch.Size((n, group, c // group, hw))
        self._average, self._deviation = call.result1, call.result2
        # The statistics of half precision are in single.
        # The kernel takes another memory format for this one.
        self._x = call.input.to(self._deviation.dtype).contiguous().view(self.shape)
        self.rstd = self._deviation.view(n, group, 1, 1)
        self.weight = self.shaped(call.weight)
        self.count = c // group * hw

    @cached_property
    def z(self) -> Tensor:
        return (self._x - self._average.view_as(self.rstd)).mul_(self.rstd)

    def shaped(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(self.rstd.dtype).view(1, *self.shape[1:3], 1)

    def project(self, t: Tensor) -> Tensor:
        return torch.ops.aten.native_group_norm_backward(
            t.contiguous(),
            self._x,
            self._average,
            self._deviation,
            None,
            *self._sizes,
            (True, False, False),
        )[0].view(self.shape)

    def mean(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).mean((2, 3), True)

    def sums(self, a: Tensor, b: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor | None]:
        t = (a * b).sum(3, True)
        return self.weighted(t).sum(2, True), None if w is None else (t * w).sum()

    def over_weight(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((0, 3)).flatten()

    def over_bias(self, a: Tensor) -> Tensor:
        return a.sum((0, 3)).flatten()


def channels(t: Tensor, x: Tensor) -> Tensor:
    return t.view(1, -1, *[1] * (x.ndim - 2))
