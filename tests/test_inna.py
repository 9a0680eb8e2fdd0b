"""INNA and INNAprop against transcriptions of the papers, and their free oracles."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from optim import INNA, GeN, INNAprop

F64 = torch.float64
Array = NDArray[np.float64]


def innaprop_as_printed(
    theta: Array, gradient: Callable[[Array], Array], gammas: list[float], **options: float
) -> Array:
    """Algorithm 1 of *INNAprop*, lines 5 to 13, in its own coordinates."""
    alpha, beta, sigma = options["alpha"], options["beta"], options["sigma"]
    v, psi = np.zeros_like(theta), (1 - alpha * beta) * theta
    for k, gamma in enumerate(gammas, start=1):
        g = gradient(theta)
        theta = (1 - options["weight_decay"] * gamma) * theta
        v = sigma * v + (1 - sigma) * g**2
        v_hat = v / (1 - sigma**k)
        psi = (1 - gamma / beta) * psi + gamma * (1 / beta - alpha) * theta
        theta = (
            (1 + gamma * (1 - alpha * beta) / (beta - gamma)) * theta
            - gamma / (beta - gamma) * psi
            - gamma * beta * (g / (np.sqrt(v_hat) + options["eps"]))
        )
    return theta


def inna_as_on_the_slides(
    theta: Array, gradient: Callable[[Array], Array], gammas: list[float], alpha: float, beta: float
) -> Array:
    psi = (1 - alpha * beta) * theta
    for gamma in gammas:
        rest = -(alpha - 1 / beta) * theta - psi / beta
        theta, psi = theta + gamma * (rest - beta * gradient(theta)), psi + gamma * rest
    return theta


def run(make: Callable[..., Any], start: Array, gammas: list[float], sign: float = 1) -> Array:
    """Iterates of an optimizer on sum(cosh), rates set as a scheduler would."""
    p = torch.nn.Parameter(torch.tensor(start))
    q = torch.nn.Parameter(torch.tensor(start[:1]))
    optimizer = make([p, q], lr=gammas[0])
    for gamma in gammas:
        optimizer.zero_grad()
        (sign * torch.cosh(p).sum() + sign * torch.cosh(q).sum()).backward()
        optimizer.param_groups[0]["lr"] = gamma
        optimizer.step()
    assert torch.equal(q, p[:1])
    return p.detach().numpy()


START = np.array([1.0, -0.5, 2.0])
GAMMAS = [0.01 * (1 + k % 3) for k in range(25)]


@given(
    alpha=st.floats(0, 4),
    beta=st.floats(0.05, 4),
    sigma=st.floats(0, 0.999),
    weight_decay=st.sampled_from([0.0, 0.3]),
    foreach=st.sampled_from([None, False]),
)
def test_innaprop(
    alpha: float, beta: float, sigma: float, weight_decay: float, foreach: bool | None
) -> None:
    options = {"alpha": alpha, "beta": beta, "sigma": sigma, "weight_decay": weight_decay}
    ours = run(lambda p, lr: INNAprop(p, lr, **options, eps=1e-3, foreach=foreach), START, GAMMAS)
    printed = innaprop_as_printed(START, np.sinh, GAMMAS, **options, eps=1e-3)
    np.testing.assert_allclose(ours, printed, rtol=1e-9, atol=1e-9)


@given(alpha=st.floats(0, 4), beta=st.floats(0.05, 4))
def test_inna(alpha: float, beta: float) -> None:
    ours = run(lambda p, lr: INNA(p, lr, alpha=alpha, beta=beta), START, GAMMAS)
    slides = inna_as_on_the_slides(START, np.sinh, GAMMAS, alpha, beta)
    np.testing.assert_allclose(ours, slides, rtol=1e-9, atol=1e-9)


def test_no_singularity_where_gamma_comes_close_to_beta() -> None:
    """The printed form divides by beta - gamma; in the form used here nothing is large."""
    options = {"alpha": 0.5, "beta": 0.1}
    gammas = [0.1 * (1 - 1e-15)] * 5
    ours = run(lambda p, lr: INNA(p, lr, **options), START, gammas)
    slides = inna_as_on_the_slides(START, np.sinh, gammas, **options)
    np.testing.assert_allclose(ours, slides, rtol=1e-12)


@pytest.mark.parametrize("kind", [INNA, INNAprop])
def test_the_proposed_direction_is_where_a_short_move_goes(kind: type) -> None:
    p = torch.nn.Parameter(torch.tensor(START))
    optimizer = kind([p], lr=0.02, weight_decay=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        torch.cosh(p).sum().backward()
        optimizer.step()
    before = p.detach().clone()
    direction = optimizer.propose([0.5])[p]
    assert torch.equal(p, before)
    optimizer.move(1e-8)
    torch.testing.assert_close((before - p.detach()) / 1e-8, direction, rtol=1e-6, atol=0)


def test_alpha_beta_one_is_adamw_without_momentum() -> None:
    make = lambda p, lr: INNAprop(p, lr, alpha=1, beta=1, sigma=0.9, weight_decay=0.1)  # noqa: E731
    adamw = lambda p, lr: torch.optim.AdamW(p, lr, betas=(0.0, 0.9), weight_decay=0.1)  # noqa: E731
    np.testing.assert_allclose(
        run(make, START, GAMMAS), run(adamw, START, GAMMAS), rtol=1e-12, atol=0
    )


def test_identity_preconditioner_makes_innaprop_inna() -> None:
    class Plain(INNAprop):
        def _precondition(self, group: Any, grads: list[Tensor], states: Any) -> list[Tensor]:
            super()._precondition(group, grads, states)
            return grads

    make = lambda p, lr: Plain(p, lr, alpha=0.7, beta=0.6, weight_decay=0.0)  # noqa: E731
    inna = lambda p, lr: INNA(p, lr, alpha=0.7, beta=0.6)  # noqa: E731
    np.testing.assert_array_equal(run(make, START, GAMMAS), run(inna, START, GAMMAS))


@pytest.mark.parametrize("kind", [INNA, INNAprop])
def test_maximize_is_minimising_the_negative(kind: type) -> None:
    up = run(lambda p, lr: kind(p, lr, maximize=True), START, GAMMAS, sign=-1)
    down = run(kind, START, GAMMAS)
    np.testing.assert_array_equal(up, down)


def test_paper_defaults() -> None:
    group = INNAprop([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    names = ("alpha", "beta", "sigma", "eps", "weight_decay", "lr")
    assert tuple(group[name] for name in names) == (0.1, 0.9, 0.999, 1e-8, 0.01, 1e-3)


@pytest.mark.parametrize("kind", [INNA, INNAprop])
def test_state_only_where_a_gradient_is_and_round_trip(kind: type) -> None:
    def make() -> tuple[list[torch.nn.Parameter], Any]:
        params = [torch.nn.Parameter(torch.full((2,), 2.0)), torch.nn.Parameter(torch.ones(3))]
        return params, kind(params, lr=0.01)

    def advance(params: list[torch.nn.Parameter], optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            params[0].square().sum().backward()
            optimizer.step()

    params, optimizer = make()
    advance(params, optimizer, 5)
    assert list(optimizer.state) == [params[0]]
    saved = copy.deepcopy(optimizer.state_dict())
    other_params, other = make()
    with torch.no_grad():
        other_params[0].copy_(params[0])
    other.load_state_dict(saved)
    advance(params, optimizer, 5)
    advance(other_params, other, 5)
    assert torch.equal(params[0], other_params[0])


def test_closure_and_scheduler() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = INNAprop([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("kind", [INNA, INNAprop])
def test_a_refused_step_changes_nothing(kind: type) -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = kind([{"params": [params[0]]}, {"params": [params[1]]}], lr=0.01)
    sum(p.square().sum() for p in params).backward()
    optimizer.param_groups[1]["lr"] = 5.0
    with pytest.raises(ValueError, match=r"lr is 5\.0"):
        optimizer.step()
    optimizer.param_groups[1]["lr"] = 0.01
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(p, torch.ones(2)) for p in params)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("alpha", -1.0, ValueError),
        ("beta", 0.0, ValueError),
        ("beta", "x", TypeError),
        ("sigma", 1.0, ValueError),
        ("eps", 0.0, ValueError),
        ("weight_decay", -0.1, ValueError),
    ],
)
def test_hyperparameters_are_checked_at_the_steps_of_a_wrapper(
    name: str, value: Any, error: type[Exception]
) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = GeN(INNAprop([p]))
    optimizer.step(lambda: p.square().sum())
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state[p])
    group = optimizer.param_groups[0]
    own, group[name] = group[name], value
    with pytest.raises(error, match=f"{name} is {value!r}"):
        optimizer.step(lambda: p.square().sum())
    group[name] = own
    assert torch.equal(p, before)
    torch.testing.assert_close(optimizer.state[p], state, rtol=0, atol=0)
    optimizer.step(lambda: p.square().sum())
