"""Whatever shape a graph has, the fast engine agrees with the reference."""

from collections.abc import Callable

import pytest
import torch
from agreement import check_agreement, fast_only
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from curvature import Tape, forward

pytestmark = fast_only
F64 = torch.float64


def write_to_views(x: Tensor) -> Tensor:
    y = x.sin()
    y[:, 0] += x[:, 1] ** 2
    y[1:].mul_(x[1:].exp())
    z = y.t()
    z[0].copy_(x.sum(1))
    return y.square().sum(1)


def detached_islands(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.exp()
    return (x**3 * scale + x.detach() * x.sin()).sum(1)


def branches(x: Tensor) -> Tensor:
    a = torch.tanh(x)
    b = torch.logaddexp(a, a.exp() * x)
    return (b.sort(1)[0] * torch.arange(3)).sum(1) + b.prod(1) * a.norm(dim=1)


def one_tensor_as_two_inputs(x: Tensor) -> Tensor:
    y = x.exp()
    return (torch.xlogy(y, y) + torch.logaddexp(x, x) * torch.hypot(y, y) + x / y / y).sum(1)


def strided(x: Tensor) -> Tensor:
    y = x.expand(2, 4, 3).permute(2, 0, 1)[::2]
    return torch.nn.functional.conv1d(y, y[:1]).sin().sum((1, 2))


def many_outputs(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x.t() @ x + torch.diag(torch.arange(3.0, dtype=F64)))
    return values.exp() + (vectors[0] ** 2).cumsum(0)


def complex_numbers(x: Tensor) -> Tensor:
    z = torch.fft.fft(x, dim=1) * torch.fft.fft(x.sin(), dim=1).conj()
    return torch.fft.ifft(z.exp()).real.sum(1) + z.abs().sum(1)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, y)
        return x**3 * y, y.sin()

    @staticmethod
    def backward(ctx, g, h):  # type: ignore[no-untyped-def]
        x, y = ctx.saved_tensors
        return 3 * x**2 * y * g, x**3 * g + y.cos() * h


def custom_function(x: Tensor) -> Tensor:
    a, b = Cube.apply(x, x.sin())
    return (a * b).sum(1)


def rebinding(x: Tensor) -> Tensor:
    weights = x.square()
    y = x
    for w in weights:
        y = F.relu(y * w + 1, inplace=True)
        y = (y + w).mul_(2)
    return y.sum(1)


@pytest.mark.parametrize("products", ["kept", "not kept"])
@pytest.mark.parametrize(
    "func",
    [
        write_to_views,
        detached_islands,
        branches,
        one_tensor_as_two_inputs,
        strided,
        many_outputs,
        complex_numbers,
        custom_function,
        rebinding,
    ],
)
def test_graph(
    func: Callable[[Tensor], Tensor], products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if products == "kept":
        monkeypatch.setattr(forward, "_LEAST_WORK", 0)
        monkeypatch.setattr(forward, "_LEAST_LENGTH", 0)
    torch.manual_seed(0)
    x, v = torch.randn(2, 4, 3, dtype=F64)
    check_agreement(func, x, v)


def test_a_parameter_computed_from_another() -> None:
    """The derivative is along both: theta_2 = f(theta_1) moves by f' v_1 + v_2."""
    x = torch.tensor([0.3, 0.4], dtype=F64, requires_grad=True)
    v, w = torch.randn(2, 2, dtype=F64)
    results = []
    for engine in ("auto", "reference"):
        with Tape(engine=engine) as tape:
            y = x.sin()
            losses = (y * x).exp()
        tape.backward(losses, [x, y])
        q = tape.directional([v, w], per_sample=True)
        results.append([q.slope, q.per_sample.curvature, *tape.hvp([v, w])])
    torch.testing.assert_close(*results)
