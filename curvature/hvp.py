"""The verb: a Hessian-vector product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from curvature.recorded import answer
from curvature.tape import Tape
from curvature.trees import Flat


def hvp(func: Callable[[Any], Tensor], params: Any, vector: Any, *, engine: str = "auto") -> Any:
    """The Hessian of a loss at ``params``, times a vector.

    ``H v``, Pearlmutter's product; appendix A.1, equation (24), of *Adaptive scaling of the
    learning rate* (de Gournay, Gossard 2022).

    Args:
        func: ``func(params)`` returns a scalar loss, or one per sample: then H is the mean's.
        params: any pytree of float32 or float64 tensors.
        vector: pytree like params, same shapes, dtypes and devices.
        engine: ``"reference"`` is PyTorch's double backward; ``"auto"`` takes the best there is.

    Returns:
        A pytree like params, without graph.

    Parameters, buffers and the state of the random generators are afterwards as before.

    Raises:
        TypeError, ValueError, NonFiniteLoss, NotTwiceDifferentiable: as
            :func:`curvature.directional`.

    Example:
        >>> import torch
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
        >>> hvp(lambda x: x @ A @ x / 2, torch.zeros(2), torch.tensor([1.0, 0.0]))
        tensor([2., 1.])
    """

    def question(tape: Tape, flat: Flat, leaves: list[Tensor]) -> Any:
        return flat.rebuild(tape.hvp(leaves))

    return answer(func, params, vector, "vector", engine, question)
