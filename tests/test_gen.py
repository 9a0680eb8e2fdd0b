"""GeN as published against Algorithm 1 of the paper, and what its probes leave alone."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from optim import GeN, Rescaled, gen_published
from optim.line import Line
from optim.rules import Newton

F64 = torch.float64


def eta_of(optimizer: Rescaled) -> float:
    """The learning rate that the next step starts from."""
    return optimizer.stepper.rule.reach(Line(1, 0.0, 1.0, 1.0), optimizer.stepper.rule_state)


def loss_of(w: torch.Tensor, t: int) -> torch.Tensor:
    """Another target at each step, so that the gradient stays away from zero."""
    target = 2 * torch.tensor([1.0, 2.0], dtype=F64).mul(t).cos()
    return (w - target).square().sum() + (w[0] + 2 * w[1]).sin() / 4


def algorithm_1(
    start: list[float], eta: float, gamma: float, phi: int, steps: int
) -> tuple[list[float], np.ndarray]:
    """Lines 1 to 10 with SGD, the fit by equation (3.5)."""
    w, etas = torch.tensor(start, dtype=F64), []
    for t in range(1, steps + 1):
        w = w.detach().requires_grad_()
        L0 = loss_of(w, t)
        (g,) = torch.autograd.grad(L0, w)
        if t % phi == 0:
            plus, minus = loss_of(w - eta * g, t).item(), loss_of(w + eta * g, t).item()
            A = (plus - 2 * L0.item() + minus) / eta**2
            b = (minus - plus) / (2 * eta)
            if A > 0 and b > 0:
                eta = gamma * eta + (1 - gamma) * b / A
        etas.append(eta)
        w = w - eta * g
    return etas, w.detach().numpy()


@given(
    eta=st.sampled_from([0.01, 0.1, 0.5]),
    gamma=st.sampled_from([0.0, 0.5, 0.9]),
    phi=st.integers(1, 4),
    start=st.lists(st.floats(-1, 1), min_size=2, max_size=2),
)
def test_algorithm_1(eta: float, gamma: float, phi: int, start: list[float]) -> None:
    w = nn.Parameter(torch.tensor(start, dtype=F64))
    optimizer = gen_published(torch.optim.SGD([w]), eta=eta, gamma=gamma, phi=phi)
    for t in range(1, 9):
        optimizer.step(lambda t=t: loss_of(w, t))
    etas, end = algorithm_1(start, eta, gamma, phi, 8)
    np.testing.assert_allclose([r.step for r in optimizer.records], etas, rtol=1e-6)
    np.testing.assert_allclose(w.detach().numpy(), end, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_exact_line_search_on_a_quadratic(base: type) -> None:
    A = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=F64)
    w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=F64))
    optimizer = gen_published(base([w]), eta=0.3, gamma=0.0, phi=1)
    optimizer.step(lambda: w @ A @ w / 2)
    record = optimizer.records[-1]
    assert record.step == pytest.approx(record.slope / record.curvature)
    slope_left = torch.autograd.grad(w @ A @ w / 2, w)[0]
    start = torch.tensor([1.0, -2.0], dtype=F64)
    assert slope_left @ (start - w.detach()) == pytest.approx(0, abs=1e-10)


def test_newtons_direction_gets_step_one() -> None:
    """Proposition 3.3."""
    A = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=F64)
    w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=F64))

    class Newton(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):  # type: ignore[no-untyped-def, override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(torch.linalg.solve(A, p.grad), alpha=group["lr"])

    optimizer = gen_published(Newton([w]), eta=0.1, gamma=0.0, phi=1)
    optimizer.step(lambda: w @ A @ w / 2)
    assert eta_of(optimizer) == pytest.approx(1)
    torch.testing.assert_close(w.detach(), torch.zeros(2, dtype=F64), rtol=0, atol=1e-9)


def test_the_searched_rate_is_that_of_the_lowest_loss() -> None:
    """Appendix C.4.2; refits follow at every Phi-th step."""
    w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=F64))
    optimizer = gen_published(torch.optim.SGD([w]), eta=None, gamma=0.0, phi=3)
    closure = lambda: 3 * w.square().sum()  # noqa: E731
    optimizer.step(closure)  # best at 1/6
    assert optimizer.records[-1].step == pytest.approx(0.1)
    optimizer.step(closure)
    assert optimizer.records[-1].curvature is None
    optimizer.step(closure)
    assert optimizer.records[-1].step == pytest.approx(1 / 6)


def test_an_exact_curvature_needs_no_search() -> None:
    w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=F64))
    optimizer = Rescaled(torch.optim.SGD([w]), ell=1.0, rule=Newton(eta=None), checked=0)
    with pytest.warns(RuntimeWarning, match="there is no learning rate yet"):
        optimizer.step(lambda: -w.square().sum())
    optimizer.step(lambda: 3 * w.square().sum())
    assert optimizer.records[-1].step == pytest.approx(1 / 6)


class Uphill(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize(
    ("base", "sign", "slope", "curvature"),
    [(torch.optim.SGD, -1, 4, -8), (Uphill, 1, -4, 8), (Uphill, -1, -4, -8)],
)
def test_eta_keeps_its_value_unless_both_are_positive(
    base: type, sign: int, slope: float, curvature: float
) -> None:
    w = nn.Parameter(torch.tensor([1.0], dtype=F64))
    optimizer = gen_published(base([w]), eta=0.1, gamma=0.0, phi=1)
    optimizer.step(lambda: sign * w.square().sum())
    assert eta_of(optimizer) == 0.1
    assert optimizer.records[-1].slope == pytest.approx(slope)
    assert optimizer.records[-1].curvature == pytest.approx(curvature)


def test_eta_is_halved_until_the_probes_are_finite() -> None:
    w = nn.Parameter(torch.tensor([1.0], dtype=F64))
    optimizer = gen_published(torch.optim.SGD([w], momentum=0.5), eta=0.03, gamma=0.0, phi=1)
    closure = lambda: -(w - 0.9).log().sum()  # noqa: E731
    for k, eta in enumerate((0.015, 0.0075)):
        with pytest.warns(RuntimeWarning, match="the loss at a probe is NaN or infinite"):
            optimizer.step(closure)
        assert (w.item(), eta_of(optimizer)) == (1, eta)
        assert optimizer.skipped == k + 1
        assert not optimizer.base.state
    optimizer.step(closure)
    assert optimizer.skipped == 2
    assert w.item() > 1


def test_a_closure_that_differentiates_inside_itself() -> None:
    """As a physics-informed loss does; other losses ahead are evaluated without a graph."""
    w, x = nn.Parameter(torch.tensor([1.0, 2.0])), torch.linspace(0, 1, 5)
    noise: list[float] = []

    def residual() -> torch.Tensor:
        noise.append(torch.rand(()).item())
        t = x.clone().requires_grad_()
        u = w[0] * t + w[1] * t.square()
        (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        return (slope - u).square().mean()

    optimizer = gen_published(torch.optim.SGD([w]), eta=0.01, phi=1)
    for _ in range(2):
        noise.clear()
        optimizer.step(residual)
        assert len(set(noise)) == 1
    # Two losses ahead; the first one was begun without a graph.
    assert len(noise) == 3
    assert eta_of(optimizer) != 0.01


def test_a_closure_that_looks_at_cotangents() -> None:
    w, seen = nn.Parameter(torch.tensor([1.0, 2.0])), []

    def closure() -> torch.Tensor:
        y = w.square()
        y.register_hook(seen.append)
        y.retain_grad()
        return y.sum()

    GeN(torch.optim.SGD([w]), phi=1).step(closure)
    assert len(seen) == 1


def test_probes_see_the_batch_as_the_gradient_did_and_leave_no_trace() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    x, y = torch.randn(16, 3), torch.randn(16, 1)
    masks = []
    model[2].register_forward_hook(lambda _, inputs, output: masks.append(output == 0))
    optimizer = gen_published(torch.optim.SGD(model.parameters()), eta=1e-3, phi=1)
    optimizer.step(lambda: F.mse_loss(model(x), y))
    assert len(masks) == 1 + 2 + 2  # the two last to see whether the closure gives a function
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    after = torch.get_rng_state()

    torch.manual_seed(3)
    twin = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    x, y = torch.randn(16, 3), torch.randn(16, 1)
    F.mse_loss(twin(x), y)
    assert torch.equal(torch.get_rng_state(), after)
    for name, buffer in twin.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name))


def test_ell_is_a_factor_on_eta() -> None:
    w = nn.Parameter(torch.tensor([1.0], dtype=F64))
    optimizer = gen_published(torch.optim.SGD([w]), eta=0.1, phi=2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5)
    optimizer.step(lambda: w.square().sum())
    assert optimizer.records[-1].step == pytest.approx(0.05)
    assert w.item() == pytest.approx(0.9)


def test_a_failing_probe_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    x = torch.randn(8, 2)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(None)
        if len(calls) == 4:
            raise KeyError("lost connection")
        return model(x).square().mean()

    base = torch.optim.SGD(model.parameters(), momentum=0.9)
    optimizer = gen_published(base, eta=0.1, phi=2)
    optimizer.step(closure)
    optimizer.zero_grad()
    pointers = [p.data_ptr() for p in model.parameters()]

    def snapshot() -> tuple:
        grads = [p.grad for p in model.parameters()]
        return copy.deepcopy(
            (model.state_dict(), base.state_dict()["state"], grads, torch.get_rng_state())
        )

    before = snapshot()
    with pytest.raises(KeyError):
        optimizer.step(closure)
    torch.testing.assert_close(snapshot(), before, rtol=0, atol=0)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    optimizer.step(closure)
    assert optimizer.iteration == 2
