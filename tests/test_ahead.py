"""The loss along a step that is not taken, and pictures of it and of a run."""

import copy
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._pytree import tree_leaves

from curvature import directional
from optim import GeN, INNAprop, Records, Rescaled, StepRecord, plots
from optim.ahead import Ahead
from optim.rules import Lyapunov

F64 = torch.float64
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "Rescaled": lambda p: Rescaled(torch.optim.RMSprop(p, momentum=0.5)),
    "GeN": lambda p: GeN(torch.optim.SGD(p, momentum=0.9, weight_decay=0.1), phi=4),
    "Lyapunov": lambda p: Rescaled(INNAprop(p, weight_decay=0.0), rule=Lyapunov()),
}
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)


class Net:
    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2)]
        self.model = nn.Sequential(*layers, nn.Linear(6, 3)).to(F64)
        self.x, self.y = torch.randn(16, 4, dtype=F64), torch.randint(3, (16,))

    def losses(self, batch: slice = slice(None)) -> Tensor:
        return F.cross_entropy(self.model(self.x[batch]), self.y[batch], reduction="none")

    def state(self, optimizer: Any) -> list[Any]:
        """Leaf by leaf: numbers, strings, and tensors as lists, to be compared exactly."""
        everything = (
            [(p.data, p.grad) for p in self.model.parameters()],
            list(self.model.buffers()),
            optimizer.state_dict(),
            list(optimizer.records),
            torch.get_rng_state(),
        )
        return [x.tolist() if isinstance(x, Tensor) else x for x in tree_leaves(everything)]


@every_wrapper
@pytest.mark.parametrize("steps", [0, 3])
def test_nothing_is_changed_by_looking(wrapper: str, steps: int) -> None:
    net, twin = Net(), Net()
    optimizer = WRAPPERS[wrapper](net.model.parameters())
    other = WRAPPERS[wrapper](twin.model.parameters())
    for k in range(steps + 2):
        if k == steps:
            before = net.state(optimizer)
            optimizer.look_ahead(net.losses, points=5)
            assert net.state(optimizer) == before
        torch.manual_seed(k)
        optimizer.step(net.losses)
        torch.manual_seed(k)
        other.step(twin.losses)
    assert net.state(optimizer) == twin.state(other)


@every_wrapper
def test_it_shows_the_step_that_follows(wrapper: str) -> None:
    net = Net()
    optimizer = WRAPPERS[wrapper](net.model.parameters())
    start = copy.deepcopy(net.model)
    torch.manual_seed(1)
    seen = optimizer.look_ahead(net.losses, points=101)
    torch.manual_seed(1)
    optimizer.step(net.losses)
    record = optimizer.records[-1]
    assert (seen.value, seen.step) == (record.value, record.step)
    assert seen.curvature == record.curvature
    assert seen.steps[0] < 0 < seen.step < seen.steps[-1]
    assert len(seen.steps) == len(seen.losses) == 101

    # The loss at the step's own end, with the step's own dropout mask.
    here, end = dict(start.named_parameters()), dict(net.model.named_parameters())
    for k in (0, 60, 100):
        share = seen.steps[k] / seen.step
        torch.manual_seed(1)
        moved = {name: p + share * (end[name] - p) for name, p in here.items()}
        out = torch.func.functional_call(copy.deepcopy(start), moved, (net.x,))
        decay = 0.05 if wrapper == "GeN" else 0.0  # the penalty of coupled weight decay
        penalty = decay * sum(p.square().sum() for p in moved.values())
        loss = (F.cross_entropy(out, net.y) + penalty).item()
        assert math.isclose(loss, seen.losses[k], rel_tol=1e-9)


def test_the_parabola_osculates() -> None:
    net = Net()
    net.model.eval()
    optimizer = Rescaled(torch.optim.SGD(net.model.parameters()))
    seen = optimizer.look_ahead(net.losses, points=11)
    params = dict(net.model.named_parameters())

    def loss(params: Any) -> Tensor:
        out = torch.func.functional_call(net.model, params, (net.x,))
        return F.cross_entropy(out, net.y)

    g = torch.autograd.grad(loss(params), list(params.values()))
    q = directional(loss, params, dict(zip(params, g, strict=True)), engine="reference")
    assert math.isclose(seen.slope, q.slope.item(), rel_tol=1e-9)
    assert math.isclose(seen.curvature, q.curvature.item(), rel_tol=1e-9)
    for t, y in zip(seen.steps, seen.parabola, strict=True):
        expected = q.value - t * q.slope + t**2 / 2 * q.curvature
        assert math.isclose(y, expected.item(), rel_tol=1e-9)


@every_wrapper
def test_closures_of_every_kind_look_the_same(wrapper: str) -> None:
    net = Net()
    net.model.eval()
    optimizer = WRAPPERS[wrapper](net.model.parameters())

    def closing() -> Tensor:
        optimizer.zero_grad()
        loss = net.losses().mean()
        loss.backward()
        return loss

    whole = optimizer.look_ahead(lambda: net.losses().mean(), points=5)
    assert optimizer.look_ahead(closing, points=5) == whole
    assert all(p.grad is None for p in net.model.parameters())
    parts = [lambda k=k: net.losses(slice(4 * k, 4 * k + 4)).mean() for k in range(4)]
    torch.testing.assert_close(
        optimizer.look_ahead(parts, points=5).losses, whole.losses, rtol=1e-9, atol=0
    )


def test_no_cast_of_a_parameter_ahead_is_left_behind() -> None:
    model, x = nn.Linear(4, 3), torch.randn(8, 4)
    optimizer = GeN(torch.optim.SGD(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        optimizer.look_ahead(lambda: model(x).square().mean(), points=3)
        assert torch.equal(model(x), expected)


def test_no_step_no_picture() -> None:
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = GeN(torch.optim.SGD([x]))
    with pytest.raises(ValueError, match="no step lies ahead: the loss is nan"):
        optimizer.look_ahead(lambda: x.sum() * torch.nan)
    with pytest.raises(ValueError, match="no step lies ahead: the direction is zero"):
        optimizer.look_ahead(lambda: (x * 0).sum())
    with pytest.raises(TypeError, match=r"GeN\.look_ahead needs a closure"):
        optimizer.look_ahead(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="points"):
        optimizer.look_ahead(lambda: x.square().sum(), points=2)
    with pytest.raises(ValueError, match="reach"):
        optimizer.look_ahead(lambda: x.square().sum(), reach=-1.0)
    assert x.grad is None
    assert len(optimizer.records) == 0


def test_a_picture_of_what_lies_ahead() -> None:
    net = Net()
    optimizer = GeN(torch.optim.SGD(net.model.parameters()))
    seen = optimizer.look_ahead(net.losses)
    (axes,) = plots.ahead(seen).axes
    loss, parabola, step, here = axes.lines
    assert list(loss.get_xdata()) == list(parabola.get_xdata()) == seen.steps
    assert list(loss.get_ydata()) == seen.losses
    assert list(parabola.get_ydata()) == seen.parabola
    assert list(step.get_xdata()) == [seen.step] * 2
    assert list(here.get_ydata()) == [seen.value]


def test_a_picture_of_a_loss_that_is_flat() -> None:
    seen = Ahead([-1.0, 0.0, 1.0], [2.0] * 3, value=2.0, slope=0.0, curvature=0.0, step=0.5)
    (axes,) = plots.ahead(seen).axes
    low, high = axes.get_ylim()
    assert low < 2.0 < high


def test_a_picture_of_a_run(tmp_path: Any) -> None:
    net = Net()
    optimizer = Rescaled(torch.optim.SGD(net.model.parameters(), momentum=0.9))
    for k in range(12):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step(lambda k=k: net.losses() * (torch.nan if k == 5 else 1.0))
    loss, step, curvature, descent = plots.run(optimizer.records).axes
    kept = [record for record in optimizer.records if record.skipped is None]
    assert list(loss.lines[0].get_xdata()) == [record.iteration for record in kept]
    assert list(loss.lines[0].get_ydata()) == [record.value for record in kept]
    assert list(loss.lines[1].get_xdata()) == [6, 6]  # the step that was skipped
    assert list(step.lines[1].get_ydata()) == [record.step for record in kept]
    assert list(curvature.lines[0].get_ydata()) == [record.magnitude for record in kept]
    assert list(descent.lines[0].get_ydata()) == [float(record.slope >= 0) for record in kept]

    path = tmp_path / "records.jsonl"
    optimizer.records.write(path)
    again = plots.run(path)
    assert list(again.axes[1].lines[1].get_ydata()) == [record.step for record in kept]


def test_shares_are_of_a_window() -> None:
    records = Records()
    for k in range(1, 101):
        records.append(StepRecord(k, 1.0, slope=1.0 if k % 4 else -1.0))
    line = plots.run(records).axes[3].lines[0]
    assert list(line.get_xdata()) == list(range(2, 101))
    assert list(line.get_ydata()) == [1.0 if k % 4 in (2, 3) else 0.5 for k in range(2, 101)]


def test_what_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no records"):
        plots.run(Records())
    plots.run([StepRecord(1, skipped="a loss is NaN")])  # nothing but a mark
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib \(this package's extra 'plots'"):
        plots.run([StepRecord(1, 1.0)])


def test_a_batch_drawn_inside_is_refused_after_looking_too() -> None:
    net = Net()
    optimizer = GeN(torch.optim.SGD(net.model.parameters()))
    optimizer.look_ahead(net.losses, points=5)
    batches = iter(range(100))

    def closure() -> Tensor:
        start = next(batches) % 4
        return net.losses(slice(4 * start, 4 * start + 4))

    with pytest.raises(ValueError, match="draw the batch outside it"):
        optimizer.step(closure)


class Periodic(torch.optim.SGD):
    """At every fourth step it multiplies its parameters."""

    steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.steps += 1
        if self.steps % 4 == 0:
            for p in self.param_groups[0]["params"]:
                p.mul_(0.5)


def test_looking_proves_nothing_of_a_base() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = GeN(Periodic([p], lr=0.1))
    for _ in range(12):
        optimizer.look_ahead(lambda: (p - 3).square().sum(), points=3)
    for _ in range(3):
        optimizer.step(lambda: (p - 3).square().sum())
    before = p.detach().clone()
    with pytest.raises(TypeError, match="not linear in lr"):
        optimizer.step(lambda: (p - 3).square().sum())
    assert torch.equal(p, before)
