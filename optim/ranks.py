"""The processes that have a part of each batch, and take the same steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import distributed

if TYPE_CHECKING:  # some builds of torch are without it
    from torch.distributed import ProcessGroup


class Ranks:
    """Means over the processes of a group, the same to the last bit on each of them.

    Args:
        group: None for a process of its own.

    Raises:
        TypeError: it is no process group.
        ValueError: several processes run, and no group is given.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        if group is None and distributed.is_available() and distributed.is_initialized():
            count = distributed.get_world_size()
            if count > 1:
                raise ValueError(
                    f"{count} processes run: give process_group=torch.distributed.group.WORLD, so "
                    "that all take the same steps; a group of one lets each go its own way"
                )
        if group is not None and not (
            distributed.is_available() and isinstance(group, distributed.ProcessGroup)
        ):
            raise TypeError(
                f"process_group is {group!r}; give one of torch.distributed, as "
                "torch.distributed.group.WORLD after init_process_group"
            )
        self._group = group
        self.size = 1 if group is None else distributed.get_world_size(group)

    @property
    def several(self) -> bool:
        return self.size > 1

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of each rank."""
        if not self.several:
            return [list(numbers)]
        on_cpu = distributed.get_backend(self._group) == "gloo"
        device = torch.device("cpu" if on_cpu else "cuda")
        own = torch.tensor(numbers, dtype=torch.float64, device=device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(found, own, group=self._group)
        return [each.tolist() for each in found]

    def means(self, *numbers: float) -> list[float]:
        """The mean of each number over the ranks."""
        if not self.several:
            return list(numbers)
        return [sum(each) / self.size for each in zip(*self.gather(numbers), strict=True)]
