"""Hooks that run once the gradient of a parameter is there."""

import pytest
import torch
from closures import Problem, every_optimizer
from torch import Tensor


@pytest.mark.parametrize("calls_backward", [False, True])
@every_optimizer
def test_hooks_on_accumulated_gradients_are_hooks_on_gradients(
    optimizer: str, calls_backward: bool
) -> None:
    """Whether they change p.grad in place or replace it, the slope stays that of the loss."""
    before, after = Problem(optimizer), Problem(optimizer)
    for p in before.model.parameters():
        p.register_hook(lambda g: 0.1 * g)
    first, *others = after.model.parameters()
    first.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", 0.1 * p.grad))
    for p in others:
        p.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.1))

    def closure(problem: Problem, k: int) -> Tensor:
        loss = problem.losses(k).mean()
        if calls_backward:
            problem.optimizer.zero_grad()
            loss.backward()
        return loss

    for k in range(3):
        for problem in (before, after):
            problem.optimizer.step(lambda k=k, problem=problem: closure(problem, k))
        assert after.optimizer.records[-1] == before.optimizer.records[-1]
    torch.testing.assert_close(after.values(), before.values(), rtol=0, atol=0)
    for p, q in zip(before.model.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("calls_backward", [False, True])
@pytest.mark.parametrize("how", ["frees", "steps", "writes", "writes data"])
def test_hooks_that_take_the_step_themselves_are_refused(how: str, calls_backward: bool) -> None:
    problem = Problem("GeN")
    problem.optimizer.step(lambda: problem.losses(0))
    own = torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.9)
    hook, message = {
        "frees": (lambda p: setattr(p, "grad", None), "sets p.grad to None"),
        "steps": (lambda p: own.step(), "steps an optimizer: take the hook off"),
        "writes": (lambda p: p.sub_(0.1 * p.grad), "writes to the parameter: take the hook off"),
        "writes data": (lambda p: p.data.sub_(0.1 * p.grad), "writes to the parameter"),
    }[how]
    handle = problem.model[0].weight.register_post_accumulate_grad_hook(hook)
    before, state = problem.values(), problem.optimizer.state_dict()["wrapper"]

    def closure() -> Tensor:
        loss = problem.losses(1).mean()
        if calls_backward:
            loss.backward()
        return loss

    with pytest.raises(ValueError, match=message):
        problem.optimizer.step(closure)
    torch.testing.assert_close(problem.values(), before, rtol=0, atol=0)
    assert problem.optimizer.state_dict()["wrapper"] == state
    assert not own.state
    assert all(p.grad is None for p in problem.model.parameters())
    handle.remove()
    problem.optimizer.step(closure)
    own.step()
