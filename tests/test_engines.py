"""Both engines against closed forms and each other."""

from collections.abc import Callable

import pytest
import torch
from agreement import every_engine, fast_only
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

import curvature
from curvature import Objective, Quadratic, Tape, directional, hvp
from curvature.sweep import Sweep

F64 = torch.float64


def random_quadratic(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, n, dtype=F64, generator=generator)
    x, v = torch.randn(2, n, dtype=F64, generator=generator)
    return matrix + matrix.T, x, v


@every_engine
@given(n=st.integers(1, 8), seed=st.integers(0, 999))
def test_quadratic(n: int, seed: int, engine: str) -> None:
    A, x, v = random_quadratic(n, seed)
    q = directional(lambda x: x @ A @ x / 2, x, v, engine=engine)
    torch.testing.assert_close(q.value, x @ A @ x / 2)
    torch.testing.assert_close(q.slope, v @ A @ x)
    torch.testing.assert_close(q.curvature, v @ A @ v)
    torch.testing.assert_close(hvp(lambda x: x @ A @ x / 2, x, v, engine=engine), A @ v)
    assert q.engine == ("tangent" if engine == "auto" and Sweep.available() else "reference")
    assert q.per_sample is None


@every_engine
@given(batch=st.integers(1, 6), n=st.integers(1, 5), seed=st.integers(0, 999))
def test_per_sample_quadratics(batch: int, n: int, seed: int, engine: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(batch, n, n, dtype=F64, generator=generator)
    A = A + A.mT
    x, v = torch.randn(2, n, dtype=F64, generator=generator)
    q = directional(
        lambda x: torch.einsum("i,bij,j->b", x, A, x) / 2, x, v, per_sample=True, engine=engine
    )
    assert q.per_sample is not None
    torch.testing.assert_close(q.per_sample.curvature, torch.einsum("i,bij,j->b", v, A, v))
    torch.testing.assert_close(q.per_sample.slope, torch.einsum("i,bij,j->b", v, A, x))
    torch.testing.assert_close(q.curvature, q.per_sample.curvature.mean())
    torch.testing.assert_close(q.slope, q.per_sample.slope.mean())
    torch.testing.assert_close(q.value, q.per_sample.value.mean())


@every_engine
@given(scale=st.floats(-3, 3), seed=st.integers(0, 99))
def test_homogeneous_in_the_direction(scale: float, seed: int, engine: str) -> None:
    A, x, v = random_quadratic(4, seed)
    func = lambda x: torch.exp(x @ A @ x / 9)  # noqa: E731
    one, scaled = (
        directional(func, x, v, engine=engine),
        directional(func, x, scale * v, engine=engine),
    )
    torch.testing.assert_close(scaled.slope, scale * one.slope)
    torch.testing.assert_close(scaled.curvature, scale**2 * one.curvature)


@every_engine
def test_batch_norm_couples_the_samples(engine: str) -> None:
    norm = nn.BatchNorm1d(2, affine=False).to(F64)
    x = torch.randn(5, 2, dtype=F64)
    w, v = torch.randn(2, 2, 2, dtype=F64)
    func = lambda w: norm(x @ w).sin().sum(1)  # noqa: E731
    q = directional(func, w, v, per_sample=True, engine=engine)
    assert q.per_sample is not None
    for b in range(5):
        alone = directional(lambda w, b=b: func(w)[b], w, v, engine=engine)
        torch.testing.assert_close(q.per_sample.curvature[b], alone.curvature)


@every_engine
def test_linear_loss_has_no_curvature(engine: str) -> None:
    q = directional(lambda x: 3 * x, torch.ones(4), torch.ones(4), per_sample=True, engine=engine)
    assert q.per_sample is not None
    assert q.slope == 3
    assert q.curvature == 0
    assert q.per_sample.curvature.tolist() == [0, 0, 0, 0]
    assert torch.equal(
        hvp(lambda x: 3 * x, torch.ones(4), torch.ones(4), engine=engine), torch.zeros(4)
    )


@every_engine
@pytest.mark.parametrize(
    "surroundings",
    [torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "autocast"],
)
def test_surroundings_do_not_change_the_numbers(surroundings, engine: str) -> None:  # type: ignore[no-untyped-def]
    A, x, v = (t.float() for t in random_quadratic(8, 0))

    def func(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return (x @ A).sin() * (A @ x)

    exact = directional(func, x, v, per_sample=True, engine=engine)
    with surroundings:
        q = directional(func, x, v, per_sample=True, engine=engine)
        product = hvp(func, x, v, engine=engine)
    assert torch.equal(q.curvature, exact.curvature)
    assert torch.equal(q.per_sample.curvature, exact.per_sample.curvature)
    assert torch.equal(product, hvp(func, x, v, engine=engine))
    assert exact.curvature != 0


@every_engine
def test_zero_gradient_is_no_refusal(engine: str) -> None:
    q = directional(lambda x: x.sign() * 2, torch.ones(4), torch.ones(4), engine=engine)
    assert q.slope == q.curvature == 0


@every_engine
def test_layers_of_no_width(engine: str) -> None:
    x = torch.tensor([2.0, 3.0])

    def func(weight: torch.Tensor) -> torch.Tensor:
        nothing = torch.nn.functional.linear(weight[:1] * x, weight[1:])
        return nothing.sum() + weight.square().sum()

    q = directional(func, torch.ones(1, 2), torch.ones(1, 2), engine=engine)
    assert q.curvature == 4


@every_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_loss_and_no_graph(dtype: torch.dtype, engine: str) -> None:
    x = torch.ones(3, dtype=dtype, requires_grad=True)
    q = directional(lambda x: x**3, x, torch.ones_like(x), per_sample=True, engine=engine)
    assert q.per_sample is not None
    for number in (q, q.per_sample):
        for tensor in (number.value, number.slope, number.curvature):
            assert tensor.dtype == dtype
            assert not tensor.requires_grad


@every_engine
def test_pytrees_and_reordered_keys(engine: str) -> None:
    params = {"a": torch.tensor([2.0]), "rest": (torch.tensor([3.0]), [torch.tensor([5.0])])}
    func = lambda p: (p["a"] * p["rest"][0] * p["rest"][1][0]).sum()  # noqa: E731
    direction = {"rest": (torch.tensor([1.0]), [torch.tensor([0.0])]), "a": torch.tensor([1.0])}
    assert directional(func, params, direction, engine=engine).curvature == 10
    assert (
        directional(
            func, params, [torch.ones(1), torch.ones(1), torch.zeros(1)], engine=engine
        ).curvature
        == 10
    )
    product = hvp(func, params, direction, engine=engine)
    assert product["a"] == 5
    assert product["rest"][1][0] == 5


@every_engine
def test_objective_with_frozen_and_tied_parameters(engine: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3, bias=False)
            self.outer = nn.Linear(3, 3)
            self.outer.weight = self.inner.weight
            self.outer.bias.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.outer(self.inner(x))

    model = Tied().to(F64)
    batch = torch.randn(4, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    J = Objective(model, F.mse_loss, batch)
    assert list(J.params) == ["inner.weight"]
    v = {"inner.weight": torch.randn(3, 3, dtype=F64)}
    curvature.testing.check_directional(J, J.params, v, engine=engine)


@every_engine
def test_objective_takes_positional_and_keyword_inputs(engine: str) -> None:
    model = nn.Bilinear(2, 2, 1)
    left, right, target = torch.ones(3, 2), torch.ones(3, 2), torch.zeros(3, 1)
    inputs = [(left, right), {"input1": left, "input2": right}]
    results = []
    for x in inputs:
        J = Objective(model, F.mse_loss, (x, target))
        ones = {name: torch.ones_like(p) for name, p in J.params.items()}
        results.append(directional(J, J.params, ones, engine=engine).curvature)
    assert results[0] == results[1] == 50  # 2 (4 + 1)^2


@every_engine
def test_tape_answers_for_several_directions(engine: str) -> None:
    A, x, _ = random_quadratic(3, 0)
    x.requires_grad_()
    with Tape(engine=engine) as tape:
        loss = x @ A @ x / 2
    (gradient,) = tape.backward(loss, (x,))
    torch.testing.assert_close(gradient, A @ x.detach())
    assert not gradient.requires_grad
    for v in torch.eye(3, dtype=F64):
        torch.testing.assert_close(tape.directional((v,)).curvature, v @ A @ v)
        torch.testing.assert_close(tape.hvp([v])[0], A @ v)


@every_engine
def test_tape_forgets_the_loss_of_an_earlier_backward(engine: str) -> None:
    x = torch.ones(2, requires_grad=True)
    with Tape(engine=engine) as tape:
        one = x.square().sum()
        ten = 10 * one
    for loss, exact in ((one, 4), (ten, 40)):
        tape.backward(loss, [x])
        assert tape.directional([torch.ones(2)]).curvature == exact


@every_engine
def test_tape_gives_none_for_an_unused_parameter(engine: str) -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    with Tape(engine=engine) as tape:
        loss = x.square().sum()
    gradient = tape.backward(loss, {"x": x, "y": y})
    assert gradient["y"] is None
    assert tape.directional({"x": torch.ones(2), "y": torch.ones(2)}).curvature == 4
    assert tape.hvp({"x": torch.ones(2), "y": torch.ones(2)})["y"].tolist() == [0, 0]


@every_engine
def test_attention_kernels_stay_the_callers_choice(engine: str) -> None:
    flags = (
        torch.backends.cuda.flash_sdp_enabled,
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.math_sdp_enabled,
    )
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        before = [flag() for flag in flags]
        inside = []

        def func(x: torch.Tensor) -> torch.Tensor:
            inside.extend(flag() for flag in flags)
            return F.scaled_dot_product_attention(x, x, x).square().sum()

        directional(func, torch.randn(1, 1, 3, 2), torch.ones(1, 1, 3, 2), engine=engine)
        fast = engine == "auto" and Sweep.available()
        assert inside == (before if fast else [False, False, True])
        assert [flag() for flag in flags] == before
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


@pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="older nested tensors differentiate once"
)
@every_engine
def test_nested_tensors_are_left_to_double_backward(engine: str) -> None:
    layer = nn.Linear(4, 2)
    rows = [torch.randn(3, 4), torch.randn(5, 4)]

    def curvature_of(x: torch.Tensor) -> Quadratic:
        params = list(layer.parameters())
        with Tape(engine=engine) as tape:
            y = layer(x).tanh()
            loss = (y.values() if y.is_nested else y).square().sum()
        return tape.directional(tape.backward(loss, params))

    q = curvature_of(torch.nested.nested_tensor(rows, layout=torch.jagged))
    assert q.engine == "reference"
    torch.testing.assert_close(q.curvature, curvature_of(torch.cat(rows)).curvature)


@pytest.mark.parametrize(
    "normalised",
    [
        lambda x, b: F.layer_norm(x, (5,), None, b),
        lambda x, b: torch.layer_norm(x, (5,), bias=b),
        lambda x, b: F.batch_norm(x, None, None, bias=b, training=True),
        lambda x, b: F.instance_norm(x, bias=b),
    ],
    ids=["layer", "layer by keyword", "batch", "instance"],
)
@every_engine
def test_a_bias_without_a_weight(normalised: Callable[..., torch.Tensor], engine: str) -> None:
    # PyTorch's own second derivative is wrong there without an error.
    x, b, v = torch.randn(3, 5, 5).double(), torch.randn(5).double(), torch.randn(5).double()

    def loss(b: torch.Tensor) -> torch.Tensor:
        return (normalised(x, b) ** 3).sum()

    curvature.testing.check_directional(loss, b, v, engine=engine)


@every_engine
def test_values_do_not_follow_what_is_done_to_the_losses(engine: str) -> None:
    x = torch.ones(3, requires_grad=True)
    with Tape(engine=engine) as tape:
        losses = x**2
    tape.backward(losses, [x])
    q = tape.directional([torch.ones(3)], per_sample=True)
    losses.detach().zero_()
    assert q.per_sample is not None
    assert (q.value, q.per_sample.value.tolist()) == (1, [1, 1, 1])


@pytest.mark.parametrize(
    ("func", "kink"),
    [
        (F.relu, 0.0),
        (F.leaky_relu, 0.0),
        (F.elu, 0.0),
        (F.selu, 0.0),
        (F.celu, 0.0),
        (F.hardtanh, 1.0),
        (F.hardswish, 3.0),
        (lambda x: F.softplus(x, beta=2.0, threshold=1.0), 0.5),
    ],
)
def test_at_a_kink_both_engines_take_the_same_side(
    func: Callable[[torch.Tensor], torch.Tensor], kink: float
) -> None:
    x = torch.tensor([kink], dtype=F64)
    results = [
        directional(lambda x: (func(x) + func(x) ** 2).sum(), x, torch.ones_like(x), engine=engine)
        for engine in ("auto", "reference")
    ]
    torch.testing.assert_close(*[(q.slope, q.curvature) for q in results])


@every_engine
def test_a_mode_that_watches_what_is_dispatched(engine: str) -> None:
    A, x, v = random_quadratic(3, 0)

    def func(x: torch.Tensor) -> torch.Tensor:
        return ((A @ x).tanh() * 1.5 / 2).square().sum()

    expected = directional(func, x, v, engine=engine).curvature
    with FlopCounterMode(display=False):
        torch.testing.assert_close(directional(func, x, v, engine=engine).curvature, expected)


def test_a_slope_is_known_where_the_curvature_is_not() -> None:
    z = torch.randn(4, 2, dtype=F64)

    def func(x: torch.Tensor) -> torch.Tensor:
        y = z @ x
        (slopes,) = torch.autograd.grad(y.logcumsumexp(0)[-1].sum(), y, create_graph=True)
        return slopes.square().sum()

    x, v = torch.randn(2, 2, 2, dtype=F64)
    q = directional(func, x, v)
    expected = directional(lambda x: (z @ x).softmax(0).square().sum(), x, v)
    torch.testing.assert_close(q.slope, expected.slope)
    assert not q.curvature.isfinite()


def test_what_is_asked_after_the_step_says_so() -> None:
    x = torch.ones(3, requires_grad=True)
    with Tape() as tape:
        loss = x.exp().prod()
    (g,) = tape.backward(loss, [x])
    loss.backward()
    with pytest.raises(RuntimeError, match="ask a tape before the optimizer's step, and before a"):
        tape.directional([g])


@every_engine
def test_products_through_sparse_cotangents_are_dense(engine: str) -> None:
    x, v = torch.randn(2, 4, 3, dtype=F64)
    y = torch.randn(3, 5, dtype=F64)
    rows = torch.tensor([0, 1, 1])
    for func in (
        lambda x: torch.sparse.mm(x.to_sparse(), y).pow(3).sum(),
        lambda x: F.embedding(rows, x, sparse=True).pow(3).sum(),
    ):
        product = hvp(func, x, v, engine=engine)
        assert product.layout == torch.strided
        torch.testing.assert_close((product * v).sum(), directional(func, x, v).curvature)


def xlogx(x: torch.Tensor) -> torch.Tensor:
    kept = x.square().masked_fill(torch.eye(4, 3, dtype=torch.bool), 0)
    return torch.where(kept > 0, kept * kept.log(), 0)


@fast_only
@pytest.mark.parametrize(
    "func",
    [
        lambda x: F.normalize(torch.cat([x, torch.zeros(2, 3, dtype=F64)]), dim=1) ** 3,
        lambda x: F.pad(x.square() + 1, (0, 1)).sqrt(),
        lambda x: F.pad(x.square() + 1, (0, 1)) ** 1.5,
        xlogx,
        lambda x: F.cross_entropy(
            x.masked_fill(torch.tensor([False, True, False, False])[:, None], -torch.inf),
            torch.tensor([0, -100, 1, 2]),
            reduction="none",
        ).unsqueeze(1),
    ],
    ids=["normalize", "sqrt", "power", "x log x", "cross entropy"],
)
def test_what_does_not_move_may_have_an_infinite_slope(
    func: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    x, v = torch.randn(2, 4, 3, dtype=F64)
    curvature.testing.check_directional(lambda x: func(x).sum(1), x, v)
    q, expected = (
        directional(lambda x: func(x).sum(), x, v, engine=engine)
        for engine in ("auto", "reference")
    )
    torch.testing.assert_close(q.curvature, expected.curvature)
    torch.testing.assert_close((hvp(lambda x: func(x).sum(), x, v) * v).sum(), q.curvature)


@every_engine
def test_functions_that_write_to_their_parameters_do_no_harm(engine: str) -> None:
    embedding = nn.Embedding(5, 4, max_norm=0.1)
    before = embedding.weight.detach().clone()
    J = Objective(embedding, lambda output, _: output.square().sum(), (torch.tensor([1, 2]), None))
    directional(J, J.params, {"weight": torch.ones(5, 4)}, engine=engine)
    assert torch.equal(embedding.weight, before)
