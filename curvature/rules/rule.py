"""What a rule is: how one operation carries tangents and cotangents, to second order.

An operation is y = F(x). With xdot the tangents of its inputs and yhat the cotangents of its
outputs, a rule knows J xdot, the bend D²F[xdot, xdot], and the cross term D²F(xdot, .)^T yhat.
The transposed Jacobian needs no rule: it is autograd's own node.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.errors import NotTwiceDifferentiable
from curvature.graph import Call, Tensors

IN_CACHE = 2**18  # entries at a time, with which temporaries stay in the cache


class Rule(ABC):
    """How one operation carries tangents, to second order.

    Tangents are given for each differentiable input, and returned for each output, in
    autograd's order; None stands for zero.

    Attributes:
        linear: whether the operation is linear in the inputs that move; then it has no bend.
        rematerialised: whether cotangents of its inputs, which cost next to nothing, are computed
            again rather than kept.
        needs_sums: whether of its own cotangent the sums along ``call.dim`` are enough.
    """

    linear = False
    rematerialised = False
    needs_sums = False

    def of(self, call: Call) -> Rule | None:
        """The rule for this very call; None where its own double backward has to serve."""
        return self

    def check(self, call: Call) -> None:  # noqa: B027
        """Refuse a call that this rule cannot serve, before anything is computed.

        Raises:
            NotTwiceDifferentiable: with the reason.
        """

    @abstractmethod
    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        """J xdot."""

    @abstractmethod
    def jet(self, call: Call, dots: Tensors, ddots: Tensors) -> tuple[Tensors, Tensors]:
        """J xdot, and the second derivative J xddot + D²F[xdot, xdot]."""

    def adjoint(
        self, call: Call, dots: Tensors, cotangents: Tensors
    ) -> tuple[Tensors, Tensor | None]:
        """J xdot and the number <yhat, D²F[xdot, xdot]>, in at least float32."""
        outputs, bends = self.jet(call, dots, (None,) * len(dots))
        return outputs, inner(cotangents, bends)

    def pull_sums(self, call: Call, cotangents: Tensors, dim: int) -> Tensors:
        """J^T yhat, or what has the same sums along ``dim`` of the input with less work."""
        return call.pull(*cotangents)

    def tangent_with_residual(self, call: Call, dots: Tensors) -> tuple[Tensors, Any]:
        """J xdot, and whatever :meth:`pullback_tangent` can use again."""
        return self.tangent(call, dots), None

    def pullback_tangent(
        self,
        call: Call,
        dots: Tensors,
        cotangents: Tensors,
        cotangent_dots: Tensors,
        residual: Any,
    ) -> Tensors:
        """How J^T yhat changes along xdot: J^T yhatdot + D²F(xdot, .)^T yhat.

        Args:
            cotangents: yhat; an operation that is linear has none.
            cotangent_dots: yhatdot.
            residual: what :meth:`tangent_with_residual` gave.
        """
        change: Tensors = (None,) * len(dots)
        if any(t is not None for t in cotangent_dots):
            change = call.pull(*cotangent_dots)
        if any(t is not None for t in cotangents):
            change = tuple(map(add, change, self.cross(call, dots, cotangents)))
        return change

    def cross(self, call: Call, dots: Tensors, cotangents: Tensors) -> Tensors:
        """D²F(xdot, .)^T yhat: half the gradient of <yhat, D²F[xdot, xdot]> in xdot."""
        with torch.enable_grad():
            moving = [d.detach().requires_grad_() for d in dots if d is not None]
            leaves = iter(moving)
            tracked = tuple(d if d is None else next(leaves) for d in dots)
            _, bends = self.jet(call, tracked, (None,) * len(dots))
            number = inner(cotangents, bends)
            if number is None or (not number.requires_grad and not bool(number)):
                return (None,) * len(dots)
            if not number.requires_grad:
                raise NotTwiceDifferentiable(
                    f"the rule of {call.name} gives a bend without graph, so that a Hessian-vector "
                    "product would lack it: write the rule with operations that autograd "
                    "differentiates"
                )
            grads = iter(torch.autograd.grad(number / 2, moving, allow_unused=True))
        return tuple(None if d is None else next(grads) for d in dots)

    def plus_tangent(self, call: Call, ddots: Tensors, bends: Tensors) -> Tensors:
        """J xddot + the bends."""
        if all(d is None for d in ddots):
            return bends
        return tuple(map(add, self.tangent(call, ddots), bends))


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None is zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def against(x: Tensor, reduced: Tensor, dims: Sequence[int]) -> Tensor:
    """What x was reduced to over these dimensions, in a shape that broadcasts against x."""
    gone = {dim % max(1, x.ndim) for dim in dims}
    return reduced.view([1 if k in gone else n for k, n in enumerate(x.shape)])


def inner(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensor | None:
    """The real inner product of two lists of tensors, in which None is zero."""
    pairs = zip(left, right, strict=False)
    numbers = [real_dot(a, b) for a, b in pairs if a is not None and b is not None]
    return sum(numbers[1:], numbers[0]) if numbers else None


def real_dot(a: Tensor, b: Tensor) -> Tensor:
    """The real inner product of two tensors, in at least float32."""
    if a.layout != torch.strided or b.layout != torch.strided:
        return real_dot(a.to_dense(), b.to_dense())
    if a.is_complex():
        return real_dot(torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj()))
    if a.dtype in (torch.float16, torch.bfloat16):
        return real_dot(a.float(), b.float())
    # What is expanded would be summed one by one, with all the rounding of that.
    flat = a.reshape(-1).contiguous(), b.to(a.dtype).reshape(-1).contiguous()
    if a.numel() <= _PIECE:
        return torch.dot(*flat)
    # In pieces: a single sum of millions of terms would round away several digits.
    pieces = zip(*(torch.split(t, _PIECE) for t in flat), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in pieces]).sum(dtype=torch.float64).to(a.dtype)


_PIECE = 2**18
