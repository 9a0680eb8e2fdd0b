"""The state of a base optimizer, wherever it keeps it, advances once a step."""

import math
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from wrapped import WRAPPERS, OwnSGD, Problem, every_wrapper

F64 = torch.float64


class Keeps(torch.optim.SGD):
    """Momentum somewhere else than in its state by the parameter."""

    def __init__(self, params: Any, buffer: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(params)
        self.held: dict[Any, Any] = {"by shape": [{}]}
        self.buffer = buffer

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            buffer = self.buffer(self, p)
            p.sub_(buffer.mul_(0.9).add_(p.grad), alpha=self.param_groups[0]["lr"])


@every_wrapper
@pytest.mark.parametrize(
    ("buffer", "where"),
    [
        (lambda base, p: base.held.setdefault(p, torch.zeros(2)), "its attribute 'held'"),
        (
            lambda base, p: base.held["by shape"][0].setdefault(id(p), torch.zeros(2)),
            "its attribute 'held'",
        ),
        (
            lambda base, p: base.state[p.data_ptr()].setdefault("m", torch.zeros(2)),
            "its state by a number",
        ),
        (lambda base, p: vars(p).setdefault("buffer", torch.zeros(2)), "their attribute 'buffer'"),
    ],
)
def test_what_a_copy_does_not_find_is_named(buffer: Any, where: str, wrapper: str) -> None:
    p = nn.Parameter(torch.ones(2))
    base = Keeps([p], buffer)
    optimizer = WRAPPERS[wrapper](base)
    with pytest.raises(TypeError, match=f"keeps something for its parameters in {where}"):
        optimizer.step(lambda: (p - 3).square().sum())
    assert p.tolist() == [1, 1]
    assert not vars(p)
    assert base.held == {"by shape": [{}]}
    assert not base.state


class ScaledByAttribute(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if type(p) is nn.Parameter:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"] * getattr(p, "scale", 1.0))


@every_wrapper
def test_a_base_may_ask_parameters_for_their_class_and_attributes(wrapper: str) -> None:
    a, b = (nn.Parameter(torch.ones(2, dtype=F64)) for _ in range(2))
    b.scale = 0.25
    optimizer = WRAPPERS[wrapper](ScaledByAttribute([a, b]))
    optimizer.step(lambda: (a - 3).square().sum() + (b - 3).square().sum())
    assert optimizer.records[0].slope == pytest.approx(32 + 0.25 * 32)
    torch.testing.assert_close(b - 1, 0.25 * (a - 1))
    assert vars(b) == {"scale": 0.25}


class Counts(torch.optim.SGD):
    """Counts its steps in its state, in its groups and in itself."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, momentum=0.9)
        self.steps = torch.zeros(())
        self.log = [self.param_groups[0]["params"][0], {"steps": 0}]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.steps += 1
        self.log[1]["steps"] += 1
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1

    def counts(self) -> tuple[int, int, int]:
        return int(self.steps), self.log[1]["steps"], self.param_groups[0].get("steps", 0)


class CountsInContainers(Counts):
    """The same, in containers and an object of its own."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        first = self.param_groups[0]["params"][0]
        entry = self.state[first]
        entry.setdefault("norms", deque(maxlen=9)).append(first.grad.norm().item())
        entry.setdefault("object", SimpleNamespace(steps=0)).steps += 1
        if not hasattr(self, "made_late"):
            self.made_late = {"array": np.zeros(2)}
        self.made_late["array"] += 1

    def counts(self) -> tuple[int, int, int]:
        entry = self.state[self.param_groups[0]["params"][0]]
        if not hasattr(self, "made_late"):
            assert not entry
            return 0, 0, 0
        return len(entry["norms"]), entry["object"].steps, int(self.made_late["array"][1])


class Periodic(Counts):
    """At every fifth step it goes back towards where it started."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        if self.steps % 5 == 0:
            for p in self.param_groups[0]["params"]:
                p.mul_(0.5)


@every_wrapper
@pytest.mark.parametrize("kind", [Counts, CountsInContainers])
def test_state_anywhere_advances_once_a_step(kind: type, wrapper: str) -> None:
    p = nn.Parameter(torch.ones(2))
    base = kind([p])
    optimizer = WRAPPERS[wrapper](base)
    for k in range(3):
        assert base.counts() == (k, k, k)
        optimizer.step(lambda: (p - 3).square().sum())
    assert base.log[0] is p
    with pytest.raises(IndexError):
        optimizer.step(lambda: (p - 3).square().sum()[5])
    with pytest.warns(RuntimeWarning):
        optimizer.step(lambda: (p * torch.nan).sum())
    assert base.counts() == (3, 3, 3)


class Coordinates(torch.optim.SGD):
    """Steps a random half of the coordinates, with one counter and one generator for all."""

    def __init__(self, params: Any, place: str) -> None:
        super().__init__(params)
        group = self.param_groups[0]
        held = SimpleNamespace(count=torch.zeros(()), dice=torch.Generator().manual_seed(3))
        if place == "attribute":
            self.held = [held]
        elif place == "group":
            group["held"] = {"all": held}
        else:
            for p in group["params"]:
                self.state[p].update(vars(held) if place == "entries" else {"held": held})

    def held_for(self, p: Tensor) -> SimpleNamespace:
        if hasattr(self, "held"):
            return self.held[0]
        if "held" in self.param_groups[0]:
            return self.param_groups[0]["held"]["all"]
        entry = self.state[p]
        return entry["held"] if "held" in entry else SimpleNamespace(**entry)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            held = self.held_for(p)
            held.count += 1
            chosen = torch.rand(p.shape, generator=held.dice) < 0.5
            p.sub_(chosen * p.grad, alpha=self.param_groups[0]["lr"])


@every_wrapper
@pytest.mark.parametrize("place", ["attribute", "group", "state", "entries"])
def test_what_is_seen_from_several_places_stays_one(place: str, wrapper: str) -> None:
    params = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    base = Coordinates(params, place)
    held = [base.held_for(p) for p in params]
    optimizer = WRAPPERS[wrapper](base)
    for _ in range(3):
        optimizer.step(lambda: sum((p - 3).pow(4).sum() for p in params))
        optimizer.look_ahead(lambda: sum((p - 3).pow(4).sum() for p in params))
    dice = torch.Generator().manual_seed(3)
    torch.rand(3, 2, 4, generator=dice)
    for p, first in zip(params, held, strict=True):
        now = base.held_for(p)
        assert now.count is first.count is held[0].count
        assert now.dice is first.dice is held[0].dice
        assert now.count == 6
        assert torch.equal(now.dice.get_state(), dice.get_state())


@every_wrapper
@pytest.mark.parametrize("base", [torch.optim.SGD, OwnSGD])
def test_what_cannot_be_copied_is_left_alone(base: type, wrapper: str) -> None:
    p = nn.Parameter(torch.ones(2))
    anchor = torch.tensor([3.0, 4.0])
    extra = {
        "module": nn.Linear(2, 2),
        "lock": threading.Lock(),
        "numbers": iter([1, 2]),
        "names": {"a", "b"},
        "nan": math.nan,
        "anchor": anchor,
    }
    optimizer = WRAPPERS[wrapper](base([{"params": [p], **extra}], lr=0.1, momentum=0.9))
    closure = lambda: (p * anchor - 3).square().sum()  # noqa: E731
    optimizer.step(closure)
    buffer = optimizer.state[p]["momentum_buffer"]
    optimizer.look_ahead(closure)
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step(lambda: closure() * torch.nan)
    assert optimizer.state[p]["momentum_buffer"] is buffer
    assert all(optimizer.param_groups[0][key] is value for key, value in extra.items())
    assert next(extra["numbers"]) == 1


@every_wrapper
def test_a_periodic_optimizer_is_refused_at_its_period(wrapper: str) -> None:
    p = nn.Parameter(torch.ones(2))
    base = Periodic([p])
    optimizer = WRAPPERS[wrapper](base)
    for _ in range(4):
        optimizer.step(lambda: (p - 3).square().sum())
    before = p.detach().clone()
    with pytest.raises(TypeError, match="not linear in lr"):
        optimizer.step(lambda: (p - 3).square().sum())
    assert torch.equal(p, before)
    assert base.counts() == (4, 4, 4)


class Noisy(torch.optim.SGD):
    """Its step is linear in lr, given the random numbers."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad + torch.randn_like(p), alpha=self.param_groups[0]["lr"])


@every_wrapper
def test_random_numbers_advance_once_a_step(wrapper: str) -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = WRAPPERS[wrapper](Noisy([p]))
    torch.manual_seed(0)
    for _ in range(3):
        optimizer.step(lambda: (p - 3).square().sum())
    after = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(3):
        torch.randn_like(p)
    assert torch.equal(torch.get_rng_state(), after)


class ClampedSGD(torch.optim.Optimizer):
    """Writes to the gradients, as many optimizers outside of torch do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "decay": 0.5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.clamp_(-0.05, 0.05).add_(p, alpha=group["decay"])
                    p.add_(p.grad, alpha=-group["lr"])


@every_wrapper
def test_a_base_that_writes_to_the_gradients(wrapper: str) -> None:
    """The slope is that of the loss; nesterov momentum writes to them in lists of tensors."""
    problem = Problem()
    params = list(problem.model.parameters())
    optimizer = WRAPPERS[wrapper](ClampedSGD(params))
    torch.manual_seed(1)
    gradients = torch.autograd.grad(problem.losses(0).mean(), params)
    slope = sum(
        (g * (g.clamp(-0.05, 0.05) + 0.5 * p)).sum() for g, p in zip(gradients, params, strict=True)
    )
    problem = Problem()
    optimizer = WRAPPERS[wrapper](ClampedSGD(list(problem.model.parameters())))
    torch.manual_seed(1)
    problem.train(optimizer, range(1))
    assert math.isclose(optimizer.records[0].slope, slope.item(), rel_tol=1e-9)

    found = []
    for foreach in (False, True):
        problem = Problem()
        base = torch.optim.SGD(problem.groups(), momentum=0.9, nesterov=True, foreach=foreach)
        optimizer = WRAPPERS[wrapper](base)
        problem.train(optimizer, range(4))
        found.append([(r.slope, r.curvature, r.step) for r in optimizer.records])
    assert np.allclose(
        np.array(found[0], dtype=float), np.array(found[1], dtype=float), rtol=1e-9, equal_nan=True
    )
