"""Options of parameter groups: their ratios, and what is set between steps."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from wrapped import WRAPPERS, every_wrapper

from optim import INNA

F64 = torch.float64


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
