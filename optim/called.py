"""The modules that closures call, remembered where compiled functions hide the calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from weakref import WeakSet

from torch import nn

from curvature import compilations


class Called:
    """The outermost modules that were called in earlier steps.

    Inside a function that ``torch.compile`` has made no call is seen: an evaluation that runs
    uncompiled, and is thrown away, tells which modules there are. It is made at the first step,
    and again where something was compiled since. So the buffers of a module are not seen if all
    code that calls it was compiled before the first step, and none of it ran at that step.

    Attributes:
        known: whether a step was noted.
    """

    def __init__(self) -> None:
        self._modules: WeakSet[nn.Module] = WeakSet()
        self._compilations = 0
        self._learned = False
        self.known = False

    def begin(self) -> None:
        """A step begins, for which nothing is learned yet."""
        self._learned = False

    @property
    def behind(self) -> bool:
        """Whether code was compiled in which calls may be hidden that no step has seen."""
        return not self._learned and compilations() != self._compilations

    def learn(self, modules: Iterable[nn.Module]) -> None:
        """Remember what an uncompiled evaluation has called, for the step that is taken."""
        self._modules.update(modules)
        self._learned = True

    def note(self, modules: Iterable[nn.Module]) -> None:
        """Remember modules that a step has called, at its end."""
        self._modules.update(modules)
        if self._learned:
            self._compilations = compilations()
        self.known = True

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self._modules))

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, _: object) -> None:
        self.__init__()  # type: ignore[misc]
