"""Activations and other functions entry by entry: f''(x) xdot over a factor, given ydot."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from curvature.graph import Call
from curvature.rules.families import Elementwise
from curvature.rules.rule import Rule
from curvature.rules.table import elementwise, register, singular

# Piecewise linear: f'' is zero wherever it exists.
for _name in (
    "AbsBackward0",
    "ClampBackward1",
    "ClampMinBackward0",
    "ClampMaxBackward0",
    "HardshrinkBackward0",
    "HardtanhBackward0",
    "LeakyReluBackward0",
    "ReluBackward0",
    "SignBackward0",
    "SoftshrinkBackward0",
    "ThresholdBackward0",
):
    register(_name, Elementwise(None))


@elementwise("ExpBackward0", "Expm1Backward0")
def _exp(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return y.clone()


@elementwise("SincBackward0")
def _sinc(call: Call, x: Tensor, y: Tensor) -> Tensor:
    """Of sin(z) / z at z = pi x; near 0 by its series, of which the formula has lost the digits."""
    z = math.pi * call.self
    square = z * z
    near = torch.zeros_like(z)
    for k in range(7, 0, -1):
        near = near * square + (-1) ** k * 2 * k * (2 * k - 1) / math.factorial(2 * k + 1)
    far = ((2 / square - 1) * z.sin() / z) - 2 * z.cos() / square
    return math.pi**2 * torch.where(z.abs() < 0.5, near, far) * x


@singular("LogBackward0", "Log2Backward0", "Log10Backward0", factor=-1)
def _log(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return y / call.self


@singular("Log1PBackward0", factor=-1)
def _log1p(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return y / (call.self + 1)


@singular("SqrtBackward0", factor=-0.5)
def _sqrt(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return y / call.result.square()


@singular("RsqrtBackward0", factor=-1.5)
def _rsqrt(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return call.result.square().mul_(y)


@singular("ReciprocalBackward0", factor=-2)
def _reciprocal(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return y * call.result


@singular("PowBackward0")
def _pow(call: Call, x: Tensor, y: Tensor) -> Tensor:
    k = call.exponent
    if k in (0, 1, 2):
        return x * (k * (k - 1))
    return call.self.pow(k - 2).mul_(k * (k - 1)).mul_(x)


@elementwise("TanhBackward0", factor=-2)
def _tanh(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return y * call.result


@elementwise("SigmoidBackward0")
def _sigmoid(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return (call.result * -2).add_(1).mul_(y)


@elementwise("SinBackward0", factor=-1)
def _sin(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return call.self.sin().mul_(x)


@elementwise("CosBackward0", factor=-1)
def _cos(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return call.self.cos().mul_(x)


@elementwise("TanBackward0", factor=2)
def _tan(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return y * call.result


@elementwise("AtanBackward0", factor=-2)
def _atan(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return (y * call.self).div_(call.self.square().add_(1))


@elementwise("SinhBackward0")
def _sinh(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return call.self.sinh().mul_(x)


@elementwise("CoshBackward0")
def _cosh(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return call.self.cosh().mul_(x)


@elementwise("Exp2Backward0", factor=math.log(2))
def _exp2(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return y.clone()


@singular("AsinBackward0", "AcosBackward0")
def _asin(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return (y * call.self).div_(1 - call.self.square())


@singular("AtanhBackward0", factor=2)
def _atanh(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return (y * call.self).div_(1 - call.self.square())


@elementwise("AsinhBackward0", factor=-1)
def _asinh(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return (y * call.self).div_(call.self.square().add_(1))


@singular("AcoshBackward0")
def _acosh(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return (y * call.self).div_(1 - call.self.square())


@elementwise("ErfBackward0", "ErfcBackward0", factor=-2)
def _erf(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return y * call.self


@elementwise("LogSigmoidBackward0", factor=-1)
def _logsigmoid(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.sigmoid(call.self).mul_(y)


@elementwise("EluBackward0")
def _elu(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return (y * call.input_scale).masked_fill_(call.self >= 0, 0)


@elementwise("SoftplusBackward0")
def _softplus(call: Call, x: Tensor, y: Tensor) -> Tensor:
    # Beyond the threshold autograd takes f for the identity, and 1 - sigmoid is not quite zero.
    z = call.self * -call.beta
    return torch.sigmoid(z).mul_(y).mul_(call.beta).masked_fill_(z <= -call.threshold, 0)


@elementwise("SiluBackward0")
def _silu(call: Call, x: Tensor, y: Tensor) -> Tensor:
    s = torch.sigmoid(call.self)
    bend = torch.rsub(s, 1, alpha=2).mul_(call.self).add_(2)
    return bend.mul_(s).mul_(s.neg_().add_(1)).mul_(x)


@elementwise("MishBackward0")
def _mish(call: Call, x: Tensor, y: Tensor) -> Tensor:
    # f = t w with w = tanh(softplus(t)), w' = (1 - w²) s and s = sigmoid(t)
    t = call.self
    s, w = torch.sigmoid(t), torch.tanh(F.softplus(t))
    bend = t.mul(1 - s - 2 * w * s).add_(2)
    return bend.mul_(s).mul_(1 - w * w).mul_(x)


def _gelu(call: Call, x: Tensor, y: Tensor) -> Tensor:
    # f = t Phi(t), f'' = (2 - t²) phi(t): with u = -t²/2 that is 2 (1 + u) exp(u) / sqrt(2 pi)
    u = torch.addcmul(call.self.new_zeros(()), call.self, call.self, value=-0.5)
    bend = u.exp()
    return bend.addcmul_(bend, u).mul_(x)


def _gelu_tanh(call: Call, x: Tensor, y: Tensor) -> Tensor:
    # f = t (1 + w)/2 with w = tanh u, u = k (t + c t³), and s = u' = k (1 + 3 c t²):
    # f'' = (1 - w²) (k (1 + 6 c t²) - t w s²)
    k, c = math.sqrt(2 / math.pi), 0.044715
    t = call.self.clamp(-1e3, 1e3)  # beyond, powers of it overflow, where w² is 1 anyway
    square = t * t
    w = torch.rsub(square, k, alpha=-k * c).mul_(t).tanh_()
    s = torch.rsub(square, k, alpha=-3 * k * c)
    bend = torch.rsub(square, k, alpha=-6 * k * c).sub_(s.square_().mul_(t).mul_(w))
    return bend.mul_(torch.rsub(w.square_(), 1)).mul_(x)


class _Gelu(Elementwise):
    def of(self, call: Call) -> Rule:
        return self if call.approximate == "none" else _GELU_TANH


_GELU_TANH = Elementwise(_gelu_tanh)
register("GeluBackward0", _Gelu(_gelu, factor=2 / math.sqrt(2 * math.pi)))
