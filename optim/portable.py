"""What ``torch.distributed.checkpoint.state_dict`` asks of a wrapper.

It keeps the groups and states of a state_dict alone, and has an optimizer make its state by a step
without closure, of no length.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from optim.sharded import local

_KEY = "wrapper"
_TRAIL = "trail"


def with_entry(state_dict: Mapping[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """A base's state_dict with the wrapper's own entry beside it, and in its first group.

    There without the trail, which is tensors; the first steps of a run that goes on do without.
    """
    first, *others = state_dict["param_groups"]
    numbers = {name: value for name, value in entry.items() if name != _TRAIL}
    # Of a dictionary, also in a list, it may load only what there is already.
    groups = [{**first, _KEY: json.dumps(numbers, default=float)}, *others]
    return {**state_dict, "param_groups": groups, _KEY: entry}


def entry_of(state_dict: Mapping[str, Any]) -> Any:
    """The wrapper's own entry; None where there is none."""
    if _KEY in state_dict:
        return state_dict[_KEY]
    groups = state_dict["param_groups"]
    held = groups[0].get(_KEY) if groups else None
    if not isinstance(held, str):
        return None
    entry = json.loads(held)
    params = sum(len(group["params"]) for group in groups)
    return {**entry, _TRAIL: [None] * params} if isinstance(entry, dict) else entry


def without_entry(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What the base is to load."""
    kept = {key: value for key, value in state_dict.items() if key != _KEY}
    groups = [{k: v for k, v in group.items() if k != _KEY} for group in kept["param_groups"]]
    return {**kept, "param_groups": groups}


def asks_for_state(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all rates are 0 and all gradients zeros, as where a base is to make its state."""
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    still = all(float(group["lr"]) == 0 for group in groups)
    return still and bool(grads) and not any(bool(local(g).any()) for g in grads)
