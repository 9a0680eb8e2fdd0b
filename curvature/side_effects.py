"""Take back what a computation does besides returning its value: random numbers and buffers."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from curvature.module_calls import module_calls
from curvature.versions import comparable, version

_NEW = object()  # stands for the content of a buffer before it was registered


class RandomState:
    """The state of the global random generators of torch (CPU and CUDA), numpy and Python.

    Example:
        >>> import torch
        >>> state = RandomState()
        >>> first = torch.rand(1)
        >>> state.restore()
        >>> bool(torch.rand(1) == first)
        True
    """

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if _cuda_in_use() else []
        self._numpy: Any = np.random.get_state()
        self._python = random.getstate()

    def restore(self) -> None:
        """Set the generators back; the state can be restored again.

        Example: see :class:`RandomState`.
        """
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)
        random.setstate(self._python)


def _cuda_in_use() -> bool:
    # Asking every device for its generator would create a context on each.
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class _Calls(threading.local):
    """The modules that a thread is in: how many, the outermost, and its buffers before the call."""

    def __init__(self) -> None:
        self.depth = 0
        self.outermost: nn.Module | None = None
        self.slots: dict[tuple[nn.Module, str], Tensor | None] = {}


class SideEffects:
    """A block whose random numbers and module buffers are as before it, unless kept.

    Inside the block every ``torch.nn.Module`` that is called has its buffers (batch-norm
    statistics, spectral-norm vectors) copied before its forward runs. On exit the generators
    and the buffers are restored, also when the block raises; :meth:`keep` lets them stand.
    Not seen: generator objects of your own, tensors that no called module holds as buffer,
    buffers inside ``torch.func`` transforms, and calls of modules inside a function that
    ``torch.compile`` has made (those of a module that it has made are).

    Args:
        modules: whose buffers are copied at once, as if they were called.

    Attributes:
        called: the modules that were called, but for those that these called.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> with SideEffects():
        ...     _ = norm(torch.randn(8, 2))
        >>> norm.running_mean
        tensor([0., 0.])
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._modules = list(modules)
        if not all(isinstance(module, nn.Module) for module in self._modules):
            raise TypeError("modules must hold torch.nn.Module alone")
        self._at_start: dict[tuple[nn.Module, str], Tensor | None] = {}
        self.called: set[nn.Module] = set()
        self._contents: dict[int, tuple[Tensor, Tensor, int]] = {}
        self._rebound: dict[tuple[nn.Module, str, int], tuple[Tensor | None, Any]] = {}
        self._calls = _Calls()
        self._kept = False

    def __enter__(self) -> SideEffects:
        self.random = RandomState()
        self._at_start = {slot: b for module in self._modules for slot, b in _buffers(module)}
        self._copy(self._at_start.values())
        self._watching = module_calls(self._before, self._after)
        self._watching.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watching.__exit__(None, None, None)
        if self._calls.depth > 0 and self._calls.outermost is not None:
            # An interrupt from the keyboard passes PyTorch's hooks by.
            self._note_rebound(self._calls.outermost)
        if kind is not None or not self._kept:
            self.rewind()
        self._at_start.clear()
        self._contents.clear()
        self._calls = _Calls()
        self._rebound.clear()

    def keep(self) -> None:
        """Let the effects stand at the end of the block, if it ends without an exception.

        Example:
            >>> import torch
            >>> norm = torch.nn.BatchNorm1d(2)
            >>> with SideEffects() as effects:
            ...     _ = norm(torch.randn(8, 2))
            ...     effects.keep()
            >>> norm.num_batches_tracked
            tensor(1)
        """
        self._kept = True

    def rewind(self) -> None:
        """Set random numbers and buffers back to where the block found them, and go on.

        Example:
            >>> import torch
            >>> norm = torch.nn.BatchNorm1d(2)
            >>> with SideEffects() as effects:
            ...     _ = norm(torch.randn(8, 2))
            ...     effects.rewind()
            ...     int(norm.num_batches_tracked)
            0
        """
        self.random.restore()
        self._restore_buffers()

    def _before(self, module: nn.Module) -> None:
        if self._calls.depth == 0:
            self.called.add(module)
            self._calls.outermost = module
            self._calls.slots = dict(_buffers(module))
            self._copy(self._calls.slots.values())
        self._calls.depth += 1

    def _copy(self, buffers: Iterable[Tensor | None]) -> None:
        for buffer in buffers:
            if buffer is None or id(buffer) in self._contents:
                continue
            if not is_functorch_wrapped_tensor(buffer):
                copy = buffer.detach().clone()
                self._contents[id(buffer)] = buffer, copy, version(buffer)

    def _after(self, module: nn.Module) -> None:
        if self._calls.depth == 0:
            return  # it was called before the block, by another thread
        self._calls.depth -= 1
        if self._calls.depth == 0:
            self._note_rebound(module)

    def _note_rebound(self, module: nn.Module) -> None:
        for slot, buffer in _buffers(module):
            before = self._calls.slots.get(slot, _NEW)
            if buffer is not before:
                first = self._rebound.get((*slot, id(before)), (before, before))[1]
                self._rebound[(*slot, id(buffer))] = buffer, first

    @torch.no_grad()
    def _restore_buffers(self) -> None:
        for (module, name, _), (buffer, first) in self._rebound.items():
            # functional_call lends its own tensors for a call: then the slot holds another again.
            if module._buffers.get(name, _NEW) is buffer:
                _fill(module, name, first)
        for slot in [slot for module in self._modules for slot, _ in _buffers(module)]:
            _fill(*slot, self._at_start.get(slot, _NEW))
        for buffer, copy, before in self._contents.values():
            # A write would invalidate graphs that saved the buffer: there is none if it has not
            # changed, and none that autograd counts if that did not count either, as in batch norm.
            counted = version(buffer) != before
            if not torch.equal(buffer, copy) if comparable(buffer) else counted:
                with torch.inference_mode(buffer.is_inference()):
                    (buffer if counted else buffer.data).copy_(copy)


def _fill(module: nn.Module, name: str, buffer: Any) -> None:
    """Put a buffer back into its slot, or remove the slot that there was not."""
    if buffer is _NEW:
        delattr(module, name)
    else:
        module._buffers[name] = buffer


def _buffers(module: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], Tensor | None]]:
    # As module.modules(), which takes several times as long to name them too.
    seen, waiting = {module}, [module]
    while waiting:
        child = waiting.pop()
        for name, buffer in child._buffers.items():
            yield (child, name), buffer
        fresh = [m for m in child._modules.values() if m is not None and m not in seen]
        seen.update(fresh)
        waiting += fresh
