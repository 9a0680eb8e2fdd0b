"""Rescaled against the paper's algorithm, the checks that fix its factor 2, and its invariances."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from optim import INNA, Rescaled
from optim.rules import Lipschitz

F64 = torch.float64
Array = NDArray[np.float64]


def parameter(values: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=F64))


@given(start=st.floats(-1, 1))
def test_newton_in_one_dimension(start: float) -> None:
    """First check of section 2.2: J = sqrt(1 + theta²), beta3 = 0, ell = 1/2 gives -theta³."""
    x = parameter([start])
    optimizer = Rescaled(torch.optim.SGD([x]), ell=0.5, rule=Lipschitz(beta3=0.0))
    optimizer.step(lambda: (1 + x**2).sqrt().sum())
    torch.testing.assert_close(x.detach(), torch.tensor([-(start**3)], dtype=F64))


@given(batch=st.integers(1, 9), seed=st.integers(0, 99), beta3=st.floats(0, 0.99))
def test_mean_of_the_batch(batch: int, seed: int, beta3: float) -> None:
    """Second check of section 2.2: J = E ‖theta - X‖²/2 with ell = 1/2 lands on the batch mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.Parameter(torch.randn(3, dtype=F64, generator=generator))
    optimizer = Rescaled(torch.optim.SGD([x]), ell=0.5, rule=Lipschitz(beta3))
    for _ in range(3):
        data = torch.randn(batch, 3, dtype=F64, generator=generator)
        optimizer.step(lambda data=data: (x - data).square().sum(1) / 2)
        torch.testing.assert_close(x.detach(), data.mean(0))


@pytest.mark.parametrize(("ell", "change"), [(0.5, -1), (0.9, -1), (1.0, 0), (1.1, 1)])
def test_ell_one_is_the_largest_step_that_does_not_raise_a_quadratic(
    ell: float, change: int
) -> None:
    """Equation (11)."""
    x = parameter([1.0, 2.0])
    loss = lambda: (x * torch.tensor([3.0, 1.0]) * x).sum()  # noqa: E731
    before = loss().item()
    Rescaled(torch.optim.SGD([x]), ell=ell, rule=Lipschitz(beta3=0.0), checked=0).step(loss)
    difference = loss().item() - before
    assert (abs(difference) < 1e-12) if change == 0 else difference * change > 0


class Quadratics:
    """Random per-sample quadratics, one batch per step, with curvatures of either sign."""

    def __init__(self, steps: int, batch: int, n: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        A = generator.standard_normal((steps, batch, n, n)) + np.eye(n)
        self.A = (A + A.transpose(0, 1, 3, 2)) / 2
        self.b = generator.standard_normal((steps, batch, n))
        self.start = generator.standard_normal(n)

    def torch_losses(self, k: int, x: torch.Tensor) -> torch.Tensor:
        A, b = torch.tensor(self.A[k]), torch.tensor(self.b[k])
        return torch.einsum("i,bij,j->b", x, A, x) / 2 + b @ x


def algorithm_1(
    problem: Quadratics, ells: list[float], beta3: float, rmsprop: float | None, mean_only: bool
) -> tuple[Array, list[float]]:
    """Lines 3 to 9 of Algorithm 1, with the factor of r that equation (11) asks for."""
    theta, c_hat, v, steps = problem.start, 0.0, 0.0, []
    for k, (A, b, ell) in enumerate(zip(problem.A, problem.b, ells, strict=True), start=1):
        g = (A @ theta + b).mean(0)
        d = g
        if rmsprop is not None:
            v = rmsprop * v + (1 - rmsprop) * g**2
            d = g / (np.sqrt(v) + 1e-8)
        products = np.einsum("i,bij,j->b", d, A, d)
        c = (abs(products.mean()) if mean_only else np.abs(products).mean()) / (d @ d)
        c_hat = beta3 * c_hat + (1 - beta3) * c
        c_tilde = c_hat / (1 - beta3**k)
        L = max(c_tilde, c)
        r = 2 * (d @ g) / ((d @ d) * L)
        steps.append(ell * r)
        theta = theta - ell * r * d
    return theta, steps


@given(
    batch=st.integers(1, 5),
    beta3=st.sampled_from([0.0, 0.5, 0.9]),
    rmsprop=st.sampled_from([None, 0.9]),
    mean_only=st.booleans(),
    seed=st.integers(0, 999),
)
def test_algorithm_1(
    batch: int, beta3: float, rmsprop: float | None, mean_only: bool, seed: int
) -> None:
    ells = [0.5, 0.45, 0.4, 0.35, 0.3]
    problem = Quadratics(len(ells), batch, 3, seed)
    x = parameter(problem.start)
    if rmsprop is None:
        base: torch.optim.Optimizer = torch.optim.SGD([x])
    else:
        base = torch.optim.RMSprop([x], alpha=rmsprop)
    optimizer = Rescaled(base, ell=1.0, rule=Lipschitz(beta3), checked=0)
    for k, ell in enumerate(ells):
        optimizer.param_groups[0]["lr"] = ell

        def closure(k: int = k) -> torch.Tensor:
            losses = problem.torch_losses(k, x)
            return losses.mean() if mean_only else losses

        optimizer.step(closure)
    theta, steps = algorithm_1(problem, ells, beta3, rmsprop, mean_only)
    np.testing.assert_allclose([r.step for r in optimizer.records], steps, rtol=1e-7)
    np.testing.assert_allclose(x.detach().numpy(), theta, rtol=1e-7, atol=1e-9)


class ScaledSGD(torch.optim.Optimizer):
    """A preconditioner that is off by another factor at each step."""

    def __init__(self, params: Any, factors: list[float]) -> None:
        super().__init__(params, {"lr": 1.0})
        self.factors = factors

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                p.sub_(p.grad, alpha=group["lr"] * self.factors[state["step"] - 1])


@given(factors=st.lists(st.floats(1e-6, 1e6), min_size=4, max_size=4))
def test_any_factor_of_the_preconditioner_leaves_the_iterates(factors: list[float]) -> None:
    """Section 2.2, gradient preconditioning."""
    iterates = []
    for scales in ([1.0] * 4, factors):
        x = parameter([1.0, -2.0])
        optimizer = Rescaled(ScaledSGD([x], scales), ell=0.7)
        for _ in range(4):
            optimizer.step(lambda x=x: (x**4 + x**2 * torch.tensor([1.0, 3.0])).sum())
        iterates.append(x.detach())
    torch.testing.assert_close(iterates[0], iterates[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1e-16, 1e13])
def test_any_unit_of_the_loss_leaves_the_iterates(size: float) -> None:
    """Also where d^T H d, of third order in the unit, is beyond what float32 can hold."""
    iterates = []
    for unit in (1.0, size):
        x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = Rescaled(torch.optim.SGD([x]), ell=0.7)
        for _ in range(4):
            optimizer.step(lambda x=x, unit=unit: unit * (x**4 + x**2).sum())
        iterates.append(x.detach())
    torch.testing.assert_close(iterates[0], iterates[1])


def test_an_ascent_direction_takes_the_step_of_its_opposite() -> None:
    """Appendix C.1: the absolute value of the step."""
    x = parameter([1.0])
    base = ScaledSGD([x], [-3.0])
    optimizer = Rescaled(base, ell=0.5, rule=Lipschitz())
    optimizer.step(lambda: (x**2).sum())
    record = optimizer.records[-1]
    assert record.slope == pytest.approx(-12)
    assert record.step == pytest.approx(1 / 6)
    assert x.item() == pytest.approx(2)  # as far up as the minimum is down


def test_nothing_to_do_at_a_stationary_point() -> None:
    x = parameter([0.0])
    optimizer = Rescaled(torch.optim.SGD([x]))
    optimizer.step(lambda: (x**2).sum())
    assert x.item() == 0
    assert optimizer.skipped == 0
    assert optimizer.records[-1].r == 0


def test_a_loss_without_any_curvature_is_not_extrapolated() -> None:
    x = parameter([1.0])
    optimizer = Rescaled(torch.optim.SGD([x]), ell=0.5)
    with pytest.warns(RuntimeWarning, match="no curvature along the direction"):
        optimizer.step(lambda: x.sum())
    assert x.item() == 1
    assert optimizer.skipped == 1
    optimizer.step(lambda: (x**2).sum())
    assert x.item() == pytest.approx(0)
    optimizer.step(lambda: x.sum())  # the average remembers a curvature
    assert x.item() < 0
    assert optimizer.skipped == 1


def test_inna_never_reaches_beta() -> None:
    x = parameter([1.0])
    optimizer = Rescaled(INNA([x], beta=0.1), ell=1.0)
    optimizer.step(lambda: 1e-6 * (x**2).sum())
    assert optimizer.records[-1].r > 1
    assert optimizer.records[-1].step == math.nextafter(0.1, 0)
