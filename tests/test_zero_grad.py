"""Gradients that the caller has set to zero, which are not none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optim import GeN, Rescaled
from optim.rules import Newton

F64 = torch.float64


@pytest.mark.parametrize("calls_backward", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop"])
def test_zeros_of_the_caller_let_momentum_go_on(
    kind: str, inside: bool, calls_backward: bool
) -> None:
    """Where the loss uses a parameter at the first step alone, as in plain training."""

    def train(wrap: Callable[[Any], Any]) -> list[Tensor]:
        used, rest = (nn.Parameter(torch.tensor([1.0, -2.0], dtype=F64)) for _ in range(2))
        options = {} if kind == "AdamW" else {"momentum": 0.9}
        optimizer = wrap(getattr(torch.optim, kind)([used, rest], lr=0.1, **options))
        plain = not isinstance(optimizer, Rescaled)

        def closure(k: int) -> Tensor:
            if inside:
                optimizer.zero_grad(set_to_none=False)
            loss = used.square().sum() + (rest.square().sum() if k == 0 else 0)
            if calls_backward or plain:
                loss.backward()
            return loss

        for k in range(4):
            if not inside:
                optimizer.zero_grad(set_to_none=False)
            optimizer.step(lambda k=k: closure(k))
        return [used.detach(), rest.detach()]

    rule = Newton(eta=1.0)
    wrapped = train(lambda base: Rescaled(base, ell=0.1, rule=rule, every=100, checked=0))
    torch.testing.assert_close(wrapped, train(lambda base: base))


def test_zeros_of_a_frozen_parameter_do_not_move_it() -> None:
    used, frozen = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    optimizer = GeN(torch.optim.SGD([used, frozen], lr=0.1, momentum=0.9))

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = used.square().sum() + frozen.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    optimizer.step(closure)
    assert torch.equal(frozen, before)
