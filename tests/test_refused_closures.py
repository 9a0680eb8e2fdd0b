"""Closures from which the loss or its gradient cannot be told are refused."""

from typing import Any

import pytest
import torch
from closures import Problem, every_optimizer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from optim import GeN

F64 = torch.float64


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
def test_state_that_is_no_buffer_is_named(optimizer: str) -> None:
    problem = Problem(optimizer)
    before, hidden = problem.values(), [torch.zeros(8, 4, dtype=F64)]

    def recurrent() -> Tensor:
        x, y = problem.batches[0]
        hidden[0] = torch.tanh(x + hidden[0])
        return F.cross_entropy(problem.model(hidden[0]), y)

    with pytest.raises(ValueError, match=r"self\.hidden, is not: make it a buffer"):
        problem.optimizer.step(recurrent)
    torch.testing.assert_close(problem.values(), before, rtol=0, atol=0)


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
