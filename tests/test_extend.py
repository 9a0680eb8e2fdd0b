"""Rules that users register, and the check that tells a right one from a wrong one."""

import typing
from typing import Any

import pytest
import torch
from agreement import check_agreement, fast_only
from torch import Tensor

import curvature
from curvature import NotTwiceDifferentiable, directional, hvp
from curvature.rules import table
from curvature.testing import check_rule

pytestmark = fast_only
F64 = torch.float64


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_TABLE", dict(table._TABLE))


class Power(torch.autograd.Function):
    """x^k y, differentiable once; k comes first and is no tensor."""

    @staticmethod
    def forward(ctx: Any, k: int, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.k = k
        return x**k * y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return None, ctx.k * x ** (ctx.k - 1) * y * g, x**ctx.k * g


def push(call: Any, dots: Any, bend: bool) -> Any:
    (x, y), (a, b), k = call.saved_tensors, dots, call.k
    a = torch.zeros_like(x) if a is None else a
    b = torch.zeros_like(y) if b is None else b
    out = k * x ** (k - 1) * y * a + x**k * b
    second = k * (k - 1) * x ** (k - 2) * y * a * a + 2 * k * x ** (k - 1) * a * b
    return (out, second) if bend else out


def power(x: Tensor, y: Tensor) -> Tensor:
    return Power.apply(3, x, y)


def inputs() -> list[Tensor]:
    return [torch.rand(4, dtype=F64) + 0.5, torch.randn(4, dtype=F64)]


def test_a_rule_serves_a_function_that_is_differentiable_once() -> None:
    with pytest.raises(NotTwiceDifferentiable, match=r"register a rule .*register_rule"):
        check_rule(power, *inputs())
    curvature.register_rule(Power, push)
    check_rule(power, *inputs())
    x, y = inputs()
    assert directional(lambda x: power(x, y).sum(), x, x).engine == "tangent"


def test_a_wrong_rule_is_found() -> None:
    def wrong(call: Any, dots: Any, bend: bool) -> Any:
        result = push(call, dots, bend)
        return (result[0], result[1] * 1.01) if bend else result

    curvature.register_rule(Power, wrong)
    with pytest.raises(AssertionError, match=r"with inputs \[0, 1\] moving: curvature differs"):
        check_rule(power, *inputs())


def test_a_rule_that_is_not_differentiable_gives_no_product() -> None:
    curvature.register_rule(Power, torch.no_grad()(push))
    x, y = inputs()
    assert directional(lambda x: power(x, y).sum(), x, x).engine == "tangent"
    with pytest.raises(NotTwiceDifferentiable, match="gives a bend without graph"):
        hvp(lambda x: power(x, y).sum(), x, x)


def in_half_the_digits(y: Tensor) -> Tensor:
    return y.float().to(y.dtype)


def only_in_double(y: Tensor) -> Tensor:
    return y if y.dtype == F64 else 1.1 * y


class Growing:
    """Gives another answer each time."""

    factor = 1.0

    def __call__(self, y: Tensor) -> Tensor:
        self.factor *= 1 + 1e-8
        return self.factor * y


@pytest.mark.parametrize("of_bend", [False, True])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (in_half_the_digits, r"moving: (<v, H v>|the slope) is .*; it must be"),
        (only_in_double, r"moving: in float32 the curvature is|a rule of your own is wrong"),
        (Growing(), r"moving: (<v, H v>|the slope) is"),
        (lambda y: y[None], "gives a tensor of shape"),
    ],
    ids=["rounded", "wrong in float32", "stateful", "a wrong shape"],
)
def test_a_rule_that_is_almost_right_is_found(error: Any, message: str, of_bend: bool) -> None:
    def wrong(call: Any, dots: Any, bend: bool) -> Any:
        result = push(call, dots, bend)
        if of_bend:
            return (result[0], error(result[1])) if bend else result
        return (error(result[0]), result[1]) if bend else error(result)

    curvature.register_rule(Power, wrong)
    with pytest.raises((AssertionError, ValueError), match=message):
        check_rule(power, *inputs())


def test_a_rule_that_does_not_serve_the_operation_is_not_verified() -> None:
    curvature.register_rule("NoSuchBackward", push)
    with pytest.raises(AssertionError, match=r"no rule serves func.*double backward: Cube"):
        check_rule(Cube.apply, torch.randn(3, dtype=F64))


def test_what_the_checked_function_gives() -> None:
    x = torch.rand(3, dtype=F64)
    check_rule(lambda x: [x.sin(), x.exp()], x)
    with pytest.raises(TypeError, match="func gives a float; it must give a tensor, or a tuple or"):
        check_rule(lambda x: x.sum().item(), x)


def test_a_function_that_takes_float64_alone() -> None:
    matrix = torch.randn(3, 3, dtype=F64)
    check_rule(lambda x: matrix @ x.sin(), torch.randn(3, dtype=F64))


def test_a_rule_for_a_custom_operator() -> None:
    @torch.library.custom_op("curvature_tests::scaled_exp", mutates_args=())
    def scaled_exp(scale: float, x: Tensor) -> Tensor:
        return scale * x.exp()

    def setup(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output.clone())

    scaled_exp.register_autograd(
        lambda ctx, g: (None, ctx.saved_tensors[0].detach() * g), setup_context=setup
    )
    x = torch.randn(4, dtype=F64)
    curvature.register_rule(
        scaled_exp,
        lambda call, dots, bend: (
            (call.saved_tensors[0] * dots[0], call.saved_tensors[0] * dots[0] ** 2)
            if bend
            else call.saved_tensors[0] * dots[0]
        ),
    )
    check_rule(lambda x: scaled_exp(2.0, x), x)


def test_a_backward_pass_by_an_operator_without_one() -> None:
    @torch.library.custom_op("curvature_tests::cube_backward", mutates_args=())
    def cube_backward(x: Tensor, g: Tensor) -> Tensor:
        return 3 * x**2 * g

    @torch.library.custom_op("curvature_tests::cube", mutates_args=())
    def cube(x: Tensor) -> Tensor:
        return x**3

    cube.register_autograd(
        lambda ctx, g: cube_backward(ctx.saved_tensors[0], g),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    x = torch.randn(3, dtype=F64)
    for engine in ("auto", "reference"):
        with pytest.raises(NotTwiceDifferentiable, match="no autograd formula was registered"):
            directional(lambda x: cube(x).sin().sum(), x, x, engine=engine)


def test_custom_operators_whose_names_look_alike() -> None:
    def cube(name: str) -> Any:
        # Older PyTorch knows a list by this name alone.
        def forward(xs: typing.List[Tensor]) -> Tensor:  # noqa: UP006
            return xs[0] ** 3

        def backward(ctx: Any, g: Tensor) -> list[Tensor]:
            return [3 * ctx.saved_tensors[0] ** 2 * g]

        operator = torch.library.custom_op(name, forward, mutates_args=())
        operator.register_autograd(
            backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[0])
        )
        return operator

    def push(call: Any, dots: Any, bend: bool) -> Any:
        (x,), (dot,) = call.saved_tensors, dots
        out = 3 * x**2 * dot
        return (out, 6 * x * dot**2) if bend else out

    ruled, other = cube("curvature_tests_a::b"), cube("curvature_tests::a_b")
    curvature.register_rule(ruled, push)
    x = torch.randn(3, dtype=F64)
    assert directional(lambda x: ruled([x]).sum(), x, x).engine == "tangent"
    assert "double backward" in directional(lambda x: other([x]).sum(), x, x).engine
    check_rule(lambda x: ruled([x]), x)


def test_a_linear_rule() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

    curvature.register_rule(Double, tangent=lambda call, x: 2 * x)
    check_rule(Double.apply, torch.randn(3, dtype=F64))


def test_arguments_that_are_no_tensors_come_first() -> None:
    """Without a rule too: what backward returns is matched with the tensors."""

    class Shifted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, k: int, x: Tensor, name: str, y: Tensor) -> Tensor:
            ctx.save_for_backward(x, y)
            ctx.k = k
            return (x + k) ** 2 * y

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None, Tensor]:
            x, y = ctx.saved_tensors
            return None, 2 * (x + ctx.k) * y * g, None, (x + ctx.k) ** 2 * g

    v = [torch.randn(4, dtype=F64), torch.randn(4, dtype=F64)]
    check_agreement(lambda p: Shifted.apply(2, p[0], "name", p[1]).sin(), inputs(), v)


class Cube(torch.autograd.Function):
    """The cube, and a copy of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x**3, x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g + h


def cube(x: Tensor) -> Tensor:
    first, second = Cube.apply(x)
    return first * second


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda y, dot: y, r"CubeBackward gives a tensor of shape \(3,\); .* shape \(3,\), \(3,\)"),
        (lambda y, dot: (y, None, dot), r"gives \(a tensor of shape \(3,\), None, a tensor"),
        (lambda y, dot: (y, dot.mean()), r"gives \(a tensor .*, a tensor of shape \(\)\)"),
        (lambda y, dot: (y[None], dot), r"gives \(a tensor of shape \(1, 3\), a tensor"),
        (lambda y, dot: (y, 1.0), r"gives \(a tensor of shape \(3,\), a float\)"),
    ],
)
def test_what_a_rule_gives_has_the_shapes_of_the_outputs(give: Any, message: str) -> None:
    def push(call: Any, dots: Any, bend: bool) -> Any:
        (x,), (dot,) = call.saved_tensors, dots
        y = give(3 * x**2 * dot, dot)
        return (y, (6 * x * dot**2, None)) if bend else y

    curvature.register_rule(Cube, push)
    x = torch.randn(3, dtype=F64)
    with pytest.raises(ValueError, match=message):
        directional(lambda x: cube(x).sum(), x, x)
    with pytest.raises(ValueError, match=message):
        directional(cube, x, x, per_sample=True)


def test_a_rule_that_forgets_the_bend() -> None:
    curvature.register_rule(Cube, lambda call, dots, bend: 3 * call.saved_tensors[0] ** 2 * dots[0])
    x = torch.randn(2, dtype=F64)
    with pytest.raises(ValueError, match=r"with bend the rule .* must give the pair of J xdot and"):
        directional(lambda x: cube(x).sum(), x, x)


def test_a_linear_rule_of_a_wrong_shape() -> None:
    curvature.register_rule(Cube, tangent=lambda call, dot: dot)
    x = torch.randn(3, dtype=F64)
    with pytest.raises(ValueError, match="the rule for CubeBackward gives a tensor"):
        directional(lambda x: cube(x).sum(), x, x)


def test_a_rule_that_writes_to_its_tangents() -> None:
    def push(call: Any, dots: Any, bend: bool) -> Any:
        (x,), (dot,) = call.saved_tensors, dots
        square, copy = dot**2, dot.clone()
        out = dot.mul_(3 * x**2), copy
        return (out, (6 * x * square, None)) if bend else out

    curvature.register_rule(Cube, push)
    x, v = torch.randn(2, 3, dtype=F64)
    before = v.clone()
    found = directional(lambda x: cube(x).sum(), x, v).curvature
    assert v.equal(before)
    torch.testing.assert_close(found, (12 * x**2 * v**2).sum())


def test_a_second_rule_for_a_function_is_refused() -> None:
    curvature.register_rule(Power, push)
    with pytest.raises(ValueError, match="already"):
        curvature.register_rule(Power, push)
