"""Where in the user's model an operation came from."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

_sequence_nr = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


@cache
def _is_own(file: str) -> bool:
    return file.startswith(_OWN)


@dataclass(frozen=True)
class Origin:
    """The call of the user's model that an operation belongs to.

    Attributes:
        operation: autograd's name of the operation, as "AddmmBackward0".
        function: the torch function that was called, as "linear"; empty if it is not known.
        module: path of the innermost module, as "layers.0.attention"; empty outside modules.
        line: file and line of the user's code, as "model.py:12" or "after model.py:12"; empty if
            it is not known.
    """

    operation: str
    function: str
    module: str
    line: str

    def __str__(self) -> str:
        parts = [self.function or self.operation]
        parts += [f"in module {self.module}"] if self.module else []
        parts += [self.line] if self.line else []
        return ", ".join(parts)


class Origins:
    """Notes, during a forward pass, which stretch of autograd's sequence each call made."""

    def __init__(self) -> None:
        # Each with its first number, the function if it is known, the line, and the modules.
        self._stretches: list[tuple[int, Any, tuple[str, int], tuple[nn.Module, ...]]] = []
        self._modules: tuple[nn.Module, ...] = ()
        self._line = ("", 0)

    def enter(self, module: nn.Module) -> None:
        """A module is called."""
        self._modules = (*self._modules, module)
        self._begin(None)

    def leave(self) -> None:
        """The innermost module has returned."""
        self._modules = self._modules[:-1]
        self._begin(None)

    def _begin(self, function: Callable[..., Any] | None) -> None:
        """What autograd records from here on belongs to this function."""
        self._stretches.append((_sequence_nr(), function, self._line, self._modules))

    def call(self, function: Callable[..., Any]) -> None:
        """A torch function is called."""
        frame = sys._getframe(1)
        while _is_own(frame.f_code.co_filename) and (caller := frame.f_back) is not None:
            frame = caller
        self._line = frame.f_code.co_filename, frame.f_lineno
        self._begin(function)

    def returned(self) -> None:
        """The torch function has returned."""
        self._begin(None)

    def of(self, operation: str, sequence_nr: int) -> Origin:
        """The origin of the node with this name and number in autograd's sequence."""
        k = bisect_right(self._stretches, sequence_nr, key=itemgetter(0)) - 1
        if k < 0:
            return Origin(operation, "", "", "")
        _, called, (file, number), modules = self._stretches[k]
        function = "" if called is None else getattr(called, "__name__", str(called))
        line = f"{file}:{number}" if file else ""
        path = ""
        if modules:
            path = next((name for name, m in modules[0].named_modules() if m is modules[-1]), "")
        # Python functions of the user's own are not seen: they come after the last call that is.
        return Origin(operation, function, path, line if function or not line else f"after {line}")
