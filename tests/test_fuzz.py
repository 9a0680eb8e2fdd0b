"""Any order of steps, faults, saves, loads, copies, schedules and edits of groups.

A second run is given the same without the faults, saves, loads and copies: it must be the same.
"""

import copy
import io
import json
import math
import pickle
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from agreement import assert_identical
from hypothesis import Phase, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import ExponentialLR

from curvature import RandomState
from curvature.sweep import Sweep
from optim import INNA, GeN, INNAprop, Rescaled
from optim.estimators import Exact, GaussNewton, GradientDifferences, Probes, Secant
from optim.rules import Cautious, Edge, Lipschitz, Lyapunov, Trust

ROWS = 6
BAD_PROBE = "the loss at a probe is NaN or infinite"


class OwnSGD(torch.optim.SGD):
    """Nothing is known of its step, which is told from copies of the parameters."""


BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p),
    "heavy ball": lambda p: torch.optim.SGD(p, momentum=0.9),
    "a subclass of SGD": lambda p: OwnSGD(p, momentum=0.5, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True, weight_decay=0.1),
    "INNA": lambda p: INNA(p, beta=1.0),
    "INNAprop": lambda p: INNAprop(p, foreach=False),
}
ESTIMATORS: dict[str, Callable[[nn.Module], Any]] = {
    "jet": lambda model: Exact(),
    "tangent pass": lambda model: Exact(per_sample=False),
    "gradients": lambda model: GradientDifferences(),
    "losses": lambda model: Probes(),
    "one loss": lambda model: Secant(),
}
if Sweep.available():
    ESTIMATORS["Gauss-Newton"] = GaussNewton
RULES = [None, Cautious(), Trust(), Edge(), Lipschitz()]
SETUPS = st.one_of(
    st.builds(
        lambda phi, checked: lambda base, model: GeN(base, phi=phi, checked=checked),
        st.integers(1, 3),
        st.sampled_from([0, 2, 10]),
    ),
    st.builds(
        lambda chosen, estimator, every, checked: (
            lambda base, model: Rescaled(
                base,
                rule=chosen,
                estimator=ESTIMATORS[estimator](model),
                every=every,
                checked=checked,
            )
        ),
        st.sampled_from(RULES),
        st.sampled_from(sorted(ESTIMATORS)),
        st.integers(1, 3),
        st.sampled_from([0, 2, 10]),
    ),
)


class Noted(nn.Module):
    """Writes to one buffer and puts another in the place of a second."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        self.calls = self.calls + 1
        return x


class Failed(Exception):
    """What a closure raises."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and in which call of the closures of a step."""

    kind: str
    call: int

    def drawn(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "label":
            return x, y + 99
        return (x[:0], y[:0]) if self.kind == "empty" else (x, y)

    def spoil(self, losses: Tensor) -> Tensor:
        if self.kind == "exception":
            np.random.rand()
            random.random()
            raise Failed
        if self.kind == "nan":
            return losses * losses.new_tensor([math.nan]).expand_as(losses)
        if self.kind == "infinite":
            return torch.cat([losses[:1] * math.inf, losses[1:]])
        if self.kind == "gradient":
            return losses + (losses * 0).sqrt()
        return losses * 1e30 if self.kind == "square" else losses


BAD_GROUPS: list[dict[str, Any]] = [
    {"maximize": True},
    {"lr": math.nan},
    {"lr": -1.0},
    {"params": [nn.Parameter(torch.ones(1, dtype=torch.float16))]},
    {"params": [torch.ones(1, requires_grad=True) * 2]},
    {"params": {nn.Parameter(torch.ones(1))}},
]
KINDS = ("exception", "nan", "infinite", "gradient", "square", "label", "empty")
HOWS = ("losses", "mean", "parts", "means", "backward")


def random_numbers() -> int:
    """The states of all generators, told apart by a hash."""
    _, keys, *rest = np.random.get_state()
    torchs = torch.get_rng_state().numpy().tobytes()
    return hash((torchs, np.asarray(keys).tobytes(), *rest, random.getstate()))


class Run:
    """A small network, its wrapper and schedule, and random numbers of its own."""

    def __init__(self, base: str, setup: Any) -> None:
        torch.manual_seed(0)
        self.base, self.setup = base, setup
        self.model = nn.Sequential(
            nn.Linear(4, 5), Noted(), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3)
        )
        self.extras: list[nn.Parameter] = []
        first, *rest = self.model.parameters()
        groups = [{"params": [first], "lr": 2e-3}, {"params": rest, "lr": 1e-3}]
        self.optimizer = setup(BASES[base](groups), self.model)
        self.scheduler = ExponentialLR(self.optimizer, 0.8)
        self.random, self.numbers = RandomState(), random_numbers()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "setup"}

    @contextmanager
    def own_random(self) -> Iterator[None]:
        outer = RandomState()
        self.random.restore()
        try:
            yield
        finally:
            self.random, self.numbers = RandomState(), random_numbers()
            outer.restore()

    def params(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *self.extras]

    def losses(self, k: int, rows: slice, fault: Fault | None) -> Tensor:
        generator = torch.Generator().manual_seed(k)
        x = torch.randn(ROWS, 4, generator=generator)[rows]
        y = torch.randint(3, (ROWS,), generator=generator)[rows]
        x, y = (x, y) if fault is None else fault.drawn(x, y)
        losses = cross_entropy(self.model(x), y, reduction="none")
        losses = losses if fault is None else fault.spoil(losses)
        return losses + sum((p.square().sum() for p in self.extras), torch.zeros(()))

    def step(self, k: int, how: str, fault: Fault | None) -> Any:
        """Its record, or what it raised."""
        calls = 0

        def losses(rows: slice) -> Tensor:
            nonlocal calls
            calls += 1
            # After the first fault all that follow are faults: a batch stays bad.
            bad = fault if fault is not None and calls >= fault.call else None
            return self.losses(k, rows, bad)

        def backward() -> Tensor:
            self.optimizer.zero_grad()
            loss = losses(slice(ROWS)).mean()
            loss.backward()
            clip_grad_norm_(self.params(), 0.5)
            return loss

        cut = [slice(0, 2), slice(2, ROWS)]
        closure: Any = {
            "losses": lambda: losses(slice(ROWS)),
            "mean": lambda: losses(slice(ROWS)).mean(),
            "parts": [lambda r=r: losses(r) for r in cut],
            "means": [lambda r=r: losses(r).mean() for r in cut],
            "backward": backward,
        }[how]
        with self.own_random(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.optimizer.step(closure)
            except (Failed, ValueError, IndexError) as error:
                return error
        record = self.optimizer.records[-1]
        assert any("nothing changed" in str(w.message) for w in caught) == bool(record.skipped)
        return record

    def state(self) -> Any:
        """All that the next step depends on."""
        return copy.deepcopy(
            (
                [(p.data, p.requires_grad) for p in self.params()],
                dict(self.model.named_buffers()),
                self.optimizer.state_dict(),
                self.scheduler.state_dict(),
                self.numbers,
            )
        )

    def add_group(self, lr: float | None) -> None:
        self.extras.append(nn.Parameter(torch.ones(2)))
        options = {} if lr is None else {"lr": lr}
        self.optimizer.add_param_group({"params": [self.extras[-1]], **options})

    def reloaded(self) -> "Run":
        """A fresh run that was given what this one saved."""
        file = io.BytesIO()
        *_, optimizer, scheduler, _ = self.state()
        model, extras = self.model.state_dict(), self.extras
        torch.save((model, extras, optimizer, scheduler), file)
        file.seek(0)
        model, extras, optimizer, scheduler = torch.load(file, weights_only=True)
        other = Run(self.base, self.setup)
        for _ in extras:
            other.add_group(None)
        other.model.load_state_dict(model)
        other.optimizer.load_state_dict(optimizer)
        other.scheduler.load_state_dict(scheduler)
        with torch.no_grad():
            for p, saved in zip(other.extras, extras, strict=True):
                p.copy_(saved)
        for p, own in zip(other.params(), self.params(), strict=True):
            p.requires_grad_(own.requires_grad)
        other.random, other.numbers = self.random, self.numbers
        return other


class Machine(RuleBasedStateMachine):
    base: str

    @initialize(setup=SETUPS, energetic=st.booleans())
    def start(self, setup: Any, energetic: bool) -> None:
        if energetic and self.base in ("heavy ball", "INNA"):
            setup = lambda base, model: Rescaled(base, rule=Lyapunov(), every=2)  # noqa: E731
        self.run, self.twin = Run(self.base, setup), Run(self.base, setup)
        note(repr(self.run.optimizer.stepper.__dict__))

    def both(self, act: Callable[[Run], Any]) -> None:
        for run in (self.run, self.twin):
            with warnings.catch_warnings():
                # Torch warns of a schedule that begins before the steps.
                warnings.simplefilter("ignore", UserWarning)
                act(run)

    @rule(ks=st.lists(st.integers(0, 9), min_size=1, max_size=3), how=st.sampled_from(HOWS))
    def steps(self, ks: list[int], how: str) -> None:
        for k in ks:
            found, expected = (run.step(k, how, None) for run in (self.run, self.twin))
            assert not isinstance(found, Exception), found
            assert found == expected

    @rule(
        k=st.integers(0, 9),
        how=st.sampled_from(HOWS),
        kind=st.sampled_from(KINDS),
        part=st.booleans(),
    )
    def fault(self, k: int, how: str, kind: str, part: bool) -> None:
        """On the batch itself, in any of its parts."""
        second = part and how in ("parts", "means")
        before = self.run.state()
        found = self.run.step(k, how, Fault(kind, 2 if second else 1))
        if kind == "exception":
            assert isinstance(found, Failed)
        elif kind == "label":
            assert isinstance(found, IndexError)
        elif kind == "empty" and how in ("losses", "parts"):
            assert "the batch is empty" in str(found)
        else:
            assert re.search("is (NaN or infinite|nan|inf)", found.skipped), found
        self.unchanged(before, found)

    @rule(
        k=st.integers(0, 9),
        how=st.sampled_from(HOWS),
        kind=st.sampled_from(KINDS),
        later=st.integers(0, 2),
    )
    def fault_ahead(self, k: int, how: str, kind: str, later: int) -> None:
        """Where the closures are run again, if they are."""
        first = 1 + (2 if how in ("parts", "means") else 1)
        fault = Fault(kind, first + later)
        before = self.run.state()
        found = self.run.step(k, how, fault)
        if isinstance(found, Exception) or found.skipped is not None:
            self.unchanged(before, found)
        else:
            assert self.twin.step(k, how, fault) == found

    def unchanged(self, before: Any, found: Any) -> None:
        """But for what the record of a skipped step counts, and the last step's gradients."""
        assert all(p.grad is None for p in self.run.params())
        own = before[2]["wrapper"]
        optimizer = self.run.optimizer
        if not isinstance(found, Exception):
            own["iteration"] += 1
            own["skipped"] += 1
            assert found.iteration == own["iteration"]
            assert found.step == 0
            if found.skipped == BAD_PROBE:
                own["rule_state"] = optimizer.stepper.rule.after_bad_probe(own["rule_state"])
                own["length"] = optimizer.stepper.length  # to the next probe
            # The first group holds the same as text, but for the trail.
            numbers = {name: value for name, value in own.items() if name != "trail"}
            before[2]["param_groups"][0]["wrapper"] = json.dumps(numbers)
            twin = self.twin.optimizer
            twin.iteration, twin.skipped = own["iteration"], own["skipped"]
            twin.stepper.rule_state = dict(own["rule_state"])
            twin.stepper.length = own["length"]
        assert_identical(self.run.state(), before)

    @rule()
    def save_and_load(self) -> None:
        self.run = self.run.reloaded()

    @rule(pickled=st.booleans())
    def copied(self, pickled: bool) -> None:
        setup = self.run.setup
        run = pickle.loads(pickle.dumps(self.run)) if pickled else copy.deepcopy(self.run)
        run.setup = setup
        self.run = run

    @rule()
    def schedule(self) -> None:
        self.both(lambda run: run.scheduler.step())

    @rule(
        i=st.integers(0, 1),
        name=st.sampled_from(["lr", "momentum", "weight_decay", "eps", "alpha"]),
        factor=st.sampled_from([0.5, 0.9]),
    )
    def edit(self, i: int, name: str, factor: float) -> None:
        def scale(run: Run) -> None:
            group = run.optimizer.param_groups[i]
            if name in group:
                group[name] = factor * group[name]

        self.both(scale)

    @rule(i=st.integers(0, 1), lr=st.sampled_from([0.0, 0.3, 0.95]))
    def edit_rate(self, i: int, lr: float) -> None:
        self.both(lambda run: run.optimizer.param_groups[i].update(lr=lr))

    @precondition(lambda self: len(self.run.extras) < 2)
    @rule(lr=st.sampled_from([None, 0.5]))
    def add_group(self, lr: float | None) -> None:
        self.both(lambda run: run.add_group(lr))

    @rule(i=st.integers(0, 2))
    def freeze_or_thaw(self, i: int) -> None:
        self.both(lambda run: run.params()[i].requires_grad_(not run.params()[i].requires_grad))

    @rule(bad=st.sampled_from(BAD_GROUPS))
    def refused(self, bad: dict[str, Any]) -> None:
        """A group that cannot be wrapped, and a checkpoint of other parameters."""
        optimizer, before = self.run.optimizer, self.run.state()
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **bad})
        saved = copy.deepcopy(optimizer.state_dict())
        saved["wrapper"]["shapes"][0][0] = [9, 9]
        saved["param_groups"][0]["lr"] = 7.0
        with pytest.raises(ValueError, match=r"of shape \[9, 9\]"):
            optimizer.load_state_dict(saved)
        assert_identical(self.run.state(), before)

    @invariant()
    def same(self) -> None:
        if hasattr(self, "run"):
            assert_identical(self.run.state(), self.twin.state())


@pytest.mark.parametrize("base", BASES)
def test_faults_saves_and_copies_change_nothing(base: str) -> None:
    machine = type("Machine", (Machine,), {"base": base})
    # To shrink a failure would take minutes; its steps are few.
    chosen = settings(max_examples=8, stateful_step_count=12, phases=[Phase.generate])
    run_state_machine_as_test(seed(list(BASES).index(base))(machine), settings=chosen)
