"""What a checkpoint must have in common with the wrapper that loads it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from optim.portable import entry_of

Shapes = list[list[list[int]]]
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def shapes(groups: Iterable[dict[str, Any]]) -> Shapes:
    """The shape of every parameter of each group."""
    return [[list(p.shape) for p in group["params"]] for group in groups]


def described(part: Any, kinds: tuple[type, ...]) -> str:
    """A description that is the same in every process.

    An instance of one of ``kinds`` is its class and attributes, but for those that a dataclass
    keeps out of its ``repr``; anything else is its ``repr``, without an address.
    """
    if isinstance(part, kinds):
        hidden = {f.name for f in fields(part) if not f.repr} if is_dataclass(part) else set()
        entries = [f"{k}={described(v, kinds)}" for k, v in vars(part).items() if k not in hidden]
        return f"{type(part).__qualname__}({', '.join(entries)})"
    if isinstance(part, (list, tuple)):
        return f"({', '.join(described(entry, kinds) for entry in part)})"
    if isinstance(part, Mapping):
        return described(list(part.items()), kinds)
    return _ADDRESS.sub("", repr(part))


def checked_entry(
    state_dict: Any, configuration: Mapping[str, Any], others: Iterable[str]
) -> dict[str, Any]:
    """The wrapper's own entry of a state_dict, if it was saved by one that is set up alike.

    Args:
        configuration: of the wrapper that loads; ``shapes`` by :func:`shapes`.
        others: names that the entry holds besides; ``states``, how many there are, is one.

    Raises:
        ValueError: it was not; the message names the first difference.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict is a {type(state_dict).__name__}, not a dictionary")
    lacking = {"state", "param_groups"} - state_dict.keys()
    if lacking:
        raise ValueError(f"this is no state_dict of an optimizer: it lacks {sorted(lacking)}")
    groups = state_dict["param_groups"]
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError("the state_dict's 'param_groups' is no list of dictionaries")
    entry = entry_of(state_dict)
    if entry is None:
        raise ValueError(
            "the state_dict has no entry 'wrapper': it was saved by an optimizer that is not "
            "wrapped, or went through what drops that entry, as flatten_optimizer_state_dict of "
            "torch.distributed.checkpoint does; save what this optimizer's state_dict() gives"
        )
    if not isinstance(entry, dict):
        raise ValueError(f"the state_dict's 'wrapper' is a {type(entry).__name__}")
    kind = configuration["kind"]
    if entry.get("kind", kind) != kind:
        raise ValueError(f"the state_dict was saved by {entry['kind']}, this is {kind}")
    differing = entry.keys() ^ {*configuration, *others}
    if differing:
        raise ValueError(f"the state_dict's 'wrapper' lacks or adds {sorted(differing)}")
    for name, here in configuration.items():
        if entry[name] != here:
            raise ValueError(
                f"the state_dict was saved with {_difference(entry[name], here)}"
                if name == "shapes"
                else f"the state_dict was saved with {name} {entry[name]}, this has {here}"
            )
    states = len(state_dict["state"])
    if states != entry["states"]:
        raise ValueError(
            f"the state_dict has a state for {states} parameters, saved were {entry['states']}"
        )
    return entry


def _difference(saved: Shapes, here: Shapes) -> str:
    if len(saved) != len(here):
        return f"{len(saved)} parameter groups, this has {len(here)}"
    for i, (there, own) in enumerate(zip(saved, here, strict=True)):
        if len(there) != len(own):
            return f"{len(there)} parameters in group {i}, this has {len(own)}"
        for k, (a, b) in enumerate(zip(there, own, strict=True)):
            if a != b:
                return f"parameter {k} of group {i} of shape {a}, this has {b}"
    raise AssertionError("there is no difference")
