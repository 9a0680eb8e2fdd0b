"""Closures that call backward themselves, clipping, and several closures for one batch."""

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import fast_only
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from optim import GeN, INNAprop, Rescaled
from optim.estimators import Exact, GaussNewton, GradientDifferences, Probes, Secant
from optim.intercept import intercepted

F64 = torch.float64
OPTIMIZERS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "tangent pass": lambda model, base: Rescaled(base, estimator=Exact(per_sample=False)),
    "jet": lambda model, base: Rescaled(base),
    "lazy": lambda model, base: Rescaled(base, every=2),
    "Gauss-Newton": lambda model, base: Rescaled(base, estimator=GaussNewton(model)),
    "gradients": lambda model, base: Rescaled(base, estimator=GradientDifferences()),
    "losses": lambda model, base: Rescaled(base, estimator=Probes()),
    "one loss": lambda model, base: Rescaled(base, estimator=Secant()),
    "GeN": lambda model, base: GeN(base, phi=2),
}
BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, momentum=0.9, weight_decay=0.01),
    "AdamW": torch.optim.AdamW,
    "INNAprop": INNAprop,
}
every_optimizer = pytest.mark.parametrize(
    "optimizer",
    [pytest.param(n, marks=fast_only if n == "Gauss-Newton" else ()) for n in OPTIMIZERS],
)
every_base = pytest.mark.parametrize("base", BASES)


class Problem:
    def __init__(self, optimizer: str, base: str = "SGD", **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64)
        self.optimizer = OPTIMIZERS[optimizer](self.model, BASES[base](self.model.parameters()))
        self.batches = [(torch.randn(8, 4, dtype=F64), torch.randint(3, (8,))) for _ in range(5)]

    def losses(self, k: int, rows: slice = slice(None)) -> Tensor:
        x, y = self.batches[k]
        return F.cross_entropy(self.model(x[rows]), y[rows], reduction="none")

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


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


def twice(problem: Problem) -> None:
    for r in (slice(0, 4), slice(4, 8)):
        problem.losses(0, r).mean().backward()


def as_weights(problem: Problem) -> None:
    losses = problem.losses(0)
    losses.backward(torch.ones_like(losses))


def through_autograd(problem: Problem) -> None:
    loss = problem.losses(0).mean()
    torch.autograd.backward([loss, loss])


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (twice, "more than once; for several parts of a batch"),
        (as_weights, "calls backward with gradient; call it plainly"),
        (lambda p: p.losses(0).mean().backward(create_graph=True), "with create_graph"),
        (lambda p: p.losses(0).mean().backward(inputs=[p.model[0].bias]), "with inputs"),
        (lambda p: p.losses(0).backward(), "on something else than one number"),
        (through_autograd, "on something else than one number"),
        (lambda p: p.losses(0).mean().detach().backward(), "no graph"),
    ],
)
@pytest.mark.parametrize("optimizer", ["jet", "GeN"])
def test_backward_that_leaves_the_loss_open_is_refused(
    closure: Any, message: str, optimizer: str
) -> None:
    problem = Problem(optimizer)
    problem.optimizer.step(lambda: problem.losses(1))
    before = problem.values()
    with pytest.raises(ValueError, match=message):
        problem.optimizer.step(lambda: closure(problem))
    torch.testing.assert_close(problem.values(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in problem.model.parameters())


def test_lists_that_are_none() -> None:
    problem = Problem("jet")
    step = problem.optimizer.step
    with pytest.raises(TypeError, match="a list of nothing"):
        step([])
    with pytest.raises(TypeError, match="it was given a list of function, Tensor"):
        step([lambda: problem.losses(0), problem.losses(0)])
    with pytest.raises(ValueError, match="some closures return a scalar, others one loss"):
        step([lambda: problem.losses(0), lambda: problem.losses(1).mean()])
    with pytest.raises(ValueError, match="one of several closures calls backward"):
        step([lambda: problem.losses(0).mean().backward()] * 2)
    with pytest.warns(RuntimeWarning, match=r"nothing changed: .* 4 of 8 samples is NaN"):
        step([lambda: problem.losses(0), lambda: problem.losses(1) / (torch.arange(8) > 3)])
    assert len(problem.optimizer.records) == 1


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("optimizer", ["jet", "GeN"])
def test_gradients_of_others_are_not_dropped(optimizer: str, added: bool) -> None:
    """Accumulated beside the step, or onto what it left."""
    problem = Problem(optimizer)
    problem.optimizer.step(lambda: problem.losses(0))
    problem.optimizer.step(lambda: problem.losses(0).mean().backward())
    if not added:
        problem.optimizer.zero_grad()
    problem.losses(1).mean().backward()
    grads = [p.grad.clone() for p in problem.model.parameters()]
    with pytest.raises(ValueError, match="computed outside this step's closure; call zero_grad"):
        problem.optimizer.step(lambda: problem.losses(2).mean().backward())
    for p, g in zip(problem.model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, g)
    problem.optimizer.zero_grad()
    problem.optimizer.step(lambda: problem.losses(2).mean().backward())
    assert len(problem.optimizer.records) == 3


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


def test_other_threads_keep_their_backward() -> None:
    x = torch.ones(1, requires_grad=True)
    found: list[Tensor] = []
    with intercepted(found.append):
        thread = threading.Thread(target=lambda: (3 * x).sum().backward())
        thread.start()
        thread.join()
        (5 * x).sum().backward()
    assert x.grad == 3
    assert found == [torch.tensor(5.0)]
    x.sum().backward()
    assert x.grad == 4


def test_a_scaler_inside_the_closure_is_told_where_it_belongs() -> None:
    problem = Problem("GeN")
    before = problem.values()

    def scaled() -> Tensor:
        loss = problem.losses(0).mean()
        (loss * 2.0**16).backward()
        return loss

    with pytest.raises(ValueError, match=r"65536 times the loss .* scaler="):
        problem.optimizer.step(scaled)
    torch.testing.assert_close(problem.values(), before, rtol=0, atol=0)


def test_threads_may_train_at_once() -> None:
    """Of which the one that began first ends first."""
    original = torch.autograd.backward
    begun = [threading.Event(), threading.Event()]
    ended = threading.Event()
    slopes = []

    def train(second: bool) -> None:
        x = nn.Parameter(torch.tensor([1.0]))
        optimizer = GeN(torch.optim.SGD([x]), checked=0)

        def closure() -> Tensor:
            begun[second].set()
            assert (ended if second else begun[1]).wait(10)
            loss = (x - 3).square().sum()
            optimizer.zero_grad()
            loss.backward()
            return loss

        assert not second or begun[0].wait(10)
        optimizer.step(closure)
        slopes.append(optimizer.records[-1].slope)
        if not second:
            ended.set()

    threads = [threading.Thread(target=train, args=(second,)) for second in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slopes == [16.0, 16.0]
    assert torch.autograd.backward is original


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


@pytest.mark.parametrize("optimizer", ["tangent pass", "gradients", "GeN"])
def test_threads_train_each_their_own_modules(optimizer: str) -> None:
    """With buffers of batch norm, which a step would take back if they were its own."""

    def train(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        for p in model.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 2
        wrapped = OPTIMIZERS[optimizer](model, torch.optim.SGD(model.parameters()))
        x, y = torch.randn(8, 4, generator=generator), torch.arange(8) % 3
        for _ in range(15):
            wrapped.step(lambda: F.cross_entropy(model(x), y))
        return list(model.state_dict().values())

    alone = [train(seed) for seed in range(2)]
    together: dict[int, list[Tensor]] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: together.update({seed: train(seed)}))
        for seed in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        torch.testing.assert_close(together[seed], alone[seed], rtol=0, atol=0)


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


@every_optimizer
def test_gradients_from_before_are_refused_also_of_a_loss_that_is_returned(optimizer: str) -> None:
    problem = Problem(optimizer)
    before = problem.values()
    problem.losses(0).mean().backward()
    with pytest.raises(ValueError, match="computed outside this step's closure; call zero_grad"):
        problem.optimizer.step(lambda: problem.losses(1))
    torch.testing.assert_close(problem.values(), before, rtol=0, atol=0)
    problem.optimizer.zero_grad()
    problem.optimizer.step(lambda: problem.losses(1))


@every_optimizer
def test_a_closure_that_gives_another_loss_each_time_is_refused(optimizer: str) -> None:
    problem = Problem(optimizer)
    before, generator = problem.values(), torch.Generator()

    def noisy() -> Tensor:
        return problem.losses(0) * torch.rand(8, generator=generator, dtype=F64)

    with pytest.raises(ValueError, match="called again for the same parameters: draw the batch"):
        problem.optimizer.step(noisy)
    torch.testing.assert_close(problem.values(), before, rtol=0, atol=0)
    problem.optimizer.step(lambda: problem.losses(0) * torch.rand(8, dtype=F64))


@every_optimizer
@pytest.mark.parametrize("whole", [True, False])
def test_a_loss_from_outside_the_closure_is_refused(optimizer: str, whole: bool) -> None:
    problem = Problem(optimizer, "AdamW")
    before, (x, y) = problem.values(), problem.batches[0]
    logits = problem.model(x)
    loss = F.cross_entropy(logits, y)
    message = {
        "Gauss-Newton": "the closure did not call the model",
        "gradients": "the graph of the loss is gone",
    }.get(optimizer, "compute the loss, and all that it is made of, inside the closure")
    with pytest.raises(ValueError, match=message):
        problem.optimizer.step(lambda: loss if whole else F.cross_entropy(logits, y))
    torch.testing.assert_close(problem.values(), before, rtol=0, atol=0)


class Reversed(torch.autograd.Function):
    """As in domain-adversarial training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return -cotangent


def of_another_gradient(problem: Any, how: str) -> Tensor:
    x, y = problem.batches[0]
    if how == "reversed":
        return F.cross_entropy(Reversed.apply(problem.model(x)), y)
    losses: Tensor = F.cross_entropy(problem.model(x), y)
    return losses + problem.model(x).square().mean() - problem.model(x).square().mean().detach()


@every_optimizer
@pytest.mark.parametrize("how", ["reversed", "detached"])
def test_a_loss_that_does_not_fall_as_its_gradient_says_is_refused(
    optimizer: str, how: str
) -> None:
    problem = Problem(optimizer)
    with torch.no_grad():
        for p in problem.model.parameters():
            p.mul_(10)  # so that the square outweighs the entropy
    before = problem.values()
    with pytest.raises(ValueError, match="times as fast as its gradient says"):
        problem.optimizer.step(lambda: of_another_gradient(problem, how))
    torch.testing.assert_close(problem.values(), before, rtol=0, atol=0)


def test_a_kink_at_the_start_is_none() -> None:
    w, x, y = nn.Parameter(torch.zeros(4, 3)), torch.randn(8, 4), torch.randint(3, (8,))
    GeN(torch.optim.SGD([w])).step(
        lambda: ((x @ w).amax(1) - (x @ w).gather(1, y[:, None])[:, 0]).mean()
    )


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
def test_backward_on_another_loss_than_is_returned_is_refused(optimizer: str) -> None:
    problem = Problem(optimizer)
    before, (x, y) = problem.values(), problem.batches[0]

    def adversarial() -> Tensor:
        near = x.clone().requires_grad_()
        F.cross_entropy(problem.model(near), y).backward()
        return F.cross_entropy(problem.model(x + 0.1 * near.grad.sign()), y)

    with pytest.raises(ValueError, match="backward on another loss than it returns"):
        problem.optimizer.step(adversarial)
    torch.testing.assert_close(problem.values(), before, rtol=0, atol=0)

    def reported(whole: bool) -> Tensor:
        problem.optimizer.zero_grad()
        loss = problem.losses(0).mean()
        (loss if whole else loss + problem.model(x).square().mean()).backward()
        return loss * 8 if whole else loss

    problem.optimizer.step(lambda: reported(True))
    problem.optimizer.step(lambda: reported(False))


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
