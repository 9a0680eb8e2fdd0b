"""Closures that call backward themselves, clipping, and several closures for one batch."""

import math

import pytest
import torch
from closures import OPTIMIZERS, Problem, every_base, every_optimizer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from optim import GeN, Rescaled

F64 = torch.float64


@every_base
@every_optimizer
def test_a_closure_that_calls_backward_does_the_same(optimizer: str, base: str) -> None:
    plain, other = Problem(optimizer, base), Problem(optimizer, base)

    def closure(k: int) -> Tensor:
        if k % 2:  # without, gradients are none anyway
            other.optimizer.zero_grad()
        loss = other.losses(k).mean()
        loss.backward()
        return loss

    for k in range(5):
        expected = plain.optimizer.step(lambda k=k: plain.losses(k).mean())
        loss = other.optimizer.step(lambda k=k: closure(k))
        assert loss == expected
        assert not loss.requires_grad
        for p, q in zip(plain.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    torch.testing.assert_close(other.values(), plain.values(), rtol=0, atol=0)
    assert other.optimizer.records[-1] == plain.optimizer.records[-1]


@pytest.mark.parametrize("how", ["norm", "value"])
@every_optimizer
def test_clipping_changes_the_direction_and_not_the_loss(optimizer: str, how: str) -> None:
    """In the closure or by the option, whose slope and curvature are those of the loss."""
    inside, option = Problem(optimizer), Problem(optimizer)
    inside.optimizer.base.param_groups[0].update(momentum=0.0, weight_decay=0.0)
    option.optimizer.base.param_groups[0].update(momentum=0.0, weight_decay=0.0)
    clips = []

    def clip(params: list[Tensor]) -> None:
        clips.append(len(params))
        if how == "norm":
            clip_grad_norm_(params, 0.01)
        else:
            clip_grad_value_(params, 0.005)

    def closure(k: int) -> Tensor:
        inside.optimizer.zero_grad()
        loss = inside.losses(k).mean()
        loss.backward()
        clip(list(inside.model.parameters()))
        return loss

    option.optimizer.stepper.clip = clip
    for k in range(4):
        gradient = torch.autograd.grad(option.losses(k).mean(), list(option.model.parameters()))
        inside.optimizer.step(lambda k=k: closure(k))
        clips.clear()
        option.optimizer.step(lambda k=k: option.losses(k).mean())
        assert clips == [4]  # once, whatever is probed
        clipped = [p.grad for p in option.model.parameters()]
        slope = sum((a * b).sum() for a, b in zip(clipped, gradient, strict=True))
        assert option.optimizer.records[-1].slope == pytest.approx(slope.item(), rel=1e-12)
        for p, q in zip(inside.model.parameters(), option.model.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    torch.testing.assert_close(inside.values(), option.values(), rtol=0, atol=0)


def test_clipping_leaves_a_quadratic_its_exact_line_search() -> None:
    x = nn.Parameter(torch.tensor([3.0, -4.0], dtype=F64))
    base = torch.optim.SGD([x])
    optimizer = Rescaled(base, ell=0.5, clip=lambda params: clip_grad_norm_(params, 0.1))
    optimizer.step(lambda: x.square().sum() / 2)
    torch.testing.assert_close(x.detach(), torch.zeros(2, dtype=F64))


@pytest.mark.parametrize("parts", [[8], [4, 4], [2, 2, 2, 2], [5, 3], [1, 6, 1]])
@every_base
@every_optimizer
def test_several_closures_are_the_joined_batch(optimizer: str, base: str, parts: list[int]) -> None:
    joined, several = Problem(optimizer, base), Problem(optimizer, base)
    ends = torch.tensor(parts).cumsum(0).tolist()
    rows = [slice(end - part, end) for end, part in zip(ends, parts, strict=True)]
    for k in range(5):
        expected = joined.optimizer.step(lambda k=k: joined.losses(k))
        closures = [lambda k=k, r=r: several.losses(k, r) for r in rows]
        losses = several.optimizer.step(closures)
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
        a, b = several.optimizer.records[-1], joined.optimizer.records[-1]
        assert (a.curvature is None) == (b.curvature is None)
        for name in ("value", "slope", "curvature", "magnitude", "step"):
            if getattr(a, name) is not None:
                assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-6)
    torch.testing.assert_close(several.values(), joined.values(), rtol=1e-6, atol=1e-9)


@every_optimizer
def test_no_more_than_one_graph_is_held_at_a_time(optimizer: str) -> None:
    problem = Problem(optimizer)
    last: list[StorageWeakRef] = []

    def losses(k: int) -> Tensor:
        assert all(output.expired() for output in last)
        found = problem.losses(k)
        # The log of the probabilities, which the graph of the losses holds.
        output = found.grad_fn._saved_self if found.grad_fn is not None else torch.ones(1)
        last[:] = [StorageWeakRef(output.untyped_storage())]
        return found

    for _ in range(2):
        problem.optimizer.step([lambda k=k: losses(k) for k in range(3)])


@every_optimizer
def test_several_closures_of_a_scalar_each_are_their_mean(optimizer: str) -> None:
    joined, several = Problem(optimizer), Problem(optimizer)
    for k in range(4):
        joined.optimizer.step(lambda k=k: joined.losses(k).mean())
        halves = [lambda k=k, r=r: several.losses(k, r).mean() for r in (slice(0, 4), slice(4, 8))]
        losses = several.optimizer.step(halves)
        assert losses.shape == (2,)
    torch.testing.assert_close(several.values(), joined.values(), rtol=1e-6, atol=1e-9)


@every_optimizer
def test_a_closure_that_runs_again_sees_the_same_random_numbers(optimizer: str) -> None:
    problem = Problem(optimizer)
    drawn: list[list[float]] = [[], []]

    def closure(i: int) -> Tensor:
        drawn[i].append(torch.rand(()).item())
        return problem.losses(0, slice(4 * i, 4 * i + 4))

    torch.manual_seed(7)
    problem.optimizer.step([lambda: closure(0), lambda: closure(1)])
    after = torch.rand(())
    torch.manual_seed(7)
    assert [set(d) for d in drawn] == [{torch.rand(()).item()}, {torch.rand(()).item()}]
    assert torch.rand(()) == after
    assert all(len(d) > 1 for d in drawn)


def test_a_loss_that_is_nan_is_skipped_after_its_backward() -> None:
    problem = Problem("jet")
    before = problem.values()
    ran = []

    def closure() -> None:
        (problem.losses(0).mean() * torch.nan).backward()
        ran.append(clip_grad_norm_(problem.model.parameters(), 1.0))

    with pytest.warns(RuntimeWarning, match="nothing changed: the loss is nan"):
        problem.optimizer.step(closure)
    assert math.isnan(ran[0])
    torch.testing.assert_close(problem.values(), before, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["jet", "gradients"])
def test_a_part_that_is_nan_when_it_is_run_again_is_skipped(optimizer: str) -> None:
    problem = Problem(optimizer)
    before, calls = problem.values(), []

    def closure(rows: slice) -> Tensor:
        calls.append(rows)
        return problem.losses(0, rows) * (math.nan if len(calls) > 3 else 1)

    with pytest.warns(RuntimeWarning, match="nothing changed: the loss at a probe is NaN"):
        problem.optimizer.step([lambda: closure(slice(0, 4)), lambda: closure(slice(4, 8))])
    torch.testing.assert_close(problem.values(), before, rtol=0, atol=0)


def test_gradients_are_left_in_memory_of_their_own() -> None:
    """Autograd gives one tensor for both summands, and an expanded one for a sum."""
    a, b, c = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = GeN(torch.optim.SGD([a, b, c]))
    optimizer.step(lambda: (a + b).square().sum() + c.sum())
    pointers = {p.grad.data_ptr() for p in (a, b, c) if p.grad is not None}
    assert len(pointers) == 3
    for p in (a, b, c):
        assert p.grad is not None
        assert p.grad.stride() == (1,)
    assert torch.equal(a.grad, b.grad)


@every_optimizer
def test_what_else_requires_a_gradient_gets_it_from_backward(optimizer: str) -> None:
    problem, twin = Problem(optimizer), Problem(optimizer)
    inputs = problem.batches[0][0].requires_grad_()
    scale = torch.ones(3, dtype=F64, requires_grad=True)
    hooked = []
    scale.register_post_accumulate_grad_hook(lambda p: hooked.append(p.grad.clone()))

    def closure() -> Tensor:
        problem.optimizer.zero_grad()
        scale.grad = None
        loss = F.cross_entropy(problem.model(inputs) * scale, problem.batches[0][1])
        loss.backward()
        return loss

    problem.optimizer.step(closure)
    theirs = twin.batches[0][0].clone().requires_grad_()
    one = torch.ones(3, dtype=F64, requires_grad=True)
    F.cross_entropy(twin.model(theirs) * one, twin.batches[0][1]).backward()
    torch.testing.assert_close(inputs.grad, theirs.grad)
    torch.testing.assert_close(scale.grad, one.grad)
    torch.testing.assert_close(hooked[0], one.grad)


@every_optimizer
def test_gradients_of_zero_are_none(optimizer: str) -> None:
    problem, twin = Problem(optimizer), Problem(optimizer)
    for k in range(3):
        problem.optimizer.zero_grad(set_to_none=False)
        problem.optimizer.step(lambda k=k: problem.losses(k).mean().backward())
        twin.optimizer.step(lambda k=k: twin.losses(k).mean())
    assert problem.values()[0].isfinite().all()
    torch.testing.assert_close(problem.values(), twin.values())


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "loss returned"])
def test_hooks_of_parameters_change_the_direction_and_not_the_loss(inside: bool) -> None:
    x = nn.Parameter(torch.tensor([3.0, -4.0], dtype=F64))
    handle = x.register_hook(lambda g: g.clamp_(-0.1, 0.1))
    optimizer = Rescaled(torch.optim.SGD([x]), ell=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x.square().sum() / 2
        if inside:
            loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.records[-1].slope == pytest.approx(0.7)
    assert optimizer.records[-1].curvature == pytest.approx(0.02)
    torch.testing.assert_close(x.grad, torch.tensor([0.1, -0.1], dtype=F64))
    torch.testing.assert_close(x.detach(), torch.tensor([-0.5, -0.5], dtype=F64))
    handle.remove()
    optimizer.step(closure)
    torch.testing.assert_close(x.grad, torch.tensor([-0.5, -0.5], dtype=F64))


@every_optimizer
def test_autocast_around_a_step_does_not_round_its_own_sums(optimizer: str) -> None:
    slopes = []
    for around in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(300, 200)
        step = OPTIMIZERS[optimizer](model, torch.optim.SGD(model.parameters(), momentum=0.9)).step
        x = torch.randn(16, 300)

        def closure(model: nn.Module = model, x: Tensor = x) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return model(x).square().mean()

        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            step(closure)
        slopes.append(step.__self__.records[-1].slope)
    assert slopes[0] == slopes[1]


class Average(nn.Module):
    """Whose output depends on what it saw before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return x - self.mean


@every_optimizer
def test_losses_ahead_start_from_the_buffers_of_the_first(optimizer: str) -> None:
    problem = Problem(optimizer)
    average = Average()
    problem.model.insert(0, average)
    x, y = problem.batches[0]
    for k in range(1, 4):
        problem.optimizer.step(lambda: F.cross_entropy(problem.model(x), y))
        torch.testing.assert_close(average.mean, (1 - 0.5**k) * x.mean(0))
    closure = lambda: F.cross_entropy(problem.model(x), y)  # noqa: E731
    mean = average.mean.clone()
    ahead = problem.optimizer.look_ahead(closure)
    assert torch.equal(average.mean, mean)
    here = min(range(len(ahead.steps)), key=lambda i: abs(ahead.steps[i]))
    t = ahead.steps[here]
    assert ahead.losses[here] == pytest.approx(
        ahead.value - t * ahead.slope, abs=1e-9 + abs(t * ahead.slope)
    )
