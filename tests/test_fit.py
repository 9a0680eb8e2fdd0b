"""Fits by forward passes: exact on polynomials, least squares otherwise, and nothing disturbed."""

import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from curvature import NonFiniteLoss, Objective, directional, fit, testing

F64 = torch.float64
X, V = torch.zeros((), dtype=F64), torch.ones((), dtype=F64)
STEPS = st.lists(st.integers(-8, 8).map(lambda k: k / 4), min_size=1, max_size=7, unique=True)


def polynomial(coefficients: list[float]):  # type: ignore[no-untyped-def]
    return lambda x: sum(c * x**k for k, c in enumerate(coefficients))


@given(
    coefficients=st.lists(st.integers(-5, 5).map(float), min_size=3, max_size=5),
    steps=STEPS,
    known=st.integers(0, 2),
)
def test_exact_on_polynomials(coefficients: list[float], steps: list[float], known: int) -> None:
    degree = len(coefficients) - 1
    useful = [t for t in steps if t != 0 or known == 0]
    assume(len(useful) >= degree + 1 - known)
    given_values = dict(zip(["value", "slope"][:known], coefficients, strict=False))
    q = fit(polynomial(coefficients), X, V, steps, degree=degree, **given_values)
    assert q.coefficients is not None
    exact = torch.tensor(coefficients, dtype=F64)
    torch.testing.assert_close(q.coefficients, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(q.curvature, 2 * exact[2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        q(0.3), polynomial(coefficients)(torch.tensor(0.3, dtype=F64)), rtol=1e-5, atol=1e-5
    )
    assert q.engine == "fit"


@given(steps=STEPS, scale=st.sampled_from([1e-4, 1.0, 1e3]))
def test_least_squares_as_numpy_does_it(steps: list[float], scale: float) -> None:
    """Equation (3.4) of GeN: pinned at the known value, through any set of points."""
    steps = [t * scale for t in steps]
    points = np.array([t for t in steps if t != 0])
    assume(len(points) >= 2)
    func = lambda x: torch.exp(-x / scale)  # noqa: E731
    columns = np.stack([points, points**2 / 2], axis=1)
    b, A = np.linalg.lstsq(columns, np.exp(-points / scale) - 1, rcond=None)[0]
    q = fit(func, X, V, steps, value=1.0)
    np.testing.assert_allclose([q.slope, q.curvature], [b, A], rtol=1e-7)
    assert q.value == 1


def test_symmetric_three_points_are_lqa() -> None:
    """Equation (3.5) of GeN."""
    eta = 0.3
    func = lambda x: torch.sin(x + 1)  # noqa: E731
    plus, zero, minus = (func(torch.tensor(t, dtype=F64)) for t in (-eta, 0.0, eta))
    lqa = eta / 2 * (minus - plus) / (plus - 2 * zero + minus)
    q = fit(func, X, V, [-eta, 0, eta])
    torch.testing.assert_close(q.slope / q.curvature, lqa)


def test_one_step_suffices_with_the_known_slope() -> None:
    calls = []

    def func(x: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return 3 * x**2 + x + 5

    assert fit(func, X, V, [0.5], value=5.0, slope=1.0).curvature == pytest.approx(6)
    assert calls == [False]


def test_mean_of_a_vector_of_losses() -> None:
    func = lambda x: torch.stack([x**2, 3 * x**2])  # noqa: E731
    assert fit(func, X, V, [-1, 0, 1]).curvature == pytest.approx(4)


def test_a_degree_of_numpy() -> None:
    assert fit(lambda x: x**2, X, V, [-1, 0, 1], degree=np.int64(2)).curvature == pytest.approx(2)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("fails_at", [None, 0, 1, 2])
def test_nothing_is_disturbed(fails_at: int | None) -> None:
    model = network()
    batch = torch.randn(8, 3), torch.zeros(8, 1)
    calls = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if len(calls) == fails_at:
            raise KeyError("out of range label")
        random.random(), np.random.rand()
        calls.append(output.clone())
        return F.mse_loss(output, target)

    J = Objective(model, loss, batch)
    before = snapshot(model)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    direction = {name: torch.zeros_like(p) for name, p in J.params.items()}
    if fails_at is None:
        fit(J, J.params, direction, [-1, 0, 1])
        assert torch.equal(calls[0], calls[1])  # the same dropout mask at every point
        assert torch.equal(calls[0], calls[2])
        assert calls[0].unique().numel() > 1
    else:
        with pytest.raises(KeyError):
            fit(J, J.params, direction, [-1, 0, 1])
    for name, tensor in snapshot(model).items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    np.testing.assert_array_equal(np.random.get_state()[1], states[2])


def test_non_finite_loss_names_the_step() -> None:
    with pytest.raises(NonFiniteLoss, match=r"at step 2\.0, the loss is inf"):
        fit(lambda x: 1 / (2 - x), X, V, [0, 1, 2])


def test_a_graph_through_batch_norm_outlives_a_fit() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    J = Objective(model, lambda y, _: y.square().mean(), (torch.randn(5, 3), None))
    loss = model(torch.randn(5, 3)).mean()
    expected = torch.autograd.grad(loss, model[0].weight, retain_graph=True)
    before = model[1].running_mean.clone()
    fit(J, J.params, {name: torch.ones_like(p) for name, p in J.params.items()}, [0.1, 0.2, 0.3])
    torch.testing.assert_close(model[1].running_mean, before, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, model[0].weight), expected)


def test_a_function_that_differentiates_inside_itself() -> None:
    def loss(w: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(w.sin().sum(), w, create_graph=True)[0].square().sum()

    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    q = fit(loss, w, torch.ones_like(w), [-1e-4, 0, 1e-4])
    # of cos²
    torch.testing.assert_close(q.curvature, -4 * (2 * w.detach()[0]).cos(), rtol=1e-6, atol=0)
    assert not q.value.requires_grad
    testing.check_directional(loss, w.detach(), torch.ones_like(w))


def test_a_model_that_pytorch_computes_otherwise_without_a_graph() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().eval()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    batch = {"src": torch.randn(3, 5, 8, dtype=F64), "src_key_padding_mask": padding}
    J = Objective(model, lambda y, _: y.square().mean(), (batch, None))
    q = directional(J, J.params, J.params)
    found = fit(J, J.params, J.params, [0.0, 1e-3], slope=q.slope)
    torch.testing.assert_close(found.value, q.value)
    torch.testing.assert_close(found.curvature, q.curvature, rtol=1e-2, atol=0)
    assert torch.backends.mha.get_fastpath_enabled()
