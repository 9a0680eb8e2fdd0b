"""A run that is saved in one process and continued in another, killed while saving or refused."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agreement import assert_identical, fast_only
from checkpoint_runs import RUNS, main
from torch import nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim import SGD, Adam, AdamW

from optim import INNA, GeN, INNAprop, Rescaled, gen_published, schedules
from optim.estimators import Exact, GaussNewton, Probes, Secant
from optim.rules import Edge, Lipschitz, RobbinsMonro, Rule

TESTS = Path(__file__).parent


def python(script: str, *args: str | Path) -> str:
    """What a fresh process prints that runs this script."""
    # Its order of sets is another one than here.
    env = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(TESTS.parent)}
    env["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-W", "error", str(TESTS / script), *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of every run: uninterrupted, and continued in a fresh process."""
    folder = tmp_path_factory.mktemp("checkpoints")
    main("save", folder)
    python("checkpoint_runs.py", "load", folder)
    names = ("uninterrupted", "continued")
    one, other = (torch.load(folder / f"{name}.pt", weights_only=True) for name in names)
    return one, other


@pytest.mark.parametrize("run", RUNS)
def test_continues_in_another_process_bit_for_bit(run: str, ends: Any) -> None:
    uninterrupted, continued = ends[0][run], ends[1][run]
    assert len(uninterrupted["records"]) == 6
    for part, expected in uninterrupted.items():
        assert_identical(continued[part], expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs to be killed are forked")
def test_a_kill_while_saving_costs_no_checkpoint(tmp_path: Path) -> None:
    printed = python("checkpoint_kills.py", tmp_path)
    assert "killed 25 times" in printed
    assert "trained on after 6 kills" in printed


class OwnAdam(Adam):
    """Another class."""


def trained(make: Callable[[Any], Any], sizes: tuple[int, ...] = (4, 3, 2)) -> tuple[Any, Any]:
    model = nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), *map(nn.Linear, sizes[1:], sizes[2:]))
    optimizer = make(model)
    for _ in range(2):
        x = torch.randn(8, sizes[0])
        optimizer.step(lambda x=x: model(x).square().sum(1))
    return model, optimizer


def split(model: Any) -> list[dict[str, Any]]:
    first, *rest = model.parameters()
    return [{"params": [first]}, {"params": rest}]


Make = Callable[[Any], Any]
OTHERS: dict[str, tuple[Make, Make, str]] = {
    "wrapper": (
        lambda m: GeN(SGD(m.parameters())),
        lambda m: Rescaled(SGD(m.parameters())),
        "by GeN, this is Rescaled",
    ),
    "base": (
        lambda m: Rescaled(SGD(m.parameters(), momentum=0.9)),
        lambda m: Rescaled(Adam(m.parameters())),
        "with base SGD, this has Adam",
    ),
    "base of the same family": (
        lambda m: GeN(AdamW(m.parameters())),
        lambda m: GeN(Adam(m.parameters())),
        "with base AdamW, this has Adam",
    ),
    "subclass": (
        lambda m: GeN(Adam(m.parameters())),
        lambda m: GeN(OwnAdam(m.parameters())),
        "with base Adam, this has OwnAdam",
    ),
    "base of this package": (
        lambda m: Rescaled(INNA(m.parameters())),
        lambda m: Rescaled(INNAprop(m.parameters())),
        "with base INNA, this has INNAprop",
    ),
    "rule": (
        lambda m: Rescaled(SGD(m.parameters()), rule=Edge()),
        lambda m: Rescaled(SGD(m.parameters()), rule=Lipschitz(beta3=0.5)),
        r"with rule Edge\(.*\), this has Lipschitz\(beta3=0.5\)",
    ),
    "estimator": (
        lambda m: Rescaled(SGD(m.parameters()), estimator=Probes()),
        lambda m: Rescaled(SGD(m.parameters()), estimator=Secant()),
        r"with estimator Probes\(.*\), this has Secant\(\)",
    ),
    "estimator's option": (
        lambda m: Rescaled(SGD(m.parameters()), estimator=Exact()),
        lambda m: Rescaled(SGD(m.parameters()), estimator=Exact(per_sample=False)),
        r"with estimator Exact\(.*\), this has Exact\(per_sample=False\)",
    ),
    "every": (
        lambda m: GeN(SGD(m.parameters()), phi=2),
        lambda m: GeN(SGD(m.parameters()), phi=8),
        "with every 2, this has 8",
    ),
    "checked": (
        lambda m: GeN(SGD(m.parameters()), checked=0),
        lambda m: GeN(SGD(m.parameters())),
        "with checked 0, this has 10",
    ),
    "groups": (
        lambda m: Rescaled(SGD(split(m))),
        lambda m: Rescaled(SGD(m.parameters())),
        "with 2 parameter groups, this has 1",
    ),
    "parameters": (
        lambda m: Rescaled(SGD(list(m.parameters())[1:])),
        lambda m: Rescaled(SGD(m.parameters())),
        "with 3 parameters in group 0, this has 4",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_of_another_configuration_is_refused_by_its_name(case: str) -> None:
    saver, loader, message = OTHERS[case]
    _, other = trained(saver)
    model, optimizer = trained(loader)
    refused(model, optimizer, other.state_dict(), message)


@pytest.mark.parametrize("base", [SGD, lambda p: Adam(p, amsgrad=True), INNAprop])
def test_of_other_shapes_is_refused(base: Any) -> None:
    make = lambda m: GeN(base(split(m)))  # noqa: E731
    _, other = trained(make, (4, 3, 2))
    model, optimizer = trained(make, (4, 3, 5))
    message = r"with parameter 1 of group 1 of shape \[2, 3\], this has \[5, 3\]"
    refused(model, optimizer, other.state_dict(), message)


def refused(model: Any, optimizer: Any, saved: Any, message: str) -> None:
    """And nothing has changed."""
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    states, groups = dict(optimizer.state), list(optimizer.param_groups)
    rng = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_identical((model.state_dict(), optimizer.state_dict()), before)
    assert all(optimizer.state[p] is entry for p, entry in states.items())
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)


def test_what_is_torn_or_no_checkpoint_is_refused() -> None:
    make = lambda m: Rescaled(SGD(m.parameters(), momentum=0.9))  # noqa: E731
    model, optimizer = trained(make)
    saved = copy.deepcopy(trained(make)[1].state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    without = lambda key: {k: v for k, v in saved.items() if k != key}  # noqa: E731
    own = saved["wrapper"]
    few = {k: v for k, v in saved["state"].items() if k != 1}
    for bad, message in (
        (None, "state_dict is a NoneType, not a dictionary"),
        ([saved], "state_dict is a list"),
        ({}, r"no state_dict of an optimizer: it lacks \['param_groups', 'state'\]"),
        (model.state_dict(), r"it lacks \['param_groups', 'state'\]"),
        ({"optimizer": saved}, r"it lacks \['param_groups', 'state'\]"),
        (without("state"), r"it lacks \['state'\]"),
        (without("param_groups"), r"it lacks \['param_groups'\]"),
        (optimizer.base.state_dict(), "saved by an optimizer that is not wrapped, or went through"),
        ({**saved, "wrapper": None}, "has no entry 'wrapper'"),
        ({**saved, "wrapper": 3}, "'wrapper' is a int"),
        ({**saved, "wrapper": {}}, r"lacks or adds \['base', .*, 'kind'"),
        ({**saved, "wrapper": {**own, "beta3": 0.5}}, r"lacks or adds \['beta3'\]"),
        ({**saved, "state": few}, "has a state for 3 parameters, saved were 4"),
        ({**saved, "param_groups": saved["param_groups"] * 2}, "number of parameter groups"),
        ({**saved, "param_groups": saved["param_groups"][0]}, "is no list of dictionaries"),
    ):
        refused(model, optimizer, bad, message)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5


@fast_only
def test_an_estimator_may_hold_a_model_of_its_own() -> None:
    make = lambda m: Rescaled(Adam(m.parameters()), estimator=GaussNewton(m))  # noqa: E731
    (_, one), (_, other) = trained(make), trained(make)
    other.load_state_dict(one.state_dict())
    assert_identical(other.state_dict(), one.state_dict())


class OwnRule(Rule):
    def __init__(self, r: float, schedule: Any) -> None:
        self.r, self.schedule = r, schedule

    def choose(self, line: Any, estimate: Any, state: Any) -> Any:
        return self.r, {"steps": state.get("steps", 0) + 1}


class OwnEstimator(Exact):
    def __init__(self, rules: Any) -> None:
        super().__init__(per_sample=False)
        object.__setattr__(self, "rules", rules)


def test_rules_and_estimators_of_others_are_known_again() -> None:
    """By what they hold, wherever it lies in memory."""

    def make(r: float, nested: float = 0.5) -> Any:
        rule = RobbinsMonro(1e-3, 1.0, rule=OwnRule(r, lambda k: k))
        estimator = OwnEstimator([{"a": OwnRule(nested, object())}])
        return lambda m: Rescaled(SGD(m.parameters()), rule=rule, estimator=estimator)

    (_, one), (model, other) = trained(make(0.1)), trained(make(0.1))
    other.load_state_dict(one.state_dict())
    assert_identical(other.state_dict(), one.state_dict())
    _, differing = trained(make(0.2))
    message = r"rule=OwnRule\(r=0\.2, schedule=.*, this has .*rule=OwnRule\(r=0\.1, "
    refused(model, other, differing.state_dict(), message)
    _, differing = trained(make(0.1, nested=0.25))
    refused(model, other, differing.state_dict(), r"estimator OwnEstimator\(.*OwnRule\(r=0\.25")


def test_hyperparameters_become_those_of_the_checkpoint() -> None:
    """As of torch's own optimizers."""
    _, saver = trained(lambda m: Rescaled(SGD(m.parameters(), momentum=0.9), ell=0.5))
    _, loader = trained(lambda m: Rescaled(SGD(m.parameters(), momentum=0.5, weight_decay=0.1)))
    loader.load_state_dict(saver.state_dict())
    (group,) = loader.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.9, 0)


HALF = np.float64(0.5)
WITH_NUMPY: dict[str, Callable[[nn.Module], Any]] = {
    "ell": lambda m: GeN(SGD(m.parameters()), ell=HALF),
    "Lipschitz": lambda m: Rescaled(SGD(m.parameters()), rule=Lipschitz(beta3=HALF)),
    "Edge": lambda m: Rescaled(SGD(m.parameters()), rule=Edge(HALF, HALF)),
    "RobbinsMonro": lambda m: Rescaled(
        SGD(m.parameters()), rule=RobbinsMonro(HALF / 100, HALF, np.float64(0.75))
    ),
    "Newton and Probes": lambda m: gen_published(
        SGD(m.parameters()), eta=HALF, gamma=HALF, points=(-HALF, HALF)
    ),
    "a tensor": lambda m: Rescaled(SGD(m.parameters()), rule=Lipschitz(beta3=torch.tensor(0.5))),
    "a rule of others": lambda m: Rescaled(SGD(m.parameters()), rule=OwnRule(HALF, None)),
    "a group": lambda m: _with_group(GeN(SGD(m[0].parameters())), m[2]),
}


def _with_group(optimizer: Any, layer: nn.Module) -> Any:
    optimizer.add_param_group({"params": layer.parameters(), "lr": HALF})
    return optimizer


@pytest.mark.parametrize("case", WITH_NUMPY)
def test_numbers_of_numpy_are_saved_as_plain_ones(case: str, tmp_path: Path) -> None:
    _, optimizer = trained(WITH_NUMPY[case])
    torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    assert type(saved["wrapper"]["length"]) is float
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: schedules.cooldown(o, 4, share=HALF),
        lambda o: schedules.red(o, 4, eta=HALF),
        lambda o: schedules.warmup_cosine(o, 2, 4, least=HALF),
    ],
)
def test_schedules_with_numbers_of_numpy_leave_plain_ones(schedule: Callable[..., Any]) -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = schedule(optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
        assert type(optimizer.param_groups[0]["lr"]) is float


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("how", ["GeN", "INNAprop"])
def test_torchs_distributed_checkpoints_keep_all_but_the_trail(
    how: str, full: bool, tmp_path: Path
) -> None:
    """Which know groups and states alone, and load into what is there already."""
    make = {
        "GeN": lambda m: GeN(AdamW([{"params": [p]} for p in m.parameters()])),
        "INNAprop": lambda m: Rescaled(INNAprop(m.parameters())),
    }[how]
    options = StateDictOptions(full_state_dict=full)
    model, optimizer = trained(make)

    def parts(model: Any, optimizer: Any) -> dict[str, Any]:
        names = ("model", "optimizer")
        return dict(zip(names, get_state_dict(model, optimizer, options=options), strict=True))

    save(parts(model, optimizer), checkpoint_id=tmp_path)
    loaded = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    fresh = make(loaded)
    found = parts(loaded, fresh)
    assert fresh.iteration == 0
    load(found, checkpoint_id=tmp_path)
    set_state_dict(
        loaded,
        fresh,
        model_state_dict=found["model"],
        optim_state_dict=found["optimizer"],
        options=options,
    )
    optimizer.stepper.trail._way = {}
    assert fresh.state_dict()["wrapper"] == optimizer.state_dict()["wrapper"]
    x = torch.randn(8, 4)
    for net, wrapper in ((model, optimizer), (loaded, fresh)):
        for _ in range(3):
            wrapper.step(lambda net=net: net(x).square().sum(1))
    assert_identical(loaded.state_dict(), model.state_dict())
    assert_identical(dict(fresh.state_dict()["state"]), dict(optimizer.state_dict()["state"]))
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    _, without = get_state_dict(model, optimizer, options=flat)
    with pytest.raises(ValueError, match="went through what drops that entry, as flatten_opt"):
        set_optimizer_state_dict(loaded, fresh, without, options=flat)


def test_a_step_without_closure_is_refused_unless_it_makes_the_state() -> None:
    x = nn.Parameter(torch.ones(2))
    optimizer = GeN(AdamW([x]))
    for rate, gradient in ((0.0, None), (0.0, torch.ones(2)), (0.95, torch.zeros(2))):
        optimizer.param_groups[0]["lr"], x.grad = rate, gradient
        with pytest.raises(TypeError, match="step needs a closure"):
            optimizer.step()
        assert not optimizer.state
    optimizer.param_groups[0]["lr"], x.grad = 0.0, torch.zeros(2)
    optimizer.step()
    assert optimizer.state[x]["step"] == 1
    assert optimizer.iteration == 0
    assert torch.equal(x.detach(), torch.ones(2))
