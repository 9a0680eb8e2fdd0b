"""A real torch optimizer around another: it keeps the direction and chooses the step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from curvature import NonFiniteLoss, RandomState, SideEffects
from optim.direction import momentum, proposer
from optim.energy import Kinetic, kinetic_of
from optim.estimators import Estimator
from optim.evaluation import Closure, Evaluation, Plain, evaluate
from optim.groups import check_group, check_rate
from optim.inner import inner, total
from optim.left_grads import LeftGrads
from optim.line import Estimate, Line
from optim.loss_scale import LossScale
from optim.penalty import penalty_of
from optim.ranges import check_count, check_positive
from optim.record import Records, StepRecord
from optim.rules import Rule
from optim.rules.rule import State
from optim.snapshot import Snapshot
from optim.trial import Trial

_OVERFLOW = "the gradient, or its square, is NaN or infinite"
_HALVINGS = 40  # after which no length of the step is left to speak of


class Wrapper(Optimizer):
    """A base optimizer that says where to, an estimator of the curvature there, and a rule.

    The common part of :class:`optim.Rescaled` and :class:`optim.GeN`, which choose the two.
    ``param_groups``, ``state`` and ``defaults`` are the base optimizer's own; ``group["lr"]``
    is ell, a factor on the step chosen here, so torch's schedulers drive it. Attach them to the
    wrapper, after wrapping. Groups with different lr keep their ratios. What the wrapper itself
    remembers is stored beside them.

    Attributes:
        base: the wrapped optimizer.
        records: one :class:`optim.record.StepRecord` per step.
        skipped: how many steps left the parameters as they were.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        estimator: Estimator,
        rule: Rule,
        ell: float,
        every: int,
        checked: int,
        clip: Callable[[list[Tensor]], Any] | None = None,
        scaler: GradScaler | None = None,
    ) -> None:
        if isinstance(base, Wrapper):
            raise TypeError(f"base is a {type(base).__name__}, which already chooses the step")
        self._proposer = proposer(base)
        self.base = base
        check_positive("ell", ell)
        check_count("every", every)
        check_count("checked", checked, 0)
        for group in base.param_groups:
            check_group(group)
            check_rate(group)
        fastest = max(float(group["lr"]) for group in base.param_groups)
        for group in base.param_groups:
            group["lr"] = ell * float(group["lr"]) / fastest if fastest > 0 else ell
        base.defaults["lr"] = ell
        self.estimator, self.rule = estimator, rule
        self._kinetic_of = kinetic_of(base) if rule.needs_kinetic else None
        self.every, self.checked, self.clip = every, checked, clip
        self.rule_state: State = {}
        self.records = Records()
        self.skipped = 0
        self.iteration = 0
        self._length = 0.0
        self._kinetic = 0.0
        self._left_grads = LeftGrads()
        self._loss_scale = LossScale(scaler)
        self.__setstate__({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Only the hooks of Optimizer are set up: its constructor would make a second state.
        super().__setstate__(state)
        # Those of saving and loading run where the base saves and loads.
        for name, hooks in vars(self.base).items():
            if name.startswith(("_optimizer_state_dict", "_optimizer_load_state_dict")):
                setattr(self, name, hooks)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.base.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; its lr, if given, is its ell.

        Raises:
            TypeError, ValueError: the group cannot be wrapped; the message says why.

        Example:
            >>> import torch
            >>> from optim import Rescaled
            >>> a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
            >>> optimizer = Rescaled(torch.optim.SGD([a], lr=0.1))
            >>> optimizer.add_param_group({"params": [b], "lr": 0.25})
            >>> [group["lr"] for group in optimizer.param_groups]
            [0.95, 0.25]
        """
        # A base may have bounds for its own lr, which ell need not meet.
        ell = param_group.get("lr", self.defaults["lr"])
        check_rate({"lr": ell})
        self.base.add_param_group({**param_group, "lr": 0.0})
        group = self.param_groups.pop()
        check_group(group)
        self.param_groups.append({**group, "lr": ell})

    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Any:
        """Evaluate the loss and its gradient, ask the base for a direction, and go the right way.

        Args:
            closure: returns the loss, a scalar or one per sample. A closure as for
                :class:`torch.optim.LBFGS` will do as well, which calls ``backward`` once on a
                scalar loss; what it then does to ``p.grad``, as clipping, changes the direction
                and leaves slope and curvature those of the loss. Several closures stand for one
                batch, of which each returns a part of the losses: gradients are accumulated, with
                one graph at a time, and the loss is the mean over all samples, or over the
                closures if each returns a scalar.

        Returns:
            What the closure returned, without graph; of several, all losses. ``p.grad`` holds the
            gradient of the mean, as clipped.

        A step is skipped if a loss or gradient is NaN or infinite, or if no step length follows
        from the curvature: parameters and ``p.grad``, buffers, optimizer and random state are
        then as before the step, and it is counted in ``skipped``, recorded and warned of. If the
        closure raises, likewise, and the exception goes on to the caller. Draw the batch outside
        the closure: one that draws it from a global generator would draw the same again. What
        the forward pass itself writes to parameters stands (``Embedding`` with ``max_norm``).

        Raises:
            TypeError, ValueError: no closure, it gave no usable loss, or the base's step is not
                linear in lr, as its first ten steps are made to prove.
            NotTwiceDifferentiable: for Rescaled, PyTorch has no second derivative of the loss.

        Example:
            >>> import torch
            >>> from optim import Rescaled
            >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
            >>> optimizer = Rescaled(torch.optim.SGD([x]), ell=0.5)
            >>> optimizer.step(lambda: x**2)  # one loss per sample
            tensor([1., 4.])
            >>> x.detach()
            tensor([0., 0.])
        """
        closures = _closures(closure, type(self).__name__)
        for group in self.param_groups:
            check_rate(group)
        params = [p for group in self.param_groups for p in group["params"]]
        old_grads = [p.grad for p in params]
        record = None
        try:
            self._left_grads.clear(params)
            with SideEffects() as effects:
                found, record = self._attempt(closures, params, effects.random)
                if record.skipped is None:
                    effects.keep()
        finally:
            if record is None or record.skipped is not None:
                for p, g in zip(params, old_grads, strict=True):
                    p.grad = g
            else:
                self._left_grads.note(params)
        self.iteration = record.iteration
        self.records.append(record)
        if record.skipped is not None:
            self.skipped += 1
            # A loss scale finds its place by overflows.
            if not (record.skipped == _OVERFLOW and self._loss_scale.used):
                message = f"step {record.iteration} skipped, nothing changed: {record.skipped}"
                warnings.warn(message, RuntimeWarning, stacklevel=3)
        return found.result

    def _attempt(
        self, closures: Sequence[Closure], params: list[Tensor], random: RandomState
    ) -> tuple[Evaluation, StepRecord]:
        """Evaluate the closures and go, or say why not; what they did besides stands."""
        iteration = self.iteration + 1
        due = self.rule.due(iteration, self.every, self.rule_state)
        recorder = self.estimator.recorder if due else Plain
        found = evaluate(closures, recorder, params, self._loss_scale)
        if found.unusable is not None:
            return found, StepRecord(iteration, skipped=found.unusable)
        # The square must be finite too: preconditioners that hold it would never recover.
        norms = torch._foreach_norm([g for g in found.grads if g is not None])
        overflowed = not math.isfinite(total(norms))
        if overflowed:
            record = StepRecord(iteration, skipped=_OVERFLOW)
        else:
            penalty = penalty_of(self.base, found.params)
            trial = Trial(closures, self._loss_scale, random, found, penalty, [])
            record = self._advance(iteration, trial, due)
        # Not before: it writes to the scale, which the graph has saved.
        self._loss_scale.update(overflowed=overflowed)
        return found, record

    def _advance(self, iteration: int, trial: Trial, due: bool) -> StepRecord:
        """Go along the base's direction, or leave the base as before."""
        before = Snapshot(self.base)
        record = None
        try:
            record = self._go(iteration, trial, due)
        finally:
            if record is None or record.skipped is not None:
                before.restore()
        return record

    def _go(self, iteration: int, trial: Trial, due: bool) -> StepRecord:
        """Ask the base for a direction and go along it as far as the rule says."""
        self._hand_over(trial.evaluation)
        ell = max(float(group["lr"]) for group in self.param_groups)
        ratios = [float(group["lr"]) / ell if ell > 0 else 1.0 for group in self.param_groups]
        proposed = self._proposer.propose(ratios)
        direction = [proposed[p] if p in proposed else torch.zeros_like(p) for p in trial.params]
        trial = replace(trial, direction=direction)
        kinetic = None if self._kinetic_of is None else self._kinetic_of(ratios, self._kinetic)
        line = Line(
            iteration,
            value=trial.value(),
            slope=trial.slope(),
            squared_norm=inner(direction, direction),
            momentum=momentum(self.base),
            ell=ell,
            kinetic=kinetic,
        )
        record = StepRecord(iteration, line.value)
        if kinetic is not None:
            record = replace(record, energy=line.value + kinetic.before)
        if not math.isfinite(line.slope) or not math.isfinite(line.squared_norm):
            return replace(record, skipped="the direction of the base optimizer is NaN or infinite")
        record = replace(record, slope=line.slope)
        estimate = None
        if due and line.squared_norm > 0:
            found = self._measure(trial, line)
            if isinstance(found, str):
                return replace(record, skipped=found)
            estimate = found
            record = replace(record, curvature=found.curvature, magnitude=found.magnitude)
        r, state = self.rule.choose(line, estimate, self.rule_state)
        if isinstance(r, str):
            return replace(record, skipped=r)
        record = replace(record, r=r)
        step = min(ell * r, self._proposer.limit(ratios))
        length = math.sqrt(line.squared_norm)
        largest = min(torch.finfo(d.dtype).max for d in direction)
        if not abs(step) * max(1.0, length) < largest:
            return replace(record, skipped=f"a step of {step:.1e} overflows the parameters' dtype")
        if iteration <= self.checked and step > 0 and (line.slope > 0 or kinetic is not None):
            step = _shortened(trial, line, step)
        self._proposer.move(step)
        if kinetic is not None:
            self._kinetic = kinetic.after(step)
        self.rule_state = state
        if ell * step > 0:
            # A schedule that takes ell to 0 must not take the probes into the rounding.
            self._length = step / ell * length
        return replace(record, step=step)

    def _hand_over(self, found: Evaluation) -> None:
        """Put the gradients into ``p.grad``, where the base looks for them."""
        if not found.accumulated:
            # Also of a parameter that is frozen by now: the base would go on along the last one.
            for p in (p for group in self.param_groups for p in group["params"]):
                p.grad = None
            for p, g in zip(found.params, found.grads, strict=True):
                p.grad = g if g is None or self.clip is None else g.clone()
        if self.clip is not None:
            self.clip([p for p in found.params if p.grad is not None])

    def _measure(self, trial: Trial, line: Line) -> Estimate | str:
        try:
            # Differentiating may evaluate checkpointed modules again, and so their statistics.
            with SideEffects():
                reach = self._reach(trial, line)
                found = self.estimator.estimate(trial, line, reach)
                return found if isinstance(found, str) else replace(found, reach=reach)
        except NonFiniteLoss:
            self.rule_state = self.rule.after_bad_probe(self.rule_state)
            return "the loss at a probe is NaN or infinite"

    def _reach(self, trial: Trial, line: Line) -> float:
        """How far along d a probe shall go: as the rule says, or as the last step at ell = 1."""
        reach = self.rule.reach(line, self.rule_state)
        if reach is not None:
            return reach
        if self._length:
            return self._length / math.sqrt(line.squared_norm)
        return self.estimator.first_reach(trial, line)

    def _own_state(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "skipped": self.skipped,
            "length": self._length,
            "kinetic": self._kinetic,
            "steady": self._loss_scale.steady,
            "rule_state": dict(self.rule_state),
        }

    def _configuration(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "rule": repr(self.rule),
            "estimator": repr(self.estimator),
            "every": self.every,
            "checked": self.checked,
        }

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's ``state_dict``, and beside it the wrapper's own numbers.

        Example:
            >>> import torch
            >>> from optim import GeN
            >>> optimizer = GeN(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
            >>> saved = optimizer.state_dict()
            >>> saved["wrapper"]["iteration"]
            0
            >>> optimizer.load_state_dict(saved)
        """
        own = {**self._configuration(), **self._own_state()}
        return {**self.base.state_dict(), "wrapper": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where the wrapper that gave ``state_dict`` stood.

        Raises:
            ValueError: it does not fit this optimizer; nothing has changed then.

        Example: see :meth:`state_dict`.
        """
        own = state_dict.get("wrapper", {"kind": "an optimizer that is not wrapped"})
        if own["kind"] != type(self).__name__:
            raise ValueError(
                f"the state_dict was saved by {own['kind']}, this is {type(self).__name__}"
            )
        configuration = self._configuration()
        differing = own.keys() ^ {*configuration, *self._own_state()}
        if differing:
            raise ValueError(f"the state_dict's 'wrapper' lacks or adds {sorted(differing)}")
        for name, here in configuration.items():
            if own[name] != here:
                raise ValueError(
                    f"the state_dict was saved with {name} {own[name]}, this has {here}"
                )
        self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "wrapper"})
        self.iteration, self.skipped = own["iteration"], own["skipped"]
        self._length, self._kinetic = own["length"], own["kinetic"]
        self._loss_scale.steady = own["steady"]
        self.rule_state = dict(own["rule_state"])

    def __getstate__(self) -> dict[str, Any]:
        hooks_and_patches = {k for k in self.__dict__ if k.startswith("_optimizer_")} | {"step"}
        return {k: v for k, v in self.__dict__.items() if k not in hooks_and_patches}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"


def _shortened(trial: Trial, line: Line, step: float) -> float:
    """The step, halved until the loss of its batch, or the energy, does not rise."""
    kinetic = line.kinetic or Kinetic(0.0, 0.0, 0.0, 0.0)
    allowed = line.value + kinetic.before
    for _ in range(_HALVINGS):
        if trial.loss_after(step) + kinetic.after(step) <= allowed + trial.rounding(allowed):
            break
        step /= 2
    return step


def _closures(given: Any, name: str) -> Sequence[Closure]:
    closures = [given] if callable(given) else given
    if isinstance(closures, (list, tuple)) and closures and all(map(callable, closures)):
        return closures
    kind = type(given).__name__
    if isinstance(given, (list, tuple)):
        kind = f"a {kind} of {', '.join(type(c).__name__ for c in given) or 'nothing'}"
    raise TypeError(
        f"{name}.step needs a closure that returns the loss, a scalar or one per sample, or a "
        f"list of such closures; it was given {kind}"
    )
