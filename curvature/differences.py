"""Slope and curvature by finite differences, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvature.along import Along
from curvature.arguments import as_number, check_callable
from curvature.quadratic import Quadratic
from curvature.trees import flatten_direction, flatten_params

_RATIO = 1.5
_LEVELS = 8
_ROUNDING = 16 * 2.0**-53  # of a loss, relative; a sum over a network adds up a few roundings


def finite_difference(
    func: Callable[[Any], Tensor], params: Any, direction: Any, *, step: float = 0.1
) -> tuple[Quadratic, Quadratic]:
    """Slope and curvature along a direction by extrapolated central differences.

    ``(J(+t) - J(-t)) / 2t`` and ``(J(+t) - 2 J(0) + J(-t)) / t²`` for t = step, step/1.5, ...,
    extrapolated to t = 0 by Neville's scheme in t² (Ridders' method): it also estimates its own
    error. Forward passes only; the result owes nothing to automatic differentiation.

    Args:
        func: ``func(params)`` returns a scalar loss or one per sample.
        params: any pytree of float64 tensors; float32 has too few digits for this.
        direction: pytree like params.
        step: the largest ‖t v‖. The loss must be smooth over it: near a kink (ReLU) take it
            smaller.

    Returns:
        ``(estimate, error)``: two :class:`Quadratic`, float64, ``per_sample`` filled if the loss
        is a vector; ``error`` holds an estimate of the error of each number.

    Raises:
        TypeError, ValueError: as :func:`curvature.directional`; also for params not in float64.
        NonFiniteLoss: a loss on the way is NaN or infinite; the message names the step.

    Example:
        >>> import torch
        >>> x = torch.tensor([0.3, 0.4], dtype=torch.float64)
        >>> estimate, error = finite_difference(lambda x: torch.exp(x).sum(), x, torch.ones_like(x))
        >>> bool((estimate.curvature - torch.exp(x).sum()).abs() < 1e-9)
        True
    """
    check_callable("func", func)
    if not 0 < as_number("step", step) < math.inf:
        raise ValueError(f"step is {step}; it must be finite and positive")
    flat = flatten_params(params)
    leaves = flatten_direction(direction, flat)
    for k, leaf in enumerate(flat.leaves):
        if leaf.dtype != torch.float64:
            name = flat.name(k)
            raise TypeError(f"{name} has dtype {leaf.dtype}; finite differences need float64")
    length = float(torch.stack([v.square().sum() for v in leaves]).sum().sqrt())
    if length == 0:
        raise ValueError("direction is zero: there is no line to take differences along")

    steps = step / length / _RATIO ** np.arange(_LEVELS)
    with np.errstate(all="ignore"):
        squares = steps**2
    if not np.all((squares >= np.finfo(float).tiny) & (squares < math.inf)):
        raise ValueError(
            f"step is {step} for a direction of length {length:.3g}: the squares of such steps "
            "cannot be represented"
        )
    losses_at = Along(func, flat, leaves)

    def mean_and_samples(t: float) -> NDArray[np.float64]:
        losses = losses_at(t).double().cpu()
        return torch.cat([losses.mean().reshape(1), losses.reshape(-1)]).numpy()

    center = mean_and_samples(0.0)
    slopes, curvatures = [], []
    for t in steps:
        up, down = mean_and_samples(t), mean_and_samples(-t)
        slopes.append((up - down) / (2 * t))
        curvatures.append(((up - center) - (center - down)) / t**2)
    rounding = _ROUNDING * np.abs(center)
    slope, slope_error = _extrapolate(slopes, [rounding / t for t in steps])
    curvature, curvature_error = _extrapolate(curvatures, [4 * rounding / t**2 for t in steps])
    return (
        _split(center, slope, curvature),
        _split(np.zeros_like(center), slope_error, curvature_error),
    )


def _extrapolate(
    values: list[NDArray[np.float64]], rounding: list[NDArray[np.float64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ridders' method: the best entry of Neville's tableau in t², and its estimated error."""
    best, error = values[0], np.full_like(values[0], np.inf)
    previous = [values[0]]
    for level, floor in zip(values[1:], rounding[1:], strict=True):
        row = [level]
        for k, above in enumerate(previous, start=1):
            factor = _RATIO ** (2 * k)
            row.append((factor * row[-1] - above) / (factor - 1))
            # Neighbours may agree by chance to more digits than the losses have.
            gap = np.maximum(np.abs(row[-1] - row[-2]), np.abs(row[-1] - above)) + floor
            better = gap < error
            best, error = np.where(better, row[-1], best), np.where(better, gap, error)
        previous = row
    return best, error


def _split(*mean_and_samples: NDArray[np.float64]) -> Quadratic:
    value, slope, curvature = map(torch.from_numpy, mean_and_samples)
    samples = Quadratic(value[1:], slope[1:], curvature[1:], "finite differences")
    return Quadratic(value[0], slope[0], curvature[0], "finite differences", samples)
