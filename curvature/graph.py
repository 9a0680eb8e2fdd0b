"""The operations between parameters and losses, as autograd recorded them in the forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvature.errors import NotTwiceDifferentiable
from curvature.forward import Product

Edge = tuple[Node, int]
Kind = tuple[torch.Size, torch.dtype]
Tensors = tuple[Tensor | None, ...]


class Call:
    """One operation of the forward pass, with what autograd saved of it for the backward pass.

    ``call.mat1`` is the saved value ``mat1`` of the derivative's formula; of a Python function,
    ``call.saved_tensors`` and whatever else its forward pass has set on ``ctx``. The tensors come
    as autograd hands them out, after its check that nobody has written to them since.

    Attributes:
        node: autograd's node, the transposed Jacobian as a function of the cotangents.
        name: of the node, one per differentiable overload ("AddmmBackward0").
        inputs: for each differentiable input the edge it came by, or None if it does not move.
        outputs: the edge of each output.
        kinds: shape and dtype of each output.
        edges: the moving inputs as gradient edges, each once.
        product: the result of a product of two tensors, if it was kept.
        used: which of the outputs are losses, or used by later calls.
    """

    __slots__ = ("_taken", "inputs", "kinds", "name", "node", "outputs", "product", "used")

    def __init__(
        self,
        node: Node,
        inputs: tuple[Edge | None, ...],
        kinds: Mapping[Edge, Kind],
        product: Product | None,
    ) -> None:
        self.node, self.product = node, product
        self.name = node.name().removeprefix("torch::autograd::")
        self.inputs = inputs
        # Asking the node takes longer than many a view.
        self._taken = tuple([None if edge is None else kinds[edge] for edge in inputs])
        self.kinds = _kinds(node)
        self.outputs: list[Edge] = [(node, k) for k in range(len(self.kinds))]
        self.used: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        # Dunder names are asked for by copy and pickle before there is a node.
        if name.startswith("__"):
            raise AttributeError(name)
        if self.is_python:
            return _without_graph(getattr(self.node, name))
        return _signed(_without_graph(getattr(self.node, "_saved_" + name)))

    def __repr__(self) -> str:
        return f"Call({self.name})"

    @property
    def is_python(self) -> bool:
        """Whether the backward pass is a function of the user's."""
        return not callable(self.node)

    @property
    def function(self) -> type | None:
        """The class of a Python function."""
        return getattr(self.node, "_forward_cls", None)

    @property
    def edges(self) -> dict[Edge, GradientEdge]:
        return {edge: GradientEdge(*edge) for edge in self.inputs if edge is not None}

    def shape(self, output: int = 0) -> torch.Size:
        """The shape of an output."""
        return self.kinds[output][0]

    def zeros(self) -> list[Tensor | None]:
        """Zeros like the outputs; None where no call uses one, whose shape may not be known."""
        # A Python function wants them all.
        used = range(len(self.outputs)) if self.is_python else self.used
        return [_zeros(edge) if k in used else None for k, edge in enumerate(self.outputs)]

    def still(self) -> Tensors:
        """Zeros like the inputs that move."""
        return tuple(None if edge is None else _zeros(edge) for edge in self.inputs)

    def filled(self, dots: Tensors) -> list[Tensor]:
        """Tangents of the inputs that move, with zeros where they are None."""
        pairs = zip(self.inputs, dots, strict=True)
        return [_zeros(e) if dot is None else dot for e, dot in pairs if e is not None]

    def is_complex(self) -> bool:
        """Whether an output or a moving input is complex."""
        kinds = filter(None, (*self.kinds, *self._taken))
        return any(dtype.is_complex for _, dtype in kinds)

    def pull(self, *cotangents: Tensor | None) -> Tensors:
        """The transposed Jacobian times cotangents of the outputs: one per moving input."""
        # The node of a Python autograd.Function is not callable.
        node: Any = self.node
        if not self.is_python:
            result = node(*cotangents)
        else:
            # Autograd fills in zeros for it, which is not done here.
            pairs = zip(self.outputs, cotangents, strict=True)
            # Nor is there anybody who would forbid it to write to what it is given.
            result = node.apply(*[_zeros(edge) if c is None else c.clone() for edge, c in pairs])
        pulled = result if isinstance(result, tuple) else (result,)
        if self.is_python:
            pulled = self._of_tensors(pulled)
        return self.fitted(pulled)

    def fitted(self, cotangents: Sequence[Tensor | None]) -> Tensors:
        """Cotangents of the inputs in their shapes, summed over what broadcasting has repeated."""
        return tuple(map(_like_input, cotangents, self._taken))

    def _of_tensors(self, pulled: Tensors) -> Tensors:
        """What a Python function returned for its tensors; it has entries for other arguments."""
        node: Any = self.node
        given = [g for g, needed in zip(pulled, node.needs_input_grad, strict=False) if needed]
        parents = [parent for parent, _ in node.next_functions]
        if len(given) != sum(parent is not None for parent in parents):
            raise NotTwiceDifferentiable(
                f"the backward pass of {self.name} returns {len(pulled)} gradients, which do not "
                "match its arguments one to one; give it tensors, not lists of tensors"
            )
        rest = iter(given)
        return tuple(None if parent is None else next(rest) for parent in parents)


def _zeros(edge: Edge) -> Tensor:
    like = edge[0]._input_metadata[edge[1]]
    return torch.zeros(tuple(like.shape), dtype=like.dtype, device=like.device)


def _kinds(node: Node) -> list[Kind]:
    """Shape and dtype of each output."""
    outputs = node._input_metadata
    if any(like.is_nested_tensor for like in outputs):
        raise NotTwiceDifferentiable(f"{node.name()} gives a nested tensor, which no rule serves")
    return [(torch.Size(like.shape), like.dtype) for like in outputs]


def _like_input(cotangent: Tensor | None, kind: Kind | None) -> Tensor | None:
    if cotangent is None or kind is None:
        return None
    # A node leaves it to autograd's engine to sum over what broadcasting has repeated.
    shape, dtype = kind
    if cotangent.shape != shape:
        cotangent = cotangent.sum_to_size(shape)
    return cotangent if cotangent.dtype == dtype else cotangent.to(dtype)


def _without_graph(value: Any) -> Any:
    if isinstance(value, Tensor):
        # A number that autograd wraps is no tensor to a mode that watches what is dispatched.
        return value.detach() if value.requires_grad else value
    return tuple(map(_without_graph, value)) if isinstance(value, tuple) else value


def _signed(value: Any) -> Any:
    # Autograd shows the integers it saved as unsigned ones.
    if isinstance(value, int):
        return value - 2**64 if value >= 2**63 else value
    if isinstance(value, tuple):
        return tuple(map(_signed, value))
    return value


class Graph:
    """The calls that parameters flow through on their way to the losses, in order of evaluation.

    Every path by which a tangent can reach the losses is a chain of its edges, also through
    views, in-place writes, C++ extensions and Python functions: autograd keeps them for the
    gradient. What is not on such a path has derivative zero for autograd too.

    Attributes:
        calls: in order of evaluation.
        leaves: the edge of each parameter.
        root: the edge of the losses.
        uses: how many inputs each edge feeds.
    """

    def __init__(
        self, losses: Tensor, params: Sequence[Tensor], products: Mapping[Node, Product]
    ) -> None:
        self.leaves: list[Edge] = [_edge(p) for p in params]
        self.root = _edge(losses)
        moving = {node for node, _ in self.leaves}
        kinds = {(node, k): kind for node in moving for k, kind in enumerate(_kinds(node))}
        self.calls: list[Call] = []
        self.uses: dict[Edge, int] = {}
        for node in _in_order(self.root[0]):
            inputs = tuple([(n, k) if n in moving else None for n, k in node.next_functions])
            if any(inputs):
                moving.add(node)
                call = Call(node, inputs, kinds, products.get(node))
                kinds.update(zip(call.outputs, call.kinds, strict=True))
                self.calls.append(call)
                for edge in inputs:
                    if edge is not None:
                        self.uses[edge] = self.uses.get(edge, 0) + 1
        made = {call.node: call for call in self.calls}
        for node, k in (*self.uses, self.root):
            if node in made:
                made[node].used.add(k)

    def reaches(self, k: int) -> bool:
        """Whether the losses depend on parameter k."""
        return self.leaves[k] in self.uses or self.leaves[k] == self.root

    def behind(self, outputs: Sequence[Tensor | GradientEdge]) -> set[int]:
        """The positions of the calls that ``outputs`` depend on."""
        made = {call.node: i for i, call in enumerate(self.calls)}
        waiting = [_edge(output)[0] for output in outputs]
        found = set()
        while waiting:
            i = made.get(waiting.pop())
            if i is not None and i not in found:
                found.add(i)
                waiting += [edge[0] for edge in self.calls[i].inputs if edge is not None]
        return found

    def is_parameter(self, output: Tensor | GradientEdge) -> bool:
        return _edge(output) in self.leaves


def _edge(tensor: Tensor | GradientEdge) -> Edge:
    if isinstance(tensor, GradientEdge):
        return tensor.node, tensor.output_nr
    # A subclass would make the view that tells a leaf's edge a node of its own.
    with torch._C.DisableTorchFunctionSubclass():
        edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _in_order(root: Node) -> Iterator[Node]:
    """Every node behind ``root`` after all those that it depends on."""
    seen = {root}
    stack = [(root, iter(root.next_functions))]
    while stack:
        node, parents = stack[-1]
        for parent, _ in parents:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append((parent, iter(parent.next_functions)))
                break
        else:
            stack.pop()
            yield node
