"""A database of what is refused: how it is called, the exception, and what the message says.

The files bad_*.py fill it, one for each part of the packages.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import curvature
import optim
from curvature import testing
from optim import estimators, plots, rules, schedules, sinks

NAN, INF = math.nan, math.inf


class World:
    """What a call may spoil: a network, bases and wrappers that have taken a step, a tape."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.v = torch.ones(3)
        self.net = nn.Sequential(
            nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.2), nn.Linear(3, 2)
        )
        self.x, self.y = torch.randn(6, 4), torch.randint(2, (6,))
        self.base = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.losses().mean().backward()
        self.base.step()
        self.base.zero_grad()
        self.memory = optim.Memory(4, 2)
        self.memory(torch.ones(3, 2), torch.zeros(3, dtype=torch.long))
        self.records = optim.Records()

    def losses(self) -> Tensor:
        return F.cross_entropy(self.net(self.x), self.y, reduction="none")

    def wrapped(self, wrapper: str) -> Any:
        """A wrapper that has taken a step; made once, before the call that is refused."""
        optimizer = getattr(optim, wrapper)(self.base)
        optimizer.step(self.losses)
        optimizer.zero_grad()  # the next step would drop its gradients, also if it fails
        return optimizer

    def taped(self, *, backward: bool = True) -> Any:
        tape = curvature.Tape()
        with tape:
            self.loss = self.p.square()
        if backward:
            tape.backward(self.loss, [self.p])
        return tape

    def objective(self) -> Any:
        return curvature.Objective(self.net, F.cross_entropy, (self.x, self.y))


@dataclass(frozen=True)
class Bad:
    """One call that must be refused.

    Attributes:
        of: the public name that is called.
        call: with the world and what ``given`` made of it.
        message: a regular expression.
        given: what exists before the call.
    """

    of: str
    call: Callable[[World, Any], Any]
    error: type[Exception]
    message: str
    given: Callable[[World], Any] = lambda w: None


ENTRIES: list[Bad] = []


def bad(
    of: str,
    error: type[Exception],
    message: str,
    call: Callable[..., Any],
    given: Callable[[World], Any] = lambda w: None,
) -> None:
    ENTRIES.append(Bad(of, call, error, message, given))


def square(x: Tensor) -> Tensor:
    return x.square().sum()


# What takes no input that could be wrong, or is given by the package and not made by hand.
NOTHING_TO_GET_WRONG = {
    "curvature.NonFiniteLoss",
    "curvature.NotTwiceDifferentiable",
    "curvature.Quadratic",
    "curvature.RandomState",
    "curvature.compilations",
    "curvature.evaluation_mode",
    "curvature.uncompiled",
    "optim.estimators.GradientDifferences",
    "optim.estimators.Secant",
}


def public_names() -> set[str]:
    """Everything that the two packages offer to be called."""
    names = set()
    for module in (curvature, testing, optim, estimators, plots, rules, schedules, sinks):
        listed = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", None) == module.__name__ and name[0] != "_"
        ]
        names |= {f"{module.__name__}.{name}" for name in listed}
    modules = {"estimators", "plots", "rules", "schedules", "sinks"}
    return names - {f"optim.{m}" for m in modules} - {"curvature.testing"}
