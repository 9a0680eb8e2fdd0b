"""Refuse derivatives through a checkpointed module that no longer has its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


class Reevaluation:
    """Compares what modules hold when evaluated, and when evaluated again by a derivative.

    ``torch.func.functional_call`` lends a module its parameters for the call. Checkpointing
    evaluates the module again during the derivative, with the module's own: where these have
    other values, PyTorch computes a wrong gradient without an error.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[nn.Module, str], list[Tensor]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, note what every module that is called holds."""
        with _before_each_module(self._note):
            yield

    @contextmanager
    def compared(self) -> Iterator[None]:
        """Inside, a module that is called with tensors of other values raises a ValueError."""
        with _before_each_module(self._compare):
            yield

    def _note(self, module: nn.Module) -> None:
        for name, tensor in _tensors(module):
            held = self._held.setdefault((module, name), [])
            if not any(tensor is other for other in held):
                held.append(tensor)

    def _compare(self, module: nn.Module) -> None:
        for name, tensor in _tensors(module):
            for other in self._held.get((module, name), []):
                if tensor is not other and not torch.equal(tensor, other):
                    raise ValueError(
                        f"checkpointing evaluates {type(module).__name__} again with another "
                        f"{name} than the loss was computed with (torch.func.functional_call "
                        "lends it for the first call only): load the values into the module "
                        "before, or switch checkpointing off"
                    )


@contextmanager
def _before_each_module(hook: Any) -> Iterator[None]:
    handle = register_module_forward_pre_hook(lambda module, _: hook(module))
    try:
        yield
    finally:
        handle.remove()


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    slots = [*module._parameters.items(), *module._buffers.items()]
    return [(name, tensor) for name, tensor in slots if tensor is not None]
