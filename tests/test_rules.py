"""Every rule against the reference, in float64 and with any of its inputs moving."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import samples_of_entries  # noqa: F401
import samples_of_layers  # noqa: F401
import torch
from agreement import check_agreement, fast_only
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_samples import SAMPLES
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from curvature import Tape, directional
from curvature.differentiable import WeightNorm
from curvature.rules import families, table

pytestmark = fast_only
F64 = torch.float64


def nodes_of(output: Tensor) -> set[str]:
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
    return {node.name() for node in seen}


SINGLE_PRECISION = {"MkldnnRnnLayerBackward0"}
GRADIENTS = {"NativeLayerNormBackwardBackward0", "NativeBatchNormBackwardBackward0"}
SEVERAL_PROCESSES = {"_DDPSinkBackward"}  # tests/test_data_parallel.py
IN_TAPES_ALONE = {WeightNorm}  # in place of WeightNormInterfaceBackward0


def test_every_rule_is_sampled() -> None:
    elsewhere = SINGLE_PRECISION | GRADIENTS | SEVERAL_PROCESSES | IN_TAPES_ALONE
    assert set(table.registered()) == SAMPLES.keys() | elsewhere


# In other orders PyTorch refuses these, takes another kernel, or (of the weight of group norm
# alone, on channels last) crashes in its own gradient.
CONTIGUOUS = {
    "NativeGroupNormBackward0",
    "NllLoss2DBackward0",
    "NllLossBackward0",
    "ScaledDotProductFlashAttentionForCpuBackward0",
    "UnsafeViewBackward0",
    "ViewBackward0",
}


def laid_out(draw: Any, x: Tensor) -> Tensor:
    """In one of the orders in memory that a tensor of these dimensions comes in."""
    order = draw(st.sampled_from(["as it is", "channels last", "reversed"]))
    if order == "channels last" and x.ndim in (4, 5):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return x.contiguous(memory_format=formats[x.ndim])
    if order == "reversed":
        dims = tuple(reversed(range(x.ndim)))
        return x.permute(dims).contiguous().permute(dims)
    return x


def bend(output: Tensor) -> Tensor:
    """A loss per entry, with first and second derivatives everywhere."""
    flat = output.reshape(-1)
    weights = torch.linspace(0.5, 1.5, flat.numel(), dtype=flat.dtype)
    return flat * weights + flat.square() / 3


@pytest.mark.parametrize("name", SAMPLES)
@settings(max_examples=10)
@given(data=st.data(), seed=st.integers(0, 999))
def test_rule(name: str, data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    function, inputs = SAMPLES[name](data.draw)
    inputs = [x.to(F64) for x in inputs]
    if name not in CONTIGUOUS:
        inputs = [laid_out(data.draw, x) for x in inputs]
    params = {i: torch.zeros_like(x) for i, x in enumerate(inputs)}
    for moving in itertools.product([True, False], repeat=len(inputs)):
        if not any(moving):
            continue

        def loss(p: dict[int, Tensor], moving: tuple[bool, ...] = moving) -> Tensor:
            # Not the parameters themselves: their second derivative is then that of a chain.
            return bend(
                function(
                    *[
                        x + p[i] + p[i] ** 2 / 5 if moves else x
                        for i, (x, moves) in enumerate(zip(inputs, moving, strict=True))
                    ]
                )
            )

        leaves = {i: p.clone().requires_grad_() for i, p in params.items()}
        if all(moving):
            assert name in nodes_of(loss(leaves))
        check_agreement(loss, params, {i: torch.randn_like(p) for i, p in params.items()})


@fast_only
@pytest.mark.parametrize("function", [F.gelu, F.softplus, torch.tanh])
def test_entries_are_served_some_rows_at_a_time(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "IN_CACHE", 6)
    x, v = torch.randn(2, 5, 2, 2, dtype=F64)
    check_agreement(lambda x: function(x.sin()).square().sum((1, 2)), x, v)


@fast_only
@pytest.mark.parametrize("affine", [False, True])
def test_group_norm_of_channels_last(affine: bool) -> None:
    x, v = torch.randn(2, 2, 8, 4, 4, dtype=F64)
    x = x.contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(8, dtype=F64), torch.randn(8, dtype=F64)] if affine else []
    check_agreement(lambda x: F.group_norm(x, 4, *weights).sin().sum((1, 2, 3)), x, v)


@fast_only
def test_the_statistics_of_group_norm_are_outputs_too() -> None:
    def loss(x: Tensor) -> Tensor:
        outputs = torch.native_group_norm(x.sin(), None, None, 2, 4, 3, 2, 1e-2)
        return sum(y.pow(3).sum() for y in outputs)  # type: ignore[return-value]

    x, v = torch.randn(2, 2, 4, 3, dtype=F64)
    check_agreement(loss, x, v)


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_deviation_of_equal_numbers_has_derivative_zero(low_memory: bool) -> None:
    """As autograd has it, where there is none."""
    x = torch.tensor([[1.0, 1.0], [1.0, 3.0]], dtype=F64, requires_grad=True)
    v = torch.tensor([[1.0, 2.0], [0.5, 2.0]], dtype=F64)
    with Tape(low_memory=low_memory) as tape:
        loss = x.std(1).square().sum() + x.std(1, correction=0)[:1].sum()
    tape.backward(loss, [x])
    q = tape.directional([v])
    assert q.engine == ("jet" if low_memory else "tangent")
    torch.testing.assert_close(q.slope, torch.tensor(3.0, dtype=F64))
    torch.testing.assert_close(q.curvature, torch.tensor(2.25, dtype=F64))
    if not low_memory:
        expected = torch.tensor([[0.0, 0.0], [-1.5, 1.5]], dtype=F64)
        torch.testing.assert_close(tape.hvp([v])[0], expected)


def test_moments_of_a_single_number() -> None:
    x = torch.tensor(2.0, dtype=F64, requires_grad=True)
    with Tape() as tape:
        loss = x.var(0, correction=0) + x.square() + torch.linalg.vector_norm(x, dim=0)
    tape.backward(loss, [x])
    q = tape.directional([torch.ones((), dtype=F64)])
    assert (q.engine, q.slope, q.curvature) == ("tangent", 5, 2)


def test_logsumexp_of_nothing_stays_zero() -> None:
    x = torch.randn(3, dtype=F64, requires_grad=True)
    nothing = torch.tensor([[True], [False]])

    def masked(x: Tensor) -> Tensor:
        return torch.stack([x, x.sin()]).masked_fill(nothing, -torch.inf).logsumexp(1).exp().sum()

    answers = []
    for func in (masked, lambda x: x.sin().exp().sum()):
        with Tape() as tape:
            loss = func(x)
        tape.backward(loss, [x])
        answers.append(tape.directional([x.detach()]))
    torch.testing.assert_close(answers[0].slope, answers[1].slope)
    torch.testing.assert_close(answers[0].curvature, answers[1].curvature)


def test_saturated_functions_have_no_curvature() -> None:
    x = torch.tensor([1e9, -1e9, 1e3], requires_grad=True)
    with Tape() as tape:
        loss = F.gelu(x, approximate="tanh").sum() + F.mish(x).sum() + F.silu(x).sum()
    tape.backward(loss, [x])
    assert tape.directional([torch.ones(3)]).curvature == 0


def test_sums_of_expanded_cotangents_keep_their_digits() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 400, requires_grad=True)
    with Tape() as tape:
        loss = x.square().sum()
    tape.backward(loss, [x])
    q = tape.directional([x.detach()])
    torch.testing.assert_close(q.curvature, 2 * loss.detach(), rtol=1e-6, atol=0)


def test_a_function_of_which_one_output_has_no_second_cotangent() -> None:
    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            ctx.save_for_backward(x)
            return x * x, x + 1

        @staticmethod
        def backward(ctx: Any, to_square: Tensor, to_sum: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 2 * to_square * x + to_sum

    def func(x: Tensor) -> Tensor:
        square, shifted = Both.apply(x)
        return square.sin() + shifted

    check_agreement(func, torch.randn(3, dtype=F64), torch.randn(3, dtype=F64))


@pytest.mark.parametrize("x", [0.0, 1e-9, 1e-3, 0.1, 0.16, 0.5, 1.0, -0.1])
def test_the_second_derivative_of_sinc_where_its_formula_loses_digits(x: float) -> None:
    terms = ((-1) ** k * math.pi ** (2 * k) / math.factorial(2 * k + 1) for k in range(30))
    second = sum(c * 2 * k * (2 * k - 1) * x ** (2 * k - 2) for k, c in enumerate(terms) if k)
    q = directional(torch.sinc, torch.tensor(x, dtype=F64), torch.tensor(1.0, dtype=F64))
    assert float(q.curvature) == pytest.approx(second, rel=1e-11)
