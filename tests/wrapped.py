"""The wrappers, the base optimizers and the training that their tests have in common."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from optim import INNA, GeN, INNAprop, Rescaled

F64 = torch.float64


class OwnSGD(torch.optim.SGD):
    """Nothing is known of its step, which is told from copies of the parameters."""


class OwnAdamW(torch.optim.AdamW):
    """Likewise."""


BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, all options": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "a subclass of SGD": lambda p: OwnSGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "RMSprop, all options": lambda p: torch.optim.RMSprop(
        p, momentum=0.5, centered=True, weight_decay=0.1
    ),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr_decay=0.1, weight_decay=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, foreach=False),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    "a subclass of AdamW": lambda p: OwnAdamW(p),
    "Adamax": lambda p: torch.optim.Adamax(p, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, decoupled_weight_decay=True, weight_decay=0.1),
    "NAdam, coupled": lambda p: torch.optim.NAdam(p, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, weight_decay=0.1),
    "INNA": lambda p: INNA(p, beta=1.0),
    "INNAprop": lambda p: INNAprop(p, foreach=False),
}
WRAPPERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "Rescaled": lambda base: Rescaled(base, ell=0.5),
    "GeN": lambda base: GeN(base, phi=2),
}
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
every_base = pytest.mark.parametrize("base", BASES)


class Problem:
    """A small network with dropout, batch norm and an unused parameter, on fixed batches."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        torch.manual_seed(0)
        # No bias before the batch norm: its gradient is rounding noise, which Adam makes a step.
        self.model = nn.Sequential(
            nn.Linear(4, 6, bias=False),
            nn.BatchNorm1d(6),
            nn.Tanh(),
            nn.Dropout(0.2),
            nn.Linear(6, 3),
        ).to(dtype)
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))
        self.batches = [(torch.randn(8, 4, dtype=dtype), torch.randint(3, (8,))) for _ in range(6)]

    def groups(self) -> list[dict[str, Any]]:
        first, *rest = self.model.parameters()
        return [{"params": [first, self.unused]}, {"params": rest}]

    def params(self) -> list[Tensor]:
        return [*self.model.parameters(), self.unused]

    def losses(self, k: int) -> Tensor:
        x, y = self.batches[k]
        return F.cross_entropy(self.model(x), y, reduction="none")

    def train(self, optimizer: Any, steps: range) -> None:
        for k in steps:
            optimizer.step(lambda k=k: self.losses(k))

    def snapshot(self, optimizer: Any) -> Any:
        return copy.deepcopy(
            (
                [p.data for p in self.params()],
                list(self.model.buffers()),
                optimizer.base.state_dict()["state"],
                torch.get_rng_state(),
            )
        )


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
