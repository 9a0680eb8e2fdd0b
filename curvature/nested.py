"""Refuse derivatives inside the loss of which PyTorch gives a wrong gradient without an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from curvature.audit import is_wrong_twice
from curvature.errors import NotTwiceDifferentiable
from curvature.nodes import node_of, nodes_behind

# Their forward-mode derivatives use results of the forward pass that have no graph.
_WRONG_AHEAD = {
    F.layer_norm,
    torch.layer_norm,
    torch.native_layer_norm,
    F.group_norm,
    torch.group_norm,
    torch.native_group_norm,
    F.batch_norm,
    torch.batch_norm,
    torch.native_batch_norm,
    F.instance_norm,
    torch.instance_norm,
    torch.linalg.solve,
    torch.linalg.solve_ex,
    torch.linalg.tensorsolve,
    torch.linalg.det,
    torch.det,
    Tensor.det,
    torch.linalg.slogdet,
    torch.slogdet,
    Tensor.slogdet,
    torch.logdet,
    Tensor.logdet,
    torch.linalg.householder_product,
    torch.orgqr,
    Tensor.orgqr,
}
_GRADIENTS = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
CHECKED = _GRADIENTS | _WRONG_AHEAD
_ONCE = once_differentiable(tuple).__code__


class NestedDerivatives(TorchFunctionMode):
    """Around a forward pass: refuses what :func:`check_call` does."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        check_call(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def check_call(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Refuse a call in the forward pass that leads to a wrong gradient of the loss.

    Raises:
        NotTwiceDifferentiable: a forward-mode derivative of a function whose tangents lose a part
            of their graph, a second derivative through layer or batch normalisation, or a gradient
            through a function that is marked once_differentiable.
    """
    if func in _WRONG_AHEAD and forward_ad._current_level >= 0 and torch.is_grad_enabled():
        raise NotTwiceDifferentiable(
            "the loss takes a forward-mode derivative (torch.func.jvp, jacfwd or hessian, or "
            f"torch.autograd.forward_ad) through {func.__name__}, of which PyTorch's gradient is "
            "wrong: take it in reverse mode (torch.func.grad, vjp or jacrev, torch.autograd.grad)"
        )
    if func in _GRADIENTS and kwargs.get("create_graph"):
        inputs = args[1] if func is torch.autograd.grad else kwargs.get("inputs")
        _check_between(_as_list(args[0]), _as_list(inputs))


def _check_between(outputs: Sequence[Any], inputs: Sequence[Any]) -> None:
    for node in nodes_behind(outputs, {node_of(x) for x in inputs}):
        if is_wrong_twice(node):
            raise NotTwiceDifferentiable(
                "the loss takes a second derivative through layer or batch normalisation, of which "
                "PyTorch's gradient is wrong: write the normalisation with mean and var"
            )
        function = getattr(node, "_forward_cls", None)
        if getattr(getattr(function, "backward", None), "__code__", None) is _ONCE:
            raise NotTwiceDifferentiable(
                f"the loss takes a gradient through {node.name()}, which is marked "
                "once_differentiable, so that PyTorch takes this gradient for constant: compute "
                "it without create_graph, or give the function a backward pass that differentiates"
            )


def _as_list(tensors: Any) -> Sequence[Any]:
    if tensors is None:
        return []
    return tensors if isinstance(tensors, Sequence) else [tensors]
