"""The two refusals that are about the function, not about its arguments."""

from __future__ import annotations


class NonFiniteLoss(ValueError):
    """A loss was NaN or infinite, so no derivative or fit of it means anything.

    Example:
        >>> import torch, curvature
        >>> try:
        ...     curvature.hvp(lambda x: x.log().sum(), torch.zeros(2), torch.ones(2))
        ... except NonFiniteLoss as error:
        ...     print(error)
        the loss is -inf
    """


class NotTwiceDifferentiable(RuntimeError):
    """PyTorch has no second derivative for an operation that the loss uses, or a wrong one.

    Example:
        >>> import torch, curvature
        >>> func = lambda x: torch.nn.functional.hardsigmoid(x).sum()
        >>> try:
        ...     curvature.hvp(func, torch.zeros(2), torch.ones(2))
        ... except NotTwiceDifferentiable as error:
        ...     print("hardsigmoid_backward is not implemented" in str(error))
        True
    """


def tells_that_the_graph_is_gone(error: RuntimeError) -> bool:
    """Whether PyTorch's error means that a backward pass has freed the graph."""
    return "backward through the graph a second time" in str(error)


def tells_no_second_derivative(error: RuntimeError) -> bool:
    """Whether PyTorch's error means that an operation has no further derivative."""
    return any(sign in str(error) for sign in _SIGNS)


_SIGNS = (
    "is not implemented",
    "double backward",
    "don't support automatic differentiation",  # a backward pass that writes with out=
    "once_differentiable",
    "no autograd formula was registered",  # for a custom operator in a backward pass
    "it is ill-defined",  # eigenvectors, whose phase one operation's share may see
)
