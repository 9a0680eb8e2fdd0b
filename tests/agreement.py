"""One check for all engines: finite differences decide, and the engines must agree."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from curvature import directional, hvp
from curvature.sweep import Sweep
from curvature.testing import check_directional

every_engine = pytest.mark.parametrize("engine", ["auto", "reference"])
shows_what_it_packed = hasattr(torch._C._autograd.SavedTensor, "data")
fast_only = pytest.mark.skipif(
    not Sweep.available(), reason="this PyTorch does not show its graph: auto is the reference"
)


def check_engines(
    func: Callable[[Any], torch.Tensor], params: Any, direction: Any, *, step: float = 0.1
) -> None:
    """Both engines against finite differences, and the fast one to 1e-9 against the reference."""
    check_directional(func, params, direction, engine="auto", step=step)
    check_agreement(func, params, direction)


def check_agreement(func: Callable[[Any], torch.Tensor], params: Any, direction: Any) -> None:
    """The fast engine's three passes against the reference, in float64 to 1e-9."""
    exact = directional(func, params, direction, engine="reference")
    fast = directional(func, params, direction)
    assert_close(fast.slope, exact.slope)
    assert_close(fast.curvature, exact.curvature)
    if exact.value.ndim == 0 and _is_vector(func, params):
        exact = directional(func, params, direction, per_sample=True, engine="reference")
        fast = directional(func, params, direction, per_sample=True)
        assert fast.per_sample is not None
        assert exact.per_sample is not None
        assert_close(fast.per_sample.slope, exact.per_sample.slope)
        assert_close(fast.per_sample.curvature, exact.per_sample.curvature)
    products = [
        torch.cat([h.flatten() for h in pytree.tree_leaves(hvp(func, params, direction, engine=e))])
        for e in ("auto", "reference")
    ]
    assert_close(*products)


def _is_vector(func: Callable[[Any], torch.Tensor], params: Any) -> bool:
    with torch.random.fork_rng():
        return func(pytree.tree_map(torch.clone, params)).ndim == 1


def assert_close(fast: torch.Tensor, exact: torch.Tensor) -> None:
    size = float(exact.abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(fast, exact, rtol=0, atol=1e-9 * max(size, 1e-3))


def assert_identical(a: Any, b: Any) -> None:
    """Bit for bit, in nested containers of tensors and anything else with a telling repr."""
    (xs, inner), (ys, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    assert inner == other
    for x, y in zip(xs, ys, strict=True):
        if isinstance(x, torch.Tensor):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert x.detach().numpy().tobytes() == y.detach().numpy().tobytes(), f"{x} and {y}"
        else:
            assert repr(x) == repr(y)
