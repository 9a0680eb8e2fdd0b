"""Single, half and mixed precision."""

from collections.abc import Callable

import pytest
import torch
from agreement import fast_only
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from curvature import Objective, Tape, directional

pytestmark = fast_only


def test_a_loss_near_zero_keeps_its_digits() -> None:
    """Where a class is all but certain, the tangent of its logarithm is a small difference."""
    logits = torch.tensor([[14.0, 0.0, 1.0], [0.5, 13.0, 0.0]])
    v, y = torch.randn(2, 3), torch.tensor([0, 1])

    def entropy(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="none")

    def binary(z: Tensor) -> Tensor:
        truth = (z > 5).to(z)
        return F.binary_cross_entropy_with_logits(2 * z - 10, truth, reduction="none").sum(1)

    for losses in (entropy, binary):
        exact = directional(losses, logits.double(), v.double(), per_sample=True).per_sample
        fast = directional(losses, logits, v, per_sample=True).per_sample
        assert exact is not None
        assert fast is not None
        torch.testing.assert_close(fast.slope.double(), exact.slope, rtol=1e-5, atol=0)
        torch.testing.assert_close(fast.curvature.double(), exact.curvature, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(32), nn.GroupNorm(4, 32), nn.BatchNorm1d(32), nn.Identity()]
)
def test_autocast_is_followed(norm: nn.Module) -> None:
    """Products are in bfloat16, forward and backward; all engines differentiate these."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), norm, nn.Tanh(), nn.Linear(32, 8))
    x, y = torch.randn(64, 16), torch.randint(8, (64,))
    params = dict(model.named_parameters())
    v = {name: torch.randn_like(p) for name, p in params.items()}
    curvatures = []
    for engine in ("auto", "reference"):
        with Tape(engine=engine) as tape, torch.autocast("cpu", dtype=torch.bfloat16):
            losses = F.cross_entropy(model(x), y, reduction="none")
        tape.backward(losses, params)
        curvatures.append(tape.directional(v).curvature)
        curvatures.append(tape.directional(v, per_sample=True).per_sample.curvature.mean())
    exact = directional(Objective(model, F.cross_entropy, (x, y)), params, v)
    assert exact.contributions is not None
    size = float(sum(term.curvature.abs() for term in exact.contributions))
    for rounded in curvatures:
        assert 1e-5 * size < abs(rounded - exact.curvature) < 2**-7 * size


@pytest.mark.parametrize("length", [1e-6, 1e6])
def test_half_precision_holds_directions_of_any_length(length: float) -> None:
    """Squares of tangents would be zero or infinite in float16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    x, y, params = torch.randn(64, 16), torch.randint(4, (64,)), list(model.parameters())
    v = [torch.randn_like(p) for p in params]
    with Tape() as tape, torch.autocast("cpu", dtype=torch.float16):
        losses = F.cross_entropy(model(x), y, reduction="none")
    tape.backward(losses, params)
    results = []
    for t in (1.0, length):
        w = [t * vi for vi in v]
        q, per_sample = (tape.directional(w, per_sample=each) for each in (False, True))
        product = sum((h * vi).sum() for h, vi in zip(tape.hvp(w), v, strict=True))
        results.append([q.slope / t, q.curvature / t**2, per_sample.curvature / t**2, product / t])
    torch.testing.assert_close(*results, rtol=2e-3, atol=0)


def test_a_tangent_is_promoted_as_what_moves() -> None:
    def func(x: torch.Tensor) -> torch.Tensor:
        return (((x.half() + torch.ones(4, 4)) @ torch.full((4, 4), 1e-9)) * 1e9).square().mean()

    x = torch.ones(4, 4)
    q, expected = (directional(func, x, x, engine=engine) for engine in ("auto", "reference"))
    torch.testing.assert_close((q.slope, q.curvature), (expected.slope, expected.curvature))


def test_products_in_lower_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8))
    x, y = torch.randn(64, 16), torch.randint(8, (64,))
    params = dict(model.named_parameters())
    results = []
    for dtype in (None, torch.bfloat16):
        with Tape(tangent_dtype=dtype) as tape:
            loss = F.cross_entropy(model(x), y)
        gradient = tape.backward(loss, params)
        results.append(tape.directional(gradient))
    exact, rounded = results
    assert rounded.curvature.dtype == torch.float32
    assert 1e-6 < abs(rounded.curvature / exact.curvature - 1) < 2e-2


A = torch.linspace(70, 130, 512 * 64).view(512, 64)
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


# The sums are beyond the range of float16, in which their tangents would be infinite.
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize(
    ("half", "reduced"),
    [
        (F16, lambda y: y.abs().sum(dtype=F32) / 1e7),
        (F16, lambda y: y.abs().sum(0, dtype=F32) / 1e7),
        (F16, lambda y: y.cumsum(0, dtype=F32) / 1e7),
        (BF16, lambda y: y.mean(dtype=F32)),
        (BF16, lambda y: y.mean(0, dtype=F32)),
    ],
    ids=["sum", "sum over", "cumsum", "mean", "mean over"],
)
def test_sums_in_higher_precision_than_their_terms(
    reduced: Callable[[Tensor], Tensor], half: torch.dtype, low_memory: bool
) -> None:
    x, v = torch.linspace(1, 3.1, 1024).view(2, 64, 8)
    exact = directional(lambda x: reduced(A @ x).square().sum(), x, v)
    x.requires_grad_()
    with Tape(low_memory=low_memory) as tape:
        loss = reduced((A @ x).to(half)).square().sum()
    tape.backward(loss, [x])
    if not low_memory:
        assert tape.hvp([v])[0].isfinite().all()
    q = tape.directional([v])
    torch.testing.assert_close(q.slope, exact.slope, rtol=1e-3, atol=0)
    torch.testing.assert_close(q.curvature, exact.curvature, rtol=1e-3, atol=0)
