"""Hooks of torch's optimizers: global ones, and those of saving and loading."""

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from wrapped import BASES, WRAPPERS, OwnSGD, Problem, every_wrapper

from optim.global_hooks import global_hooks_off


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
