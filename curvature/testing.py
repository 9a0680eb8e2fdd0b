"""Check second derivatives against finite differences, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvature.along import Along
from curvature.arguments import check_callable, number
from curvature.directional import directional
from curvature.hvp import hvp
from curvature.quadratic import Quadratic
from curvature.trees import flatten_direction, flatten_params

__all__ = ["check_directional", "check_rule", "finite_difference"]

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

    Example:
        >>> import torch
        >>> x = torch.tensor([0.3, 0.4], dtype=torch.float64)
        >>> estimate, error = finite_difference(lambda x: torch.exp(x).sum(), x, torch.ones_like(x))
        >>> bool((estimate.curvature - torch.exp(x).sum()).abs() < 1e-9)
        True
    """
    check_callable("func", func)
    if not 0 < number("step", step) < math.inf:
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

    losses_at = Along(func, flat, leaves)

    def mean_and_samples(t: float) -> NDArray[np.float64]:
        losses = losses_at(t).double().cpu()
        return torch.cat([losses.mean().reshape(1), losses.reshape(-1)]).numpy()

    center = mean_and_samples(0.0)
    slopes, curvatures = [], []
    steps = step / length / _RATIO ** np.arange(_LEVELS)
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


def check_directional(
    func: Callable[[Any], Tensor],
    params: Any,
    direction: Any,
    *,
    engine: str = "auto",
    step: float = 0.1,
    rtol: float = 1e-6,
    atol: float = 1e-8,
) -> None:
    """Assert that :func:`curvature.directional` agrees with finite differences.

    Compares slope and curvature of the mean loss and, for a vector of losses, of each sample.
    The tolerance is ``atol + rtol * size``, where size is the largest of the compared numbers;
    a finite difference whose own error estimate exceeds it is an error too, since it could
    not tell right from wrong.

    Raises:
        AssertionError: they disagree, or the differences are too inaccurate; the message has
            both numbers.
        TypeError, ValueError: as :func:`finite_difference`.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 5, dtype=torch.float64)
        >>> check_directional(lambda x: torch.tanh(x), x, torch.ones_like(x))
    """
    estimate, error = finite_difference(func, params, direction, step=step)
    exact = directional(func, params, direction, engine=engine)
    pairs = [("", estimate, error, exact)]
    if estimate.per_sample is not None and estimate.per_sample.value.numel() > 1:
        exact = directional(func, params, direction, per_sample=True, engine=engine)
        pairs.append((" per sample", estimate.per_sample, error.per_sample, exact.per_sample))  # type: ignore[arg-type]
    for suffix, difference, uncertainty, computed in pairs:
        for name in ("slope", "curvature"):
            numbers = [getattr(q, name).double().cpu() for q in (difference, uncertainty, computed)]
            _compare(name + suffix, *numbers, rtol=rtol, atol=atol)


def check_rule(func: Callable[..., Any], *inputs: Tensor, rtol: float = 1e-6) -> None:
    """Assert that an operation's rule agrees with finite differences, whichever inputs move.

    Every non-empty choice of moving inputs is tried, along a random direction: the tangent pass
    and the jets by :func:`check_directional`, and the Hessian-vector product by its symmetry,
    <w, H v> = <v, H w>, and by <v, H v>.

    Args:
        func: calls the operation; gives a tensor, or a tuple of tensors.
        inputs: float64 tensors, at a point around which the operation is smooth.
        rtol: relative tolerance.

    Raises:
        AssertionError: they disagree; the message names the inputs that moved.
        TypeError, ValueError: as :func:`check_directional`.

    Example:
        >>> import torch
        >>> check_rule(torch.atan2, torch.rand(3).double() + 1, torch.rand(3).double() + 1)
    """
    check_callable("func", func)
    if not inputs:
        raise ValueError("there are no inputs that could move")
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor) or x.dtype != torch.float64:
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"input {i} is a {kind}; finite differences need float64 tensors")
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)

    for moving in itertools.product([True, False], repeat=len(inputs)):
        params = {i: torch.zeros_like(x) for i, x in enumerate(inputs) if moving[i]}
        if not params:
            continue

        def losses(params: dict[int, Tensor]) -> Tensor:
            # Bent before and after, so that second derivatives pass through the operation.
            bent = [
                x + params[i] + params[i] ** 2 / 5 if i in params else x
                for i, x in enumerate(inputs)
            ]
            outputs = func(*bent)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            flat = torch.cat([y.reshape(-1) for y in outputs])
            weights = torch.linspace(0.5, 1.5, flat.numel(), dtype=flat.dtype, device=flat.device)
            return flat * weights + flat.square() / 3

        v, w = ({i: random(p) for i, p in params.items()} for _ in range(2))
        try:
            check_directional(losses, params, v, rtol=rtol)
            hv, hw = hvp(losses, params, v), hvp(losses, params, w)
            curvature = directional(losses, params, v).curvature
            _check_equal("<v, H v>", _inner(v, hv), curvature, rtol)
            _check_equal("<w, H v>", _inner(w, hv), _inner(v, hw), rtol)
        except AssertionError as error:
            raise AssertionError(f"with inputs {sorted(params)} moving: {error}") from error


def _inner(left: dict[int, Tensor], right: dict[int, Tensor]) -> Tensor:
    return torch.stack([(left[i] * right[i]).sum() for i in left]).sum()


def _check_equal(name: str, number: Tensor, expected: Tensor, rtol: float) -> None:
    if not abs(number - expected) <= rtol * max(1.0, abs(float(expected))):
        raise AssertionError(f"{name} is {float(number)}; it must be {float(expected)}")


def _compare(
    name: str,
    difference: Tensor,
    uncertainty: Tensor,
    computed: Tensor,
    *,
    rtol: float,
    atol: float,
) -> None:
    tolerance = atol + rtol * float(torch.maximum(difference.abs(), computed.abs()).max())
    if float(uncertainty.max()) > tolerance:
        raise AssertionError(
            f"finite differences of the {name} are uncertain by {float(uncertainty.max()):.2g}, "
            f"the tolerance is {tolerance:.2g}: choose another step, or is the loss not smooth?"
        )
    gap = float((difference - computed).abs().max())
    if not gap <= tolerance:
        raise AssertionError(
            f"{name} differs by {gap:.2g}, the tolerance is {tolerance:.2g}: "
            f"computed {computed.tolist()}, finite differences {difference.tolist()}"
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
