"""Which steps of a base optimizer can be told from its learning rate."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from wrapped import WRAPPERS, OwnSGD, Problem, assert_same, every_wrapper

from optim import Rescaled

F64 = torch.float64


class Sign(torch.optim.SGD):
    """Its step does not scale with lr."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_((group["lr"] * p.grad).tanh())


class Averaged(torch.optim.SGD):
    """Its step scales with lr, and its state depends on lr."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["average"] = p.clone()


class AveragedInItsGroup(torch.optim.SGD):
    """The same, in its groups."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        group = self.param_groups[0]
        group["distance"] = group.get("distance", 0.0) + group["lr"]


class AveragedInItself(torch.optim.SGD):
    """The same, in an attribute."""

    distance = 0.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.distance += self.param_groups[0]["lr"]


class FixedDecay(torch.optim.SGD):
    """A part of its step does not scale with lr."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(0.9)
        super().step()


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        closure()


class AssertsClosure(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None


class RaisesWithoutClosure(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("requires closure")


class KeyedByIdentity(torch.optim.SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.scales = {id(p): 1.0 for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * self.scales[id(p)])


class StepsOthers(torch.optim.SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.own = [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.own:
            if p.grad is not None:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


class StepsOthersUnseen(StepsOthers):
    """The same, past autograd, which counts what is written to a tensor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.own:
            if p.grad is not None:
                p.data.sub_(p.grad, alpha=self.param_groups[0]["lr"])


class StepsElsewhere(StepsOthers):
    """The same, to other memory, before it fails."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.own:
            if p.grad is not None:
                p.data = p.data - self.param_groups[0]["lr"] * p.grad
        if self.param_groups[0]["lr"] > 1:
            raise LookupError("after it has stepped")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (Sign, "not linear in lr"),
        (Averaged, "not linear in lr"),
        (AveragedInItsGroup, "not linear in lr"),
        (AveragedInItself, "not linear in lr"),
        (FixedDecay, "not linear in lr"),
        (NeedsClosure, "cannot step copies .* missing 1 required positional"),
        (AssertsClosure, "cannot step copies .* AssertionError"),
        (RaisesWithoutClosure, "cannot step copies .*requires closure"),
        (KeyedByIdentity, "in its attribute 'scales', and is made to step copies"),
        (StepsOthers, "steps other tensors"),
        (StepsOthersUnseen, "steps other tensors"),
        (StepsElsewhere, "steps other tensors"),
    ],
)
@every_wrapper
def test_other_steps_are_refused_at_the_first(base: type, message: str, wrapper: str) -> None:
    problem = Problem()
    optimizer = WRAPPERS[wrapper](base(problem.params()))
    before = problem.snapshot(optimizer), [p.data_ptr() for p in problem.params()]
    with pytest.raises(TypeError, match=message) as refused:
        optimizer.step(lambda: problem.losses(0))
    assert "cannot step" not in message or refused.value.__cause__ is not None
    assert_same(problem.snapshot(optimizer), before[0])
    assert [p.data_ptr() for p in problem.params()] == before[1]
    assert optimizer.iteration == 0


class MovesBy(torch.optim.SGD):
    """Moves each parameter to a function of it, its gradient and lr."""

    def __init__(self, params: Any, moved: Callable[[Tensor, Tensor, float], Tensor]) -> None:
        super().__init__(params)
        self.moved = moved

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.moved(p, p.grad, group["lr"]))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1e-2, 1.0])
@pytest.mark.parametrize(
    "moved",
    [
        lambda p, g, lr: p - lr**2 * g,
        lambda p, g, lr: (p - lr * g) * (1 - 0.1 * lr),
        lambda p, g, lr: p - lr * g + (2 * lr) ** 0.5 * torch.randn_like(p),
        lambda p, g, lr: math.exp(-5 * lr) * p - lr * g,
        lambda p, g, lr: F.softshrink(p - lr * g, 0.5 * lr),
    ],
    ids=["squared", "decay of the step", "noise", "exponential decay", "proximal"],
)
def test_a_step_that_is_linear_only_at_large_rates_is_refused(
    moved: Callable[[Tensor, Tensor, float], Tensor], scale: float, dtype: torch.dtype
) -> None:
    """Also where squares of the displacements are beyond single precision."""
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=dtype))
    optimizer = Rescaled(MovesBy([p], moved))
    with pytest.raises(TypeError, match="not linear in lr"):
        optimizer.step(lambda: scale * (p * torch.arange(1, 4, dtype=dtype)).square().sum())
    assert p.tolist() == [1, -2, 3]


@every_wrapper
def test_a_first_gradient_of_zero_proves_nothing(wrapper: str) -> None:
    p = nn.Parameter(torch.zeros(2))
    optimizer = WRAPPERS[wrapper](Sign([p]))
    optimizer.step(lambda: p.square().sum())
    with pytest.raises(TypeError, match="not linear in lr"):
        optimizer.step(lambda: (p - 1).square().sum())


NOT_LINEAR = ["LBFGS", "Rprop", "ASGD", "SparseAdam"]
NOT_LINEAR += ["Adafactor"] if hasattr(torch.optim, "Adafactor") else []


@pytest.mark.parametrize("name", NOT_LINEAR)
@every_wrapper
def test_torch_optimizers_that_cannot_be_wrapped(name: str, wrapper: str) -> None:
    kind = getattr(torch.optim, name)
    for make in (kind, type("Inherits", (kind,), {})):
        with pytest.raises(TypeError, match=f"{make.__name__} cannot be wrapped"):
            WRAPPERS[wrapper](make([nn.Parameter(torch.ones(1))]))


@every_wrapper
def test_a_name_that_torch_has_too_says_nothing(wrapper: str) -> None:
    p = nn.Parameter(torch.ones(1))
    optimizer = WRAPPERS[wrapper](type("ASGD", (OwnSGD,), {})([p]))
    optimizer.step(lambda: p.square().sum())
    assert p.item() < 1
