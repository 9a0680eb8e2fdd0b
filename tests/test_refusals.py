"""Operations that PyTorch differentiates once are refused by both engines."""

import pytest
import torch
from agreement import every_engine, fast_only
from torch.nn import functional as F  # noqa: N812

import curvature
from curvature import NotTwiceDifferentiable, Tape, directional

F64 = torch.float64


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent):  # type: ignore[no-untyped-def]
        return cotangent * ctx.saved_tensors[0].cos()


class CutsGraph(torch.autograd.Function):
    forward = OnceDifferentiable.forward

    @staticmethod
    def backward(ctx, cotangent):  # type: ignore[no-untyped-def]
        return (cotangent * ctx.saved_tensors[0].cos()).detach()


class HandWritten(torch.autograd.Function):
    forward = OnceDifferentiable.forward

    @staticmethod
    def backward(ctx, cotangent):  # type: ignore[no-untyped-def]
        # A backward pass through another Function, which itself has only a first derivative.
        return cotangent * OnceDifferentiableCosine.apply(ctx.saved_tensors[0])


class OnceDifferentiableCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.cos()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent):  # type: ignore[no-untyped-def]
        return -cotangent * ctx.saved_tensors[0].sin()


@every_engine
@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (OnceDifferentiable.apply, "once_differentiable"),
        (CutsGraph.apply, "CutsGraphBackward.* returns a gradient without graph"),
        (lambda x: x + CutsGraph.apply(x), "CutsGraphBackward.* returns a gradient without graph"),
        (F.hardsigmoid, "hardsigmoid_backward"),
        (
            lambda x: F.embedding(torch.tensor([0, 0]), x, scale_grad_by_freq=True),
            "scale_grad_by_freq is not the gradient of the loss",
        ),
    ],
    ids=["once differentiable", "cut", "cut on one of two paths", "not implemented", "scaled"],
)
def test_refusals(operation, reason: str, engine: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NotTwiceDifferentiable, match=reason):
        directional(
            lambda x: operation(x).square().sum(), torch.ones(2, 2), torch.ones(2, 2), engine=engine
        )


@fast_only
def test_attention_in_a_gradient_penalty_says_how_it_is_served() -> None:
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    with Tape() as tape:
        y = F.scaled_dot_product_attention(q, q, q).sin().sum()
        (slopes,) = torch.autograd.grad(y, q, create_graph=True)
    with pytest.raises(NotTwiceDifferentiable, match=r"inside sdpa_kernel\(SDPBackend.MATH\)"):
        tape.backward(slopes.square().sum(), [q])


@every_engine
def test_per_sample_refuses_what_only_the_mean_can_have(engine: str) -> None:
    x, v = torch.tensor([0.3, 0.4]), torch.ones(2)
    exact = (-x.sin()).mean()
    torch.testing.assert_close(directional(HandWritten.apply, x, v, engine=engine).curvature, exact)
    with pytest.raises(NotTwiceDifferentiable, match="once_differentiable"):
        directional(HandWritten.apply, x, v, per_sample=True, engine=engine)


def fused_weight_norm(x: torch.Tensor) -> torch.Tensor:
    return torch._weight_norm_interface(x, x[:, :1].contiguous())[0].sin().sum(1)


@fast_only
def test_the_reference_refuses_the_fused_weight_norm_whose_second_derivative_is_wrong() -> None:
    x, v = torch.randn(2, 2, 3, dtype=F64)
    with pytest.raises(NotTwiceDifferentiable, match="weight_norm is wrong"):
        directional(fused_weight_norm, x, v, engine="reference")
    curvature.testing.check_directional(fused_weight_norm, x, v)
