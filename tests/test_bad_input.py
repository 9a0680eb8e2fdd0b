"""Every bad argument is refused with a message that names it and says what to do."""

import copy
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bad_components  # noqa: F401
import bad_curvature  # noqa: F401
import bad_functions  # noqa: F401
import bad_optimizers  # noqa: F401
import bad_wrappers  # noqa: F401
import numpy as np
import pytest
import torch
from agreement import fast_only
from bad_inputs import ENTRIES, NOTHING_TO_GET_WRONG, Bad, World, public_names, square

from curvature import directional, fit, hvp
from optim.groups import check_devices


def contents(world: World, given: Any) -> Any:
    """All that a refused call must leave as it was."""
    params = [world.p, *world.net.parameters()]
    return copy.deepcopy(
        {
            "params": [(p.data, p.grad, p.requires_grad) for p in params],
            "inputs": [world.v, world.x, world.y],
            "buffers": [*world.net.buffers(), *world.memory.buffers()],
            "base": world.base.state_dict(),
            "defaults": world.base.defaults,
            "wrapper": given.state_dict() if isinstance(given, torch.optim.Optimizer) else None,
            "records": list(getattr(given, "records", world.records)),
            "random": (torch.get_rng_state(), np.random.get_state()[1], random.getstate()),
        }
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.layout == b.layout and torch.equal(a.to_dense(), b.to_dense())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)


@pytest.mark.parametrize(
    "entry",
    [pytest.param(e, marks=fast_only if "these outputs" in e.message else ()) for e in ENTRIES],
    ids=lambda e: f"{e.of}: {e.message}",
)
def test_is_refused_and_nothing_has_changed(entry: Bad) -> None:
    world = World()
    given = entry.given(world)
    before = contents(world, given)
    with pytest.raises(entry.error, match=entry.message) as caught:
        entry.call(world, given)
    assert type(caught.value) is entry.error
    after = contents(world, given)
    assert [key for key in before if not same(before[key], after[key])] == []


def test_parameters_on_several_devices() -> None:
    """By stand-ins, since a machine may have but one."""
    first, second = (
        SimpleNamespace(is_meta=False, device=torch.device(device), shape=(size,))
        for device, size in (("cpu", 2), ("cuda:0", 3))
    )
    check_devices([{"params": [first]}, {"params": [first]}])
    message = r"parameter 1 .* \(3,\), is on cuda:0 and parameter 0 .* on cpu; move all parameters"
    with pytest.raises(TypeError, match=message):
        check_devices([{"params": [first]}, {"params": [first, second]}])


def test_every_public_name_is_in_the_database() -> None:
    covered = {entry.of for entry in ENTRIES}
    assert covered | NOTHING_TO_GET_WRONG == public_names()
    assert not covered & NOTHING_TO_GET_WRONG


X, V = torch.ones(3), torch.ones(3)


@pytest.mark.parametrize("verb", [directional, hvp], ids=["directional", "hvp"])
def test_inference_mode(verb: Callable) -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="leave it to compute"):
        verb(square, X, V)


@pytest.mark.parametrize("verb", [directional, hvp, lambda *a: fit(*a, [-1, 0, 1])])
def test_inside_a_transform(verb: Callable) -> None:
    with pytest.raises(RuntimeError, match="per_sample=True"):
        torch.vmap(lambda a: verb(lambda x: a * square(x), X, V))(X)
