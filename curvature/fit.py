"""The verb: a polynomial through losses along a direction, by forward passes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvature.along import Along
from curvature.arguments import as_number, check_callable
from curvature.losses import is_finite
from curvature.quadratic import Quadratic
from curvature.trees import flatten_direction, flatten_params


def fit(
    func: Callable[[Any], Tensor],
    params: Any,
    direction: Any,
    steps: Sequence[float],
    *,
    degree: int = 2,
    value: float | Tensor | None = None,
    slope: float | Tensor | None = None,
) -> Quadratic:
    """Fit the loss along a direction by least squares, from forward passes without a graph.

    Minimises ``sum_i |J(theta + t_i v) - sum_k c_k t_i^k|²`` over the coefficients c: equation
    (3.4) of *Gradient descent with generalized Newton's method* (Bu, Xu), for theta + t v in
    place of w - eta g, so that its b is the slope along -v. What is known exactly is not
    fitted: with ``value`` as there, c_0 is pinned; with ``slope`` too, which a backward pass has
    already given, one step that is not zero determines the curvature.

    Args:
        func: ``func(params)`` returns a scalar loss or one per sample; the mean is fitted.
        params: any pytree of float32 or float64 tensors.
        direction: pytree like params; v above, not normalised.
        steps: the points t_i, in units of direction; any number, symmetric or not. 0 is
            evaluated only if ``value`` is not given.
        degree: of the polynomial, at least 2.
        value: J(theta), if known.
        slope: <g, v>, if known.

    Returns:
        A :class:`curvature.Quadratic` with ``curvature`` = 2 c_2 and all of c as
        ``coefficients``. Solved in float64, returned in the dtype of the loss. Its error is that
        of the fit: of order t^(degree - 1) in the curvature (one better for symmetric steps),
        plus rounding of the losses divided by t².

    Parameters, buffers and the state of the random generators are afterwards as before, also
    if func raises; every point sees the same random numbers (dropout masks).

    Raises:
        TypeError, ValueError: an argument or the loss cannot be used; the message says why.
        NonFiniteLoss: a loss on the way is NaN or infinite; the message names the step.

    Example:
        >>> import torch
        >>> loss = lambda x: (x**2).sum() * 3
        >>> x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
        >>> q = fit(loss, x, v, steps=[-0.5, 0.0, 0.5])
        >>> q.curvature
        tensor(6.)
        >>> fit(loss, x, v, steps=[0.5], value=15.0, slope=6.0).curvature
        tensor(6.)
    """
    check_callable("func", func)
    flat = flatten_params(params)
    leaves = flatten_direction(direction, flat)
    known = [_known("value", value), _known("slope", slope)]
    points = _check_steps(steps, degree, known)

    losses_at = Along(func, flat, leaves)
    losses = [losses_at(t) for t in points]
    targets = np.array([loss.double().mean().item() for loss in losses])
    coefficients = torch.from_numpy(_least_squares(np.array(points), targets, degree, known))
    coefficients = coefficients.to(dtype=losses[0].dtype, device=losses[0].device)
    if not is_finite(coefficients):
        raise ValueError(
            f"the coefficients of the fit exceed {coefficients.dtype}: the steps {points} are too "
            "small for their powers"
        )
    return Quadratic(
        value=coefficients[0],
        slope=coefficients[1],
        curvature=2 * coefficients[2],
        engine="fit",
        coefficients=coefficients,
    )


def _known(name: str, number: float | Tensor | None) -> float | None:
    if number is None:
        return None
    result = as_number(name, number)
    if not math.isfinite(result):
        raise ValueError(f"{name} is {result}; give a finite number or leave it out")
    return result


def _check_steps(steps: Sequence[float], degree: Any, known: list[float | None]) -> list[float]:
    if not isinstance(degree, (int, np.integer)) or isinstance(degree, bool) or degree < 2:
        raise ValueError(f"degree is {degree}; a curvature needs an integer of at least 2")
    try:
        points = [as_number("a step", t) for t in steps]
    except TypeError as error:
        raise TypeError(f"steps is {steps!r}; give a list of numbers, as [0.1]") from error
    if not all(map(math.isfinite, points)):
        raise ValueError(f"steps holds a NaN or infinite entry: {points}")
    if len(set(points)) != len(points):
        raise ValueError(f"steps holds the same point twice: {points}")
    if known[0] is not None:
        points = [t for t in points if t != 0]
    unknown = degree + 1 - sum(k is not None for k in known)
    columns, _, _ = _design(np.array(points), int(degree), known)
    if len(points) < unknown or np.linalg.matrix_rank(columns) < unknown:
        raise ValueError(
            f"the steps {points} do not determine the {unknown} unknown coefficients of a fit of "
            f"degree {degree}: give more steps, or the known value and slope"
        )
    return points


def _design(
    points: NDArray[np.float64], degree: int, known: list[float | None]
) -> tuple[NDArray[np.float64], NDArray[np.int64], float]:
    """The least-squares matrix in units of the largest step, its powers of t, and that unit."""
    # In these units the columns are of one size; powers of a step of 1e-4 are not.
    unit = float(np.abs(points).max(initial=0.0)) or 1.0
    powers = np.array([k for k in range(degree + 1) if k >= 2 or known[k] is None])
    return (points[:, None] / unit) ** powers, powers, unit


def _least_squares(
    points: NDArray[np.float64],
    targets: NDArray[np.float64],
    degree: int,
    known: list[float | None],
) -> NDArray[np.float64]:
    columns, powers, unit = _design(points, degree, known)
    value, slope = (k or 0.0 for k in known)
    solution = np.linalg.lstsq(columns, targets - value - slope * points, rcond=None)[0]
    coefficients = np.array([value, slope] + [0.0] * (degree - 1))
    with np.errstate(all="ignore"):
        coefficients[powers] = solution / unit**powers
    return coefficients
