"""Autocast and loss scales: the wrappers in half precision."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from agreement import fast_only
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F  # noqa: N812

from optim import GeN, Rescaled
from optim.estimators import Exact, GaussNewton, GradientDifferences, Probes, Secant
from optim.line import Estimate, Line
from optim.trial import Trial

ESTIMATORS: dict[str, Callable[[nn.Module], Any]] = {
    "jet": lambda model: Exact(),
    "tangent pass": lambda model: Exact(per_sample=False),
    "Gauss-Newton": lambda model: GaussNewton(model),
    "gradients": lambda model: GradientDifferences(),
    "losses": lambda model: Probes(),
    "one loss": lambda model: Secant(),
}
every_optimizer = pytest.mark.parametrize(
    "optimizer",
    [
        *(pytest.param(n, marks=fast_only if n == "Gauss-Newton" else ()) for n in ESTIMATORS),
        "GeN",
    ],
)


class Problem:
    def __init__(
        self, optimizer: str, dtype: torch.dtype | None, *, decay: float = 0.0, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 3))
        base = torch.optim.SGD(self.model.parameters(), weight_decay=decay)
        if optimizer == "GeN":
            self.optimizer: Any = GeN(base, phi=1, **options)
        else:
            estimator = ESTIMATORS[optimizer](self.model)
            self.optimizer = Rescaled(base, estimator=estimator, **options)
        self.x, self.y = torch.randn(64, 8), torch.randint(3, (64,))
        self.dtype = dtype

    def losses(self) -> Tensor:
        with torch.autocast("cpu", self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return F.cross_entropy(self.model(self.x), self.y, reduction="none")

    def train(self, steps: int) -> float:
        for _ in range(steps):
            loss = self.optimizer.step(self.losses).mean().item()
        return loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_optimizer
def test_training_under_autocast_is_training(optimizer: str, dtype: torch.dtype) -> None:
    """Its rounding is neither slope nor curvature: about as far as in single precision."""
    # Later steps of Gauss-Newton are too long here in any precision.
    steps = 5 if optimizer == "Gauss-Newton" else 25
    single, half = Problem(optimizer, None).train(steps), Problem(optimizer, dtype).train(steps)
    assert half < 1.3 * single


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
@every_optimizer
def test_a_loss_scale_changes_no_number(optimizer: str, scale: float) -> None:
    """In single precision, where a power of two rounds nothing."""
    plain = Problem(optimizer, None, decay=1e-3)
    scaled = Problem(optimizer, None, decay=1e-3, scaler=GradScaler("cpu", init_scale=scale))
    assert plain.train(5) == scaled.train(5)
    for a, b in zip(plain.optimizer.records, scaled.optimizer.records, strict=True):
        assert a == b
    torch.testing.assert_close(scaled.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)


def test_a_loss_scale_serves_every_closure_of_several() -> None:
    found = []
    for scaler in (None, GradScaler("cpu", init_scale=2.0**10)):
        problem = Problem("jet", None, scaler=scaler)
        problem.optimizer.step([lambda p=problem: p.losses()[:5], lambda p=problem: p.losses()])
        found.append(problem.optimizer.records[-1])
    assert found[0] == found[1]


@dataclass(frozen=True)
class Rounding(Secant):
    """Notes how far apart losses may be by rounding alone."""

    found: list[float] = field(default_factory=list)

    def estimate(self, trial: Trial, line: Line, reach: float) -> Estimate | str:
        self.found.append(trial.rounding(line.value))
        return super().estimate(trial, line, reach)


def test_the_coarsest_rounding_of_several_closures_counts_in_any_order() -> None:
    problem, rounding = Problem("one loss", torch.bfloat16), Rounding()

    def plain() -> Tensor:
        return F.cross_entropy(problem.model(problem.x), problem.y, reduction="none")

    for closures in ([problem.losses, plain], [plain, problem.losses], [plain, plain]):
        optimizer = Rescaled(torch.optim.SGD(problem.model.parameters()), estimator=rounding)
        optimizer.look_ahead(closures)
    first, second, single = rounding.found
    assert first == pytest.approx(second)
    assert first > 100 * single


@fast_only  # double backward in float16 loses the curvature of a unit direction
@every_optimizer
def test_a_loss_scale_falls_at_overflows_and_rises_after_many_steps(optimizer: str) -> None:
    scaler = GradScaler("cpu", init_scale=2.0**30, growth_interval=3)
    problem = Problem(optimizer, torch.float16, scaler=scaler)
    before = copy.deepcopy(problem.model.state_dict())
    scales = []
    while not problem.optimizer.records or problem.optimizer.records[-1].skipped:
        torch.testing.assert_close(problem.model.state_dict(), before, rtol=0, atol=0)
        problem.train(1)  # no warning either, which would be an error here
        scales.append(scaler.get_scale())
    overflows = problem.optimizer.skipped
    assert 1 <= overflows == len(scales) - 1
    assert scales[:-1] == [2.0 ** (29 - k) for k in range(overflows)]
    assert scales[-1] == scales[-2]
    problem.train(2)
    assert scaler.get_scale() == 2 * scales[-1] or problem.optimizer.skipped > overflows


def test_float16_without_a_scale_loses_small_gradients() -> None:
    """And with one keeps them: what the scaler is for."""

    def slope(scaler: GradScaler | None, dtype: torch.dtype | None) -> float:
        problem = Problem("tangent pass", dtype, scaler=scaler)
        problem.optimizer.step(lambda: problem.losses() * 1e-8)
        return float(problem.optimizer.records[-1].slope)

    expected = slope(None, None)
    assert slope(GradScaler("cpu", init_scale=2.0**24), torch.float16) == pytest.approx(
        expected, rel=1e-2
    )
    assert slope(None, torch.float16) < 0.9 * expected


def test_a_half_loss_is_scaled_in_single_precision() -> None:
    problem = Problem("jet", None, scaler=GradScaler("cpu", init_scale=2.0**15))
    problem.optimizer.step(lambda: (4 * problem.losses()).half())
    assert problem.optimizer.skipped == 0


def test_the_count_of_steady_steps_is_saved() -> None:
    scaler = GradScaler("cpu", growth_interval=3)
    first = Problem("jet", None, scaler=scaler)
    first.train(2)
    again = GradScaler("cpu", growth_interval=3)
    again.load_state_dict(scaler.state_dict())
    second = Problem("jet", None, scaler=again)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.train(1)
    assert again.get_scale() == 2 * scaler.get_scale()


@pytest.mark.parametrize("optimizer", ["jet", "GeN"])
def test_a_scaler_that_steps_by_itself_is_told_where_it_belongs(optimizer: str) -> None:
    problem, scaler = Problem(optimizer, torch.float16), GradScaler("cpu")
    scaler.scale(problem.losses().mean()).backward()
    grads = [p.grad.clone() for p in problem.model.parameters()]
    with pytest.raises(
        TypeError, match=r"GradScaler, which steps so, goes into \w+\(base, scaler="
    ):
        scaler.step(problem.optimizer)
    for p, g in zip(problem.model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, g / scaler.get_scale())


@every_optimizer
def test_a_step_inside_autocast_sees_the_parameters_move(optimizer: str) -> None:
    """Whose cache of cast weights outlives an evaluation, of the step and of the caller."""
    inside, outside = Problem(optimizer, torch.bfloat16), Problem(optimizer, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = inside.train(3)
        last = inside.losses()
    assert loss == outside.train(3)
    assert list(inside.optimizer.records) == list(outside.optimizer.records)
    assert torch.equal(last, outside.losses())
