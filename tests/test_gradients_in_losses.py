"""Losses made of gradients: their third derivatives, against plain formulas and differences."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import assert_close, every_engine, fast_only
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from curvature import NotTwiceDifferentiable, Objective, Tape, directional, hvp
from curvature.testing import check_directional

F64 = torch.float64
EPS = 1e-2

Norm = Callable[..., Tensor]
Params = dict[str, Tensor]


def plain(x: Tensor, dims: list[int], shape: list[int], w: Tensor | None, b: Any) -> Tensor:
    z = (x - x.mean(dims, True)) / (x.var(dims, correction=0, keepdim=True) + EPS).sqrt()
    z = z if w is None else z * w.view(shape)
    return z if b is None else z + b.view(shape)


def layer_norm(shape: list[int]) -> tuple[Norm, Norm, list[int]]:
    dims = list(range(-len(shape), 0))
    return (
        lambda x, w=None, b=None: F.layer_norm(x, shape, w, b, EPS),
        lambda x, w=None, b=None: plain(x, dims, shape, w, b),
        shape,
    )


def batch_norm(ndim: int, channels: int) -> tuple[Norm, Norm, list[int]]:
    dims = [k for k in range(ndim) if k != 1]
    shape = [1, channels, *[1] * (ndim - 2)]
    return (
        lambda x, w=None, b=None: F.batch_norm(x, None, None, w, b, True, eps=EPS),
        lambda x, w=None, b=None: plain(x, dims, shape, w, b),
        [channels],
    )


def of_gradients(norm: Norm) -> Callable[[Params], Tensor]:
    """A loss per gradient of a loss of the normalised input, as of the parameters that move."""

    def losses(params: Params) -> Tensor:
        y = norm(*params.values())
        weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
        inner = (y.sin() * weights).sum() + y.pow(3).mean()
        moving = [p for p in params.values() if p.requires_grad]
        gradients = torch.autograd.grad(inner, moving, create_graph=True)
        return torch.stack([g.pow(2).sum() + g.sin().sum() for g in gradients])

    return losses


@fast_only
@settings(max_examples=30)
@given(data=st.data())
def test_gradients_of_normalisations(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 999)))
    places = data.draw(st.lists(st.integers(2, 3), max_size=2))
    if data.draw(st.booleans()):
        fused, formula, shape = layer_norm([*places, 3])
        x = torch.randn(*data.draw(st.sampled_from([[], [1], [4], [2, 2]])), *shape)
    else:
        fused, formula, shape = batch_norm(2 + len(places), 2)
        x = torch.randn(3, 2, *places)
    inputs = [x, *[torch.randn(shape) for _ in range(data.draw(st.integers(0, 2)))]]
    inputs = [t.to(F64) for t in inputs]
    moving = data.draw(
        st.sampled_from([m for m in itertools.product([True, False], repeat=len(inputs)) if any(m)])
    )
    fixed = {str(i): t for i, t in enumerate(inputs)}
    params = {k: t for (k, t), moves in zip(fixed.items(), moving, strict=True) if moves}
    direction = {k: torch.randn_like(p) for k, p in params.items()}

    def func(p: Params) -> Tensor:
        return of_gradients(fused)({**fixed, **p})

    def expected(p: Params) -> Tensor:
        return of_gradients(formula)({**fixed, **p})

    for per_sample in (False, True):
        found = directional(func, params, direction, per_sample=per_sample)
        exact = directional(expected, params, direction, per_sample=per_sample, engine="reference")
        assert_close(found.slope, exact.slope)
        assert_close(found.curvature, exact.curvature)
        if per_sample:
            assert found.per_sample is not None
            assert exact.per_sample is not None
            assert_close(found.per_sample.curvature, exact.per_sample.curvature)
    products = hvp(func, params, direction)
    exact_products = hvp(expected, params, direction, engine="reference")
    for k in params:
        assert_close(products[k], exact_products[k])


def test_the_reference_refuses_gradients_of_normalisations_whose_derivative_is_wrong() -> None:
    x, v = torch.randn(2, 3, 4, dtype=F64)
    losses = of_gradients(lambda x: F.layer_norm(x, (4,)))
    with pytest.raises(NotTwiceDifferentiable, match="a gradient of layer or batch normalisation"):
        directional(losses, {"x": x}, {"x": v}, engine="reference")


NORMS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, evaluating": lambda: nn.BatchNorm2d(4).eval(),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "group": lambda: nn.GroupNorm(2, 4),
    "layer": lambda: nn.LayerNorm((4, 5, 5)),
}


@fast_only
@pytest.mark.parametrize("norm", NORMS)
def test_gradient_penalties(norm: str) -> None:
    """As of a convolutional critic: some derivatives of the backward passes go nowhere."""
    critic = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), NORMS[norm](), nn.Softplus(), nn.Conv2d(4, 1, 3, bias=False)
    ).to(F64)
    images = torch.randn(3, 1, 5, 5, dtype=F64)

    def losses(params: Params) -> Tensor:
        x = images.clone().requires_grad_()
        scores = torch.func.functional_call(critic, params, x).sum((1, 2, 3))
        (slopes,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        return scores + 10 * (slopes.square().sum((1, 2, 3)) + 0.1).sqrt()

    params = {name: p.detach() for name, p in critic.named_parameters()}
    v = {name: torch.randn_like(p) for name, p in params.items()}
    check_directional(losses, params, v, step=0.02)
    product = hvp(losses, params, v)
    along = sum((product[name] * v[name]).sum() for name in v)
    torch.testing.assert_close(along, directional(losses, params, v).curvature)


@fast_only
def test_a_step_of_gradient_descent_through_batch_norm() -> None:
    """As in meta-learning."""
    x, params = torch.randn(5, 4, dtype=F64), {"A": torch.randn(4, 3, dtype=F64)}
    params |= {"w": torch.ones(3, dtype=F64), "b": torch.zeros(3, dtype=F64)}

    def inner(p: Params) -> Tensor:
        return F.batch_norm(x @ p["A"], None, None, p["w"], p["b"], True).sin().square().sum()

    def outer(p: Params) -> Tensor:
        gradients = torch.autograd.grad(inner(p), list(p.values()), create_graph=True)
        return inner({k: t - 0.1 * g for (k, t), g in zip(p.items(), gradients, strict=True)})

    check_directional(outer, params, {k: torch.randn_like(t) for k, t in params.items()}, step=0.02)


def of_a_step(inner: Callable[[list[Tensor]], Tensor]) -> Callable[[list[Tensor]], Tensor]:
    """The loss after a step of gradient descent."""

    def outer(params: list[Tensor]) -> Tensor:
        params = [p * 1 for p in params]
        gradients = torch.autograd.grad(inner(params).sum(), params, create_graph=True)
        return inner([p - 0.1 * g for p, g in zip(params, gradients, strict=True)])

    return outer


@every_engine
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_step_of_gradient_descent_through_weight_norm(dim: int, engine: str) -> None:
    x = torch.randn(5, 4, dtype=F64)
    v = torch.randn(3, 4, dtype=F64)
    params = [v, 2 * torch.norm_except_dim(v, 2, dim)]

    def loss(params: list[Tensor]) -> Tensor:
        return (x @ torch._weight_norm(*params, dim).T).sin().square().sum(1)

    func, direction = of_a_step(loss), [torch.randn_like(p) for p in params]
    check_directional(func, params, direction, engine=engine, step=0.02)
    for p in params:
        p.requires_grad_()
    with Tape(engine=engine) as tape:
        losses = func(params)
    gradient = tape.backward(losses, params)
    slope = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
    torch.testing.assert_close(slope, tape.directional(direction).slope)


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"engine": "reference"}])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_weight_norm_under_checkpointing(checkpointed: bool, options: dict[str, Any]) -> None:
    layers = [nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(2)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1]).to(F64)
    x, params = torch.randn(5, 4, dtype=F64), dict(model.named_parameters())
    v = {name: torch.randn_like(p) for name, p in params.items()}
    with Tape(**options) as tape:
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        losses = y.square().sum(1)
    tape.backward(losses, params)
    found = tape.directional(v, per_sample=True)
    J = Objective(model, lambda y, _: y.square().sum(1), (x, None))
    exact = directional(J, params, v, per_sample=True, engine="reference")
    assert found.per_sample is not None
    assert exact.per_sample is not None
    assert_close(found.per_sample.curvature, exact.per_sample.curvature)


@fast_only
@pytest.mark.parametrize(
    "norm",
    [
        lambda x, b: F.layer_norm(x, (4,), None, b),
        lambda x, b: F.batch_norm(x, None, None, None, b, True),
        lambda x, b: F.batch_norm(x, torch.zeros(4).to(x), torch.ones(4).to(x), bias=b),
    ],
    ids=["layer", "batch", "batch, evaluating"],
)
def test_a_gradient_in_a_bias_without_a_weight(norm: Norm) -> None:
    x, b = torch.randn(5, 4, dtype=F64), torch.randn(4, dtype=F64)

    def losses(params: list[Tensor]) -> Tensor:
        b = params[0] * 1
        inner = norm(x.sin() * params[1], b).sin().square().sum()
        return torch.autograd.grad(inner, b, create_graph=True)[0].square().sum()

    params = [b, torch.rand(4, dtype=F64) + 0.5]
    check_directional(losses, params, [torch.randn_like(p) for p in params], step=0.02)


def ahead(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A loss made of a forward-mode derivative, as of the matrix in which it is taken."""

    def losses(x: Tensor) -> Tensor:
        _, dot = torch.func.jvp(function, (x.sin(),), (torch.ones_like(x),))
        return dot.square().sum()

    return losses


# PyTorch compiles some formulas of its forward mode, at first use.
compiling = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@compiling
@every_engine
@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.layer_norm(x, (3,)),
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: F.instance_norm(x[None]),
        lambda x: F.group_norm(x, 3),
        lambda x: torch.linalg.solve(x, x.T),
        torch.linalg.det,
        lambda x: x.slogdet()[1],
        lambda x: torch.linalg.householder_product(x, x[0]),
    ],
    ids=["layer", "batch", "instance", "group", "solve", "det", "slogdet", "householder"],
)
def test_forward_mode_whose_gradient_is_wrong(
    function: Callable[[Tensor], Tensor], engine: str
) -> None:
    x, v = torch.randn(2, 3, 3, dtype=F64)
    with pytest.raises(NotTwiceDifferentiable, match=r"forward-mode .* take it in reverse mode"):
        directional(ahead(function), x, v, engine=engine)
    with pytest.raises(NotTwiceDifferentiable, match="forward-mode"):
        directional(lambda x: torch.func.hessian(lambda x: function(x).sum())(x).sum(), x, v)
    with torch.no_grad():
        expected = ahead(function)(x)
    with Tape(engine=engine), torch.no_grad():
        assert ahead(function)(x) == expected


@compiling
@pytest.mark.parametrize("function", [torch.inverse, torch.matrix_exp, torch.tanh])
def test_forward_mode_whose_gradient_is_right(function: Callable[[Tensor], Tensor]) -> None:
    x, v = torch.randn(2, 3, 3, dtype=F64)
    check_directional(ahead(lambda x: function(x + 3 * torch.eye(3).to(x))), x, v, step=0.02)


def laplacian(norm: Norm) -> Callable[[Tensor], Tensor]:
    """Of a network with a normalisation, as of its weights."""
    points = torch.randn(4, 3, dtype=F64)

    def losses(weights: Tensor) -> Tensor:
        x = points.clone().requires_grad_()
        (slopes,) = torch.autograd.grad(norm(x @ weights).sin().sum(), x, create_graph=True)
        (bends,) = torch.autograd.grad(slopes.sum(), x, create_graph=True)
        return bends.square().sum()

    return losses


@every_engine
@pytest.mark.parametrize(
    "norm",
    [
        lambda x: F.layer_norm(x, (3,)),
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: F.instance_norm(x.T[None])[0],
    ],
    ids=["layer", "batch", "instance"],
)
def test_second_derivatives_whose_gradient_is_wrong(norm: Norm, engine: str) -> None:
    x, v = torch.randn(2, 3, 3, dtype=F64)
    with pytest.raises(NotTwiceDifferentiable, match="write the normalisation with mean and var"):
        directional(laplacian(norm), x, v, engine=engine)
    hessian = torch.func.jacrev(torch.func.jacrev(lambda x: norm(x).sum()))
    with pytest.raises(NotTwiceDifferentiable, match="a second derivative through layer or batch"):
        directional(lambda x: hessian(x).sum(), x, v, engine=engine)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: F.group_norm(x, 1),
        lambda x: F.batch_norm(x, torch.zeros(3).to(x), torch.ones(3).to(x)),
        lambda x: plain(x, [1], [3], None, None),
    ],
    ids=["group", "batch, evaluating", "by mean and var"],
)
def test_second_derivatives_whose_gradient_is_right(norm: Norm) -> None:
    x, v = torch.randn(2, 3, 3, dtype=F64)
    check_directional(laplacian(norm), x, v, step=0.02, rtol=1e-5)


@fast_only
def test_two_steps_of_gradient_descent_through_layer_norm() -> None:
    """The second differentiates through the first, but not twice through a normalisation."""
    x, w = torch.randn(5, 4, dtype=F64), torch.randn(4, 3, dtype=F64)

    def inner(w: Tensor) -> Tensor:
        return F.layer_norm(x @ w, (3,), eps=EPS).sin().square().sum()

    def outer(w: Tensor) -> Tensor:
        for _ in range(2):
            w = w * 1
            w = w - 0.01 * torch.autograd.grad(inner(w), w, create_graph=True)[0]
        return inner(w)

    check_directional(outer, w, torch.randn_like(w), step=0.02)


def bent_twice(differentiate: Callable[[Tensor], None]) -> Callable[[Tensor], Tensor]:
    """As of a network with layer norm, by backward passes that leave the gradients in .grad."""
    points = torch.randn(3, 4, dtype=F64)

    def losses(weights: Tensor) -> Tensor:
        x = points.clone().requires_grad_()
        y = F.layer_norm((x @ weights).tanh(), (4,)).exp()
        for _ in range(2):
            differentiate(y.sum())
            y, x.grad = x.grad.square(), None
        return y.sum()

    return losses


@pytest.mark.filterwarnings("ignore:Using backward")
@every_engine
@pytest.mark.parametrize(
    "differentiate",
    [
        lambda loss: loss.backward(create_graph=True),
        pytest.param(
            lambda loss: torch.autograd.backward(loss, create_graph=True),
            marks=pytest.mark.skipif(
                "handle_torch_function" not in inspect.getsource(torch.autograd.backward),
                reason="this PyTorch hands only Tensor.backward to modes",
            ),
        ),
    ],
    ids=["Tensor", "autograd"],
)
def test_second_derivatives_by_backward(
    differentiate: Callable[[Tensor], None], engine: str
) -> None:
    x, v = torch.randn(2, 4, 4, dtype=F64)
    with pytest.raises(NotTwiceDifferentiable, match="layer or batch normalisation"):
        directional(bent_twice(differentiate), x, v, engine=engine)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * ctx.saved_tensors[0].cos()


@every_engine
@pytest.mark.parametrize(
    "function",
    [Once.apply, lambda x: torch.distributions.Dirichlet(x.exp()).rsample().square()],
    ids=["own", "Dirichlet"],
)
def test_a_gradient_that_pytorch_takes_for_constant(
    function: Callable[[Tensor], Tensor], engine: str
) -> None:
    points = torch.randn(3, 4, dtype=F64)

    def penalty(weights: Tensor) -> Tensor:
        x = points.clone().requires_grad_()
        (slopes,) = torch.autograd.grad(function(x @ weights).sum(), x, create_graph=True)
        return slopes.square().sum()

    x, v = torch.randn(2, 4, 4, dtype=F64)
    with pytest.raises(NotTwiceDifferentiable, match="is marked once_differentiable, so that"):
        directional(penalty, x, v, engine=engine)


@every_engine
def test_a_gradient_at_an_edge(engine: str) -> None:
    points = torch.randn(3, 4, dtype=F64)

    def penalty(weights: Tensor) -> Tensor:
        hidden = (points @ weights).sin()
        edge = torch.autograd.graph.get_gradient_edge(hidden)
        (slopes,) = torch.autograd.grad(hidden.exp().sum(), edge, create_graph=True)
        return slopes.square().sum()

    x, v = torch.randn(2, 4, 3, dtype=F64)
    q = directional(penalty, x, v, engine=engine)
    expected = directional(lambda w: (2 * (points @ w).sin()).exp().sum(), x, v)
    torch.testing.assert_close(q.curvature, expected.curvature)
