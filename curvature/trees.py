"""Parameters and directions as pytrees: flatten, compare, and refuse what cannot be used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.utils import _pytree as pytree

from curvature.losses import is_finite, unusable

_SUPPORTED_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Flat:
    """A checked pytree of parameters: leaves, their names for messages, and the way back.

    The spec of a list of tensors, which is what optimizers have, is its length.
    """

    leaves: list[Tensor]
    spec: pytree.TreeSpec | int

    def name(self, k: int, tree: str = "params") -> str:
        """The name of leaf k, as "params['weight']"."""
        return tree + _keys(self.rebuild(self.leaves))[k]

    def rebuild(self, leaves: Sequence[Tensor | None]) -> Any:
        if isinstance(self.spec, int):
            return list(leaves)
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
    leaves, spec = _flatten(params)
    if not leaves:
        raise ValueError(
            "params holds no tensor: there is nothing to differentiate with respect to"
        )
    for k, leaf in enumerate(leaves):
        reason = _unusable(leaf)
        if reason is not None:
            raise TypeError(f"{Flat(leaves, spec).name(k)} {reason}")
    return Flat(leaves, spec)


def flatten_direction(direction: Any, params: Flat, *, argument: str = "direction") -> list[Tensor]:
    """The leaves of ``direction`` in the order of ``params``.

    ``direction`` has the structure of params (dictionaries may list their keys in another
    order), or is a plain list of tensors in params' order.

    Raises:
        TypeError: an iterator, or a leaf is no dense tensor, or its dtype differs from its
            parameter's.
        ValueError: structure, shape or device differ, or an entry is NaN or infinite.
    """
    if isinstance(direction, Iterator):
        raise TypeError(f"{argument} is an iterator, which can be read only once; pass a list")
    leaves, spec = _flatten(direction)
    if spec != params.spec:
        leaves = _in_order(direction, params, argument)
    for k, (leaf, param) in enumerate(zip(leaves, params.leaves, strict=True)):
        misfit = _misfit(leaf, param)
        if misfit is not None:
            kind, reason = misfit
            raise kind(f"{params.name(k, argument)} {reason}")
    bad = [params.name(k, argument) for k, leaf in enumerate(leaves) if not is_finite(leaf)]
    if bad:
        raise ValueError(f"{', '.join(bad)} holds NaN or infinite entries")
    return [leaf.detach() for leaf in leaves]


def _flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec | int]:
    if type(tree) is list and all(isinstance(leaf, Tensor) for leaf in tree):
        return list(tree), len(tree)
    return pytree.tree_flatten(tree)


def _in_order(direction: Any, params: Flat, argument: str) -> list[Any]:
    """The leaves of a direction that is built otherwise than params."""
    paths, _ = pytree.tree_flatten_with_path(direction)
    given = {pytree.keystr(path): leaf for path, leaf in paths}
    wanted = _keys(params.rebuild(params.leaves))
    if set(given) == set(wanted):
        return [given[key] for key in wanted]
    if isinstance(direction, list) and len(direction) == len(wanted) == len(paths):
        return list(direction)
    missing = [key for key in wanted if key not in given]
    extra = [key for key in given if key not in wanted]
    raise ValueError(
        f"{argument} does not have the structure of params: missing {missing or 'nothing'}, "
        f"unexpected {extra or 'nothing'}; build it with the keys of params"
    )


def _keys(params: Any) -> list[str]:
    return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(params)[0]]


def _unusable(leaf: Any) -> str | None:
    """Why this is no parameter that can be differentiated twice."""
    if not isinstance(leaf, Tensor):
        return f"is a {type(leaf).__name__}, not a tensor"
    if leaf.dtype not in _SUPPORTED_DTYPES:
        advice = (
            "split it into real and imaginary parts"
            if leaf.is_complex()
            else "convert it to float32 or float64, or leave it out of params"
        )
        return f"has dtype {leaf.dtype}; only float32 and float64 can be used: {advice}"
    return unusable(leaf)


def _misfit(leaf: Any, param: Tensor) -> tuple[type[Exception], str] | None:
    """Why this is no tangent of the parameter."""
    if not isinstance(leaf, Tensor):
        return TypeError, f"is a {type(leaf).__name__}, not a tensor"
    if reason := unusable(leaf):
        return TypeError, reason
    if leaf.shape != param.shape:
        return ValueError, f"has shape {tuple(leaf.shape)}, its parameter has {tuple(param.shape)}"
    if leaf.dtype != param.dtype:
        return TypeError, f"has dtype {leaf.dtype}, its parameter has {param.dtype}"
    if leaf.device != param.device:
        return ValueError, f"is on {leaf.device}, its parameter is on {param.device}"
    return None
