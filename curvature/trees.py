"""Parameters and directions as pytrees: flatten, compare, and refuse what cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.utils import _pytree as pytree

from curvature.losses import is_finite

SUPPORTED_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Flat:
    """A checked pytree of parameters: leaves, their names for messages, and the way back."""

    leaves: list[Tensor]
    spec: pytree.TreeSpec

    @property
    def names(self) -> list[str]:
        return _names(self.rebuild(self.leaves))

    def rebuild(self, leaves: list[Tensor]) -> Any:
        return pytree.tree_unflatten(leaves, self.spec)


def flatten_params(params: Any) -> Flat:
    """Flatten ``params``, refusing anything but dense float32 or float64 tensors.

    Raises:
        TypeError: a leaf is no tensor, or has another dtype or layout.
        ValueError: there is no tensor at all.
        RuntimeError: a ``torch.func`` transform is around the call.
    """
    if peek_interpreter_stack() is not None:
        raise RuntimeError(
            "this cannot be called inside vmap, grad or another torch.func transform; call it "
            "outside (per_sample=True gives the numbers of each sample)"
        )
    if isinstance(params, Iterator):
        raise TypeError(
            "params is an iterator, which can be read only once; pass "
            "dict(model.named_parameters()) or list(model.parameters())"
        )
    leaves, spec = pytree.tree_flatten(params)
    if not leaves:
        raise ValueError(
            "params holds no tensor: there is nothing to differentiate with respect to"
        )
    for k, leaf in enumerate(leaves):
        reason = _unusable(leaf)
        if reason is not None:
            raise TypeError(f"{_names(params)[k]} {reason}")
    return Flat(leaves, spec)


def flatten_direction(direction: Any, params: Flat, *, argument: str = "direction") -> list[Tensor]:
    """The leaves of ``direction`` in the order of ``params``.

    ``direction`` has the structure of params (dictionaries may list their keys in another
    order), or is a plain list of tensors in params' order.

    Raises:
        TypeError: a leaf is no tensor, or its dtype differs from its parameter's.
        ValueError: structure, shape or device differ, or an entry is NaN or infinite.
    """
    paths, _ = pytree.tree_flatten_with_path(direction)
    given = {pytree.keystr(path): leaf for path, leaf in paths}
    wanted = [name.removeprefix("params") for name in params.names]
    if set(given) == set(wanted):
        leaves = [given[key] for key in wanted]
    elif isinstance(direction, list) and len(direction) == len(wanted) == len(paths):
        leaves = list(direction)
    else:
        missing = [key for key in wanted if key not in given]
        extra = [key for key in given if key not in wanted]
        raise ValueError(
            f"{argument} does not have the structure of params: missing {missing or 'nothing'}, "
            f"unexpected {extra or 'nothing'}; build it with the keys of params"
        )
    for key, leaf, param in zip(wanted, leaves, params.leaves, strict=True):
        _check_pair(argument + key, leaf, param)
    bad = [argument + key for key, leaf in zip(wanted, leaves, strict=True) if not is_finite(leaf)]
    if bad:
        raise ValueError(f"{', '.join(bad)} holds NaN or infinite entries")
    return [leaf.detach() for leaf in leaves]


def _names(params: Any) -> list[str]:
    return ["params" + pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(params)[0]]


def _unusable(leaf: Any) -> str | None:
    """Why this is no parameter that can be differentiated twice."""
    if not isinstance(leaf, Tensor):
        return f"is a {type(leaf).__name__}, not a tensor"
    if leaf.dtype not in SUPPORTED_DTYPES:
        advice = (
            "split it into real and imaginary parts"
            if leaf.is_complex()
            else "convert it to float32 or float64, or leave it out of params"
        )
        return f"has dtype {leaf.dtype}; only float32 and float64 can be used: {advice}"
    if leaf.layout != torch.strided:
        return f"has layout {leaf.layout}; only dense tensors can be used"
    if leaf.is_meta:
        return "is on the meta device, which holds no numbers; materialise it"
    return None


def _check_pair(name: str, leaf: Any, param: Tensor) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{name} is a {type(leaf).__name__}, not a tensor")
    if leaf.shape != param.shape:
        raise ValueError(
            f"{name} has shape {tuple(leaf.shape)}, its parameter has {tuple(param.shape)}"
        )
    if leaf.dtype != param.dtype:
        raise TypeError(f"{name} has dtype {leaf.dtype}, its parameter has {param.dtype}")
    if leaf.device != param.device:
        raise ValueError(f"{name} is on {leaf.device}, its parameter is on {param.device}")
    if leaf.layout != torch.strided:
        raise TypeError(f"{name} has layout {leaf.layout}; only dense tensors can be used")
