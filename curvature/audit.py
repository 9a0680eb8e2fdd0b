"""Notice the graphs that PyTorch would differentiate wrongly without an error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from curvature.nodes import nodes_behind

_WRONG = {
    # Reached where the call was not seen by the mode that replaces it, as inside TorchScript.
    "WeightNormInterfaceBackward0": "PyTorch's second derivative of fused weight_norm is wrong",
    **{
        f"{name}AutogradOpBackward": f"PyTorch has no right second derivative of {function}"
        for name, function in (
            ("Cond", "torch.cond"),
            ("FlexAttention", "flex_attention"),
            ("Map", "the operator map"),
            ("Scan", "the operator scan"),
            ("WhileLoop", "the operator while_loop"),
        )
    },
    # torch.autograd.grad never runs this node, which would raise: it leads to no parameter.
    "torch::autograd::Error": "a custom autograd.Function is marked once_differentiable",
}
_GRADIENTS_OF_NORM = {"NativeLayerNormBackwardBackward0", "NativeBatchNormBackwardBackward0"}


class Audit:
    """Watches a graph as derivatives of derivatives are added to it."""

    def __init__(self) -> None:
        self._nodes: set[Node | None] = set()
        self._reason: str | None = None

    def obstacle(self, tensors: Sequence[Tensor | None]) -> str | None:
        """Why a derivative of ``tensors`` would be wrong without an error, or ``None``."""
        self._add(tensors)
        return self._reason

    @contextmanager
    def cuts_noted(self, output: Tensor) -> Iterator[list[str]]:
        """Collect the operations whose backward pass loses its graph, in a block that runs it.

        For a backward pass of ``output`` that starts from a cotangent with a graph. The
        backward pass of each operation is linear, so every cotangent that is not zero must have
        a graph as well; one that has none was computed from detached values, and its derivative
        would be taken for zero.
        """
        cuts: list[str] = []

        def watch(node: Node) -> Any:
            def note(arriving: Sequence[Tensor | None], leaving: Sequence[Tensor | None]) -> None:
                if any(map(without_graph, (*arriving, *leaving))):
                    cuts.append(node.name())

            return node.register_hook(note)

        nodes = self._add([output])
        if any(map(is_wrong_twice, nodes)):
            self._reason = (
                "the loss holds a gradient of layer or batch normalisation, of which PyTorch's "
                'second derivative is wrong; engine="auto" has a rule for it'
            )
        hooks = [watch(node) for node in nodes]
        try:
            yield cuts
        finally:
            for hook in hooks:
                hook.remove()

    def _add(self, tensors: Sequence[Tensor | None]) -> list[Node]:
        """Take note of the graphs behind ``tensors``; the nodes that were not known before."""
        new = list(nodes_behind(tensors, self._nodes))
        self._reason = self._reason or next(filter(None, map(obstacle_of, new)), None)
        return new


def obstacle_of(node: Node) -> str | None:
    """Why a derivative of what a node computes would be wrong without an error, or ``None``."""
    if node.name() == "EmbeddingBackward0" and node._saved_scale_grad_by_freq:  # type: ignore[attr-defined]
        return "what embedding gives with scale_grad_by_freq is not the gradient of the loss"
    return _WRONG.get(node.name())


def is_wrong_twice(node: Node) -> bool:
    """Whether a node of the loss itself has a gradient, but PyTorch's derivative of it is wrong."""
    # With fixed statistics there is nothing that could be taken for constant.
    return node.name() in _GRADIENTS_OF_NORM and getattr(node, "_saved_train", True)


def without_graph(cotangent: Tensor | None) -> bool:
    """Whether a cotangent that is not zero has no graph."""
    return cotangent is not None and not cotangent.requires_grad and bool(cotangent.any())
