"""Check second derivatives against finite differences, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.arguments import check_callable
from curvature.differences import finite_difference
from curvature.directional import directional
from curvature.hvp import hvp

__all__ = ["check_directional", "check_rule", "finite_difference"]

_EXACT = 1e-9  # relative, of what float64 computes to rounding
_SINGLE = 1e-3  # of what float32 does

_Params = dict[int, Tensor]


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
    and the jets by :func:`check_directional`, and to nine digits these and the Hessian-vector
    product against the gradient and differences of it. All is computed twice, and in float32 too
    where func takes inputs of it.

    Args:
        func: calls the operation; gives a tensor, or a tuple or list of tensors.
        inputs: float64 tensors, at a point around which the operation is smooth.
        rtol: relative tolerance of the differences of func itself.

    Raises:
        AssertionError: they disagree, or no rule served the operation; the message names the
            inputs that moved.
        TypeError, ValueError: as :func:`check_directional`.

    Example:
        >>> import torch
        >>> check_rule(torch.div, torch.rand(3).double() + 1, torch.rand(3).double() + 1)
    """
    check_callable("func", func)
    if not inputs:
        raise ValueError("there are no inputs that could move")
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor) or x.dtype != torch.float64:
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"input {i} is a {kind}; finite differences need float64 tensors")
    generator = torch.Generator().manual_seed(0)
    single = [x.float() for x in inputs]
    takes_single = _takes(func, single)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)

    for moving in itertools.product([True, False], repeat=len(inputs)):
        params = {i: torch.zeros_like(x) for i, x in enumerate(inputs) if moving[i]}
        if not params:
            continue
        v, w = ({i: random(p) for i, p in params.items()} for _ in range(2))
        losses = _bent(func, inputs)
        try:
            engine = directional(losses, params, v).engine
            if engine != "tangent":
                raise AssertionError(
                    f"no rule serves func, or a part of it: register one for what the engine "
                    f"names, which is {engine!r}"
                )
            check_directional(losses, params, v, rtol=rtol)
            _check_digits(losses, params, v, w)
            if takes_single:
                _check_single(losses, _bent(func, single), params, v)
        except AssertionError as error:
            raise AssertionError(f"with inputs {sorted(params)} moving: {error}") from error


def _bent(func: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[[_Params], Tensor]:
    """A loss per entry, bent before and after, so that second derivatives pass through func."""

    def losses(params: _Params) -> Tensor:
        bent = [
            x + params[i] + params[i] ** 2 / 5 if i in params else x for i, x in enumerate(inputs)
        ]
        outputs = func(*bent)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        for y in outputs:
            if not isinstance(y, Tensor):
                raise TypeError(
                    f"func gives a {type(y).__name__}; it must give a tensor, or a tuple or list "
                    "of tensors"
                )
        flat = torch.cat([y.reshape(-1) for y in outputs])
        weights = torch.linspace(0.5, 1.5, flat.numel(), dtype=flat.dtype, device=flat.device)
        return flat * weights + flat.square() / 3

    return losses


def _takes(func: Callable[..., Any], inputs: Sequence[Tensor]) -> bool:
    try:
        with torch.no_grad():
            func(*inputs)
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


def _check_digits(
    losses: Callable[[_Params], Tensor], params: _Params, v: _Params, w: _Params
) -> None:
    """Slope, curvature and Hv against the gradient and its differences, which have more digits."""

    def gradient(params: _Params) -> _Params:
        with torch.enable_grad():
            leaves = {i: p.detach().requires_grad_() for i, p in params.items()}
            grads = torch.autograd.grad(losses(leaves).mean(), [*leaves.values()])
        return dict(zip(leaves, grads, strict=True))

    for _ in range(2):  # the same again, whatever a rule keeps from the first time
        q, jets = (directional(losses, params, v, per_sample=s) for s in (False, True))
        product = hvp(losses, params, v)
        for name, along, found in (
            ("<v, H v>", v, [q.curvature, jets.curvature, _inner(v, product)]),
            ("<w, H v>", w, [_inner(w, product)]),
        ):

            def slope_along(p: _Params, along: _Params = along) -> Tensor:
                return _inner(along, gradient(p))

            differences, error = finite_difference(slope_along, params, v)
            size = _inner(_abs(along), _abs(product))
            for computed in found:
                _check_equal(name, computed, differences.slope, _EXACT * size + error.slope)
        g = gradient(params)
        for slope in (q.slope, jets.slope):
            _check_equal("the slope", slope, _inner(v, g), _EXACT * _inner(_abs(v), _abs(g)))


def _check_single(
    losses: Callable[[_Params], Tensor],
    in_single: Callable[[_Params], Tensor],
    params: _Params,
    v: _Params,
) -> None:
    exact, product = directional(losses, params, v), hvp(losses, params, v)
    params, to_v = ({i: t.float() for i, t in tree.items()} for tree in (params, v))
    single = directional(in_single, params, to_v)
    size = _inner(_abs(v), _abs(product))
    for name in ("slope", "curvature"):
        number, expected = getattr(single, name).double(), getattr(exact, name)
        tolerance = _SINGLE * torch.maximum(size, expected.abs())
        _check_equal(f"in float32 the {name}", number, expected, tolerance)


def _inner(left: _Params, right: _Params) -> Tensor:
    return torch.stack([(left[i] * right[i]).sum() for i in left]).sum()


def _abs(tree: _Params) -> _Params:
    return {i: t.abs() for i, t in tree.items()}


def _check_equal(name: str, number: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    if not abs(number - expected) <= tolerance:
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
