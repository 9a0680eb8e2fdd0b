"""DINAdam and INNAprop's momentum form against the equations that the paper derives them from."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from optim import INNA, DINAdam, INNAprop, INNApropMomentum, Rescaled

F64 = torch.float64
Array = NDArray[np.float64]
START = np.array([1.0, -2.0, 0.3])


def run(make: Callable[..., Any], steps: int, lr: float) -> Array:
    """Iterates on sum(cosh), whose gradient is sinh."""
    p = torch.nn.Parameter(torch.tensor(START))
    optimizer = make([p], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.cosh(p).sum().backward()
        optimizer.step()
    return p.detach().numpy()


@given(
    alpha=st.floats(0, 2),
    beta=st.floats(0, 2),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)),
    decay=st.sampled_from([0.0, 0.1]),
)
def test_dinadam(alpha: float, beta: float, betas: tuple[float, float], decay: float) -> None:
    """Equations (27) and (28), before the change of variable; the root is that of (33)."""
    sigma1, sigma2 = betas
    theta, eta, eps = START, 0.01, 1e-8
    m = v = last = np.zeros_like(theta)
    for _ in range(6):
        g = np.sinh(theta)
        theta = (1 - decay * eta) * theta
        v = sigma2 * v + (1 - sigma2) * g**2
        m = sigma1 * m + (1 - sigma1) * g + beta * alpha * sigma1 * (g - last)
        theta = theta - eta * m / np.sqrt(v + eps)
        last = g
    found = run(
        lambda p, lr: DINAdam(
            p, lr, alpha=alpha, beta=beta, betas=betas, eps=eps, weight_decay=decay
        ),
        6,
        eta,
    )
    np.testing.assert_allclose(found, theta, rtol=1e-9, atol=1e-9)


def test_dinadam_without_newtonian_damping_is_adam() -> None:
    """Remark 6, for Adam as DINAdam writes it: without bias correction, eps under the root."""
    theta, m, v = START, 0.0, 0.0
    for _ in range(5):
        g = np.sinh(theta)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        theta = theta - 0.02 * m / np.sqrt(v + 1e-8)
    found = run(lambda p, lr: DINAdam(p, lr, alpha=1.0, beta=0.0, betas=(0.9, 0.99)), 5, 0.02)
    np.testing.assert_allclose(found, theta, rtol=1e-12)


@given(
    alpha=st.floats(0, 2), beta=st.floats(0.1, 2), sigma=st.floats(0, 0.999), lr=st.floats(0, 0.09)
)
def test_innaprop_momentum(alpha: float, beta: float, sigma: float, lr: float) -> None:
    """Equations (16) to (18), before the change of variable."""
    theta, v, m, last = START, 0.0, 0.0, 0.0
    for _ in range(6):
        g = np.sinh(theta)
        v = sigma * v + (1 - sigma) * g**2
        p = g / (np.sqrt(v) + 1e-8)
        m = (1 - alpha * lr) * m + lr**2 * last + beta * lr * (p - last)
        theta, last = theta - m, p
    found = run(lambda p, lr: INNApropMomentum(p, lr, alpha=alpha, beta=beta, sigma=sigma), 6, lr)
    np.testing.assert_allclose(found, theta, rtol=1e-9, atol=1e-12)


@given(alpha=st.floats(0, 2), beta=st.floats(0.1, 2), lr=st.floats(0, 0.09))
def test_the_momentum_form_takes_innaprops_iterates(alpha: float, beta: float, lr: float) -> None:
    """sigma = 0, where the bias correction, which the momentum form lacks, is 1."""
    options = {"alpha": alpha, "beta": beta, "sigma": 0.0, "weight_decay": 0.0}
    forms = [
        run(lambda p, lr, k=k: k(p, lr, **options), 8, lr) for k in (INNAprop, INNApropMomentum)
    ]
    np.testing.assert_allclose(forms[0], forms[1], rtol=1e-9, atol=1e-9)


def test_dinadam_can_be_rescaled_and_the_momentum_form_says_that_it_cannot() -> None:
    x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=F64))
    optimizer = Rescaled(DINAdam([x]))
    for _ in range(30):
        optimizer.step(lambda: (x**2).sum())
    assert optimizer.records[-1].value < 0.1
    y = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=r"INNApropMomentum cannot be wrapped: .* not linear in lr"):
        Rescaled(INNApropMomentum([y]))


@pytest.mark.parametrize("kind", [INNA, INNAprop, DINAdam, INNApropMomentum])
def test_a_parameter_that_changes_its_dtype_takes_its_state_along(kind: type) -> None:
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = kind([{"params": [first]}, {"params": [second]}], lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        (first.square().sum() + second.square().sum()).backward()
        optimizer.step()

    step()
    second.data = second.data.double()
    before = copy.deepcopy((first.data, second.data, optimizer.state_dict()["state"]))
    with pytest.raises(TypeError, match=r"a state has dtype torch.float32 .* converts it"):
        step()
    torch.testing.assert_close(
        (first.data, second.data, optimizer.state_dict()["state"]), before, rtol=0, atol=0
    )
    optimizer.load_state_dict(optimizer.state_dict())
    step()
    states = [x for x in optimizer.state[second].values() if isinstance(x, torch.Tensor)]
    assert {x.dtype for x in states} == {F64}


@pytest.mark.parametrize("kind", [INNA, INNAprop])
def test_nor_does_a_wrapper_go_on_with_the_old_state(kind: type) -> None:
    x = torch.nn.Parameter(torch.ones(2))
    optimizer = Rescaled(kind([x]))
    optimizer.step(lambda: x.square().sum())
    x.data = x.data.double()
    before = x.detach().clone()
    with pytest.raises(TypeError, match=r"a state has dtype torch.float32"):
        optimizer.step(lambda: x.square().sum())
    assert torch.equal(x, before)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(lambda: x.square().sum())
    assert optimizer.iteration == 2
