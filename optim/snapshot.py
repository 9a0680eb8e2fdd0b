"""What a step of an optimizer changes besides its parameters, to be taken back or compared."""

from __future__ import annotations

import logging
import math
import pickle
import random
from collections import deque
from collections.abc import Iterable
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optim.sharded import local

_FIXED = (
    *(type(None), bool, int, float, complex, str, bytes, np.generic, Enum, type),
    *(torch.dtype, torch.device, FunctionType, BuiltinFunctionType, MethodType),
)
_VALUES = (Tensor, np.ndarray, torch.Generator, random.Random, np.random.Generator)
_CONTAINERS = (list, tuple, deque, set, frozenset)
_FOREIGN = (nn.Module, Optimizer, ModuleType, logging.Logger)


class Snapshot:
    """What an optimizer's state, its groups and its own attributes hold.

    Tensors, arrays, random generators, containers, and objects made of nothing but these, are set
    back in place: each stays the one that it is, wherever it is held. Anything else (a model, a
    logger, a lock) is left alone, and what it holds is not seen. So are parameters.
    """

    @torch.no_grad()
    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._params = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._attributes = _own_attributes(optimizer)
        self._held: dict[int, tuple[Any, Any]] = {}
        for value in (optimizer.state, optimizer.param_groups, *self._attributes.values()):
            self._hold(value)

    def _hold(self, value: Any) -> None:
        # What is held in several places must be one object afterwards too.
        if id(value) in self._held or id(value) in self._params:
            return
        # Asked first, since most are tensors.
        if isinstance(value, _VALUES):
            self._held[id(value)] = value, _copy(value)
        elif not isinstance(value, _FIXED):
            entries = _entries(value)
            if entries is not None:
                self._held[id(value)] = value, entries
                for entry in _values(entries):
                    self._hold(entry)

    def restore(self) -> None:
        """Set the optimizer back; the snapshot can be restored again."""
        for value, held in self._held.values():
            if isinstance(value, _VALUES):
                _write(value, held)
            else:
                _fill(value, held)
        attributes = vars(self._optimizer)
        for key in _own_attributes(self._optimizer):
            del attributes[key]
        attributes.update(self._attributes)

    def equals(self, other: Snapshot) -> bool:
        """Whether both hold the same to rounding."""
        here, there = ([held for _, held in x._held.values()] for x in (self, other))
        pairs = zip([self._attributes, *here], [other._attributes, *there], strict=False)
        return len(here) == len(there) and all(_same(a, b) for a, b in pairs)


def _own_attributes(optimizer: Optimizer) -> dict[str, Any]:
    covered = {"state", "param_groups", "defaults"}
    return {
        key: value
        for key, value in vars(optimizer).items()
        # Torch's hooks are the caller's to register, at any time.
        if key not in covered and not key.startswith("_optimizer_")
    }


def _entries(value: Any) -> dict[Any, Any] | list[Any] | None:
    """What a container, or an object that is made of plain things, holds; else None."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, _CONTAINERS):
        return list(value)
    return dict(vars(value)) if _is_plain(value, set()) else None


def _values(entries: dict[Any, Any] | list[Any]) -> Iterable[Any]:
    return entries.values() if isinstance(entries, dict) else entries


def _is_plain(value: Any, seen: set[int]) -> bool:
    if id(value) in seen or isinstance(value, (_FIXED, _VALUES)):
        return True
    seen.add(id(value))
    if isinstance(value, dict):
        return all(_is_plain(entry, seen) for entry in value.values())
    if isinstance(value, _CONTAINERS):
        return all(_is_plain(entry, seen) for entry in value)
    if isinstance(value, _FOREIGN) or not hasattr(value, "__dict__"):
        return False
    return all(_is_plain(entry, seen) for entry in vars(value).values())


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return pickle.dumps(value.getstate())
    return pickle.dumps(value.bit_generator.state)


@torch.no_grad()
def _write(value: Any, held: Any) -> None:
    if isinstance(value, Tensor):
        here, there = local(value), local(held)
        if here.shape != there.shape:
            value.data = held.clone()
        # A graph may have saved what the step has left alone.
        elif here.layout != torch.strided or not torch.equal(here, there):
            here.copy_(there)
    elif isinstance(value, np.ndarray):
        if not np.array_equal(value, held):
            value[...] = held
    elif isinstance(value, torch.Generator):
        value.set_state(held)
    elif isinstance(value, random.Random):
        value.setstate(pickle.loads(held))
    else:
        value.bit_generator.state = pickle.loads(held)


def _fill(value: Any, held: Any) -> None:
    if isinstance(value, (tuple, frozenset)):
        return
    if isinstance(value, list):
        value[:] = held
        return
    inside = value if isinstance(value, (dict, deque, set)) else vars(value)
    inside.clear()
    if isinstance(inside, deque):
        inside.extend(held)
    else:
        inside.update(held)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        here, there = local(a), local(b)
        return here.shape == there.shape and torch.allclose(here, there, equal_nan=True)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and np.allclose(a, b, equal_nan=True)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_entry(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same_entry, a, b))
    return bool(a == b)


def _same_entry(a: Any, b: Any) -> bool:
    # Tensors and containers are compared on their own, other objects not at all.
    if not isinstance(a, _FIXED) or not isinstance(b, _FIXED):
        return type(a) is type(b)
    return bool(a == b) or (_is_nan(a) and _is_nan(b))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
