"""Hold what autograd saves, so that it can be freed piece by piece."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks


class _Held:
    """One saved tensor, and its version then."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor.detach()
        self._version = tensor._version

    def get(self) -> Tensor:
        if self.tensor is None:
            raise RuntimeError(
                "a low-memory tape answers one question and frees its graph on the way: record "
                "the loss again, or use Tape() for several"
            )
        if self.tensor._version != self._version:
            # With hooks autograd leaves this check to them.
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {tuple(self.tensor.shape)} is at version "
                f"{self.tensor._version}; expected version {self._version}"
            )
        return self.tensor


class Saved:
    """What the nodes of one forward pass have saved."""

    def __init__(self) -> None:
        self._all: weakref.WeakSet[_Held] = weakref.WeakSet()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Around the forward pass."""
        with saved_tensors_hooks(self._pack, self._unpack):
            yield

    def addresses(self) -> set[int]:
        """The addresses of all that is held."""
        tensors = [held.tensor for held in self._all]
        return {t.data_ptr() for t in tensors if t is not None and t.layout == torch.strided}

    def _pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor)
        self._all.add(held)
        return held

    @staticmethod
    def _unpack(held: _Held) -> Tensor:
        return held.get()

    def free(self, node: Node) -> None:
        """Drop what this node has saved."""
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                saved = getattr(node, name)
                for each in saved if isinstance(saved, tuple) else (saved,):
                    # As it was packed: to unpack it is to evaluate a checkpointed region again.
                    # An older PyTorch does not show it; there it is freed with the graph.
                    packed = getattr(each, "data", None)
                    if isinstance(packed, _Held):
                        packed.tensor = None
