"""The nodes of autograd's graph behind tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.autograd.graph import Node


def nodes_behind(tensors: Iterable[Tensor | None], seen: set[Node | None]) -> Iterator[Node]:
    """Each node that leads to one of ``tensors``, but for those in ``seen``, where all are put."""
    waiting = [t.grad_fn for t in tensors if t is not None]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend([parent for parent, _ in node.next_functions])
