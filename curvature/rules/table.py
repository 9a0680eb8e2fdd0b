"""What a rule is, the families that carry the algebra, and the table that finds a rule by name.

An operation is y = F(x). With xdot the tangents of its inputs and yhat the cotangents of its
outputs, a rule knows J xdot, the bend D²F[xdot, xdot], and the cross term D²F(xdot, .)^T yhat.
The transposed Jacobian needs no rule: it is autograd's own node.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from curvature.graph import Call, Tensors


class Rule(ABC):
    """How one operation carries tangents, to second order.

    Tangents are given for each differentiable input, and returned for each output, in
    autograd's order; None stands for zero.

    Attributes:
        linear: whether the operation is linear in the inputs that move; then it has no bend.
        light: whether the cotangent of its first input is cheaper to compute again than to keep.
    """

    linear = False
    light = False

    def check(self, call: Call) -> None:  # noqa: B027
        """Refuse a call that this rule cannot serve, before anything is computed.

        Raises:
            NotTwiceDifferentiable: with the reason.
        """

    @abstractmethod
    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        """J xdot."""

    @abstractmethod
    def jet(self, call: Call, dots: Tensors) -> tuple[Tensors, Tensors]:
        """J xdot and the bend D²F[xdot, xdot]."""

    def adjoint(
        self, call: Call, dots: Tensors, cotangents: Tensors
    ) -> tuple[Tensors, Tensor | None]:
        """J xdot and the number <yhat, D²F[xdot, xdot]>, in at least float32."""
        outputs, bends = self.jet(call, dots)
        return outputs, inner(cotangents, bends)

    def turn(
        self, call: Call, dots: Tensors, cotangents: Tensors | None, turned: Tensors | None
    ) -> list[Tensors]:
        """How J^T yhat changes along xdot: J^T yhatdot and D²F(xdot, .)^T yhat, to be added."""
        parts = [] if turned is None else [call.pull(*turned)]
        if cotangents is not None and not self.linear:
            parts.append(self.cross(call, dots, cotangents))
        return parts

    def cross(self, call: Call, dots: Tensors, cotangents: Tensors) -> Tensors:
        """D²F(xdot, .)^T yhat: half the gradient of <yhat, D²F[xdot, xdot]> in xdot."""
        with torch.enable_grad():
            moving = [d.detach().requires_grad_() for d in dots if d is not None]
            leaves = iter(moving)
            _, bends = self.jet(call, tuple(d if d is None else next(leaves) for d in dots))
            number = inner(cotangents, bends)
            if number is None or not number.requires_grad:
                return (None,) * len(dots)
            grads = iter(torch.autograd.grad(number / 2, moving, allow_unused=True))
        return tuple(None if d is None else next(grads) for d in dots)


class Linear(Rule):
    """F is linear: the tangent is F of the tangents."""

    linear = True

    def __init__(self, apply: Callable[..., Any]) -> None:
        self._apply = apply

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        return _as_tuple(self._apply(call, *dots))

    def jet(self, call: Call, dots: Tensors) -> tuple[Tensors, Tensors]:
        outputs = self.tangent(call, dots)
        return outputs, (None,) * len(outputs)


class Elementwise(Rule):
    """y = f(x) entry by entry. The Jacobian is diagonal, so J xdot is autograd's own J^T xdot.

    Args:
        bend: f''(x) xdot, given the call, xdot and ydot = f'(x) xdot; or None where f'' is zero.
    """

    light = True

    def __init__(self, bend: Callable[[Call, Tensor, Tensor], Tensor] | None) -> None:
        self._bend = bend
        self.linear = bend is None

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        return (call.pull(dots[0])[0],)

    def jet(self, call: Call, dots: Tensors) -> tuple[Tensors, Tensors]:
        (x,), (y,) = dots, self.tangent(call, dots)
        if self._bend is None:
            return (y,), (None,)
        assert x is not None
        assert y is not None
        return (y,), (self._bend(call, x, y).mul_(x),)

    def cross(self, call: Call, dots: Tensors, cotangents: Tensors) -> Tensors:
        (x,), (y,), (cotangent,) = dots, self.tangent(call, dots), cotangents
        if self._bend is None or cotangent is None:
            return (None,)
        assert x is not None
        assert y is not None
        return (self._bend(call, x, y).mul_(cotangent),)


Rows = slice | EllipsisType

_BLOCK = 2**20  # entries of a product at a time, so that sums over them stay in the cache


class Bilinear(Rule):
    """y = B(a, b), plus an input that is only added: the bend is 2 B(adot, bdot).

    Args:
        left, right: names of the saved a and b.
        product: B(call, a, b).
        transposed: (call, a, b, yhat) -> the cotangents of a and b.
        inputs: where a and b stand among the inputs.
        added: (call, cdot) -> what a moving third input adds to ydot.
        rowwise: whether the rows of y are those of a, each times b, and the same is added to all.
    """

    def __init__(
        self,
        left: str,
        right: str,
        product: Callable[[Call, Tensor, Tensor], Tensor],
        transposed: Callable[[Call, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
        *,
        inputs: tuple[int, int] = (0, 1),
        added: Callable[[Call, Tensor], Tensor] | None = None,
        rowwise: bool = False,
    ) -> None:
        self._left, self._right, self._inputs = left, right, inputs
        self._product, self._transposed, self._added = product, transposed, added
        self._rowwise = rowwise

    def _split(self, dots: Tensors) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        a, b = self._inputs
        rest = [d for i, d in enumerate(dots) if i not in self._inputs]
        return dots[a], dots[b], rest[0] if rest else None

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        a, b, c = self._split(dots)
        out, _ = self._products(call, a, b, bend=False)
        return (self._plus(call, out, c),)

    def jet(self, call: Call, dots: Tensors) -> tuple[Tensors, Tensors]:
        out, halves = self._with_half(call, dots, lambda _, half: half.mul_(2))
        return (out,), (_joined(halves) if halves else None,)

    def adjoint(
        self, call: Call, dots: Tensors, cotangents: Tensors
    ) -> tuple[Tensors, Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return self.tangent(call, dots), None
        out, halves = self._with_half(
            call, dots, lambda rows, half: _real_dot(cotangent[rows], half)
        )
        return (out,), 2 * sum(halves[1:], halves[0]) if halves else None

    def _with_half(
        self, call: Call, dots: Tensors, use: Callable[[Rows, Tensor], Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """ydot, and what ``use`` makes of B(adot, bdot), half of the bend, given with its rows."""
        a, b, c = self._split(dots)
        known = None if call.product is None else call.product()
        if known is not None and a is not None and b is not None:
            return self._from_known(call, a, b, c, *known, use)
        out, half = self._products(call, a, b, bend=True)
        return self._plus(call, out, c), [] if half is None else [use(..., half)]

    def _from_known(
        self,
        call: Call,
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        y: Tensor,
        bias: Tensor | None,
        use: Callable[[Rows, Tensor], Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """One product instead of two for B(a, B) + B(A, b), where y = B(A, B) + bias is known.

        B(A + t a, B + t b) = B(A, B) + t (B(A, b) + B(a, B)) + t² B(a, b), as in Karatsuba's
        product. With t² = ‖A‖ ‖B‖ / (‖a‖ ‖b‖) the rounding of the difference is at most that of
        the two products, since the geometric mean of their sizes is at most the larger.
        """
        A, B = getattr(call, self._left), getattr(call, self._right)
        y = y.reshape(call.shape())
        t = _balance([A, B], [a, b])
        moved = torch.addcmul(B, b, t)
        step = max(1, _BLOCK // y[:1].numel()) if self._rowwise else len(y)
        outs, used = [], []
        for start in range(0, len(y), step):
            rows = slice(start, start + step)
            half = self._product(call, a[rows], b)
            out = self._product(call, torch.addcmul(A[rows], a[rows], t), moved).sub_(y[rows])
            self._plus(call, out, bias).div_(t).addcmul_(half, t, value=-1)
            outs.append(self._plus(call, out, c))
            used.append(use(rows, half))
        return _joined(outs), used

    def _plus(self, call: Call, out: Tensor | None, c: Tensor | None) -> Tensor:
        """Add the tangent of the input that is only added."""
        if c is not None:
            assert self._added is not None
            third = self._added(call, c)
            out = third.expand(call.shape()) if out is None else out.add_(third)
        assert out is not None
        return out

    def _products(
        self, call: Call, a: Tensor | None, b: Tensor | None, *, bend: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """B(a, B) + B(A, b), and B(a, b), in the dtype of :func:`products_in`."""
        dtype = _product_dtype.get()
        kept = next((t.dtype for t in (a, b) if t is not None), None)
        out = half = None
        if dtype is not None:
            a, b = (None if t is None else t.to(dtype) for t in (a, b))
        if a is not None:
            out = self._product(call, a, getattr(call, self._right).to(a.dtype))
        if b is not None:
            other = self._product(call, getattr(call, self._left).to(b.dtype), b)
            out = other if out is None else out.add_(other)
        if bend and a is not None and b is not None:
            half = self._product(call, a, b)
        if dtype is None:
            return out, half
        return None if out is None else out.to(kept), None if half is None else half.to(kept)

    def turn(
        self, call: Call, dots: Tensors, cotangents: Tensors | None, turned: Tensors | None
    ) -> list[Tensors]:
        parts = super().turn(call, dots, cotangents, turned)
        if len(parts) < 2:
            return parts
        pulled, crossed = parts
        return [
            tuple(
                a if b is None else b if a is None else b.add_(a)
                for a, b in zip(pulled, crossed, strict=True)
            )
        ]

    def cross(self, call: Call, dots: Tensors, cotangents: Tensors) -> Tensors:
        result: list[Tensor | None] = [None] * len(dots)
        a, b, _ = self._split(dots)
        (y,) = cotangents
        if a is not None and b is not None and y is not None:
            left, right = self._inputs
            result[left], result[right] = self._transposed(call, a, b, y)
        return tuple(result)


def _joined(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _balance(factors: list[Tensor], moves: list[Tensor]) -> Tensor:
    """The power of two next to sqrt(‖A‖ ‖B‖ / (‖a‖ ‖b‖)); a tensor that is zero has no say."""
    norms = torch.stack(torch._foreach_norm([*factors, *moves])).log2()
    ratios = norms[:2] - norms[2:]
    ratios = torch.where(ratios.isfinite(), ratios, ratios.flip(0))
    return ratios.nan_to_num(0, 0, 0).mean().round().clamp(-60, 60).exp2()


class General(Rule):
    """Any other operation.

    Args:
        push: (call, dots, bend) -> ydot, or with ``bend`` the pair of ydot and D²F[xdot, xdot];
            each a tensor, None, or a tuple of these for several outputs. Written with operations
            that autograd differentiates, it serves the cross term too.
        adjoint: (call, dots, cotangents) -> ydot and <yhat, D²F[xdot, xdot]>; where there is a
            cheaper way than to form the bend.
        turn: (call, dots, cotangents, turned) -> J^T turned and the cross term, added; where
            there is a cheaper way than these two one by one. ``turned`` may hold None.
        light: see :class:`Rule`.
    """

    def __init__(
        self,
        push: Callable[[Call, Tensors, bool], Any],
        *,
        light: bool = False,
        adjoint: Callable[[Call, Tensors, Tensors], tuple[Tensor, Tensor]] | None = None,
        turn: Callable[[Call, Tensors, Tensors, Tensors], Tensors] | None = None,
    ) -> None:
        self._push, self._adjoint, self._turn, self.light = push, adjoint, turn, light

    def adjoint(
        self, call: Call, dots: Tensors, cotangents: Tensors
    ) -> tuple[Tensors, Tensor | None]:
        if self._adjoint is None:
            return super().adjoint(call, dots, cotangents)
        output, number = self._adjoint(call, dots, cotangents)
        return (output,), number

    def turn(
        self, call: Call, dots: Tensors, cotangents: Tensors | None, turned: Tensors | None
    ) -> list[Tensors]:
        if self._turn is None or cotangents is None:
            return super().turn(call, dots, cotangents, turned)
        return [self._turn(call, dots, cotangents, turned or (None,) * len(cotangents))]

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        return _as_tuple(self._push(call, dots, False))

    def jet(self, call: Call, dots: Tensors) -> tuple[Tensors, Tensors]:
        outputs, bends = self._push(call, dots, True)
        return _as_tuple(outputs), _as_tuple(bends)


def _as_tuple(value: Any) -> Tensors:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def inner(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensor | None:
    """The real inner product of two lists of tensors, in which None is zero."""
    pairs = zip(left, right, strict=False)
    numbers = [_real_dot(a, b) for a, b in pairs if a is not None and b is not None]
    return sum(numbers[1:], numbers[0]) if numbers else None


def _real_dot(a: Tensor, b: Tensor) -> Tensor:
    if a.layout != torch.strided or b.layout != torch.strided:
        return _real_dot(a.to_dense(), b.to_dense())
    if a.is_complex():
        return _real_dot(torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj()))
    if a.dtype in (torch.float16, torch.bfloat16):
        return _real_dot(a.float(), b.float())
    flat = a.reshape(-1), b.to(a.dtype).reshape(-1)
    if a.numel() <= _PIECE:
        return torch.dot(*flat)
    # In pieces: a single sum of millions of terms would round away several digits.
    pieces = zip(*(torch.split(t, _PIECE) for t in flat), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in pieces]).sum(dtype=torch.float64).to(a.dtype)


_PIECE = 2**18


_TABLE: dict[str | type, Rule] = {}
_product_dtype: ContextVar[torch.dtype | None] = ContextVar("product_dtype", default=None)


@contextmanager
def products_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, rules multiply matrices in this dtype, and round the result to the tangents'."""
    token = _product_dtype.set(dtype)
    try:
        yield
    finally:
        _product_dtype.reset(token)


def multiply(product: Callable[..., Tensor], call: Call, a: Tensor, b: Tensor) -> Tensor:
    """``product(call, a, b)`` in the dtype that :func:`products_in` asks for."""
    dtype = _product_dtype.get()
    if dtype is None:
        return product(call, a, b)
    return product(call, a.to(dtype), b.to(dtype)).to(a.dtype)


def register(name: str | type, rule: Rule) -> None:
    """Let ``rule`` serve the calls of this name, or of this class of Python functions.

    Raises:
        ValueError: there is a rule for it already.
    """
    if name in _TABLE:
        raise ValueError(f"there is a rule for {name} already")
    _TABLE[name] = rule


def linear(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register F of the tangents as a :class:`Linear` rule."""
    return _registering(Linear, names)


def elementwise(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register f''(x) xdot as an :class:`Elementwise` rule."""
    return _registering(Elementwise, names)


def general(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ydot and bend as a :class:`General` rule."""
    return _registering(General, names)


def _registering(
    family: type[Rule], names: Sequence[str]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            register(name, family(function))  # type: ignore[call-arg]
        return function

    return decorate


def find(call: Call) -> Rule | None:
    """The rule for a call, if there is one."""
    function = call.function
    return _TABLE.get(call.name if function is None else function) or _TABLE.get(call.name)


def registered() -> list[str | type]:
    """The names and classes that have a rule."""
    return list(_TABLE)
