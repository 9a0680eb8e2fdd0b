"""Coupled weight decay as the L2 penalty that it is, in value, slope and curvature."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import fast_only
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from optim import GeN, Rescaled
from optim.estimators import Exact, GaussNewton, GradientDifferences, Probes
from optim.rules import Lyapunov

F64 = torch.float64
COUPLED = ["SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Adam", "NAdam", "RAdam"]
WRAPPERS: dict[str, Callable[[torch.optim.Optimizer, nn.Module], Any]] = {
    "per sample": lambda base, _: Rescaled(base),
    "batch": lambda base, _: Rescaled(base, estimator=Exact(per_sample=False), every=2),
    "Gauss-Newton": lambda base, model: Rescaled(base, estimator=GaussNewton(model)),
    "gradients": lambda base, _: Rescaled(base, estimator=GradientDifferences()),
    "losses": lambda base, _: Rescaled(base, estimator=Probes()),
    "GeN": lambda base, _: GeN(base, phi=2),
}


def train(make: str, wrapper: str, decays: list[float], penalised: bool) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64)
    x, y = torch.randn(16, 4, dtype=F64), torch.randint(3, (16,))
    groups = [list(layer.parameters()) for layer in (model[0], model[2])]

    def closure() -> Tensor:
        losses = F.cross_entropy(model(x), y, reduction="none")
        if not penalised:
            return losses
        squares = [sum(p.square().sum() for p in group) for group in groups]
        return losses + sum(decay / 2 * s for decay, s in zip(decays, squares, strict=True))

    own = [0.0, 0.0] if penalised else decays
    base = getattr(torch.optim, make)(
        [{"params": g, "weight_decay": w} for g, w in zip(groups, own, strict=True)], lr=0.1
    )
    optimizer = WRAPPERS[wrapper](base, model)
    for _ in range(5):
        optimizer.step(closure)
    return [p.detach() for p in model.parameters()], optimizer.records


@pytest.mark.parametrize(
    "wrapper",
    [pytest.param(name, marks=fast_only if name == "Gauss-Newton" else ()) for name in WRAPPERS],
)
@pytest.mark.parametrize("make", COUPLED)
def test_weight_decay_is_the_penalty(make: str, wrapper: str) -> None:
    ends = [train(make, wrapper, [0.3, 0.05], penalised) for penalised in (False, True)]
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-6, atol=1e-9)
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-6)
        assert a.slope == pytest.approx(b.slope, rel=1e-5)
        if a.curvature is not None:
            assert a.curvature == pytest.approx(b.curvature, rel=1e-4)
            assert a.magnitude == pytest.approx(b.magnitude, rel=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, weight_decay=0.5),
        lambda p: torch.optim.NAdam(p, weight_decay=0.5, decoupled_weight_decay=True),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ],
)
def test_decoupled_decay_is_none(make: Callable) -> None:
    x = nn.Parameter(torch.tensor([1.0, 2.0], dtype=F64))
    optimizer = Rescaled(make([x]))
    optimizer.step(lambda: x.square().sum())
    assert optimizer.records[-1].value == 5


class Inherits(torch.optim.SGD):
    """Has torch's step, by another name."""


class SaysNothing(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Says(SaysNothing):
    coupled_weight_decay = True


class RAdam(torch.optim.Optimizer):
    """Not torch's: its decay is decoupled."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * p.grad)


@pytest.mark.parametrize(
    ("make", "value"), [(Inherits, 6), (SaysNothing, 5), (Says, 6), (RAdam, 5)]
)
def test_decay_is_coupled_where_the_step_is_torchs_or_says_so(make: type, value: float) -> None:
    x = nn.Parameter(torch.tensor([1.0, 2.0], dtype=F64))
    optimizer = Rescaled(make([x], lr=0.1, weight_decay=0.4))
    optimizer.step(lambda: x.square().sum())
    assert optimizer.records[-1].value == value


def test_the_energy_of_heavy_ball_has_the_penalty() -> None:
    x = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=F64))
    base = torch.optim.SGD([x], momentum=0.9, weight_decay=0.3)
    optimizer = Rescaled(base, rule=Lyapunov(beta3=0.0), ell=1.0, checked=0)
    scales = torch.tensor([0.1, 1.0, 5.0], dtype=F64)
    for _ in range(6):
        optimizer.step(lambda: (scales * x.square()).sum())
    energies = [record.energy for record in optimizer.records]
    assert energies == pytest.approx([energies[0]] * 6, rel=1e-9)


def test_a_frozen_parameter_has_no_penalty() -> None:
    x = nn.Parameter(torch.tensor([1.0], dtype=F64))
    frozen = nn.Parameter(torch.tensor([3.0], dtype=F64), requires_grad=False)
    optimizer = Rescaled(torch.optim.SGD([x, frozen], weight_decay=0.5))
    optimizer.step(lambda: (x * frozen).square().sum())
    assert optimizer.records[-1].value == 9 + 0.25
