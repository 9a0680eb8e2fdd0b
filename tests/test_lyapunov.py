"""The Lyapunov rule: the energy of INNA, INNAprop and heavy ball against its definition."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from optim import INNA, DINAdam, INNAprop, Rescaled
from optim.estimators import Exact, Probes
from optim.rules import Cautious, Lyapunov, RobbinsMonro

F64 = torch.float64


def quadratic(seed: int) -> tuple[nn.Parameter, Callable[[], Tensor]]:
    torch.manual_seed(seed)
    A = torch.randn(4, 4, dtype=F64)
    H = A @ A.T + 0.1 * torch.eye(4, dtype=F64)
    x = nn.Parameter(torch.randn(4, dtype=F64))
    return x, lambda: x @ H @ x / 2


def din_energy(
    loss: float, x: Tensor, state: dict, group: dict, metric: Tensor | float = 1.0
) -> float:
    """E = (1 + alpha beta) J + ‖v‖²_P / 2 over 1 + alpha beta, from theta and psi."""
    alpha, beta = group["alpha"], group["beta"]
    v = (alpha - 1 / beta) * x.detach() + state["psi"] / beta
    return loss + float((metric * v.square()).sum()) / 2 / (1 + alpha * beta)


def of_inna(optimizer: Rescaled, x: nn.Parameter, closure: Callable[[], Tensor]) -> float:
    state = optimizer.state.get(x)
    kinetic = din_energy(0.0, x, state, optimizer.param_groups[0]) if state else 0.0
    return closure().item() + kinetic


def of_heavy_ball(optimizer: Rescaled, x: nn.Parameter, closure: Callable[[], Tensor]) -> float:
    """With K <- (1 - s/r) K + s/2 ‖m‖², which is s/2 ‖m‖² where ell is 1."""
    kinetic = optimizer.stepper.energy
    if optimizer.state:
        last, m = optimizer.records[-1], optimizer.state[x]["momentum_buffer"]
        least = last.step / 2 * m.square().sum().item()
        assert kinetic >= least * (1 - 1e-12)
        if last.step == last.r:
            assert kinetic == pytest.approx(least)
    return closure().item() + kinetic


METHODS = {
    "INNA": (lambda p: INNA(p, alpha=0.5, beta=8.0), of_inna),
    "INNA, little friction": (lambda p: INNA(p, alpha=0.01, beta=8.0), of_inna),
    "INNA, much friction": (lambda p: INNA(p, alpha=3.0, beta=8.0), of_inna),
    "heavy ball": (lambda p: torch.optim.SGD(p, momentum=0.9), of_heavy_ball),
    "heavy ball, short": (lambda p: torch.optim.SGD(p, momentum=0.5), of_heavy_ball),
}
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
@given(seed=st.integers(0, 50), ell=st.sampled_from([0.3, 0.5, 0.9, 1.0]))
def test_on_a_quadratic_the_energy_never_rises(method: str, seed: int, ell: float) -> None:
    make, energy = METHODS[method]
    x, closure = quadratic(seed)
    optimizer = Rescaled(make([x]), rule=Lyapunov(beta3=0.0), ell=ell, checked=0)
    energies = [energy(optimizer, x, closure)]
    for _ in range(25):
        optimizer.step(closure)
        energies.append(energy(optimizer, x, closure))
        assert optimizer.records[-1].energy == pytest.approx(energies[-2], rel=1e-9)
        if ell == 1:
            assert energies[-1] == pytest.approx(energies[-2], rel=1e-9)
        else:
            assert energies[-1] < energies[-2]
    if ell < 1:
        assert energies[-1] < 0.9 * energies[0]


@pytest.mark.parametrize("method", ["INNA, little friction", "heavy ball"])
def test_the_loss_itself_may_rise(method: str) -> None:
    x, closure = quadratic(0)
    optimizer = Rescaled(METHODS[method][0]([x]), rule=Lyapunov(), ell=0.9, checked=0)
    for _ in range(25):
        optimizer.step(closure)
    losses = [record.value for record in optimizer.records]
    assert losses != sorted(losses, reverse=True)


@pytest.mark.parametrize("method", ["INNA", "heavy ball"])
@given(seed=st.integers(0, 50))
def test_ell_one_half_is_the_best_step(method: str, seed: int) -> None:
    make, energy = METHODS[method]
    ends = []
    for ell in (0.5, 0.49, 0.51):
        x, closure = quadratic(seed)
        optimizer = Rescaled(make([x]), rule=Lyapunov(beta3=0.0), ell=0.5, checked=0)
        for _ in range(3):
            optimizer.step(closure)
        optimizer.param_groups[0]["lr"] = ell
        optimizer.step(closure)
        ends.append(energy(optimizer, x, closure))
    assert ends[0] < ends[1]
    assert ends[0] < ends[2]


@given(seed=st.integers(0, 50), ell=st.sampled_from([0.1, 0.5, 0.9]))
def test_heavy_balls_energy_falls_by_what_ell_says(seed: int, ell: float) -> None:
    x, closure = quadratic(seed)
    base = torch.optim.SGD([x], momentum=0.9)
    optimizer = Rescaled(base, rule=Lyapunov(beta3=0.0), ell=ell, checked=0)
    for _ in range(10):
        optimizer.step(closure)
        last = optimizer.records[-1]
        fallen = ell * (1 - ell) * last.r**2 * last.curvature / 2
        after = closure().item() + optimizer.stepper.energy
        assert after == pytest.approx(last.energy - fallen, rel=1e-9)


@pytest.mark.parametrize("ell", [0.1, 0.5])
def test_ell_is_a_factor_that_does_not_compound(ell: float) -> None:
    x = nn.Parameter(torch.ones(2, dtype=F64))
    sizes = torch.tensor([1.0, 0.01], dtype=F64)
    optimizer = Rescaled(torch.optim.SGD([x], momentum=0.9), rule=Lyapunov(), ell=ell)
    for _ in range(400):
        optimizer.step(lambda: (sizes * x * x).sum())
    assert optimizer.records[-1].value < 1e-8


def test_innaprops_energy_is_in_the_norm_of_its_preconditioner() -> None:
    """With the same P before and after, E is unchanged at ell = 1."""
    x, closure = quadratic(0)
    base = INNAprop([x], alpha=0.5, beta=30.0, weight_decay=0.0)
    optimizer = Rescaled(base, rule=Lyapunov(beta3=0.0), ell=1.0, checked=0)
    for _ in range(10):
        before = copy.deepcopy((x, optimizer.state.get(x)))
        J = closure().item()
        optimizer.step(closure)
        state, group = optimizer.state[x], optimizer.param_groups[0]
        P = (state["v"] / (1 - group["sigma"] ** state["step"])).sqrt() + group["eps"]
        old = din_energy(J, before[0], before[1], group, P) if before[1] else J
        assert optimizer.records[-1].energy == pytest.approx(old, rel=1e-9)
        assert din_energy(closure().item(), x, state, group, P) == pytest.approx(old, rel=1e-9)


@pytest.mark.parametrize("kind", ["INNA", "heavy ball"])
def test_groups_of_their_own_share_one_energy(kind: str) -> None:
    x, closure = quadratic(1)
    y, _ = quadratic(2)
    groups = [{"params": [x], "lr": 0.02}, {"params": [y], "lr": 0.005}]
    base: torch.optim.Optimizer
    if kind == "INNA":
        groups[1] |= {"alpha": 1.5, "beta": 20.0}
        base = INNA(groups, alpha=0.5, beta=8.0)
    else:
        groups[1] |= {"momentum": 0.3}
        base = torch.optim.SGD(groups, momentum=0.9)
    both = lambda: closure() + (y.square().sum() - x @ y) / 2  # noqa: E731

    def kinetic(group: dict) -> float:
        (p,) = group["params"]
        if kind == "INNA":
            return din_energy(0.0, p, optimizer.state[p], group)
        s = optimizer.records[-1].step * group["lr"]  # ell is 1, the other group's share of it
        return s / 2 * optimizer.state[p]["momentum_buffer"].square().sum().item()

    optimizer = Rescaled(base, rule=Lyapunov(beta3=0.0), ell=1.0, checked=0)
    energies = [both().item()]
    for _ in range(8):
        optimizer.step(both)
        energies.append(both().item() + sum(map(kinetic, optimizer.param_groups)))
    assert energies == pytest.approx([energies[0]] * 9, rel=1e-9)
    assert [record.energy for record in optimizer.records] == pytest.approx(energies[:-1])


@pytest.mark.parametrize("estimator", [Exact(), Probes()])
@every_method
def test_on_rosenbrock_the_energy_never_rises(method: str, estimator: object) -> None:
    x = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=F64))
    make, energy = METHODS[method]
    optimizer = Rescaled(make([x]), rule=Lyapunov(), estimator=estimator, ell=0.8, checked=10_000)
    closure = lambda: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2  # noqa: E731
    energies = []
    for _ in range(600):
        energies.append(energy(optimizer, x, closure))
        optimizer.step(closure)
    for a, b in zip(energies[1:], energies, strict=False):
        assert a <= b + 1e-14 + 1e-12 * abs(b)
    assert energies[-1] < energies[0] / 20


def test_a_saved_energy_is_taken_up() -> None:
    make = METHODS["heavy ball"][0]
    x, closure = quadratic(3)
    optimizer = Rescaled(make([x]), rule=Lyapunov())
    for _ in range(4):
        optimizer.step(closure)
    y, again = quadratic(3)
    y.data.copy_(x.data)
    twin = Rescaled(make([y]), rule=Lyapunov())
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step(closure)
    twin.step(again)
    assert twin.records[-1] == optimizer.records[-1]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@every_method
def test_a_copy_has_the_energy_of_its_own_base(method: str, how: Callable) -> None:
    sizes = torch.arange(1.0, 5.0, dtype=F64)
    x = nn.Parameter(torch.ones(4, dtype=F64))
    optimizer = Rescaled(METHODS[method][0]([x]), rule=Lyapunov())
    for _ in range(3):
        optimizer.step(lambda: (sizes * x**2).sum())
    copied = how(optimizer)
    (y,) = copied.param_groups[0]["params"]
    for _ in range(3):
        optimizer.step(lambda: (sizes * x**2).sum())
    for _ in range(3):
        copied.step(lambda: (sizes * y**2).sum())
    assert list(copied.records) == list(optimizer.records)
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: torch.optim.AdamW(p), TypeError, "AdamW has no energy that is known to fall"),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9), TypeError, "RMSprop has no energy"),
        (lambda p: DINAdam(p), TypeError, "DINAdam"),
        (lambda p: INNAprop(p), ValueError, "weight_decay is 0.01: the energy falls without it"),
        (lambda p: torch.optim.SGD(p), ValueError, "momentum is 0: heavy ball is between 0 and 1"),
        (lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True), ValueError, "nesterov is True"),
    ],
)
@pytest.mark.parametrize("rule", [Lyapunov(), RobbinsMonro(1e-3, 1.0, rule=Lyapunov())])
def test_refusals(make: Callable, error: type, message: str, rule: object) -> None:
    x, closure = quadratic(0)
    before, base = x.detach().clone(), make([x])
    rate = base.param_groups[0]["lr"]
    with pytest.raises(error, match=message):
        Rescaled(base, rule=rule).step(closure)
    assert torch.equal(x.detach(), before)
    assert base.param_groups[0]["lr"] == rate


@pytest.mark.parametrize(
    ("base", "changed", "message"),
    [
        (lambda p: INNAprop(p, weight_decay=0.0), {"weight_decay": 0.1}, "weight_decay is 0.1"),
        (lambda p: torch.optim.SGD(p, momentum=0.9), {"momentum": 0}, "momentum is 0"),
    ],
)
def test_what_is_changed_later_is_refused_at_the_step(
    base: Callable, changed: dict[str, float], message: str
) -> None:
    x, closure = quadratic(0)
    optimizer = Rescaled(base([x]), rule=Lyapunov())
    optimizer.step(closure)
    before = x.detach().clone()
    optimizer.param_groups[0].update(changed)
    with pytest.raises(ValueError, match=message):
        optimizer.step(closure)
    assert torch.equal(x.detach(), before)


def test_the_energy_is_asked_for_by_the_rule_alone() -> None:
    x, closure = quadratic(0)
    optimizer = Rescaled(INNAprop([x]), rule=Cautious())
    optimizer.step(closure)
    assert optimizer.records[-1].energy is None
    assert math.isfinite(optimizer.records[-1].step)
