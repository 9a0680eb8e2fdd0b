"""Schedules against the formulas of the papers, step by step."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR, LinearLR

from optim import INNA, DINAdam, INNAprop, INNApropMomentum, Rescaled, schedules


def rates(make: Callable[[torch.optim.Optimizer], LambdaLR], count: int, lr: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=lr)
    scheduler, found = make(optimizer), []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@given(
    warmup=st.integers(0, 5),
    length=st.integers(1, 9),
    least=st.floats(0, 1),
    gamma=st.floats(1e-6, 1e3),
)
def test_warmup_cosine(warmup: int, length: int, least: float, gamma: float) -> None:
    decay = warmup + length
    expected = []
    for k in range(decay + 3):
        if k < warmup:
            expected.append(gamma * k / warmup)
        elif k <= decay:
            cosine = math.cos(math.pi * (k - warmup) / (decay - warmup))
            expected.append(least * gamma + 0.5 * (gamma - least * gamma) * (1 + cosine))
        else:
            expected.append(least * gamma)
    found = rates(
        lambda o: schedules.warmup_cosine(o, warmup, decay, least=least), decay + 3, gamma
    )
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12 * gamma)


@given(warmup=st.integers(0, 5), length=st.integers(1, 9), gamma=st.floats(1e-6, 1e3))
def test_warmup_linear(warmup: int, length: int, gamma: float) -> None:
    steps = warmup + length
    expected = [
        gamma * k / warmup if k < warmup else gamma * (1 - (k - warmup) / (steps - warmup))
        for k in range(steps + 1)
    ]
    found = rates(lambda o: schedules.warmup_linear(o, warmup, steps), steps + 2, gamma)
    assert found == pytest.approx([*expected, 0.0], rel=1e-12)


@given(epochs=st.integers(1, 20), eta=st.floats(0.01, 2))
def test_red(epochs: int, eta: float) -> None:
    """Line 13 of Algorithm 3: ell <- eta^(1/N) ell, from 1."""
    expected = [1.0]
    for _ in range(epochs):
        expected.append(eta ** (1 / epochs) * expected[-1])
    found = rates(lambda o: schedules.red(o, epochs, eta=eta), epochs + 1, 1.0)
    assert found == pytest.approx(expected)
    assert found[-1] == pytest.approx(eta)


def test_ran_is_periodic() -> None:
    found = rates(schedules.ran, 60, 1.0)
    assert found[:20] == [1.0] * 5 + [0.5] * 13 + [2.0] * 2
    assert found[20:40] == found[40:] == found[:20]


@given(steps=st.integers(1, 30), share=st.floats(0.01, 1))
def test_cooldown_is_constant_and_then_linear_to_zero(steps: int, share: float) -> None:
    found = rates(lambda o: schedules.cooldown(o, steps, share=share), steps + 2, 3.0)
    for k, rate in enumerate(found[:-1]):
        left = 1 - k / steps
        assert rate == pytest.approx(3.0 if left >= share else 3.0 * left / share, abs=1e-12)
    assert found[-1] == 0


def test_a_wrapper_is_driven_by_its_schedule() -> None:
    x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = Rescaled(torch.optim.SGD([x]), ell=0.5, checked=0)
    scheduler = schedules.cooldown(optimizer, 4, share=1.0)
    steps = []
    for _ in range(4):
        optimizer.step(lambda: (3 * x**2).sum())
        scheduler.step()
        steps.append(optimizer.records[-1].step)
    assert steps == pytest.approx([1 / 6, 1 / 8, 1 / 12, 1 / 24], rel=1e-9)


@pytest.mark.parametrize("first", [0.9, 0.8, 1 / 3])
@pytest.mark.parametrize(
    "make", [lambda p: Rescaled(torch.optim.SGD(p)), INNA, INNAprop, DINAdam, INNApropMomentum]
)
def test_a_schedule_to_zero_may_end_below_by_rounding(
    make: Callable[[Any], Any], first: float
) -> None:
    """As torch computes LinearLR, from the rate of the step before."""
    below = 0
    for length in range(2, 30):
        x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        optimizer = make([x])

        def loss(optimizer: Any = optimizer, x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            value = (3 * x**2).sum()
            value.backward()
            return value

        scheduler = LinearLR(optimizer, first, 0.0, length)
        for _ in range(length):
            optimizer.step(loss)
            scheduler.step()
        before = x.detach().clone()
        optimizer.step(loss)
        if optimizer.param_groups[0]["lr"] < 0:
            below += 1
            # The momentum of INNApropMomentum is not a multiple of lr.
            assert torch.equal(x, before) or make is INNApropMomentum
    assert below
    optimizer.param_groups[0]["lr"] = -1e-9
    with pytest.raises(ValueError, match="lr is -1e-09"):
        optimizer.step(loss)
