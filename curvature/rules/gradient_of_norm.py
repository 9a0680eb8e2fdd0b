"""The gradients of layer and batch normalisation, of which a loss may be made in turn.

Autograd's own derivative of their derivative is wrong without an error: it takes the statistics
that the forward pass saved for constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from curvature.audit import is_wrong_twice
from curvature.graph import Call, Tensors
from curvature.rules.local import LocalDoubleBackward
from curvature.rules.rule import Rule
from curvature.rules.table import register

Shape = Sequence[int]


class _Gradient(LocalDoubleBackward):
    """The cotangents of x, w and b of y = w z + b as functions of those of y, of x and of w.

    With z = (x - mean) s and s² = 1 / (var + eps)::

        x^ = s (w y^ - mean(w y^) - z mean(z w y^)),   w^ = sum(z y^),   b^ = sum(y^)

    Args:
        places: of y^, x and w among the inputs.
        read: of a call s and the shape of w, so that they broadcast against x, and the
            dimensions over which x is normalised.
    """

    def __init__(
        self,
        places: tuple[int, int, int],
        read: Callable[[Call], tuple[Tensor, Shape, list[int]]],
    ) -> None:
        super().__init__()
        self._places, self._read = places, read

    def of(self, call: Call) -> Rule | None:
        return self if is_wrong_twice(call.node) else None

    def check(self, call: Call) -> None:
        """The formula is differentiable."""

    def differentiable(self, call: Call) -> Call:
        s, shape, dims = self._read(call)
        # eps, which is not saved, and what rounding has made of s.
        rest = s**-2 - call.input.to(s.dtype).var(dims, correction=0, keepdim=True)

        def gradient(y: Tensor, x: Tensor, w: Tensor | None = None) -> Tensors:
            y, x = y.to(rest.dtype), x.to(rest.dtype)
            centred = x - x.mean(dims, True)
            s = (centred.square().mean(dims, True) + rest).rsqrt()
            z = centred * s
            back = y if w is None else y * w.to(y.dtype).view(shape)
            back = back - back.mean(dims, True) - z * (z * back).mean(dims, True)
            return s * back, (z * y).sum_to_size(shape), y.sum_to_size(shape)

        values = zip(self._places, (call.grad_out, call.input, call.weight), strict=True)
        return _Recomputed(call, gradient, {k: x for k, x in values if x is not None})


class _Recomputed(Call):
    """A call as a function of the values that it saved of its inputs, by their places."""

    __slots__ = ("_function", "_values")

    def __init__(
        self, call: Call, function: Callable[..., Tensors], values: dict[int, Tensor]
    ) -> None:
        for name in Call.__slots__:
            setattr(self, name, getattr(call, name))
        self._function = function
        self._values = {
            place: value.detach().requires_grad_(call.inputs[place] is not None)
            for place, value in values.items()
        }
        edges = {k: get_gradient_edge(x) for k, x in self._values.items() if x.requires_grad}
        self.inputs = tuple(
            (edges[k].node, edges[k].output_nr) if k in edges else None
            for k in range(len(call.inputs))
        )

    def pull(self, *cotangents: Tensor | None) -> Tensors:
        moving = {place: x for place, x in self._values.items() if x.requires_grad}
        with torch.enable_grad():
            outputs = self._function(*self._values.values())
            pairs = [
                (y, c.to(y.dtype).view_as(y))
                for y, c in zip(outputs, cotangents, strict=True)
                if y is not None and c is not None
            ]
            pulled = torch.autograd.grad(
                [y for y, _ in pairs],
                list(moving.values()),
                [c for _, c in pairs],
                create_graph=True,
                allow_unused=True,
            )
        by_place = dict(zip(moving, pulled, strict=True))
        return tuple(by_place.get(place) for place in range(len(self.inputs)))


def _layer_norm(call: Call) -> tuple[Tensor, Shape, list[int]]:
    shape = call.normalized_shape
    return call.rstd, shape, list(range(-len(shape), 0))


def _batch_norm(call: Call) -> tuple[Tensor, Shape, list[int]]:
    x = call.input
    shape = [1, x.shape[1], *[1] * (x.ndim - 2)]
    return call.save_invstd.view(shape), shape, [k for k in range(x.ndim) if k != 1]


register("NativeLayerNormBackwardBackward0", _Gradient((0, 1, 4), _layer_norm))
register("NativeBatchNormBackwardBackward0", _Gradient((0, 1, 2), _batch_norm))
