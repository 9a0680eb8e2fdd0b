"""The nodes of autograd's graph behind tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node


def nodes_behind(
    tensors: Iterable[Tensor | GradientEdge | None], seen: set[Node | None]
) -> Iterator[Node]:
    """Each node that leads to one of ``tensors``, but for those in ``seen``, where all are put."""
    waiting = [node_of(t) for t in tensors if t is not None]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend([parent for parent, _ in node.next_functions])


def node_of(output: Tensor | GradientEdge) -> Node | None:
    """The node that computes a tensor; None if nothing does."""
    return output.node if isinstance(output, GradientEdge) else output.grad_fn
