"""The inner product that slopes and lengths are made of, in single precision and out of range."""

import pytest
import torch

from optim.inner import inner


@pytest.mark.parametrize("size", [1, 4096, 2**15 + 1, 1_000_003])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inner(size: int, scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    a = torch.rand(size, generator=generator, dtype=dtype) * scale
    b = torch.rand(size, generator=generator, dtype=dtype) * scale
    expected = (a.double() @ b.double()).item()
    assert inner([a, a], [b, None]) == pytest.approx(expected, rel=2e-7)
    assert inner([a, b], [b, -a]) == pytest.approx(0, abs=1e-6 * expected)
    square = (a.double() @ a.double()).item()
    assert inner([a], [a]) == pytest.approx(square, rel=2e-7)
    assert inner([a, a], [a, b]) == pytest.approx(square + expected, rel=2e-7)
