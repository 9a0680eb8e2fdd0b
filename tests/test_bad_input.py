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
from bad_inputs import ENTRIES, NOTHING_TO_GET_WRONG, Bad, World, public_names
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from curvature import NonFiniteLoss, Objective, Tape, directional, fit, hvp
from curvature.testing import check_directional, finite_difference
from optim.groups import check_devices


def contents(world: World, given: Any) -> Any:
    """All that a refused call must leave as it was."""
    params = [world.p, *world.net.parameters()]
    return copy.deepcopy(
        {
            "params": [(p.data, p.grad, p.requires_grad) for p in params],
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
ZERO = torch.zeros(())


def square(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum()


def square_tree(p: dict) -> torch.Tensor:
    return sum((x.square().sum() for x in p.values()), ZERO)


def nested(x: torch.Tensor) -> torch.Tensor:
    return torch.nested.as_nested_tensor([x, x[:2]], layout=torch.jagged)


def exhausted(x: torch.Tensor) -> torch.Tensor:
    raise StopIteration("no more batches")


def faked(x: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return x * 2


FAKE = FakeTensorMode().from_tensor(X)
LAZY = nn.parameter.UninitializedParameter()
TREE = {"a": torch.ones(2), "b": torch.ones(3)}

# func, params, direction, type of the error, message
CASES: dict[str, tuple[Callable, Any, Any, type[Exception], str]] = {
    "shape": (square, X, torch.ones(2), ValueError, r"direction has shape \(2,\), .* has \(3,\)"),
    "missing key": (square_tree, TREE, {"a": X}, ValueError, r"missing \[\"\['b'\]\"\]"),
    "extra key": (square_tree, TREE, {**TREE, "c": X}, ValueError, r"unexpected \[\"\['c'\]\"\]"),
    "shape in a tree": (
        square_tree,
        TREE,
        {"a": torch.ones(2), "b": torch.ones(4)},
        ValueError,
        r"direction\['b'\] has shape \(4,\)",
    ),
    "dtype of direction": (square, X, V.double(), TypeError, "direction has dtype torch.float64"),
    "direction no tensor": (square, X, 1.0, TypeError, "direction is a float"),
    "NaN direction": (square, X, V * torch.nan, ValueError, "direction holds NaN"),
    "infinite direction": (
        square_tree,
        TREE,
        {"a": torch.ones(2), "b": torch.ones(3) * torch.inf},
        ValueError,
        r"direction\['b'\] holds NaN or infinite",
    ),
    "integer params": (square, X.int(), V.int(), TypeError, "params has dtype torch.int32"),
    "half params": (square, X.half(), V.half(), TypeError, "params has dtype torch.float16"),
    "complex params": (square, X + 0j, V + 0j, TypeError, "complex64.*real and imaginary"),
    "sparse params": (square, X.to_sparse(), V, TypeError, "layout torch.sparse_coo"),
    "meta params": (square, X.to("meta"), V.to("meta"), TypeError, "on the meta device"),
    "meta direction": (square, X, V.to("meta"), TypeError, "direction is on the meta device"),
    "fake params": (square, FAKE, V, TypeError, "params is a fake tensor, .* FakeTensorMode"),
    "fake direction": (square, X, FAKE, TypeError, "direction is a fake tensor"),
    "lazy params": (square, LAZY, V, TypeError, "params is not initialised yet"),
    "lazy direction": (square, X, LAZY, TypeError, "direction is not initialised yet"),
    "nested params": (square, nested(X), V, TypeError, "params is a nested tensor"),
    "params no tensor": (square_tree, {"a": 1.0}, {"a": V}, TypeError, r"params\['a'\] is a float"),
    "no params": (square_tree, {}, {}, ValueError, "params holds no tensor"),
    "iterator": (square, iter([X]), [V], TypeError, r"dict\(model.named_parameters\(\)\)"),
    "iterator for a direction": (square, X, iter([V]), TypeError, "direction is an iterator"),
    "sparse loss": (lambda x: x.to_sparse(), X, V, TypeError, "loss has layout torch.sparse_coo"),
    "nested loss": (nested, X, V, TypeError, "loss is a nested tensor"),
    "meta loss": (lambda x: x.to("meta"), X, V, TypeError, "loss is on the meta device"),
    "fake loss": (faked, X, V, TypeError, "loss is a fake tensor"),
    "StopIteration": (exhausted, X, V, StopIteration, "no more batches"),
    "matrix": (lambda x: x.outer(x), X, V, ValueError, r"loss has shape \(3, 3\); return a scalar"),
    "no tensor returned": (lambda x: 1.0, X, V, TypeError, "loss is a float, not a tensor"),
    "tuple returned": (lambda x: (x.sum(),), X, V, TypeError, "loss is a tuple"),
    "integer loss": (lambda x: x.int().sum(), X, V, TypeError, "loss has dtype torch.int"),
    "complex loss": (lambda x: x.sum() + 0j, X, V, TypeError, "loss has dtype torch.complex64"),
    "empty batch": (lambda x: x[:0], X, V, ValueError, "the batch is empty"),
    "NaN loss": (
        lambda x: (-x).log(),
        X,
        V,
        NonFiniteLoss,
        r"3 of 3 samples .* \(sample 0, 1, 2\)",
    ),
    "NaN params": (square, X * torch.nan, V, NonFiniteLoss, "the loss is nan"),
}
NEEDS_GRAPH = {
    "detached": (lambda x: x.detach().sum(), X, V, ValueError, "loss has no graph"),
    "other parameters": (
        lambda x: nn.Linear(3, 1)(torch.ones(3)).sum(),
        X,
        V,
        ValueError,
        "does not depend on any tensor of params",
    ),
}


@pytest.mark.parametrize("case", [*CASES, *NEEDS_GRAPH])
@pytest.mark.parametrize("verb", [directional, hvp], ids=["directional", "hvp"])
def test_exact_verbs(verb: Callable, case: str) -> None:
    func, params, direction, error, message = {**CASES, **NEEDS_GRAPH}[case]
    if verb is hvp:
        message = message.replace("direction", "vector")
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        verb(func, params, direction)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", CASES)
def test_fit(case: str) -> None:
    func, params, direction, error, message = CASES[case]
    with pytest.raises(error, match=message):
        fit(func, params, direction, [-0.5, 0, 0.5])


def test_unknown_engine() -> None:
    with pytest.raises(ValueError, match="engine is 'fast'; it must be one of 'auto', 'reference'"):
        directional(square, X, V, engine="fast")


def test_per_sample_of_a_scalar() -> None:
    with pytest.raises(ValueError, match='reduction="none"'):
        directional(square, X, V, per_sample=True)


@pytest.mark.parametrize("verb", [directional, hvp], ids=["directional", "hvp"])
def test_inference_mode(verb: Callable) -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="leave it to compute"):
        verb(square, X, V)


def test_tape_is_used_in_order() -> None:
    tape = Tape()
    with pytest.raises(RuntimeError, match="call backward"):
        tape.directional([V])
    x = X.clone().requires_grad_()
    with tape:
        loss = square(x)
    with pytest.raises(RuntimeError, match="make a new one"), tape:
        pass
    with pytest.raises(ValueError, match=r"params\[0\] does not require grad"):
        tape.backward(loss, [X])


def test_tape_after_the_users_own_backward() -> None:
    x = X.clone().requires_grad_()
    with Tape() as tape:
        loss = square(x)
        loss.backward()
    with pytest.raises(ValueError, match="without calling backward"):
        tape.backward(loss, [x])


def test_objective() -> None:
    with pytest.raises(TypeError, match="model is a function"):
        Objective(square, square, (X, X))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pair"):
        Objective(nn.Identity(), square, X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the batch is empty"):
        Objective(nn.Identity(), square, ({"x": X[:0]}, X[:0]))
    J = Objective(nn.Linear(3, 1), lambda output, _: output.sum(), (X, None))
    with pytest.raises(TypeError, match=r"params is a list; .* J\.params"):
        directional(J, list(J.params.values()), list(J.params.values()))


@pytest.mark.parametrize("verb", [directional, hvp, lambda *a: fit(*a, [-1, 0, 1])])
def test_inside_a_transform(verb: Callable) -> None:
    with pytest.raises(RuntimeError, match="per_sample=True"):
        torch.vmap(lambda a: verb(lambda x: a * square(x), X, V))(X)


def test_steps_that_are_no_list() -> None:
    with pytest.raises(TypeError, match=r"steps is 0.1; give a list"):
        fit(square, X, V, 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [1e-200, 1e-150])
def test_steps_whose_square_is_lost(step: float) -> None:
    with pytest.raises(ValueError, match=r"coefficients .* exceed torch.float32: the steps \[1e"):
        fit(square, X, V, [step], value=3.0, slope=6.0)


def test_a_degree_of_numpy() -> None:
    assert fit(square, X, V, [-1, 0, 1], degree=np.int64(2)).curvature == 6  # type: ignore[arg-type]


def test_finite_differences() -> None:
    with pytest.raises(TypeError, match="need float64"):
        finite_difference(square, X, V)
    with pytest.raises(ValueError, match="direction is zero"):
        finite_difference(square, X.double(), 0 * V.double())
    for step in (1e-300, 1e300):
        with pytest.raises(ValueError, match=r"step is .* the squares of such steps cannot"):
            finite_difference(square, X.double(), V.double(), step=step)
    with pytest.raises(NonFiniteLoss, match=r"at step -1\.7.*, the loss is nan"):
        finite_difference(lambda x: x.log().sum(), X.double(), V.double(), step=3)


def test_checks_can_fail() -> None:
    x, v = X.double(), V.double()
    with pytest.raises(AssertionError, match="uncertain"):
        check_directional(lambda x: (x - 1.001).relu().square().sum(), x, v)
    # The gradient of x² with one factor detached is x: half of what the values say.
    with pytest.raises(AssertionError, match="slope differs"):
        check_directional(lambda x: (x * x.detach()).sum(), x, v)
