"""The door for rules of your own operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from curvature.arguments import check_callable
from curvature.graph import Call, Tensors
from curvature.rules.families import General, Linear
from curvature.rules.table import Key, register


def register_rule(
    operation: type | CustomOpDef | str,
    push: Callable[..., Any] | None = None,
    *,
    tangent: Callable[..., Any] | None = None,
) -> None:
    """Give an operation a rule, by which tangents pass through it to second order.

    Without one an operation is differentiated by its own double backward, where it has one; a
    rule is faster, and serves operations that have only a first derivative.

    Args:
        operation: a subclass of :class:`torch.autograd.Function`, an operator made by
            ``torch.library.custom_op``, or the name of autograd's node ("AddmmBackward0").
        push: ``push(call, dots, bend)`` gives J xdot, or with ``bend`` the pair of J xdot and
            D²F[xdot, xdot]. ``dots`` are the tangents of the inputs that are tensors, None for
            one that does not move; an operation with several outputs gives tuples, in which None
            stands for zero. ``call``
            holds what the forward pass saved: ``call.saved_tensors``, ``call.name_on_ctx``.
            Written with operations that autograd differentiates (nothing in place on what it
            still needs), it serves Hessian-vector products too.
        tangent: instead of ``push``, for an operation that is linear in what moves:
            ``tangent(call, *dots)`` gives J xdot.

    Raises:
        TypeError, ValueError: no such operation, not one of ``push`` and ``tangent``, or there is
            a rule already.

    :func:`curvature.testing.check_rule` compares a rule with finite differences.

    Example:
        >>> import torch, curvature
        >>> class Square(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return x * x
        ...
        ...     @staticmethod
        ...     @torch.autograd.function.once_differentiable
        ...     def backward(ctx, g):
        ...         return 2 * ctx.saved_tensors[0] * g
        >>> def push(call, dots, bend):
        ...     (x,), (xdot,) = call.saved_tensors, dots
        ...     ydot = 2 * x * xdot
        ...     return (ydot, 2 * xdot * xdot) if bend else ydot
        >>> curvature.register_rule(Square, push)
        >>> x = torch.tensor([1.0, 2.0])
        >>> curvature.directional(lambda x: Square.apply(x).sum(), x, x).curvature
        tensor(10.)
    """
    if (push is None) == (tangent is None):
        raise TypeError("give either push or tangent")
    if push is not None:
        check_callable("push", push)
        register(_key(operation), General(_checked_push(push)))
    else:
        check_callable("tangent", tangent)
        register(_key(operation), Linear(_checked_tangent(tangent)))  # type: ignore[arg-type]


def _key(operation: Any) -> Key:
    if isinstance(operation, CustomOpDef):
        return operation._opoverload
    if (isinstance(operation, str) and operation) or (
        isinstance(operation, type) and hasattr(operation, "apply")
    ):
        return operation
    raise TypeError(
        f"operation is {operation!r}; it must be a subclass of torch.autograd.Function, an "
        "operator made by torch.library.custom_op, or the name of an autograd node"
    )


def _checked_push(push: Callable[..., Any]) -> Callable[..., Any]:
    def checked(call: Call, dots: Tensors, bend: bool) -> Any:
        result = push(call, _copies(dots), bend)
        if not bend:
            return _fitting(call, result)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise ValueError(
                f"with bend the rule for {call.name} gives {_described(result)}; it must give the "
                "pair of J xdot and D²F[xdot, xdot]"
            )
        return _fitting(call, result[0]), _fitting(call, result[1])

    return checked


def _checked_tangent(tangent: Callable[..., Any]) -> Callable[..., Any]:
    return lambda call, *dots: _fitting(call, tangent(call, *_copies(dots)))


def _copies(dots: Tensors) -> Tensors:
    # A rule may write to them, and they may be the caller's direction.
    return tuple(None if dot is None else dot.clone() for dot in dots)


def _fitting(call: Call, result: Any) -> Tensors:
    """What a rule gives for the outputs, each None or in the shape of its output."""
    n = len(call.outputs)
    outputs = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    if result is None:
        outputs = (None,) * n
    shapes = [tuple(call.shape(k)) for k in range(n)]
    if len(outputs) != n or not all(
        y is None or (isinstance(y, Tensor) and y.shape == shape)
        for y, shape in zip(outputs, shapes, strict=True)
    ):
        raise ValueError(
            f"the rule for {call.name} gives {_described(result)}; it must give None or a tensor "
            f"for each output, of shape {', '.join(map(str, shapes))}"
        )
    return outputs


def _described(result: Any) -> str:
    if isinstance(result, (tuple, list)):
        return f"({', '.join(map(_described, result))})"
    if isinstance(result, Tensor):
        return f"a tensor of shape {tuple(result.shape)}"
    return "None" if result is None else f"a {type(result).__name__}"
