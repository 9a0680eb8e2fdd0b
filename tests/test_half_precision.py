"""Graphs that pass through half precision on their way."""

from collections.abc import Callable

import pytest
import torch
from agreement import fast_only
from torch import Tensor

from curvature import Tape, directional

A = torch.linspace(70, 130, 512 * 64).view(512, 64)
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


# The sums are beyond the range of float16, in which their tangents would be infinite.
@fast_only
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
