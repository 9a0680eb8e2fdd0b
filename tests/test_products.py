"""Products of the forward pass that the tangent pass uses again."""

from functools import partial

import pytest
import torch
from agreement import check_agreement, fast_only
from dispatched import Dispatched
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from curvature import Objective, Tape, directional, forward

pytestmark = fast_only
F64 = torch.float64


def test_a_product_that_was_written_to_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_LEAST_WORK", 0)
    monkeypatch.setattr(forward, "_LEAST_LENGTH", 0)
    w, v = torch.randn(2, 3, 3, dtype=F64)

    def func(w: Tensor) -> Tensor:
        y = torch.tanh(w) @ w
        y.mul_(2).add_(w)
        bias = w.sum(0)
        z = F.linear(y, w, bias)
        bias.add_(1)
        return z.sum(1) * bias

    check_agreement(func, w, v)


def test_the_product_of_an_input_that_is_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """F.linear adds the bias in a call of its own there."""
    monkeypatch.setattr(forward, "_LEAST_WORK", 0)
    monkeypatch.setattr(forward, "_LEAST_LENGTH", 0)
    torch.manual_seed(0)
    x, v = torch.randn(2, 2, 4, 3, dtype=F64)

    def func(x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = x[0, :3].sin()
        y = F.linear(x.transpose(0, 1).tanh(), weight, x[1, 0] if bias is None else bias)
        return y.square().sum((1, 2))

    multiplications = []
    for least_length in (0, 1000):
        monkeypatch.setattr(forward, "_LEAST_LENGTH", least_length)
        with Tape() as tape:
            losses = func(x.requires_grad_())
        tape.backward(losses, [x])
        with Dispatched() as dispatched:
            tape.directional([v])
        multiplications.append(dispatched.multiplications)
    assert multiplications == [2, 3]
    monkeypatch.setattr(forward, "_LEAST_LENGTH", 0)
    for bias in (None, torch.randn(3, dtype=F64)):
        check_agreement(partial(func, bias=bias), x.detach(), v)


@pytest.mark.parametrize("still", ["0.weight", "2.weight", "0.weight 0.bias"])
def test_products_whose_factors_do_not_move(still: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions that are zero, tiny or large in one factor keep all digits of the tangent."""
    monkeypatch.setattr(forward, "_LEAST_WORK", 0)
    monkeypatch.setattr(forward, "_LEAST_LENGTH", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1))
    model = model.to(F64)
    J = Objective(model, lambda y, _: y.square().sum(1), (torch.randn(4, 3, dtype=F64), None))
    for size, other in ((0.0, 1.0), (1e-30, 1.0), (1e30, 1.0), (0.0, 1e-20)):
        v = {
            name: torch.randn_like(p) * (size if name in still.split() else other)
            for name, p in J.params.items()
        }
        exact = directional(J, J.params, v, engine="reference")
        fast = directional(J, J.params, v)
        torch.testing.assert_close(fast.curvature, exact.curvature, rtol=1e-9, atol=0)
        torch.testing.assert_close(fast.slope, exact.slope, rtol=1e-9, atol=0)


def test_a_direction_far_below_its_parameter_does_not_overflow_in_single_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward, "_LEAST_WORK", 0)
    monkeypatch.setattr(forward, "_LEAST_LENGTH", 0)
    torch.manual_seed(0)
    x, a = torch.randn(2, 6, 3)
    w, b = 1e10 * torch.randn(3, 3), 1e-12 * torch.randn(3, 3)

    def losses(factors: tuple[Tensor, Tensor]) -> Tensor:
        return (factors[0] @ factors[1]).square().sum(1)

    fast = directional(losses, (x, w), (a, b))
    exact = directional(losses, (x, w), (a, b), engine="reference")
    torch.testing.assert_close(fast.curvature, exact.curvature, rtol=1e-5, atol=0)
