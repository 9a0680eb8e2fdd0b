"""A step that is skipped or refused changes nothing."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from wrapped import BASES, WRAPPERS, Problem, assert_same, every_base, every_wrapper

from curvature import NotTwiceDifferentiable
from optim import Rescaled

F64 = torch.float64


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
@pytest.mark.parametrize("schedulers", [0, 1, 2])
def test_a_skipped_step_warns_of_the_callers_line(schedulers: int, wrapper: str) -> None:
    """However often schedulers have wrapped the step."""
    p = nn.Parameter(torch.ones(1))
    optimizer = WRAPPERS[wrapper](torch.optim.SGD([p]))
    for _ in range(schedulers):
        torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.warns(RuntimeWarning, match="skipped") as caught:
        optimizer.step(lambda: p.sum() * torch.nan)
    assert caught[0].filename == __file__


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
