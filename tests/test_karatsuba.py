"""Products that move, where their value is known: entry by entry as exact as two products."""

from collections.abc import Callable

import pytest
import torch
from agreement import fast_only
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from curvature import Tape, forward
from curvature.rules import bilinear, karatsuba

pytestmark = fast_only
F64 = torch.float64
EPS = torch.finfo(torch.float32).eps

exponents = st.sampled_from([-25.0, -6.0, -3.0, 0.0, 3.0, 20.0])
spreads = st.sampled_from([0.0, 1.0, 3.0])
Product = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_LEAST_LENGTH", 1)
    monkeypatch.setattr(forward, "_LEAST_WORK", 1)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The t of each product that was made so."""
    found: list[float] = []

    def noted(*args: object) -> object:
        found.append(args[3])
        return karatsuba.karatsuba(*args)

    monkeypatch.setattr(bilinear, "karatsuba", noted)
    return found


def moved(product: Product, values: list[Tensor], moves: list[Tensor]) -> tuple[Tensor, Tensor]:
    """First and second derivative of each entry of the product."""
    leaves = [x.clone().requires_grad_() for x in values]
    with Tape() as tape:
        y = product(*leaves)
    tape.backward(y.flatten(), leaves)
    samples = tape.directional(moves, per_sample=True).per_sample
    return samples.slope.view_as(y), samples.curvature.view_as(y)


def lengths(product: Product, a: Tensor, b: Tensor) -> Tensor:
    """Of the row times that of the column that each entry comes from."""
    columns = b.flatten(1).norm(dim=1)
    return product(a.square(), torch.ones_like(b)).sqrt() * columns.view(-1, *[1] * (a.ndim - 2))


def check(product: Product, values: list[Tensor], moves: list[Tensor]) -> None:
    first, second = moved(product, values, moves)
    (A, B, _), (a, b, c) = ([x.to(F64) for x in each] for each in (values, moves))
    exact_first, exact_second = product(a, B, c) + product(A, b), 2 * product(a, b)
    rounding = lengths(product, A, b) + lengths(product, a, B)
    shift = c.abs().view(-1, *[1] * (A.ndim - 2))
    assert ((first - exact_first).abs() <= 100 * EPS * (rounding + shift)).all()
    size, limits = lengths(product, a, b), torch.finfo(torch.float32)
    close = (second - exact_second).abs() <= 100 * EPS * size + limits.tiny
    assert (close | (2 * size > limits.max)).all()


@settings(max_examples=60)
@given(
    scales=st.tuples(exponents, exponents),
    rows=spreads,
    columns=spreads,
    features=spreads,
    bias=st.sampled_from([0.0, 1.0, 1e4]),
    still=st.sampled_from([0.0, 0.5, 0.99]),
    seed=st.integers(0, 1000),
)
def test_every_entry_is_as_exact_as_by_two_products(
    scales: tuple[float, float],
    rows: float,
    columns: float,
    features: float,
    bias: float,
    still: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    n, k, m = 12, 160, 9

    def scaled(spread: float, *shape: int) -> Tensor:
        return 10 ** (spread * (2 * torch.rand(shape) - 1))

    A = torch.randn(n, k) * scaled(rows, n, 1) * scaled(features, k)
    B = torch.randn(m, k) * scaled(columns, m, 1)
    a = torch.randn(n, k) * scaled(rows, n, 1) * 10 ** scales[0]
    b = torch.randn(m, k) * scaled(columns, m, 1) * 10 ** scales[1]
    a[torch.rand(n) < still] = 0
    b[torch.rand(m) < still] = 0
    check(F.linear, [A, B, torch.full((m,), bias)], [a, b, torch.randn(m) * 10 ** scales[1]])


@settings(max_examples=20)
@given(
    groups=st.sampled_from([1, 2]),
    scales=st.tuples(exponents, exponents),
    spread=spreads,
    seed=st.integers(0, 1000),
)
def test_convolutions_too(
    groups: int, scales: tuple[float, float], spread: float, seed: int
) -> None:
    torch.manual_seed(seed)

    def product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, w, bias, padding=1, groups=groups)

    A, a = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5) * 10 ** scales[0]
    B, b = torch.randn(6, 8 // groups, 3, 3), torch.randn(6, 8 // groups, 3, 3) * 10 ** scales[1]
    B[0] *= 10**spread
    A[0] = A[0].relu() * 10**spread
    check(product, [A, B, torch.randn(6)], [a, b, torch.zeros(6)])


def test_ordinary_layers_take_two_products(used: list[float]) -> None:
    torch.manual_seed(0)
    A, a = torch.randn(32, 160), 0.01 * torch.randn(32, 160)
    B, b = torch.randn(16, 160) / 13, torch.randn(16, 160) * torch.rand(16, 1)
    values, moves = [A.relu(), B, torch.randn(16)], [a, b, torch.randn(16)]
    check(F.linear, values, moves)
    assert len(used) == 1
    check(F.linear, values, [x * 1e-25 for x in moves])
    assert len(used) == 1
