"""The precision in which the modules of a closure compute, and what autocast remembers of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature import module_calls


@dataclass
class Precision:
    """The coarsest rounding of an autocast seen so far; 0 without any."""

    eps: float = 0.0


@contextmanager
def autocast_noted(params: Iterable[Tensor]) -> Iterator[Precision]:
    """Inside, note in which dtype autocast lets modules compute on the parameters' devices."""
    precision = Precision()
    devices = {p.device.type for p in params}

    def note(*_: object) -> None:
        for device in devices:
            if torch.is_autocast_enabled(device):
                eps = torch.finfo(torch.get_autocast_dtype(device)).eps
                precision.eps = max(precision.eps, eps)

    with module_calls(before=note):
        yield precision


def forget_casts() -> None:
    """Let autocast cast parameters anew.

    Until its outermost region ends it holds what it cast: also where the caller's region surrounds
    a step, in which parameters move, and with a graph or without, as it was first asked.
    """
    torch.clear_autocast_cache()
