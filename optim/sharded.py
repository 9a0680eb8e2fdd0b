"""Parameters of which each process holds a part, as by ``torch.distributed.fsdp.fully_shard``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from curvature import module_calls


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, in the same memory."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def sum_of_parts(number: float, like: Any) -> float:
    """The sum of a number over the processes that hold the parts of ``like``."""
    total = torch.tensor(number, dtype=torch.float64, device=local(like).device)
    distributed.all_reduce(total, group=like.device_mesh.get_group())
    return total.item()


def check_sharding(params: Sequence[Tensor], *, several: bool, exact: str | None) -> None:
    """Refuse what cannot be sharded, or not in this way.

    On every process alike, so that none waits for another.

    Args:
        several: whether a group of several processes was given.
        exact: the estimator, if it needs the graph of the whole parameters.
    """
    if any(map(_is_flattened, params)):
        raise TypeError(
            "the parameters are those of a FullyShardedDataParallel, which keeps them flat in one "
            "and cannot be used: shard the model by torch.distributed.fsdp.fully_shard instead "
            "(PyTorch 2.6), and take GeN or one of the estimators Secant, Probes and "
            "GradientDifferences"
        )
    for p in (p for p in params if is_sharded(p)):
        if exact is not None:
            raise TypeError(
                f"{exact} follows the graph of whole parameters, and these are sharded: take GeN, "
                "or one of the estimators Secant, Probes and GradientDifferences"
            )
        if p.device_mesh.ndim != 1:  # type: ignore[attr-defined]
            raise TypeError("parameters that are sharded along several dimensions cannot be used")
        if not several:
            raise ValueError(
                "the parameters are sharded over several processes: give the group of these as "
                "process_group"
            )


def _is_flattened(tensor: Tensor) -> bool:
    """Whether ``FullyShardedDataParallel`` has made it, or what it was made of."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


@contextmanager
def resharded() -> Iterator[None]:
    """Modules that are called inside give up whole parameters at the end.

    Without a backward pass ``fully_shard`` keeps those of the outermost module for the next
    call, which would not notice that the sharded ones have changed.
    """
    called: dict[int, Any] = {}

    def note(module: nn.Module) -> None:
        if hasattr(module, "reshard"):
            called[id(module)] = module

    try:
        with module_calls(after=note):
            yield
    finally:
        for module in called.values():
            module.reshard()
