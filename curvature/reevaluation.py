"""Refuse derivatives through a checkpointed module whose parameters have become others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from curvature.module_calls import module_calls
from curvature.versions import same, version


class Reevaluation:
    """Compares what modules hold when evaluated, and when evaluated again by a derivative.

    Checkpointing evaluates a module again during the derivative, with the parameters that it
    has then. Where these have other values, PyTorch computes a wrong derivative without an
    error: after a step, or where ``torch.func.functional_call`` had lent them for the first call.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[nn.Module, str], list[tuple[Tensor, int]]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, note what every module that is called holds."""
        with module_calls(self._note):
            yield

    @contextmanager
    def compared(self) -> Iterator[None]:
        """Inside, a module that is called with other values raises a ValueError."""
        with module_calls(self._compare):
            yield

    def _note(self, module: nn.Module) -> None:
        # To the tape's own mode, reading an attribute is a call like any other.
        with torch._C.DisableTorchFunction():
            for name, tensor in _tensors(module):
                held = self._held.setdefault((module, name), [])
                if not any(tensor is other for other, _ in held):
                    held.append((tensor, version(tensor)))

    def _compare(self, module: nn.Module) -> None:
        for name, tensor in _tensors(module):
            for other, before in self._held.get((module, name), []):
                # A buffer may have been written by the very call that is repeated.
                if tensor is other:
                    differs = name in module._parameters and version(tensor) != before
                else:
                    differs = not same(tensor, other)
                if differs:
                    raise ValueError(
                        f"checkpointing evaluates {type(module).__name__} again with another "
                        f"{name} than the loss was computed with: ask for derivatives before the "
                        "step; load values into the module instead of lending them by "
                        "torch.func.functional_call; or switch checkpointing off"
                    )


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    slots = [*module._parameters.items(), *module._buffers.items()]
    return [(name, tensor) for name, tensor in slots if tensor is not None]
