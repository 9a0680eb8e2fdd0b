"""The way of the last steps, and the slope of a new batch along it."""

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optim import GeN, Rescaled
from optim.estimators import Exact
from optim.line import Estimate, Line
from optim.rules import Newton, RobbinsMonro, Rule, Trust

F64 = torch.float64


@dataclass(frozen=True)
class LooksBack(Rule):
    """Steps of length 0.3, and what was known at each."""

    seen: list[Line] = field(default_factory=list, repr=False)

    @property
    def needs_hindsight(self) -> bool:
        return True

    def choose(
        self, line: Line, estimate: Estimate | None, state: dict[str, float]
    ) -> tuple[float | str, dict[str, float]]:
        self.seen.append(line)
        return 0.3, state


def losses(x: Tensor, k: int) -> Tensor:
    """Of step k: one batch and the next have minima of their own."""
    return torch.stack([(x - 2 * (k % 2)).square().sum(), x.cosh().sum()])


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_hindsight(mu: float, decay: float) -> None:
    x = nn.Parameter(torch.tensor([1.0, -0.5], dtype=F64))
    base = torch.optim.SGD([x], momentum=mu, weight_decay=decay)
    rule = LooksBack()
    optimizer = Rescaled(base, rule=rule, checked=0)
    at, expected = [x.detach().clone()], []
    for k in range(25):
        here = at[-1].requires_grad_()
        (g,) = torch.autograd.grad(losses(here, k).mean() + decay / 2 * here @ here, here)
        way = sum((mu**j * (at[-2 - j] - at[-1 - j]) for j in range(k)), torch.zeros(2, dtype=F64))
        expected.append((g @ way).item())
        optimizer.step(partial(losses, x, k))
        at.append(x.detach().clone())
    assert [line.hindsight for line in rule.seen] == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert all(expected[1:])


def stepped(optimizer: Any, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Take step k; the gradient before it, and by how much x has fallen."""
    here = x.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(losses(here, k).mean(), here)
    optimizer.step(partial(losses, x, k))
    return g, (here - x).detach()


class Consumes(torch.optim.SGD):
    """Proposes p.grad, and spoils it when it moves."""

    def propose(self, ratios: Any) -> dict[Tensor, Tensor]:
        return {p: p.grad for p in self.param_groups[0]["params"]}

    @torch.no_grad()
    def move(self, step: float) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad.mul_(step))

    def limit(self, ratios: Any) -> float:
        return torch.inf


def zeroed(optimizer: Any) -> None:
    optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize(
    ("base", "then"), [(torch.optim.SGD, zeroed), (Consumes, lambda optimizer: None)]
)
def test_directions_that_are_written_to_are_copied_from_then_on(base: Any, then: Any) -> None:
    x = nn.Parameter(torch.tensor([1.0, -0.5], dtype=F64))
    rule = LooksBack()
    optimizer = Rescaled(base([x]), rule=rule, checked=0)
    way = torch.zeros(2, dtype=F64)
    for k in range(6):
        g, moved = stepped(optimizer, x, k)
        then(optimizer)
        if k == 2:
            # What is known of it is saved.
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        expected = 0.0 if k < 2 else (g @ way).item()
        assert rule.seen[-1].hindsight == pytest.approx(expected, rel=1e-12)
        way = moved


def test_directions_in_memory_that_others_write_to() -> None:
    x, bucket = nn.Parameter(torch.tensor([1.0, -0.5], dtype=F64)), torch.zeros(3, dtype=F64)

    def into_bucket(g: Tensor) -> Tensor:
        bucket.data[:2] = g  # leaves no version to tell it by
        return bucket[:2]

    x.register_hook(into_bucket)
    rule = LooksBack()
    optimizer = Rescaled(torch.optim.SGD([x]), rule=rule, checked=0)
    way = torch.zeros(2, dtype=F64)
    for k in range(3):
        g, moved = stepped(optimizer, x, k)
        assert rule.seen[-1].hindsight == pytest.approx((g @ way).item(), rel=1e-12)
        way = moved


def test_a_direction_that_the_move_spoils_ends_the_way_under_momentum() -> None:
    x = nn.Parameter(torch.tensor([1.0, -0.5], dtype=F64))
    rule = LooksBack()
    optimizer = Rescaled(Consumes([x], momentum=0.5), rule=rule, checked=0)
    way = torch.zeros(2, dtype=F64)
    for k in range(5):
        g, moved = stepped(optimizer, x, k)
        assert rule.seen[-1].hindsight == pytest.approx((g @ way).item(), rel=1e-12)
        # The first direction is copied, as there is no way yet to add it to; the second is not.
        way = (0.5 * way + moved) * (k != 1)


@pytest.mark.parametrize("mus", [(0.0, 0.0, 0.0), (0.9, 0.9, 0.9), (0.0, 0.9, 0.0)])
def test_gradients_stay_as_they_are(mus: tuple[float, ...]) -> None:
    x = nn.Parameter(torch.tensor([1.0, -0.5], dtype=F64))
    optimizer = GeN(torch.optim.SGD([x], momentum=0.5))
    values, grads = [], []
    for mu in mus:
        optimizer.param_groups[0]["momentum"] = mu
        values.append(x.detach().clone())
        optimizer.step(lambda: x.square().sum())
        grads.append(x.grad)
    assert all(torch.equal(g, 2 * at) for g, at in zip(grads, values, strict=True))


def test_parameters_that_rest_and_new_ones() -> None:
    x, y, z = (nn.Parameter(torch.ones(1, dtype=F64)) for _ in range(3))
    rule = LooksBack()
    optimizer = Rescaled(torch.optim.SGD([x, y], momentum=0.5), rule=rule, checked=0)
    optimizer.step(lambda: (x * y).sum())
    moved = 1 - x.item()
    y.requires_grad_(False)
    optimizer.add_param_group({"params": [z]})
    optimizer.step(lambda: (3 * x + 5 * y + 7 * z).sum())
    y.requires_grad_()
    optimizer.step(lambda: (5 * y).sum())
    assert rule.seen[1].hindsight == pytest.approx(3 * moved)
    assert rule.seen[2].hindsight == pytest.approx(5 * moved / 2)
    there = z.item()
    optimizer.step(lambda: (11 * z).sum())
    assert rule.seen[3].hindsight == pytest.approx(11 * (1 - there) / 2)


def squares(model: nn.Module, data: Tensor) -> Any:
    return model(data).square().sum()


@pytest.mark.parametrize("mu", [0.0, 0.9])
def test_a_model_converted_between_two_steps(mu: float) -> None:
    model = nn.Linear(2, 1)
    rule = LooksBack()
    base = torch.optim.SGD(model.parameters(), momentum=mu)
    optimizer = Rescaled(base, rule=rule, checked=0)
    for dtype in (torch.float32, F64, F64):
        model.to(dtype)
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        data = torch.ones(4, 2, dtype=dtype)
        optimizer.step(partial(squares, model, data))
    # Without momentum d is p.grad, which is converted with the model.
    assert [line.hindsight != 0 for line in rule.seen] == [False, mu == 0, True]


def test_skipped_steps_and_looks_ahead_leave_no_way() -> None:
    x = nn.Parameter(torch.tensor([1.0], dtype=F64))
    optimizer = GeN(torch.optim.SGD([x]))
    optimizer.look_ahead(lambda: x.square().sum())
    with pytest.warns(RuntimeWarning, match="nan"):
        optimizer.step(lambda: x.sum() * torch.nan)
    assert optimizer.state_dict()["wrapper"]["trail"] == [None]


class Breaks(torch.optim.SGD):
    """Proposes, and cannot move."""

    def propose(self, ratios: Any) -> dict[Tensor, Tensor]:
        self.state[self.param_groups[0]["params"][0]]["proposed"] = True
        return {p: p.grad for p in self.param_groups[0]["params"]}

    def move(self, step: float) -> None:
        raise MemoryError

    def limit(self, ratios: Any) -> float:
        return torch.inf


def test_a_step_that_breaks_leaves_base_and_way_as_they_were() -> None:
    x = nn.Parameter(torch.tensor([1.0], dtype=F64))
    optimizer = GeN(Breaks([x]))
    with pytest.raises(MemoryError):
        optimizer.step(lambda: x.square().sum())
    assert optimizer.state_dict()["wrapper"]["trail"] == [None]
    assert not optimizer.base.state


def test_hooks_that_reorder_what_is_loaded_drop_the_way() -> None:
    x = nn.Parameter(torch.tensor([1.0], dtype=F64))
    optimizer = GeN(torch.optim.SGD([x]))
    optimizer.step(lambda: x.square().sum())
    optimizer.register_load_state_dict_pre_hook(lambda optimizer, state_dict: None)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["wrapper"]["trail"] == [None]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_way_is_saved(momentum: float) -> None:
    def run(optimizer: Any, x: Tensor, steps: range) -> None:
        for k in steps:
            optimizer.step(partial(losses, x, k % 3))

    def new(value: Tensor) -> tuple[GeN, Tensor]:
        x = nn.Parameter(value.clone())
        return GeN(torch.optim.SGD([x], momentum=momentum)), x

    optimizer, x = new(torch.tensor([1.0, -0.5], dtype=F64))
    run(optimizer, x, range(20))
    saved, there = copy.deepcopy(optimizer.state_dict()), x.detach().clone()
    way = saved["wrapper"]["trail"][0].clone()
    other, y = new(there)
    other.load_state_dict(saved)
    run(other, y, range(20, 40))
    run(optimizer, x, range(20, 40))
    assert torch.equal(x, y)
    assert torch.equal(saved["wrapper"]["trail"][0], way)


def test_what_does_not_look_back_remembers_no_way() -> None:
    x = nn.Parameter(torch.tensor([1.0], dtype=F64))
    optimizer = Rescaled(torch.optim.SGD([x]), rule=Newton(), estimator=Exact())
    optimizer.step(lambda: x.square().sum())
    assert optimizer.state_dict()["wrapper"]["trail"] == [None]
    assert RobbinsMonro(0.1, 1.0, rule=Trust()).needs_hindsight
    assert not RobbinsMonro(0.1, 1.0, rule=Newton()).needs_hindsight
