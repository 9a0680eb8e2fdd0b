"""GeN's own rule and estimator: what makes it depend on no first learning rate."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from caution import average, caution
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from optim import GeN, INNAprop, Rescaled
from optim.estimators import Secant
from optim.line import Estimate, Line
from optim.rules import Trust

F64 = torch.float64
Known = tuple[float, float, float, float, float]  # slope, ‖d‖², magnitude, loss, hindsight
sizes = st.floats(1e-3, 1e3)


def trust(
    lines: list[Known],
    mu: float,
    beta3: float,
    phi: int,
    trusted: float,
) -> list[float]:
    """The docstring's equations, each sum written out over all steps so far."""
    qs = caution(*zip(*[(v, h) for *_, v, h in lines], strict=True))
    rs, curvatures, settled, L = [], [], True, math.inf
    for k, (_, squared_norm, magnitude, _, _) in enumerate(lines, start=1):
        earlier = [v for *_, v, _ in lines[: k - 1]]
        surprised = k > 2 and earlier[-1] > 2 * average(earlier[:-1], 0.9)
        due = (k - 1) % phi == 0 or surprised or not settled
        settled = True
        slopes = [s / math.sqrt(n) for s, n, *_ in lines[:k]]
        B = max(0.0, min(slopes[-1], average(slopes, mu)))
        if due:
            curvatures.append(magnitude / squared_norm)
            known = L
            L = max(curvatures[-1], average(curvatures, beta3))
            step = min(2 * B / L, 4 * trusted)
            settled = step < 4 * trusted and 2 * known >= L
            trusted = max(step, trusted / 2) if step > 0 else trusted
        else:
            step = min(2 * B / L, trusted)
        rs.append((1 - mu**k) * qs[k - 1] * step / math.sqrt(squared_norm))
    return rs


@given(
    lines=st.lists(
        st.tuples(st.floats(-5, 5), sizes, sizes, st.floats(0.5, 2), st.floats(-1, 1)), min_size=1
    ),
    mu=st.sampled_from([0.0, 0.5, 0.9]),
    beta3=st.sampled_from([0.0, 0.7]),
    phi=st.integers(1, 4),
)
@example(
    lines=[(1.0, 1.0, 9.0, 1.0, 0.0), (1.0, 1.0, 1.0, 1.5, -1.0)] * 6, mu=0.9, beta3=0.7, phi=2
)
@example(
    lines=[(1.0, 1.0, 1e-3, 1.0, 0.0), (-1.0, 1.0, 1.0, 1.0, 1.0)] * 4, mu=0.0, beta3=0.7, phi=1
)
def test_trust(lines: list[Known], mu: float, beta3: float, phi: int) -> None:
    rule, state, found = Trust(beta3), {}, []
    for k, (slope, squared_norm, magnitude, value, h) in enumerate(lines, start=1):
        line = Line(k, value, slope, squared_norm, momentum=mu, hindsight=h)
        estimate = None
        if rule.due(k, phi, state):
            first = 0.125 / math.sqrt(squared_norm)
            reach = rule.reach(line, state) if state else first
            estimate = Estimate(slope, -magnitude, magnitude, reach)
        r, state = rule.choose(line, estimate, state)
        found.append(r)
    assert found == pytest.approx(trust(lines, mu, beta3, phi, 0.125), rel=1e-9, abs=1e-12)


def test_caution_answers_hindsight_while_the_loss_stays() -> None:
    """Down to its bound while batches call the steps too long, up at once, or as the loss falls."""
    losses = [*[1.0] * 60, *[1.0] * 7, *[1.0] * 60, *np.geomspace(1, 1e-3, 300)]
    hindsights = [*[-1.0] * 60, *[1.0] * 7, *[-1.0] * 60, *[-1.0] * 300]
    rule, state, rs = Trust(), {}, []
    for k, (value, h) in enumerate(zip(losses, hindsights, strict=True), start=1):
        line = Line(k, float(value), slope=1.0, squared_norm=1.0, hindsight=h)
        r, state = rule.choose(line, Estimate(1.0, 1.0, 1.0, reach=2.0), state)
        rs.append(r)
    assert [rs[i] for i in (59, 66, 126, -1)] == pytest.approx([0.02, 2, 0.02, 2])


def test_a_loss_that_doubles_is_measured_at_the_next_step() -> None:
    rule, state, due = Trust(), {}, []
    for k, value in enumerate([1.0, 1.5, 2.6, 2.0, 1.0, -1.0, 1.0], start=1):
        due.append(rule.due(k, 100, state))
        estimate = Estimate(1.0, 1.0, 1.0, reach=2.0) if due[-1] else None
        _, state = rule.choose(Line(k, value, slope=1.0, squared_norm=1.0), estimate, state)
    # 2.6 is above twice the mean of 1 and 1.5, weighted 0.9 and 1; 2.0 is below that of three.
    assert due == [True, False, False, True, False, False, False]


def test_without_curvature_steps_grow_fourfold() -> None:
    x = nn.Parameter(torch.tensor([1.0], dtype=F64))
    optimizer = GeN(torch.optim.SGD([x]), phi=1, ell=1.0)
    for _ in range(4):
        optimizer.step(lambda: 3 * x.sum())
    steps = [r.step for r in optimizer.records]
    assert [b / a for a, b in itertools.pairwise(steps)] == pytest.approx([4, 4, 4])
    assert all(r.curvature == 0 for r in optimizer.records)


@pytest.mark.parametrize("mu", [0.0, 0.9])
def test_the_chord_is_that_of_the_loss(mu: float) -> None:
    x = nn.Parameter(torch.tensor([0.7], dtype=F64))
    base = torch.optim.SGD([x], momentum=mu, lr=0.1)
    optimizer = Rescaled(base, rule=Trust(), estimator=Secant())
    reaches = []
    for _ in range(3):
        state = dict(optimizer.stepper.rule_state)
        start = x.item()
        optimizer.step(lambda: x.cosh().sum())
        record = optimizer.records[-1]
        d = (start - x.item()) / record.step
        if state:
            t = state["trusted"] / abs(d)
            chord = [
                2 * (math.cosh(start - s * d) - math.cosh(start) + s * d * math.sinh(start)) / s**2
                for s in (t, t / 4)
            ]
            assert record.curvature == pytest.approx(chord[0], rel=1e-6)
            largest = max(chord) if mu else chord[0]
            assert record.magnitude == pytest.approx(largest, rel=1e-6)
            reaches.append(t)
    assert len(reaches) == 2


def test_an_exact_curvature_is_trusted_at_once() -> None:
    """And refuses a first step along which the loss does not bend."""
    x = nn.Parameter(torch.tensor([1.0], dtype=F64))
    optimizer = Rescaled(torch.optim.SGD([x]), ell=0.5, every=2)
    with pytest.warns(RuntimeWarning, match="no curvature along the direction"):
        optimizer.step(lambda: x.sum())
    optimizer.step(lambda: 3 * x.square().sum())
    assert x.item() == pytest.approx(0)
    assert isinstance(optimizer.stepper.rule, Trust)


def test_rounding_counts_as_no_curvature() -> None:
    """Of a float32 loss of 1e4 at a distance where it changes by less than its last digit."""
    x = nn.Parameter(torch.tensor([1.0]))
    optimizer = GeN(torch.optim.SGD([x]), phi=1, checked=0)
    optimizer.stepper.rule_state = {"trusted": 1e-6}
    optimizer.step(lambda: 1e4 + x.square().sum())
    record = optimizer.records[-1]
    assert record.curvature == record.magnitude == 0
    assert record.step * 2 == pytest.approx(0.95 * 4e-6)


def test_a_loss_that_is_not_finite_shortens_the_steps() -> None:
    x = nn.Parameter(torch.tensor([1.0], dtype=F64))
    optimizer = GeN(torch.optim.SGD([x]), phi=1, ell=1.0, checked=0)
    optimizer.stepper.rule_state = {"trusted": 2.0}
    optimizer.step(lambda: x.sum() - (x + 0.5).log().sum() * 0.3)
    assert optimizer.skipped == 0
    assert optimizer.records[-1].step * optimizer.records[-1].slope ** 0.5 == pytest.approx(2 / 8)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(
    ("f", "steepest"), [(lambda x: x.square(), 1.0), (lambda x: (1 + x.square()).log(), 1.5)]
)
def test_the_first_length_is_within_four_of_the_minimum(
    f: Callable, steepest: float, scale: float
) -> None:
    """Whatever the scale of the loss, and so of d."""
    x = nn.Parameter(torch.tensor([3.0], dtype=F64))
    optimizer = GeN(torch.optim.SGD([x]), phi=1, checked=0)
    optimizer.step(lambda: scale * f(x).sum())
    assert 3 / 4 <= abs(x.item() - 3) <= 4 * 3 * steepest


@given(exponent=st.integers(-6, 6))
def test_rescaling_the_direction_leaves_the_iterates(exponent: int) -> None:
    class Scaled(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):  # type: ignore[no-untyped-def, override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad * 10.0**exponent, alpha=group["lr"])

    ends = []
    for make in (Scaled, torch.optim.SGD):
        x = nn.Parameter(torch.tensor([1.0, -2.0], dtype=F64))
        optimizer = GeN(make([x]), phi=2)
        for _ in range(5):
            optimizer.step(lambda x=x: x.cosh().sum())
        ends.append(x.detach())
    torch.testing.assert_close(*ends)


def settled() -> tuple[Trust, dict[str, float]]:
    """After an estimate of curvature 3 that was looked at as far as 2."""
    rule = Trust()
    line = Line(1, value=1.0, slope=3.0, squared_norm=1.0)
    _, state = rule.choose(line, Estimate(3.0, 3.0, 3.0, reach=2.0), {})
    assert (state["trusted"], state["lipschitz"]) == (2, 3)
    return rule, state


def test_an_estimate_that_the_rounding_hides_changes_nothing() -> None:
    rule, state = settled()
    line = Line(2, value=1.0, slope=1e-9, squared_norm=1e-18)
    r, after = rule.choose(line, Estimate(1e-9, 0.0, 0.0, reach=2e9, blind=True), state)
    assert r * 1e-9 == pytest.approx(2 / 3)
    assert (after["trusted"], after["lipschitz"]) == (2, 3)


def test_the_curvature_where_the_loss_is_nan_is_no_less_than_known() -> None:
    rule, state = settled()
    line = Line(2, value=1.0, slope=3.0, squared_norm=1.0)
    estimate = Estimate(3.0, 0.1, 0.1, reach=2.0, at_least=True)
    assert rule.choose(line, estimate, state)[1]["lipschitz"] == pytest.approx(3)
    larger = Estimate(3.0, 9.0, 9.0, reach=2.0, at_least=True)
    assert rule.choose(line, larger, state)[1]["lipschitz"] == 9


def test_the_trusted_length_stays_within_what_the_base_allows() -> None:
    rule, state = settled()
    for k in range(2, 200):
        line = Line(k, value=1.0, slope=4.0, squared_norm=4.0, limit=0.25)
        _, state = rule.choose(line, Estimate(4.0, 0.0, 0.0, reach=1.0), state)
    assert state["trusted"] == 0.5


def test_what_has_converged_stays_where_the_loss_is_defined() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = GeN(torch.optim.SGD([p]))
    for _ in range(300):
        optimizer.step(lambda: (p - p.log()).sum())
    assert optimizer.skipped == 0
    assert torch.allclose(p, torch.ones(2), atol=1e-3)


def test_a_base_that_bounds_its_step_bounds_what_is_looked_at() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = GeN(INNAprop([p]))
    for _ in range(100):
        optimizer.step(lambda: p.sum())
    assert p.isfinite().all()
    assert optimizer.records[-1].r <= 4
