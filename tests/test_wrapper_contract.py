"""What holds for every wrapper around every base optimizer."""

import copy
import json
import math
import pickle
import threading
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from agreement import fast_only
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.checkpoint import checkpoint

from curvature import NotTwiceDifferentiable, SideEffects
from optim import INNA, GeN, INNAprop, Records, Rescaled
from optim.global_hooks import global_hooks_off
from optim.rules import Lipschitz

F64 = torch.float64


class OwnSGD(torch.optim.SGD):
    """Nothing is known of its step, which is told from copies of the parameters."""


class OwnAdamW(torch.optim.AdamW):
    """Likewise."""


BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, all options": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "a subclass of SGD": lambda p: OwnSGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "RMSprop, all options": lambda p: torch.optim.RMSprop(
        p, momentum=0.5, centered=True, weight_decay=0.1
    ),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr_decay=0.1, weight_decay=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, foreach=False),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    "a subclass of AdamW": lambda p: OwnAdamW(p),
    "Adamax": lambda p: torch.optim.Adamax(p, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, decoupled_weight_decay=True, weight_decay=0.1),
    "NAdam, coupled": lambda p: torch.optim.NAdam(p, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, weight_decay=0.1),
    "INNA": lambda p: INNA(p, beta=1.0),
    "INNAprop": lambda p: INNAprop(p, foreach=False),
}
WRAPPERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "Rescaled": lambda base: Rescaled(base, ell=0.5),
    "GeN": lambda base: GeN(base, phi=2),
}
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
every_base = pytest.mark.parametrize("base", BASES)


class Problem:
    """A small network with dropout, batch norm and an unused parameter, on fixed batches."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        torch.manual_seed(0)
        # No bias before the batch norm: its gradient is rounding noise, which Adam makes a step.
        self.model = nn.Sequential(
            nn.Linear(4, 6, bias=False),
            nn.BatchNorm1d(6),
            nn.Tanh(),
            nn.Dropout(0.2),
            nn.Linear(6, 3),
        ).to(dtype)
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))
        self.batches = [(torch.randn(8, 4, dtype=dtype), torch.randint(3, (8,))) for _ in range(6)]

    def groups(self) -> list[dict[str, Any]]:
        first, *rest = self.model.parameters()
        return [{"params": [first, self.unused]}, {"params": rest}]

    def params(self) -> list[Tensor]:
        return [*self.model.parameters(), self.unused]

    def losses(self, k: int) -> Tensor:
        x, y = self.batches[k]
        return F.cross_entropy(self.model(x), y, reduction="none")

    def train(self, optimizer: Any, steps: range) -> None:
        for k in steps:
            optimizer.step(lambda k=k: self.losses(k))

    def snapshot(self, optimizer: Any) -> Any:
        return copy.deepcopy(
            (
                [p.data for p in self.params()],
                list(self.model.buffers()),
                optimizer.base.state_dict()["state"],
                torch.get_rng_state(),
            )
        )


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@every_wrapper
@every_base
def test_equals_the_base_with_the_recorded_steps_as_its_rate(base: str, wrapper: str) -> None:
    """State advances once a step; all of it, buffers and random numbers too, is the base's."""
    problem = Problem()
    optimizer = WRAPPERS[wrapper](BASES[base](problem.groups()))
    optimizer.param_groups[1]["lr"] *= 0.25
    problem.train(optimizer, range(6))
    after = problem.snapshot(optimizer)
    assert optimizer.skipped == 0
    assert not (torch.cat([p.detach().flatten() for p in problem.params()]) == 0).all()

    twin = Problem()
    plain = BASES[base](twin.groups())
    for k, record in enumerate(optimizer.records):
        plain.param_groups[0]["lr"], plain.param_groups[1]["lr"] = record.step, record.step / 4
        plain.zero_grad()
        twin.losses(k).mean().backward()
        plain.step()
    params, buffers, state, rng = after
    torch.testing.assert_close(params, [p.data for p in twin.params()], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(buffers, list(twin.model.buffers()), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(state, plain.state_dict()["state"], rtol=1e-7, atol=1e-10)
    assert torch.equal(rng, torch.get_rng_state())
    assert twin.unused not in plain.state or base.startswith("Adagrad")
    assert twin.unused.grad is None


@every_wrapper
@every_base
def test_a_saved_run_continues_bit_for_bit(base: str, wrapper: str) -> None:
    # In float32, as torch itself casts NAdam's float32 state to the parameters' dtype on loading.
    problem = Problem(torch.float32)
    optimizer = WRAPPERS[wrapper](BASES[base](problem.groups()))
    problem.train(optimizer, range(3))
    saved = copy.deepcopy((problem.model.state_dict(), optimizer.state_dict()))
    rng = torch.get_rng_state()
    problem.train(optimizer, range(3, 6))

    other = Problem(torch.float32)
    resumed = WRAPPERS[wrapper](BASES[base](other.groups()))
    other.model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    torch.set_rng_state(rng)
    other.train(resumed, range(3, 6))
    assert_same([p.data for p in other.params()], [p.data for p in problem.params()])
    assert list(resumed.records) == list(optimizer.records)[3:]


@every_wrapper
@every_base
def test_faults_change_nothing_and_training_goes_on(base: str, wrapper: str) -> None:
    problem = Problem()
    optimizer = WRAPPERS[wrapper](BASES[base](problem.groups()))
    problem.train(optimizer, range(2))
    before = problem.snapshot(optimizer)

    def nan() -> Tensor:
        losses = problem.losses(2)
        return losses * torch.tensor([torch.nan] + [1.0] * 7, dtype=F64)

    def infinite_gradient() -> Tensor:
        return (problem.losses(2).sum() * 0).sqrt()

    def overflow() -> Tensor:
        return problem.losses(2) * 1e200

    for closure, reason in (
        (nan, "1 of 8 samples"),
        (infinite_gradient, "the gradient"),
        (overflow, "its square"),
    ):
        with pytest.warns(RuntimeWarning, match=f"nothing changed: .*{reason}"):
            optimizer.step(closure)
        assert_same(problem.snapshot(optimizer), before)
        assert optimizer.records[-1].step == 0
        assert reason in optimizer.records[-1].skipped

    def label() -> Tensor:
        x, _ = problem.batches[2]
        return F.cross_entropy(problem.model(x), torch.full((8,), 99))

    def empty() -> Tensor:
        return problem.losses(2)[:0]

    def matrix() -> Tensor:
        return problem.losses(2).outer(problem.losses(2))

    def no_graph() -> Tensor:
        return problem.losses(2).detach()

    def backward() -> Tensor:
        loss = problem.losses(2).mean()
        torch.autograd.grad(loss, problem.model[0].weight)
        return loss

    for broken, error, message in (
        (label, IndexError, "99"),
        (empty, ValueError, "batch is empty"),
        (matrix, ValueError, "return a scalar"),
        (no_graph, ValueError, "no graph"),
        (backward, ValueError, "without calling backward"),
        (lambda: None, TypeError, "not a tensor"),
    ):
        with pytest.raises(error, match=message):
            optimizer.step(broken)
        assert_same(problem.snapshot(optimizer), before)
    with pytest.raises(TypeError, match=r"needs a closure .* given Tensor"):
        optimizer.step(torch.ones(()))
    with pytest.raises(TypeError, match=r"needs a closure .* given none\. After"):
        optimizer.step()

    assert optimizer.skipped == 3
    problem.train(optimizer, range(2, 6))
    assert optimizer.skipped == 3
    assert all(torch.isfinite(p).all() for p in problem.params())


@every_wrapper
@pytest.mark.parametrize(("dtype", "skipped"), [(torch.float32, 1), (F64, 0)])
def test_a_gradient_may_be_as_large_as_its_square_can_be_held(
    wrapper: str, dtype: torch.dtype, skipped: int
) -> None:
    problem = Problem(dtype)
    optimizer = WRAPPERS[wrapper](torch.optim.SGD(problem.groups()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        optimizer.step(lambda: problem.losses(0) * 1e25)
    assert optimizer.skipped == skipped


def test_a_model_without_second_derivative_is_refused_and_unchanged() -> None:
    problem = Problem()
    optimizer = Rescaled(torch.optim.Adam(problem.groups()))
    before = problem.snapshot(optimizer)
    with pytest.raises(NotTwiceDifferentiable, match="hardsigmoid"):
        optimizer.step(lambda: F.hardsigmoid(problem.losses(0)))
    assert_same(problem.snapshot(optimizer), before)
    assert all(p.grad is None for p in problem.params())
    assert optimizer.iteration == 0


@every_wrapper
def test_is_a_torch_optimizer(wrapper: str) -> None:
    problem = Problem()
    base = torch.optim.SGD(problem.groups(), lr=0.1)
    optimizer = WRAPPERS[wrapper](base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    ell = optimizer.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    losses = optimizer.step(lambda: problem.losses(0))
    scheduler.step()
    assert losses.shape == (8,)
    assert not losses.requires_grad
    assert optimizer.param_groups[0]["lr"] == ell / 2
    assert problem.model[0].weight.grad is not None
    optimizer.zero_grad()
    assert problem.model[0].weight.grad is None
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.step(lambda: problem.losses(1))
    assert calls == [1]
    assert wrapper in repr(optimizer)


@every_wrapper
@pytest.mark.parametrize("base", [torch.optim.SGD, INNA])
def test_groups_keep_their_ratios_and_can_be_added(base: type, wrapper: str) -> None:
    a, b, c = (nn.Parameter(torch.ones(1, dtype=F64)) for _ in range(3))
    groups = [{"params": a, "lr": 0.02}, {"params": b, "lr": 0.01}]
    optimizer = WRAPPERS[wrapper](base(groups, lr=0.05))
    optimizer.add_param_group({"params": (p for p in [c])})
    first, second, third = (group["lr"] for group in optimizer.param_groups)
    assert first == third == 2 * second
    optimizer.step(lambda: (a + b + c).square().sum())
    moved = [1 - p.item() for p in (a, b, c)]
    assert moved[0] == pytest.approx(moved[2])
    assert moved[0] == pytest.approx(2 * moved[1])


@every_wrapper
def test_frozen_parameters_and_zero_rate(wrapper: str) -> None:
    a, b = (nn.Parameter(torch.ones(1, dtype=F64)) for _ in range(2))
    b.requires_grad_(False)
    optimizer = WRAPPERS[wrapper](torch.optim.SGD([a, b], momentum=0.9))
    optimizer.step(lambda: (a * b).square().sum())
    moved = a.item()
    assert moved != 1
    assert b.item() == 1
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(lambda: (a * b).square().sum())
    assert a.item() == moved


@every_wrapper
def test_a_parameter_frozen_between_steps_stays(wrapper: str) -> None:
    a, b = (nn.Parameter(torch.ones(1, dtype=F64)) for _ in range(2))
    optimizer = WRAPPERS[wrapper](torch.optim.SGD([a, b]))
    closure = lambda: (a * b).square().sum() + a.exp().sum()  # noqa: E731
    optimizer.step(closure)
    b.requires_grad_(False)
    before = a.item(), b.item()
    optimizer.step(closure)
    assert a.item() != before[0]
    assert b.item() == before[1]
    assert b.grad is None


@every_wrapper
@pytest.mark.parametrize("own", [False, True])
def test_a_step_that_is_not_taken_leaves_the_callers_gradients(wrapper: str, own: bool) -> None:
    """Those of the last step are gone, so that there is never memory for two in use."""
    problem = Problem()
    optimizer = WRAPPERS[wrapper](torch.optim.SGD(problem.groups()))
    problem.train(optimizer, range(1))
    if own:
        for p in problem.params():
            p.grad = torch.randn_like(p)
    before = [(p.grad, copy.deepcopy(p.grad)) for p in problem.params()]

    def twice() -> None:
        assert all((p.grad is not None) == own for p in problem.params())
        optimizer.zero_grad()
        problem.losses(0).mean().backward()
        problem.losses(0).mean().backward()

    with pytest.raises(ValueError, match="calls backward more than once"):
        optimizer.step(twice)
    refused = pytest.raises(ValueError, match="computed outside this step's closure")
    skipped = pytest.warns(RuntimeWarning, match="skipped")
    with refused if own else skipped:
        optimizer.step(lambda: problem.losses(0) * torch.nan)
    for p, (grad, value) in zip(problem.params(), before, strict=True):
        assert p.grad is (grad if own else None)
        if own:
            assert_same(p.grad, value)


@every_wrapper
@pytest.mark.parametrize(
    ("name", "message"), [("maximize", "negate the loss"), ("differentiable", "no graph is kept")]
)
def test_an_option_that_is_set_between_steps_is_seen(name: str, message: str, wrapper: str) -> None:
    p, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = WRAPPERS[wrapper](torch.optim.Adam([p]))
    optimizer.base.add_param_group({"params": [other], name: True})
    for call in (optimizer.step, optimizer.look_ahead):
        with pytest.raises(ValueError, match=message):
            call(lambda: p.square().sum() + other.square().sum())
    assert (p.item(), other.item(), optimizer.iteration) == (1, 1, 0)
    optimizer.param_groups[1][name] = False
    optimizer.step(lambda: p.square().sum() + other.square().sum())
    assert p.item() < 1


@every_wrapper
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lr": "a"}, "lr is 'a'; it must be a number"),
        ({"lr": None}, "lr is None; it must be a number"),
        ({"lr": torch.ones(2)}, r"lr is tensor\(.*; it must be a number"),
        ({"momentum": None}, "momentum is None; it must be a number"),
        ({"betas": (None, 0.9)}, r"betas\[0\] is None; it must be a number"),
        ({"betas": 0.9}, r"betas is 0\.9; give a tuple of numbers"),
    ],
)
def test_an_option_that_is_no_number_is_refused(
    option: dict[str, Any], message: str, wrapper: str
) -> None:
    p = nn.Parameter(torch.ones(1, dtype=F64))
    base = torch.optim.SGD([p])
    optimizer = WRAPPERS[wrapper](base)
    before = dict(base.param_groups[0])
    base.param_groups[0].update(option)
    for call in (optimizer.step, optimizer.look_ahead):
        with pytest.raises(TypeError, match=message):
            call(lambda: p.square().sum())
    with pytest.raises(TypeError, match=message):
        WRAPPERS[wrapper](base)
    base.param_groups[0].clear()
    base.param_groups[0].update(before)
    with pytest.raises(TypeError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **option})
    assert (len(base.param_groups), p.item(), optimizer.iteration) == (1, 1, 0)


@every_wrapper
@pytest.mark.parametrize("lr", [math.nan, math.inf, -0.1])
def test_a_rate_that_is_none_is_refused(lr: float, wrapper: str) -> None:
    p = nn.Parameter(torch.ones(1, dtype=F64))
    optimizer = WRAPPERS[wrapper](torch.optim.SGD([p]))
    message = rf"lr is {lr}; it must be finite"
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": lr})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda: p.square().sum())
    assert (p.item(), optimizer.iteration) == (1, 0)
    base = torch.optim.SGD([p])
    base.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=message):
        WRAPPERS[wrapper](base)


@every_wrapper
def test_pickles(wrapper: str) -> None:
    problem = Problem()
    optimizer = WRAPPERS[wrapper](BASES["AdamW"](problem.groups()))
    problem.train(optimizer, range(2))
    copied = pickle.loads(pickle.dumps(optimizer))
    assert copied.iteration == 2
    assert_same(copied.state_dict()["state"], optimizer.state_dict()["state"])
    copied.register_step_post_hook(lambda *_: None)
    copied.load_state_dict(copied.state_dict())


@every_wrapper
def test_a_skipped_step_warns_of_the_callers_line(wrapper: str) -> None:
    p = nn.Parameter(torch.ones(1))
    optimizer = WRAPPERS[wrapper](torch.optim.SGD([p]))
    with pytest.warns(RuntimeWarning, match="skipped") as caught:
        optimizer.step(lambda: p.sum() * torch.nan)
    assert caught[0].filename == __file__


@every_wrapper
@pytest.mark.parametrize("base", ["SGD", "SGD, all options", "a subclass of SGD", "INNA"])
def test_global_hooks_run_once_a_step_around_the_wrapper(base: str, wrapper: str) -> None:
    seen: list[Any] = []

    def scale(optimizer: Any, *_: Any) -> None:
        seen.append(optimizer)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(0.01)

    slopes = []
    for hooks in ((register_optimizer_step_pre_hook, register_optimizer_step_post_hook), ()):
        problem = Problem()
        optimizer = WRAPPERS[wrapper](BASES[base](problem.groups()))
        handles = [register(scale) for register in hooks]
        try:
            for k in range(2):
                optimizer.step(lambda p=problem, k=k: p.losses(k))
                optimizer.zero_grad()
        finally:
            for handle in handles:
                handle.remove()
        slopes.append([record.slope for record in optimizer.records])
        assert seen == [optimizer] * 4 * bool(hooks)
        seen.clear()
    assert slopes[0] == slopes[1]


def test_global_hooks_stay_those_of_other_threads() -> None:
    seen: list[str] = []
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))])

    class Waits(OwnSGD):
        def step(self, closure: Any = None) -> None:
            thread = threading.Thread(target=other.step)
            thread.start()
            thread.join()

    handle = register_optimizer_step_post_hook(lambda o, *_: seen.append(type(o).__name__))
    try:
        with global_hooks_off(), global_hooks_off():
            Waits([nn.Parameter(torch.ones(1))]).step()
        assert seen == ["SGD"]
        other.step()
    finally:
        handle.remove()
    assert seen == ["SGD", "SGD"]
    assert not _global_optimizer_post_hooks


@every_wrapper
def test_hooks_of_saving_and_loading_run(wrapper: str) -> None:
    p = nn.Parameter(torch.ones(1))
    optimizer = WRAPPERS[wrapper](torch.optim.SGD([p]))
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step(lambda: p.sum() * torch.nan)
    optimizer.step(lambda: p.square().sum())
    calls = []
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("after saving"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before saving", "after saving", "before loading", "after loading"]


def test_state_of_another_kind_is_refused() -> None:
    problem = Problem()
    rescaled = Rescaled(torch.optim.SGD(problem.groups()))
    gen = GeN(torch.optim.SGD(problem.groups()))
    with pytest.raises(ValueError, match="saved by GeN, this is Rescaled"):
        rescaled.load_state_dict(gen.state_dict())
    with pytest.raises(ValueError, match="saved by an optimizer that is not wrapped"):
        rescaled.load_state_dict(torch.optim.SGD(problem.groups()).state_dict())
    saved = rescaled.state_dict()
    saved["wrapper"] = {"kind": "Rescaled", "beta3": 0.5}
    saved["param_groups"][0]["lr"] = 7.0
    with pytest.raises(
        ValueError, match=r"lacks or adds \['base', 'beta3', 'checked', 'energy', 'estimator'"
    ):
        rescaled.load_state_dict(saved)
    assert rescaled.param_groups[0]["lr"] == 0.95
    published = Rescaled(torch.optim.SGD(problem.groups()), rule=Lipschitz(beta3=0.5))
    message = r"saved with rule Cautious\(\), this has Lipschitz\(beta3=0.5\)"
    with pytest.raises(ValueError, match=message):
        published.load_state_dict(rescaled.state_dict())


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


class Diverges(torch.optim.SGD):
    """Its direction is NaN wherever the gradient is above 1."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p]["calls"] = self.state[p].get("calls", 0) + 1
            p.sub_((1 - p.grad).sqrt(), alpha=self.param_groups[0]["lr"])


@every_wrapper
def test_a_direction_that_is_nan_is_skipped(wrapper: str) -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = WRAPPERS[wrapper](Diverges([p]))
    for size in (9.0, 0.1, 9.0):
        before = p.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
        if size > 1:
            with pytest.warns(RuntimeWarning, match="direction of the base optimizer is NaN"):
                optimizer.step(lambda size=size: (size * p + p.square() / 9).sum())
            assert_same((p.detach(), optimizer.state_dict()["state"]), before)
        else:
            optimizer.step(lambda size=size: (size * p + p.square() / 9).sum())
            assert optimizer.state[p]["calls"] == 1
            assert not torch.equal(p, before[0])


def test_a_model_that_turns_non_differentiable_later_costs_nothing() -> None:
    problem = Problem()
    optimizer = Rescaled(torch.optim.Adam(problem.groups()))
    problem.train(optimizer, range(2))
    before = problem.snapshot(optimizer), optimizer.state_dict()["wrapper"]
    with pytest.raises(NotTwiceDifferentiable, match="hardsigmoid"):
        optimizer.step(lambda: F.hardsigmoid(problem.losses(0)))
    assert_same(problem.snapshot(optimizer), before[0])
    assert optimizer.state_dict()["wrapper"] == before[1]


@fast_only
@every_wrapper
def test_the_callers_attention_kernels_serve_and_never_change(wrapper: str) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(1, 1, 3, 2))
    flash = torch.backends.cuda.flash_sdp_enabled
    seen = []

    def closure() -> Tensor:
        seen.append(flash())
        return F.scaled_dot_product_attention(p, p, p).square().sum()

    optimizer = WRAPPERS[wrapper](torch.optim.SGD([p]))
    for _ in range(2):
        optimizer.step(closure)
    assert len(seen) >= 4  # twice the step, twice a check or probes
    assert all(seen)
    assert flash()


@every_wrapper
def test_checkpointed_statistics_advance_as_in_plain_training(wrapper: str) -> None:
    def make() -> tuple[nn.Module, Callable[[], Tensor]]:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        x = torch.randn(8, 4)
        return block, lambda: checkpoint(block, x, use_reentrant=False).square().sum(1)

    block, closure = make()
    optimizer = WRAPPERS[wrapper](torch.optim.SGD(block.parameters()))
    for _ in range(2):
        optimizer.step(closure)
    twin, closure = make()
    for _ in range(2):
        closure().mean().backward()
    assert block[1].num_batches_tracked == twin[1].num_batches_tracked
    assert optimizer.skipped == 0


@pytest.mark.parametrize("size", [1e-8, 1e-12, 1e-14])
def test_small_gradients_keep_their_digits(size: float) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Rescaled(torch.optim.SGD([p]), ell=0.5)
    optimizer.step(lambda: size * (p - 3).square().sum())
    torch.testing.assert_close(p.detach(), torch.full((3,), 3.0))


@pytest.mark.parametrize("base", [torch.optim.SGD, OwnSGD])
def test_a_model_that_changes_its_dtype_goes_on(base: type) -> None:
    model = nn.Linear(3, 2)
    optimizer = Rescaled(base(model.parameters(), lr=0.1), ell=0.5)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, F64, torch.float32):
        model.to(dtype)
        before = model.weight.detach().clone()
        optimizer.step(lambda dtype=dtype: model(x.to(dtype)).square().sum(1))
        assert optimizer.skipped == 0
        assert (model.weight - before).norm() > 1e-3


def test_a_step_beyond_the_parameters_dtype_is_skipped() -> None:
    p = nn.Parameter(torch.ones(1))
    optimizer = Rescaled(torch.optim.SGD([p]), ell=0.5)
    before = optimizer.state_dict()["wrapper"]
    with pytest.warns(RuntimeWarning, match="overflows"):
        optimizer.step(lambda: (p + 1e-41 * p**2).sum())
    assert p.item() == 1
    assert p.grad is None
    assert optimizer.state_dict()["wrapper"] == {**before, "iteration": 1, "skipped": 1}
    optimizer.step(lambda: (p - 3).square().sum())
    assert p.item() == pytest.approx(3)


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


OVERLAPS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "the same": lambda p: (p, p),
    "transposed": lambda p: (p, p.t()),
    "a row": lambda p: (p, p[2]),
    "columns": lambda p: (p[:, :2], p[:, 1:]),
    "of another type": lambda p: (p, p.view(torch.float32)[0]),
}


@pytest.mark.parametrize("overlap", OVERLAPS)
@every_wrapper
def test_parameters_that_share_memory_are_refused(wrapper: str, overlap: str) -> None:
    a, b = map(nn.Parameter, OVERLAPS[overlap](torch.ones(4, 3, dtype=F64)))
    message = "parameter . of group ., of shape .* shares memory with parameter . of group"
    with pytest.raises(ValueError, match=message):
        WRAPPERS[wrapper](torch.optim.SGD([{"params": [a]}, {"params": [b]}]))
    optimizer = WRAPPERS[wrapper](torch.optim.SGD([a]))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [b]})
    c, before = nn.Parameter(torch.ones(3, dtype=F64)), b.detach().clone()
    optimizer.add_param_group({"params": [c]})
    optimizer.step(lambda: a.square().sum() + c.square().sum())
    with torch.no_grad():
        a.fill_(1)
    c.data = b.data
    for call in (optimizer.step, optimizer.look_ahead):
        with pytest.raises(ValueError, match=message):
            call(lambda: a.square().sum() + c.square().sum())
    assert_same(b.detach(), before)


@every_wrapper
def test_views_of_one_buffer_that_are_apart_serve(wrapper: str) -> None:
    ends = []
    for own in (False, True):
        flat = torch.linspace(-1, 1, 24, dtype=F64)
        views = [flat[:12].view(4, 3)[:, :2], flat[:12].view(4, 3)[:, 2:], flat[12:], flat[:0]]
        params = [nn.Parameter(view.clone() if own else view) for view in views]
        optimizer = WRAPPERS[wrapper](torch.optim.SGD(params, momentum=0.9))
        for _ in range(3):
            optimizer.step(lambda ps=params: sum(p.cosh().sum() for p in ps))
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(*ends)


@every_wrapper
def test_a_lazy_module_finds_its_place_at_the_first_step(wrapper: str) -> None:
    model, x = nn.LazyLinear(2), torch.ones(3, 4)
    optimizer = WRAPPERS[wrapper](torch.optim.SGD(model.parameters()))
    values = [optimizer.step(lambda: model(x).square().sum()).item() for _ in range(3)]
    assert values == sorted(values, reverse=True)


@every_wrapper
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_listed_twice_is_refused(wrapper: str) -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    message = "parameter 2 of group 0 is parameter 0 of group 0 again, .* list it once"
    with pytest.raises(ValueError, match=message):
        WRAPPERS[wrapper](torch.optim.SGD([a, b, a]))
    optimizer = WRAPPERS[wrapper](torch.optim.SGD([a]))
    with pytest.raises(ValueError, match="parameter 1 of group 1 is parameter 0 of group 1"):
        optimizer.add_param_group({"params": [b, b]})
    assert len(optimizer.param_groups) == 1


@every_wrapper
def test_records_as_json_lines(wrapper: str, tmp_path: Path) -> None:
    problem = Problem()
    optimizer = WRAPPERS[wrapper](torch.optim.SGD(problem.groups()))
    problem.train(optimizer, range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        optimizer.step(lambda: problem.losses(3) * torch.nan)
    path = tmp_path / "records.jsonl"
    optimizer.records.write(path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    assert {"value", "slope", "curvature", "r", "step", "skipped"} <= set(lines[0])
    assert lines[1]["slope"] == optimizer.records[1].slope
    assert lines[2]["skipped"] is None
    assert "NaN or infinite" in lines[3]["skipped"]
    assert len(optimizer.records) == 4
    assert [record.iteration for record in optimizer.records[1:3]] == [2, 3]


def test_the_share_of_descent_directions() -> None:
    """Equation (26), of a heavy ball that climbs every now and then."""
    x = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Rescaled(
        torch.optim.SGD([x], lr=0.1, momentum=0.9), rule=Lipschitz(), ell=1.0, checked=0
    )
    for _ in range(20):
        optimizer.step(lambda: (x.square() * torch.tensor([1.0, 5.0])).sum())
    slopes = [r.slope for r in optimizer.records if r.slope is not None]
    climbing = sum(slope < 0 for slope in slopes)
    assert 0 < climbing < 20
    assert optimizer.records.descent_share() == 1 - climbing / 20
    assert optimizer.records.descent_share(last=5) == sum(s >= 0 for s in slopes[-5:]) / 5
    assert math.isnan(Records().descent_share())


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


def test_a_module_that_another_thread_is_in_does_not_matter() -> None:
    norm = nn.BatchNorm1d(2)
    inside, done = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            assert done.wait(10)
            return x

    thread = threading.Thread(target=Slow(), args=(torch.ones(1),))
    with SideEffects():
        thread.start()
        assert inside.wait(10)
        with SideEffects():
            done.set()
            thread.join()
            norm(torch.randn(4, 2))
        assert norm.num_batches_tracked == 0
    assert list(norm.state_dict()) == list(nn.BatchNorm1d(2).state_dict())
