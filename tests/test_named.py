"""Named methods against their formulas, iterate by iterate."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim import gen_hod, lqa, qlabgrad

F64 = torch.float64


TILT = torch.tensor([0.3, -0.4], dtype=F64)


def loss_of(w: torch.Tensor, k: int) -> torch.Tensor:
    """Tilted to the other side at each step, so that the gradient stays away from zero."""
    return w.cosh().sum() + (w[0] * w[1]).sin() / 2 + (-1) ** k * w @ TILT


def derivatives(w: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient and Hessian of it, by hand."""
    cosine, sine = (w[0] * w[1]).cos() / 2, (w[0] * w[1]).sin() / 2
    mixed = cosine - w[0] * w[1] * sine
    H = torch.stack([-(w[1] ** 2) * sine, mixed, mixed, -(w[0] ** 2) * sine]).view(2, 2)
    return w.sinh() + w.flip(0) * cosine + (-1) ** k * TILT, H + w.cosh().diag()


@dataclass
class Along:
    """The loss along theta - t g: L(t), b = <g, g> and A = g^T H g."""

    L: Callable[[float], float]
    b: float
    A: float


def by_lqa(line: Along, eta: float) -> float:
    """Equation (3.5)."""
    L = line.L
    return eta / 2 * (L(-eta) - L(eta)) / (L(-eta) - 2 * L(0) + L(eta))


def by_qlabgrad(line: Along, eta: float) -> float:
    """Appendix D.4, where b is the squared norm of the gradient."""
    return eta**2 / 2 * line.b / (line.L(eta) - line.L(0) + eta * line.b)


def by_hod(line: Along, _: float) -> float:
    """Algorithm 2, line 7."""
    return line.b / line.A


@pytest.mark.parametrize(
    ("make", "formula"), [(lqa, by_lqa), (qlabgrad, by_qlabgrad), (gen_hod, by_hod)]
)
@given(start=st.lists(st.floats(0.2, 1), min_size=2, max_size=2), eta=st.floats(0.01, 0.2))
def test_formula(make: Callable, formula: Callable, start: list[float], eta: float) -> None:
    p = torch.nn.Parameter(torch.tensor(start, dtype=F64))
    optimizer = make(torch.optim.SGD([p]), eta=eta)
    w = torch.tensor(start, dtype=F64)
    for k in range(3):
        optimizer.step(lambda k=k: loss_of(p, k))
        g, H = derivatives(w, k)
        line = Along(
            lambda t, w=w, g=g, k=k: loss_of(w - t * g, k).item(),
            (g @ g).item(),
            (g @ H @ g).item(),
        )
        found = formula(line, eta)
        eta = found if found > 0 else eta
        assert optimizer.records[-1].step == pytest.approx(eta, rel=1e-6)
        w = w - optimizer.records[-1].step * g
        np.testing.assert_allclose(p.detach().numpy(), w.numpy(), rtol=1e-9)
