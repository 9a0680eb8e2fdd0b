"""The verb: curvature of a function of its parameters along a direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from curvature.quadratic import Quadratic
from curvature.recorded import answer
from curvature.tape import Tape
from curvature.trees import Flat


def directional(
    func: Callable[[Any], Tensor],
    params: Any,
    direction: Any,
    *,
    per_sample: bool = False,
    engine: str = "auto",
) -> Quadratic:
    """Value, slope and exact curvature of a loss along a direction.

    ``J(theta + t v) = value + t <g, v> + t^2/2 v^T H v + O(t^3)``, equation (3) of *Adaptive
    scaling of the learning rate* (de Gournay, Gossard 2022), with v the direction as given:
    the curvature is v^T H v, not divided by ‖v‖². Exact to rounding, no finite differences.

    Args:
        func: ``func(params)`` returns a scalar loss, or a vector with one loss per sample (the
            numbers are then those of the mean). See :class:`curvature.Objective` for a module,
            a loss and a batch.
        params: any pytree of float32 or float64 tensors: a dict from ``named_parameters``, a
            tuple, a single tensor.
        direction: pytree like params, same shapes, dtypes and devices.
        per_sample: also fill ``per_sample`` with the three numbers of each sample's loss.
        engine: ``"reference"`` is PyTorch's double backward; ``"auto"`` takes the best there is.

    Returns:
        A :class:`curvature.Quadratic` of tensors without graph, in the dtype of the loss.

    Parameters, buffers and the state of the random generators are afterwards as before. What
    PyTorch holds constant in a gradient (``detach``, padding rows of an embedding) is constant
    here too.

    Raises:
        TypeError, ValueError: an argument or the loss cannot be used; the message says why.
        NonFiniteLoss: the loss is NaN or infinite.
        NotTwiceDifferentiable: PyTorch has no second derivative for an operation in func.

    Example:
        >>> import torch
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
        >>> q = directional(lambda x: x @ A @ x / 2, torch.ones(2), torch.tensor([1.0, 0.0]))
        >>> q.value, q.slope, q.curvature
        (tensor(4.), tensor(3.), tensor(2.))
    """

    def question(tape: Tape, _: Flat, leaves: list[Tensor]) -> Quadratic:
        return tape.directional(leaves, per_sample=per_sample)

    return answer(func, params, direction, "direction", engine, question)
