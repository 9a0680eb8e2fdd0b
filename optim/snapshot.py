"""What a step of an optimizer changes besides its parameters, to be taken back or compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Snapshot:
    """A copy of an optimizer's state, of the entries of its groups and of its plain attributes.

    Plain are numbers, strings, tensors and lists, tuples or dictionaries of these. Parameters
    are never copied, wherever they appear.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._params = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._state = {p: self._copy(entry) for p, entry in optimizer.state.items()}
        self._groups = [self._copy(_without_params(group)) for group in optimizer.param_groups]
        self._attributes = {
            key: self._copy(value)
            for key, value in vars(optimizer).items()
            if key not in _COVERED and _is_plain(value)
        }

    def restore(self) -> None:
        """Set the optimizer back; the snapshot can be restored again."""
        state = self._optimizer.state
        state.clear()
        for p, entry in self._state.items():
            state[p] = self._copy(entry)
        for group, entries in zip(self._optimizer.param_groups, self._groups, strict=True):
            for key in _without_params(group):
                del group[key]
            group.update(self._copy(entries))
        vars(self._optimizer).update(self._copy(self._attributes))

    def equals(self, other: Snapshot) -> bool:
        """Whether both hold the same to rounding."""
        return (
            _same(self._state, other._state)
            and _same(self._groups, other._groups)
            and _same(self._attributes, other._attributes)
        )

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if id(value) in self._params else value.detach().clone()
        if type(value) is dict:
            return {key: self._copy(entry) for key, entry in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._copy(entry) for entry in value)
        return value


_COVERED = {"state", "param_groups", "defaults"}


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.allclose(a, b, equal_nan=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
