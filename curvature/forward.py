"""What is noted while the forward pass runs, besides the graph that autograd records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from curvature.differentiable import REPLACED, PlainFormulas, otherwise
from curvature.module_calls import module_calls
from curvature.nested import CHECKED, check_call
from curvature.origin import Origins
from curvature.saved import Saved

_LAYERS = {F.linear, F.conv1d, F.conv2d, F.conv3d}  # (input, weight, bias)
_NODES = {"MmBackward0", "BmmBackward0", "AddmmBackward0", "ConvolutionBackward0"}
_PRODUCTS = {torch.mm, torch.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__}
_WATCHED = CHECKED | REPLACED
_MULTIPLYING = _LAYERS | _PRODUCTS

# Below these a product costs no more than the few sums that save one.
_LEAST_LENGTH = 128  # of the sums that the product consists of
_LEAST_CONVOLVED = 256  # likewise, of which lengths are costly to know
_LEAST_WORK = 25_000_000  # multiplications


class Product:
    """The result of a product of two tensors, as long as nobody writes to it."""

    def __init__(self, result: Tensor, bias: Tensor | None) -> None:
        self._tensors = [result.detach()] + ([] if bias is None else [bias.detach()])
        self._versions = [t._version for t in self._tensors]

    def address(self) -> int:
        return self._tensors[0].data_ptr()

    def __call__(self) -> tuple[Tensor, Tensor | None] | None:
        """The result and the bias that was added, or None if one was written to since."""
        if [t._version for t in self._tensors] != self._versions:
            return None
        return self._tensors[0], self._tensors[1] if len(self._tensors) > 1 else None


class Forward:
    """Notes of one forward pass.

    Args:
        freeing: let what autograd saves be freed.

    Attributes:
        saved: what autograd saved, if that can be freed.
        origins: where operations came from.
        products: the results of products of two tensors that both have a graph, by their nodes.
    """

    def __init__(self, *, freeing: bool) -> None:
        self.origins = Origins()
        self.saved = Saved() if freeing else None
        self.products: dict[Node, Product] = {}
        self._changes: list[str] = []
        self._repeats = False

    @property
    def hooks_interfere(self) -> bool:
        """Whether a hook, put in the forward pass on what was computed, changed a cotangent."""
        return bool(self._changes)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Around the forward pass."""
        with (
            module_calls(self._enter, lambda _: self.origins.leave()),
            _Watch(self),
            nullcontext() if self.saved is None else self.saved.holding(),
        ):
            yield

    def evaluated_again(self) -> AbstractContextManager[Any]:
        """Around what may evaluate parts of the forward pass again, as checkpointing does."""
        return PlainFormulas() if self._repeats else nullcontext()

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a torch function, and note what is of use."""
        if func is Tensor.register_hook:
            return self._register_hook(*args, **kwargs)
        self.origins.call(func)
        other = None
        if func in _WATCHED:
            check_call(func, args, kwargs)
            other = otherwise(func, args, kwargs)
            # Of weight_norm PyTorch's own node saves the same.
            self._repeats = self._repeats or (other is not None and func is not torch._weight_norm)
        result = (other or func)(*args, **kwargs)
        self.origins.returned()
        if func in _MULTIPLYING and len(args) >= 2:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            left, right = args[:2]
            length = left.shape[-1] if func in _PRODUCTS else math.prod(right.shape[1:])
            least = _LEAST_LENGTH if func in _PRODUCTS or right.ndim == 2 else _LEAST_CONVOLVED
            if length >= least and length * result.numel() >= _LEAST_WORK:
                self._keep(left, right, bias, result)
        return result

    def _enter(self, module: nn.Module) -> None:
        # Such hooks are put on autograd's nodes, where nobody hears of it.
        if module._backward_hooks and not module._is_full_backward_hook:
            self._changes.append("module")
        self.origins.enter(module)

    def forget_products(self) -> None:
        """Where memory counts, forget the products that autograd does not hold anyway."""
        if self.saved is not None:
            held = self.saved.addresses()
            self.products = {n: p for n, p in self.products.items() if p.address() in held}

    def _keep(self, left: Tensor, right: Tensor, bias: Tensor | None, result: Tensor) -> None:
        if not (left.requires_grad and right.requires_grad) or result.grad_fn is None:
            return
        if result.dtype not in (torch.float32, torch.float64):
            return
        node = _behind_views(result.grad_fn)
        if bias is not None and node is not None and node.name() == "AddBackward0":
            # Of an input that is not contiguous the product is a node of its own.
            node = _behind_views(node.next_functions[0][0])
        if node is not None and node.name() in _NODES:
            self.products[node] = Product(result, bias)

    def _register_hook(self, tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Any:
        # A parameter's own hook changes its gradient alone.
        if tensor.is_leaf:
            return tensor.register_hook(hook)  # type: ignore[no-untyped-call]

        # The hook lives as long as the graph, which these notes hold: it must not hold them.
        changes = self._changes

        def watched(cotangent: Tensor) -> Tensor | None:
            version = cotangent._version
            changed = hook(cotangent)
            if changed is not None or cotangent._version != version:
                changes.append("tensor")
            return changed

        return tensor.register_hook(watched)  # type: ignore[no-untyped-call]


def _behind_views(node: Node | None) -> Node | None:
    while node is not None and node.name() in ("ViewBackward0", "UnsafeViewBackward0"):
        node = node.next_functions[0][0]
    return node


class _Watch(TorchFunctionMode):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self._forward = forward

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self._forward.call(func, args, kwargs or {})
