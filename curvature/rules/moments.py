"""Variances, deviations and Euclidean norms."""

from __future__ import annotations

import math

from torch import Tensor

from curvature.graph import Call, Tensors
from curvature.rules.families import General
from curvature.rules.rule import Rule, against
from curvature.rules.table import general, register

Pushed = tuple[Tensor, Tensor] | Tensor


@general("VarBackward0")
def _var(call: Call, dots: Tensors, bend: bool) -> Pushed:
    first, second, _ = _moved(call, dots)
    return (first, second) if bend else first


@general("VarMeanBackward0")
def _var_mean(call: Call, dots: Tensors, bend: bool) -> tuple[Tensors, Tensors] | Tensors:
    first, second, mean = _moved(call, dots)
    return ((first, mean), (second, None)) if bend else (first, mean)


@general("StdBackward0")
def _std(call: Call, dots: Tensors, bend: bool) -> Pushed:
    first, second, _ = _deviating(call, dots, call.result)
    return (first, second) if bend else first


@general("StdMeanBackward0")
def _std_mean(call: Call, dots: Tensors, bend: bool) -> tuple[Tensors, Tensors] | Tensors:
    first, second, mean = _deviating(call, dots, call.result0)
    return ((first, mean), (second, None)) if bend else (first, mean)


def _moved(call: Call, dots: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """v' = 2 sum(c c') / n, v'' = 2 sum(c'²) / n with c = x - mean(x); and the mean of x'."""
    centred, moved, mean, n = _centred(call, dots)
    dims = _dims(call)
    first = 2 * (centred * moved).sum(dims, True) / n
    second = 2 * moved.square().sum(dims, True) / n
    return _shaped(call, first), _shaped(call, second), _shaped(call, mean)


def _deviating(call: Call, dots: Tensors, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s' = sum(c c') / (n s), and s'' = sum((c' - c s'/s)²) / (n s); and the mean of x'."""
    centred, moved, mean, n = _centred(call, dots)
    dims = _dims(call)
    s = against(call.self, deviation, dims)
    # As autograd, which lets what is constant stay so.
    s = s.masked_fill(s == 0, math.inf)
    first = (centred * moved).sum(dims, True) / (n * s)
    across = moved - centred * (first / s)
    second = across.square().sum(dims, True) / (n * s)
    return _shaped(call, first), _shaped(call, second), _shaped(call, mean)


def _centred(call: Call, dots: Tensors) -> tuple[Tensor, Tensor, Tensor, float]:
    """x - mean(x), x' - mean(x'), mean(x'), and what the sums of squares are divided by."""
    (x,), dims = dots, _dims(call)
    assert x is not None
    value = call.self
    # A single number has no dimension, but may be given one.
    count = math.prod(value.shape[dim] for dim in dims if value.ndim)
    freedom = count - (1 if call.correction is None else call.correction)
    mean = x.mean(dims, True)
    return value - value.mean(dims, True), x - mean, mean, freedom if freedom > 0 else math.nan


def _dims(call: Call) -> tuple[int, ...]:
    dims: tuple[int, ...] = call.dim or tuple(range(call.self.ndim))
    return dims


def _shaped(call: Call, t: Tensor) -> Tensor:
    return t.view(call.shape())


class _Norm(General):
    def __init__(self, order: str) -> None:
        super().__init__(_norm)
        self._order = order

    def of(self, call: Call) -> Rule | None:
        value, euclidean = call.self, getattr(call, self._order) in (2, None)
        # The norm of nothing would be divided by itself.
        plain = value.numel() > 0 and value.dtype == call.result.dtype
        return self if euclidean and plain else None


def _norm(call: Call, dots: Tensors, bend: bool) -> Pushed:
    # r' = <x, x'> / r, and r'' = ‖x' - x r'/r‖² / r: what moves across x
    (x,), value = dots, call.self
    assert x is not None
    dims = tuple(range(value.ndim)) if call.name == "NormBackward0" else _dims(call)
    r = against(value, call.result, dims)
    # At zero autograd takes 0 for the derivative.
    slope = r.masked_fill(r == 0, math.inf)
    first = (value * x).sum(dims, True) / slope
    if not bend:
        return _shaped(call, first)
    across = (x - value * (first / slope)).square().sum(dims, True)
    # What does not move does not bend, also there.
    return _shaped(call, first), _shaped(call, across / r.masked_fill(across == 0, 1))


register("LinalgVectorNormBackward0", _Norm("ord"))
register("NormBackward0", _Norm("p"))
register("NormBackward1", _Norm("p"))
