"""The modules that closures call, remembered where compiled functions hide the calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from weakref import WeakSet

from torch import nn


class Called:
    """The outermost modules that were called in earlier steps.

    Inside a function that ``torch.compile`` has made no call is seen: a first step that runs
    uncompiled tells which modules there are.
    """

    def __init__(self) -> None:
        self._modules: WeakSet[nn.Module] = WeakSet()
        self.known = False

    def note(self, modules: Iterable[nn.Module]) -> None:
        """Remember modules that a step has called."""
        self._modules.update(modules)
        self.known = True

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self._modules))

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, _: object) -> None:
        self.__init__()  # type: ignore[misc]
