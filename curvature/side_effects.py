"""Take back what a computation does besides returning its value: random numbers and buffers."""

from __future__ import annotations

import random
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle


class RandomState:
    """The state of the global random generators of torch (CPU and CUDA), numpy and Python."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if _cuda_in_use() else []
        self._numpy: Any = np.random.get_state()
        self._python = random.getstate()

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)
        random.setstate(self._python)


def _cuda_in_use() -> bool:
    # Asking every device for its generator would create a context on each.
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class SideEffects:
    """A block whose random numbers and module buffers are as before it, unless kept.

    Inside the block every ``torch.nn.Module`` that is called has its buffers (batch-norm
    statistics, spectral-norm vectors) copied before its forward runs. On exit the generators
    and the buffers are restored, also when the block raises; :meth:`keep` lets them stand.
    Not seen: generator objects of your own, and tensors that no called module holds as buffer.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> with SideEffects():
        ...     _ = norm(torch.randn(8, 2))
        >>> norm.running_mean
        tensor([0., 0.])
    """

    def __init__(self) -> None:
        self._seen: dict[int, nn.Module] = {}
        self._buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] = []
        self._rebound: dict[tuple[int, str], Tensor | None] = {}
        self._kept = False

    def __enter__(self) -> SideEffects:
        self.random = RandomState()
        self._hooks: list[RemovableHandle] = [
            register_module_forward_pre_hook(self._save),
            register_module_forward_hook(self._note_rebound, always_call=True),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is not None or not self._kept:
            self._restore_buffers()
            self.random.restore()
        self._seen.clear()
        self._buffers.clear()
        self._rebound.clear()

    def keep(self) -> None:
        """Let the effects stand at the end of the block, if it ends without an exception."""
        self._kept = True

    def _save(self, module: nn.Module, _: Any) -> None:
        if id(module) in self._seen:
            return
        for child in module.modules():
            if id(child) in self._seen:
                continue
            self._seen[id(child)] = child
            for name, buffer in child._buffers.items():
                copy = None if buffer is None else buffer.detach().clone()
                self._buffers.append((child, name, buffer, copy))

    def _note_rebound(self, module: nn.Module, *_: Any) -> None:
        for name, buffer in module._buffers.items():
            self._rebound[id(module), name] = buffer

    @torch.no_grad()
    def _restore_buffers(self) -> None:
        for module, name, buffer, copy in self._buffers:
            # A slot that holds neither may have been swapped by functional_call, which put its
            # own tensor there for the call and the module's back after it.
            last = self._rebound.get((id(module), name), buffer)
            if module._buffers.get(name) is last:
                module._buffers[name] = buffer
            # An unchanged buffer is not written: a write would invalidate graphs that saved it.
            if buffer is not None and copy is not None and not torch.equal(buffer, copy):
                buffer.copy_(copy)
