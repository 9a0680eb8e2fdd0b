"""Which operations and modules bend the loss along a direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from curvature.origin import Origin, Origins


@dataclass(frozen=True, eq=False)
class Contribution:
    """One term <yhat, D²F[xdot, xdot]> of the curvature along a direction.

    Attributes:
        origin: the operation, its module and its line.
        curvature: the term; all terms of a direction add up to v^T H v.
    """

    origin: Origin
    curvature: Tensor


class Contributions(Sequence[Contribution]):
    """The terms of v^T H v, one for each operation that bends, in order of evaluation.

    Example:
        >>> import torch, curvature
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> J = curvature.Objective(model, lambda y, _: y.square().mean(), (torch.ones(4, 2), None))
        >>> q = curvature.directional(J, J.params, J.params)
        >>> [term.origin.module for term in q.contributions]
        ['1', '2', '']
        >>> bool((sum(q.contributions.by_module().values()) - q.curvature).abs() < 1e-5)
        True
    """

    def __init__(self, origins: Origins, terms: Sequence[tuple[str, int, Tensor]]) -> None:
        self._origins, self._terms = origins, list(terms)

    def __len__(self) -> int:
        return len(self._terms)

    @overload
    def __getitem__(self, index: int) -> Contribution: ...
    @overload
    def __getitem__(self, index: slice) -> list[Contribution]: ...
    def __getitem__(self, index: int | slice) -> Contribution | list[Contribution]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        operation, sequence_nr, number = self._terms[index]
        return Contribution(self._origins.of(operation, sequence_nr), number)

    def by_module(self) -> dict[str, Tensor]:
        """The terms summed over each module, by its path; "" stands for what is in none.

        Example: see :class:`Contributions`.
        """
        sums: dict[str, Tensor] = {}
        for term in self:
            path = term.origin.module
            sums[path] = sums.get(path, torch.zeros_like(term.curvature)) + term.curvature
        return sums
