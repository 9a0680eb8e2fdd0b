"""Fits by forward passes: exact on polynomials, least squares otherwise, and nothing disturbed."""

import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from curvature import NonFiniteLoss, Objective, SideEffects, fit, testing

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


def test_side_effects_can_be_kept() -> None:
    norm = nn.BatchNorm1d(2)
    with SideEffects() as effects:
        norm(torch.randn(4, 2))
        after = torch.get_rng_state()
        effects.keep()
    assert norm.num_batches_tracked == 1
    assert torch.equal(torch.get_rng_state(), after)


def test_side_effects_of_a_raising_block_are_taken_back_even_if_kept() -> None:
    norm = nn.BatchNorm1d(2)
    with pytest.raises(KeyError), SideEffects() as effects:  # noqa: PT012
        norm(torch.randn(4, 2))
        effects.keep()
        raise KeyError
    assert norm.num_batches_tracked == 0


def test_side_effects_restore_a_buffer_that_was_rebound() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count = self.count + 1
            return x

    counter = Counter()
    own = counter.count
    with SideEffects():
        counter(torch.ones(1))
    assert counter.count is own
    assert counter.count == 0


def test_side_effects_leave_the_buffers_that_functional_call_swapped_out() -> None:
    norm = nn.BatchNorm1d(2)
    own = dict(norm.named_buffers())
    given = {name: torch.full_like(b, 7) for name, b in own.items()}
    with SideEffects():
        torch.func.functional_call(norm, given, (torch.randn(4, 2),))
    for name, buffer in norm.named_buffers():
        assert buffer is own[name]
        assert (buffer == (1 if name == "running_var" else 0)).all()
        assert (given[name] == 7).all()


def test_side_effects_see_a_module_both_with_lent_and_with_its_own_buffers() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rebound", torch.zeros(()))
            self.register_buffer("written", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.rebound = self.rebound + 1
            self.written += 1
            return x

    counter, x = Counter(), torch.ones(1)
    own = dict(counter.named_buffers())
    lent = {"rebound": torch.tensor(7.0), "written": torch.tensor(7.0)}
    with SideEffects():
        counter(x)
        torch.func.functional_call(counter, dict(lent), x)
        counter(x)
        assert counter.rebound == counter.written == 2
    for name, buffer in counter.named_buffers():
        assert buffer is own[name]
        assert buffer == 0
        assert lent[name] == 7


def test_side_effects_remove_a_buffer_that_was_registered_in_the_block() -> None:
    class Cache(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.register_buffer("cache", x.clone())
            return x

    model = nn.Sequential(Cache())
    with pytest.raises(KeyError), SideEffects():  # noqa: PT012
        model(torch.ones(1))
        model(torch.zeros(1))
        raise KeyError
    assert not hasattr(model[0], "cache")


def test_side_effects_leave_stacked_models_alone() -> None:
    models = [nn.BatchNorm1d(2).eval() for _ in range(3)]
    params, buffers = torch.func.stack_module_state(models)
    x = torch.randn(4, 2)

    def loss(p: dict, b: dict) -> torch.Tensor:
        return torch.func.functional_call(models[0], (p, b), (x,)).square().sum()

    q = fit(
        lambda p: torch.func.vmap(loss)(p, buffers),
        params,
        {name: torch.ones_like(p) for name, p in params.items()},
        [-1, 0, 1],
    )
    torch.testing.assert_close(q.curvature, 2 * ((x / (1 + 1e-5) ** 0.5 + 1) ** 2).sum())


def test_side_effects_reach_buffers_of_inference_mode() -> None:
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.inference_mode():
                self.register_buffer("mean", torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                self.mean.lerp_(x.mean(0), 0.1)
            return x + torch.rand(())

    module, state = Seen(), torch.get_rng_state()
    with SideEffects():
        module(torch.ones(3, 2))
    assert module.mean.tolist() == [0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_graph_through_batch_norm_outlives_a_fit() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    J = Objective(model, lambda y, _: y.square().mean(), (torch.randn(5, 3), None))
    loss = model(torch.randn(5, 3)).mean()
    expected = torch.autograd.grad(loss, model[0].weight, retain_graph=True)
    before = model[1].running_mean.clone()
    fit(J, J.params, {name: torch.ones_like(p) for name, p in J.params.items()}, [0.1, 0.2, 0.3])
    torch.testing.assert_close(model[1].running_mean, before, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, model[0].weight), expected)


def test_side_effects_do_not_invalidate_a_graph() -> None:
    norm = nn.BatchNorm1d(2).eval()
    x = torch.randn(4, 2, requires_grad=True)
    output = norm(x).sum()
    with SideEffects():
        norm(x)
    output.backward()


def test_a_function_that_differentiates_inside_itself() -> None:
    def loss(w: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(w.sin().sum(), w, create_graph=True)[0].square().sum()

    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    q = fit(loss, w, torch.ones_like(w), [-1e-4, 0, 1e-4])
    # of cos²
    torch.testing.assert_close(q.curvature, -4 * (2 * w.detach()[0]).cos(), rtol=1e-6, atol=0)
    assert not q.value.requires_grad
    testing.check_directional(loss, w.detach(), torch.ones_like(w))
