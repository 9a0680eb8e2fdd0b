"""What hooks and backward passes of the user's own do, and that nothing wrong comes of it."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import every_engine, fast_only
from torch import Tensor, nn

import curvature
from curvature import NotTwiceDifferentiable, Objective, Tape, directional, hvp
from curvature.rules import table

F64 = torch.float64


def hooked(x: torch.Tensor) -> torch.Tensor:
    y = x**2
    y.register_hook(lambda cotangent: 2 * cotangent.detach())
    return (x + y).square().sum()


@fast_only
def test_hooks_that_change_a_cotangent() -> None:
    """Then the gradient is not that of the loss."""
    x, v = torch.ones(2), torch.tensor([1.0, 2.0])
    with pytest.raises(NotTwiceDifferentiable, match="gradient without graph"):
        directional(hooked, x, v, engine="reference")
    # (x + x²)² has derivative 12 at 1
    with pytest.raises(
        ValueError, match="has slope 36 along the direction, but its gradient gives 60"
    ):
        directional(hooked, x, v)
    with pytest.raises(ValueError, match="a backward hook may have changed"):
        hvp(hooked, x, v)


@fast_only
def test_hooks_that_only_look_change_nothing() -> None:
    seen = []

    def func(x: torch.Tensor) -> torch.Tensor:
        y = x**2
        y.register_hook(seen.append)
        return (x + y).square().sum()

    q = directional(func, torch.ones(2), torch.tensor([1.0, 2.0]))
    assert (q.curvature, q.engine) == (130, "tangent")
    assert len(seen) == 1


@fast_only
def test_backward_hooks_of_modules() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).to(F64)
    looking = model[1].register_full_backward_hook(lambda module, before, after: None)
    x = torch.randn(3, 2, dtype=F64)
    J = Objective(model, lambda y, _: y.square().sum(1), (x, None))
    v = {name: torch.randn_like(p) for name, p in J.params.items()}
    q = directional(J, J.params, v)
    assert q.engine.startswith("jet")
    looking.remove()
    torch.testing.assert_close(q.curvature, directional(J, J.params, v).curvature)
    model[1].register_full_backward_hook(lambda module, before, after: (2 * before[0],))
    with pytest.raises(ValueError, match="a backward hook or the backward pass of a function"):
        directional(J, J.params, v)


@fast_only
def test_a_hook_of_a_parameter_changes_its_gradient_and_not_the_loss() -> None:
    for engine, inside in (("reference", False), ("auto", False), ("auto", True)):
        x = torch.ones(2, requires_grad=True)
        if not inside:
            x.register_hook(lambda cotangent: 2 * cotangent.detach())
        with Tape(engine=engine) as tape:
            if inside:
                x.register_hook(lambda cotangent: 2 * cotangent.detach())
            loss = (x**2).sum()
        assert tape.backward(loss, [x])[0].tolist() == [4, 4]
        q = tape.directional([torch.ones(2)])
        assert (q.slope, q.curvature) == (4, 4)
        assert tape.hvp([torch.ones(2)])[0].tolist() == [2, 2]


class Exp(torch.autograd.Function):
    """Its backward pass writes to the cotangent."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g.mul_(ctx.saved_tensors[0].exp())


def push_exp(call, dots, bend):  # type: ignore[no-untyped-def]
    (x,), (xdot,) = call.saved_tensors, dots
    return (x.exp() * xdot, x.exp() * xdot**2) if bend else x.exp() * xdot


@pytest.mark.parametrize("ruled", [False, True])
def test_a_backward_pass_may_write_to_its_cotangent(
    ruled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_TABLE", dict(table._TABLE))
    if ruled:
        curvature.register_rule(Exp, push_exp)
    x, v = torch.randn(2, 3, 4, dtype=F64)

    def func(x: Tensor, exp: Callable[[Tensor], Tensor] = Exp.apply) -> Tensor:
        return (exp(x.sin()) @ torch.ones(4, 4, dtype=F64)).square().sum()

    expected = directional(lambda x: func(x, torch.exp), x, v).curvature
    torch.testing.assert_close(directional(func, x, v).curvature, expected)
    torch.testing.assert_close((hvp(func, x, v) * v).sum(), expected)


@fast_only
def test_the_hook_of_a_parameter_is_not_taken_for_a_wrong_gradient() -> None:
    x = torch.zeros(2, requires_grad=True)
    x.register_hook(lambda cotangent: 2 * cotangent)
    with Tape() as tape:
        loss = Exp.apply(x).square().sum()
    assert tape.backward(loss, [x])[0].tolist() == [4, 4]
    q = tape.directional([torch.ones(2)])
    assert (q.slope, q.curvature) == (4, 8)
    assert tape.hvp([torch.ones(2)])[0].tolist() == [4, 4]


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, most):  # type: ignore[no-untyped-def]
        ctx.most = most
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g.clamp(-ctx.most, ctx.most), None


@fast_only
def test_a_backward_pass_that_is_not_linear_is_differentiated_as_a_whole() -> None:
    x, v = torch.randn(2, 3, 4, dtype=F64)
    for low_memory in (False, True):
        x.requires_grad_()
        with Tape(low_memory=low_memory) as tape:
            loss = (Clip.apply(x * x.sin(), 0.5) @ x.mT).sin().sum()
        (g,) = tape.backward(loss, [x])
        q = tape.directional([v])
        torch.testing.assert_close(q.slope, (g * v).sum())
        assert q.engine == "reference"
    # Beyond what a look at the function alone can tell.
    with pytest.raises(ValueError, match="the backward pass of a function of your own"):
        directional(lambda x: (Clip.apply(x * x.sin(), 10.0) * 50).sum(), x, v)


def doubling(cotangent: Tensor) -> None:
    cotangent.mul_(2)


@fast_only
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("hooked_node", [False, True])
def test_hooks_that_change_a_cotangent_in_other_ways(hooked_node: bool) -> None:
    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x**2
            if not hooked_node:
                y.register_hook(doubling)
            return y

    module = Squared()
    if hooked_node:
        module.register_backward_hook(lambda module, before, after: (2 * before[0],))
    x, v = torch.randn(2, 3, dtype=F64)
    with pytest.raises(ValueError, match="a backward hook or the backward pass"):
        directional(lambda x: torch.linalg.vector_norm(module(x)), x, v)


@fast_only
def test_cotangents_that_are_written_to_after_their_use_are_refused() -> None:
    x, v = torch.randn(2, 3, dtype=F64)
    kept = []
    x.requires_grad_()
    with Tape() as tape:
        y = x.sin()
        y.register_hook(kept.append)
        loss = torch.linalg.vector_norm(y)
    tape.backward(loss, [x])
    kept[0].mul_(2)
    with pytest.raises(ValueError, match="the cotangents of SinBackward0 were written to"):
        tape.directional([v])


def test_the_gradient_may_be_written_to() -> None:
    """Also where it is the cotangent of something that bends."""
    m, s, *v = torch.randn(4, 3, dtype=F64).unbind()
    results = []
    for write in (False, True):
        params = [m.clone().requires_grad_(), s.clone().requires_grad_()]
        with Tape() as tape:
            loss = torch.linalg.vector_norm(params[0] + params[1].exp())
        g = tape.backward(loss, params)
        if write:
            g[0].zero_()
        results.append((tape.directional(v).curvature, *tape.hvp(v)))
    torch.testing.assert_close(*results)


def test_a_gradient_that_has_no_memory() -> None:
    x, v = torch.randn(2, 3, dtype=F64)
    assert directional(lambda x: x.sgn().sum(), x, v).curvature == 0


@fast_only
def test_a_hook_does_not_keep_the_graph_alive() -> None:
    x = torch.ones(3, requires_grad=True)
    gc.disable()
    try:
        with Tape() as tape:
            y = x.exp()
            y.register_hook(lambda cotangent: None)
            loss = (y * y).sum()
        tape.backward(loss, [x])
        alive = weakref.ref(y)
        del y, loss, tape
        assert alive() is None
    finally:
        gc.enable()


class Plain(Tensor):
    """A tensor of another type, as of a library that notes where parameters come from."""


def test_parameters_of_a_subclass_of_tensor() -> None:
    A = torch.randn(3, 3, dtype=F64)
    x = torch.randn(3, dtype=F64).as_subclass(Plain).requires_grad_()
    with Tape() as tape:
        loss = x @ A @ x
    tape.backward(loss, [x])
    q = tape.directional([torch.ones(3, dtype=F64).as_subclass(Plain)])
    assert float(q.curvature) == pytest.approx(2 * float(A.sum()))


def test_a_function_of_ones_own_in_half_precision() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * cotangent

    A, x, v = torch.randn(5, 4, dtype=F64), *torch.randn(2, 4, 3, dtype=F64)

    def loss(x: Tensor) -> Tensor:
        return Square.apply((A @ x).to(torch.bfloat16)).tanh().sum(1).mean()

    fast, exact = directional(loss, x, v), directional(loss, x, v, engine="reference")
    assert float(fast.slope) == pytest.approx(float(exact.slope), rel=0.02)


class PenaltyByGradient(torch.autograd.Function):
    """The sum of x, and what only its gradient holds of the sum of (x² / 2)."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.sum()

    @staticmethod
    def backward(ctx, cotangent):  # type: ignore[no-untyped-def]
        return cotangent + ctx.saved_tensors[0]


@every_engine
def test_a_gradient_that_is_not_linear_in_its_cotangent_is_left_to_double_backward(
    engine: str,
) -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with Tape(engine=engine) as tape:
        loss = PenaltyByGradient.apply(x)
    (g,) = tape.backward(loss, [x])
    q = tape.directional([torch.ones(2)])
    assert (g.tolist(), q.slope, q.curvature, q.engine) == ([2, 3], 5, 2, "reference")
