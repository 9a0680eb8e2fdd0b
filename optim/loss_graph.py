"""The graph behind a loss: what takes part in it, and what backward gives a gradient to."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node


def check_same_loss(result: Any, loss: Tensor) -> None:
    """Refuse a returned loss that neither contains nor is part of the one of ``backward``."""
    if not isinstance(result, Tensor) or result.grad_fn is None:
        return
    if not _is_part(result, loss) and not _is_part(loss, result):
        raise ValueError(
            "the closure calls backward on another loss than it returns; to differentiate on the "
            "way to the loss, as for an adversarial input, use torch.autograd.grad"
        )


def _is_part(part: Tensor, whole: Tensor) -> bool:
    return any(node is part.grad_fn for node in _behind(whole))


def other_leaves(losses: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """The leaves besides params to which backward gives a gradient."""
    known = set(params)
    leaves = [node.variable for node in _behind(losses) if hasattr(node, "variable")]
    return [leaf for leaf in leaves if leaf not in known]


def _behind(loss: Tensor) -> Iterator[Node]:
    """The graph of a loss, what is nearest to it first."""
    seen, waiting = set(), deque([loss.grad_fn])
    while waiting:
        node = waiting.popleft()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(parent for parent, _ in node.next_functions)
