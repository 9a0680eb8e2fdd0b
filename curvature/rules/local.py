"""Rules that ask autograd: the double backward of one operation, cut off from its neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from curvature.audit import obstacle_of
from curvature.errors import NotTwiceDifferentiable, tells_no_second_derivative
from curvature.graph import Call, Tensors
from curvature.nodes import nodes_behind
from curvature.rules.rule import Rule, inner


class Transposition(Rule):
    """A linear operation, as the transpose of its transposed Jacobian."""

    linear = True

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        return _anywhere(call, dots).tangent()

    def jet(self, call: Call, dots: Tensors, ddots: Tensors) -> tuple[Tensors, Tensors]:
        outputs = self.tangent(call, dots)
        return outputs, self.plus_tangent(call, ddots, (None,) * len(outputs))


TRANSPOSED = Transposition()


class LocalDoubleBackward(Rule):
    """Any operation whose backward pass autograd differentiates.

    With G(u) = J^T u and h = <G(u), xdot>, the gradient of h in u is J xdot, and its gradient
    in the inputs, at u = yhat, is the cross term D²F(xdot, .)^T yhat.
    """

    def __init__(self) -> None:
        self._proved: set[str] = set()

    def check(self, call: Call) -> None:
        reason = obstacle_of(call.node)
        if reason is not None:
            raise _refusal(call, reason)
        # A Python function's name does not tell which one it is.
        if call.name not in self._proved or call.is_python:
            local = _Local(call, call.still(), call.zeros())
            local.derivatives()
            if any(g is not None and bool(g.any()) for g in local.pulled):
                raise _refusal(call, "its backward pass gives a gradient for a cotangent of zero")
            if call.is_python and not _is_linear(call):
                raise _refusal(call, "its backward pass is not linear in the cotangent")
            self._proved.add(call.name)

    def differentiable(self, call: Call) -> Call:
        """A call with the same values whose backward pass autograd differentiates rightly."""
        return call

    def tangent(self, call: Call, dots: Tensors) -> Tensors:
        return _anywhere(self.differentiable(call), dots).tangent()

    def jet(self, call: Call, dots: Tensors, ddots: Tensors) -> tuple[Tensors, Tensors]:
        local = _anywhere(self.differentiable(call), dots)
        outputs, crosses = local.derivatives(create_graph=True)
        with torch.enable_grad():
            number = inner(crosses, dots)
        bends: Tensors = (None,) * len(outputs)
        if number is not None and number.requires_grad:
            bends = local.differentiate(number, local.u)
        return _detached(outputs), self.plus_tangent(call, ddots, bends)

    def adjoint(
        self, call: Call, dots: Tensors, cotangents: Tensors
    ) -> tuple[Tensors, Tensor | None]:
        outputs, crosses = self._at(call, dots, cotangents).derivatives()
        return outputs, inner(crosses, dots)

    def cross(self, call: Call, dots: Tensors, cotangents: Tensors) -> Tensors:
        return self._at(call, dots, cotangents).derivatives()[1]

    def _at(self, call: Call, dots: Tensors, cotangents: Tensors) -> _Local:
        return _Local(self.differentiable(call), dots, _filled(call, cotangents))


class _Local:
    """h(u, x) = <J(x)^T u, xdot> of one call, with a graph that ends at the call's inputs."""

    def __init__(self, call: Call, dots: Tensors, u: Sequence[Tensor | None]) -> None:
        self._call, self._dots = call, dots
        self.u = [None if y is None else y.detach().requires_grad_() for y in u]
        with torch.enable_grad(), _refusing(call):
            self.pulled = call.pull(*self.u)
            self._check(self.pulled)
            self._h = inner(self.pulled, dots)

    def tangent(self) -> Tensors:
        """J xdot."""
        if self._h is None or not self._h.requires_grad:
            return (None,) * len(self.u)
        return self.differentiate(self._h, self.u)

    def derivatives(self, *, create_graph: bool = False) -> tuple[Tensors, Tensors]:
        """The gradient of h in u, J xdot, and in each input, the cross term."""
        n, inputs = len(self.u), self._call.inputs
        if self._h is None or not self._h.requires_grad:
            return (None,) * n, (None,) * len(inputs)
        edges = self._call.edges
        grads = self.differentiate(self._h, [*self.u, *edges.values()], create_graph=create_graph)
        # What comes in by several inputs is differentiated as one.
        crosses = dict(zip(edges, grads[n:], strict=True))
        return grads[:n], tuple(None if e is None else crosses.pop(e, None) for e in inputs)

    def differentiate(
        self,
        output: Tensor,
        inputs: Sequence[Any],
        *,
        create_graph: bool = False,
    ) -> Tensors:
        moving = [x for x in inputs if x is not None]
        with _refusing(self._call), _cut({node for node, _ in self._call.edges}):
            grads = torch.autograd.grad(
                output, moving, retain_graph=True, create_graph=create_graph, allow_unused=True
            )
        if create_graph:
            self._check_graph(grads)
        rest = iter(grads)
        return tuple(None if x is None else next(rest) for x in inputs)

    def _check(self, pulled: Tensors) -> None:
        """Refuse a J^T u whose derivative would be wrong without an error."""
        for i, (cotangent, dot) in enumerate(zip(pulled, self._dots, strict=True)):
            if cotangent is None or dot is None or cotangent.requires_grad:
                continue
            if bool(cotangent.any()) or not self._is_zero(i):
                raise _refusal(self._call, "its backward pass returns a gradient without graph")
        self._check_graph(pulled)

    def _check_graph(self, tensors: Tensors) -> None:
        for node in nodes_behind(tensors, {node for node, _ in self._call.edges}):
            name = node.name()
            if name == "torch::autograd::Error":
                raise _refusal(self._call, "it is marked once_differentiable")
            if name == "torch::autograd::AccumulateGrad" and not any(
                node.variable is u  # type: ignore[attr-defined]
                for u in self.u
            ):
                raise _refusal(self._call, "its backward pass uses a tensor that is no input of it")

    def _is_zero(self, i: int) -> bool:
        # With u = 0 every J^T u is zero: only another u tells.
        with torch.no_grad():
            cotangent = self._call.pull(*map(_ones_like, self.u))[i]
        return cotangent is None or not bool(cotangent.any())


@torch.no_grad()
def _is_linear(call: Call) -> bool:
    """Whether twice the cotangents pull back to twice as much."""
    once = list(map(_ones_like, call.zeros()))
    twice = [None if u is None else 2 * u for u in once]
    pairs = zip(call.pull(*once), call.pull(*twice), strict=True)
    # By a function that adds up in any order, not to the last digit.
    return all(
        (a is None) == (b is None)
        and (a is None or b is None or torch.allclose(2 * a, b, rtol=1e-3, equal_nan=True))
        for a, b in pairs
    )


def _anywhere(call: Call, dots: Tensors) -> _Local:
    """At some u, since h is linear in it."""
    try:
        # Not at 0, where a formula that takes the logarithm of u has no derivative.
        return _Local(call, dots, list(map(_ones_like, call.zeros())))
    except NotTwiceDifferentiable:
        raise
    except RuntimeError:
        # Eigenvectors allow only cotangents of losses that do not see their phase; 0 is one.
        return _Local(call, dots, call.zeros())


@contextmanager
def _refusing(call: Call) -> Iterator[None]:
    try:
        yield
    except NotTwiceDifferentiable:
        raise
    except RuntimeError as error:
        if not tells_no_second_derivative(error):
            raise
        raise _refusal(call, str(error).splitlines()[0].rstrip(".")) from error


def _refusal(call: Call, reason: str) -> NotTwiceDifferentiable:
    attention = (
        "Compute attention inside sdpa_kernel(SDPBackend.MATH) of torch.nn.attention, "
        if "scaled_dot_product" in reason
        else "Replace that operation by others, "
    )
    return NotTwiceDifferentiable(
        f"PyTorch cannot differentiate {call.name} twice: {reason}. {attention}register a rule "
        "for it (curvature.register_rule), or use curvature.fit, which needs only forward passes."
    )


def _ones_like(t: Tensor | None) -> Tensor | None:
    return None if t is None else torch.ones_like(t)


def _filled(call: Call, cotangents: Tensors) -> list[Tensor | None]:
    return [
        zero if cotangent is None else cotangent
        for zero, cotangent in zip(call.zeros(), cotangents, strict=True)
    ]


def _detached(tensors: Tensors) -> Tensors:
    return tuple(None if t is None else t.detach() for t in tensors)


@contextmanager
def _cut(nodes: set[Node]) -> Iterator[None]:
    """Inside, a derivative that reaches one of the nodes does not go on to its parents.

    Where one input of a call is computed from another, a derivative by the latter would
    otherwise also hold what flows through the former.
    """
    inside = [node for node in nodes if node.next_functions] if len(nodes) > 1 else []
    hooks = [node.register_prehook(lambda grads: (None,) * len(grads)) for node in inside]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
