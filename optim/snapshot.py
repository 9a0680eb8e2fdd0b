"""What a step of an optimizer changes besides its parameters, to be taken back or compared."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer


class Snapshot:
    """A copy of an optimizer's state, of the entries of its groups and of its own attributes.

    Of the attributes, numbers, strings, tensors, arrays and containers of these are copied; any
    other (a model, a logger) is shared, and what it holds is not seen. Parameters are never
    copied, wherever they appear.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._params = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        self._state = {p: self._copy(entry) for p, entry in optimizer.state.items()}
        self._groups = [self._copy(_without_params(group)) for group in optimizer.param_groups]
        self._attributes = self._copy(_own_attributes(optimizer))

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
        attributes = vars(self._optimizer)
        for key in _own_attributes(self._optimizer):
            del attributes[key]
        attributes.update(self._copy(self._attributes))

    def equals(self, other: Snapshot) -> bool:
        """Whether both hold the same to rounding."""
        return (
            _same(self._state, other._state)
            and _same(self._groups, other._groups)
            and _same(self._attributes, other._attributes)
        )

    def _copy(self, value: Any) -> Any:
        # The common cases, many times faster than deepcopy.
        if isinstance(value, Tensor):
            return value if id(value) in self._params else value.detach().clone()
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if type(value) is dict:
            return {key: self._copy(entry) for key, entry in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._copy(entry) for entry in value)
        return copy.deepcopy(value, dict(self._params))


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _own_attributes(optimizer: Optimizer) -> dict[str, Any]:
    covered = {"state", "param_groups", "defaults"}
    return {
        key: value
        for key, value in vars(optimizer).items()
        # Torch's hooks are the caller's to register, at any time.
        if key not in covered and not key.startswith("_optimizer_") and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, deque)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Tensor, np.ndarray))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.allclose(a, b, equal_nan=True))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and np.allclose(a, b, equal_nan=True)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple, deque)) and isinstance(b, (list, tuple, deque)):
        return len(a) == len(b) and all(map(_same, a, b))
    if hasattr(a, "__dict__") and type(a) is type(b):
        return _same(vars(a), vars(b))
    return bool(a == b)
