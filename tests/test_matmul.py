"""Products by the faster library: the same numbers, whatever the layout."""

from __future__ import annotations

import pytest
import torch
from dispatched import Dispatched
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvature.rules import matmul as module
from curvature.rules.matmul import matmul

ON_BOARD = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def laid_out(rows: int, columns: int, layout: str) -> Tensor:
    if layout == "transposed":
        return torch.randn(columns, rows).t()
    if layout == "strided":
        return torch.randn(rows, 2 * columns)[:, ::2]
    if layout == "slice":
        return torch.randn(rows, 2 * columns)[:, columns:]
    return (
        torch.randn(rows, columns)
        if layout == "plain"
        else torch.randn(1, columns).expand(rows, -1)
    )


layouts = st.sampled_from(["plain", "transposed", "strided", "slice", "expanded"])
sizes = st.integers(0, 40)


@given(
    sizes,
    sizes,
    sizes,
    layouts,
    layouts,
    st.sampled_from([None, "plain", "transposed", "row", "matrix", "number"]),
    st.booleans(),
)
def test_any_layout_and_size(
    n: int, k: int, m: int, left: str, right: str, added: str | None, onednn: bool
) -> None:
    torch.manual_seed(0)
    a, b = laid_out(n, k, left), laid_out(k, m, right)
    onto = laid_out(n, m, added) if added in ("plain", "transposed") else None
    shape = {"row": (m,), "matrix": (n, m), "number": ()}.get(added or "")
    plus = None if shape is None else torch.randn(shape)
    exact = a.double() @ b.double()
    exact = exact if added is None else exact + (plus if onto is None else onto).double()
    before = None if plus is None else plus.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LEAST_WORK", 1)
        patch.setattr(module, "_ONEDNN", onednn and ON_BOARD)
        result = matmul(a, b, onto, plus)
    torch.testing.assert_close(result, exact.float(), rtol=1e-5, atol=1e-5)
    assert plus is None or torch.equal(plus, before)


@pytest.mark.skipif(not ON_BOARD, reason="oneDNN is not on board")
def test_large_products_go_to_onednn_unless_autograd_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_ONEDNN", True)

    def by_onednn(a: Tensor, b: Tensor) -> bool:
        with Dispatched() as dispatched:
            matmul(a, b)
        return "mkldnn::_linear_pointwise" in dispatched.names

    a, b = torch.randn(128, 128), torch.randn(128, 128)
    assert by_onednn(a, b)
    assert not by_onednn(a.double(), b.double())
    assert not by_onednn(a[:4], b[:, :4])
    a.requires_grad_()
    assert not by_onednn(a, b)
    assert matmul(a, b).requires_grad
    with torch.no_grad():
        assert by_onednn(a, b)
    monkeypatch.setattr(type(torch.backends.mkldnn), "enabled", False)
    with torch.no_grad():
        assert not by_onednn(a, b)
