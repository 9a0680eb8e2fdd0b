"""The gradient of the mean loss, after the checks that every use of a loss needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvature.differentiable import derivative_mode
from curvature.errors import NonFiniteLoss, tells_that_the_graph_is_gone
from curvature.losses import check_losses, describe_non_finite, is_finite
from curvature.trees import Flat, flatten_params


def gradient(
    losses: Tensor, params: Any, *, retain_graph: bool = False, accumulate: bool = False
) -> Any:
    """The gradient of the mean loss, as :func:`torch.autograd.grad` gives it.

    Args:
        losses: a scalar, or a vector with one loss per sample, with a graph.
        params: pytree of the tensors that the losses were computed from, float32 or float64,
            each with ``requires_grad``.
        retain_graph: keep the graph of the losses for further derivatives.
        accumulate: let it pass through ``.grad`` of all leaves of the graph, as ``backward``
            does, where :class:`torch.nn.parallel.DistributedDataParallel` takes the mean over
            the processes. Those of params must be None before.

    Returns:
        A pytree like params, without graph; ``None`` for a tensor that the loss does not use.

    Hooks on tensors run, those on the accumulation into ``p.grad`` only with ``accumulate``.

    Raises:
        TypeError, ValueError: losses or params cannot be used; the message says why.
        NonFiniteLoss: a loss is NaN or infinite.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gradient(x**3, {"x": x})
        {'x': tensor([1.5000, 6.0000])}
    """
    flat = check_differentiable(losses, params)
    return flat.rebuild(gradients(losses, flat, retain_graph=retain_graph, accumulate=accumulate))


def gradients(
    losses: Tensor, flat: Flat, *, retain_graph: bool, accumulate: bool
) -> list[Tensor | None]:
    """The leaves of :func:`gradient`, where all is checked."""
    weights = torch.full_like(losses, 1 / losses.numel())
    try:
        with derivative_mode(losses.device):
            if accumulate:
                if any(p.grad is not None for p in flat.leaves):
                    raise ValueError("a tensor of params has a gradient already, to be added to")
                torch.autograd.backward(losses, weights, retain_graph=retain_graph)
                leaves: list[Tensor | None] = [p.grad for p in flat.leaves]
            else:
                leaves = list(
                    torch.autograd.grad(
                        losses, flat.leaves, weights, retain_graph=retain_graph, allow_unused=True
                    )
                )
    except RuntimeError as error:
        if not tells_that_the_graph_is_gone(error):
            raise
        raise ValueError(
            "the graph of the loss is gone: return the loss without calling backward on it"
        ) from error
    if all(g is None for g in leaves):
        raise ValueError(
            "the loss does not depend on any tensor of params; a function of params must use "
            "the tensors it is given (see curvature.Objective or torch.func.functional_call)"
        )
    return leaves


def check_differentiable(losses: Any, params: Any) -> Flat:
    """The leaves of ``params``, if ``losses`` can be differentiated in them."""
    check_losses(losses, graph=True)
    flat = flatten_params(params)
    if not all(p.requires_grad for p in flat.leaves):
        frozen = [flat.name(k) for k, p in enumerate(flat.leaves) if not p.requires_grad]
        raise ValueError(f"{', '.join(frozen)} does not require grad; leave it out of params")
    if not is_finite(losses):
        raise NonFiniteLoss(describe_non_finite(losses))
    return flat
