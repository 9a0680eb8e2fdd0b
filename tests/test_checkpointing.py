"""Checkpointed regions, which both engines have to evaluate again."""

import pytest
import torch
from agreement import every_engine
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

import curvature
from curvature import Objective, Tape, directional, hvp

F64 = torch.float64


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Dropout(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = checkpoint(self.attend, x, use_reentrant=False)
        return self.attend(x)[0] + q * k - v

    def attend(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = F.scaled_dot_product_attention(x, x, x)
        return [self.block(y).square(), self.block(y).sin(), y.mean(-1, keepdim=True)]


@every_engine
def test_checkpointing_changes_nothing(engine: str) -> None:
    model = Checkpointed().to(F64)
    J = Objective(model, lambda y, _: y.square().mean((1, 2)), (torch.randn(2, 4, 3).to(F64), None))
    v = {name: torch.randn_like(p) for name, p in J.params.items()}
    curvature.testing.check_directional(J, J.params, v, engine=engine)


@every_engine
def test_checkpointing_refuses_parameters_lent_for_the_first_call(engine: str) -> None:
    J = Objective(Checkpointed(), lambda y, _: y.square().mean(), (torch.randn(2, 4, 3), None))
    params = {name: p.detach() + 0.1 for name, p in J.params.items()}
    for verb in (directional, hvp):
        with pytest.raises(ValueError, match="evaluates Linear again with another weight"):
            verb(J, params, params, engine=engine)


@every_engine
def test_checkpointing_refuses_a_module_that_was_lent_two_sets_of_parameters(engine: str) -> None:
    layer = nn.Linear(2, 2)
    block = nn.Sequential()
    block.forward = lambda x: checkpoint(layer, x, use_reentrant=False)
    block.layer = layer
    lent = {f"layer.{name}": p.detach() + 1 for name, p in layer.named_parameters()}
    x = torch.ones(2, requires_grad=True)
    with Tape(engine=engine) as tape:
        loss = (torch.func.functional_call(block, lent, x) + layer(x)).square().sum()
    with pytest.raises(ValueError, match="evaluates Linear again"):
        tape.backward(loss, [x])


@every_engine
@pytest.mark.parametrize("verb", ["directional", "hvp"])
def test_checkpointing_refuses_parameters_that_have_stepped(verb: str, engine: str) -> None:
    model = Checkpointed()
    params = dict(model.named_parameters())
    with Tape(engine=engine) as tape:
        loss = model(torch.randn(2, 4, 3)).square().mean()
    gradient = tape.backward(loss, params)
    getattr(tape, verb)(gradient)
    with torch.no_grad():
        model.block[0].weight.add_(1)
    with pytest.raises(ValueError, match="evaluates Linear again with another weight"):
        getattr(tape, verb)(gradient)
