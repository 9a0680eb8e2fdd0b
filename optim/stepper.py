"""One step along the direction of a base optimizer, as far as a rule says."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from curvature import NonFiniteLoss, SideEffects
from optim.again import learn_calls
from optim.consistent import check_consistent
from optim.direction import check_hooks, momentum, proposer
from optim.energy import Kinetic, kinetic_of
from optim.estimators import Estimator
from optim.evaluation import Batch, Evaluation, Plain, evaluate
from optim.grads import set_grads
from optim.line import Estimate, Line
from optim.penalty import penalty_of
from optim.ranges import check_count
from optim.rate import rate
from optim.record import StepRecord
from optim.rules import Rule
from optim.rules.rule import State
from optim.snapshot import Snapshot
from optim.trail import Trail
from optim.trial import Trial

OVERFLOW = "the gradient, or its square, is NaN or infinite"
_HALVINGS = 40  # after which no length of the step is left to speak of
_SMALLEST = sys.float_info.min
_LEAST = _SMALLEST / sys.float_info.epsilon  # sum of squares that has all its digits
_TOO_SMALL = (
    "the gradient is so small that products with it leave the range of float64; multiply the loss "
    "by a large number"
)
_NEARER = 4.0  # where the next probe goes after one that was NaN or infinite


@dataclass
class Plan:
    """A step that is not taken yet, made up as one thing follows from another.

    Attributes:
        estimate: of the curvature, where one was due.
        state: what the rule will remember.
        numbers: of the record, as far as they are known.
    """

    trial: Trial
    line: Line
    estimate: Estimate | None = None
    state: State = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> StepRecord:
        """What is recorded of the step, or of why there is none."""
        return StepRecord(self.line.iteration, self.line.value, **self.numbers)


class Stepper:
    """Base optimizer, estimator and rule, put together.

    Attributes:
        rule_state: what the rule remembers.
        length: of the last step at ell = 1, or less where a probe beyond it was NaN or infinite.
        energy: the kinetic energy that the last step left.
        trail: the way of the last steps, where the rule needs hindsight.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        estimator: Estimator,
        rule: Rule,
        every: int,
        checked: int,
        clip: Callable[[list[Tensor]], Any] | None,
    ) -> None:
        self._proposer = proposer(base)
        check_count("every", every)
        check_count("checked", checked, 0)
        self.base, self.estimator, self.rule = base, estimator, rule
        self._kinetic_of = kinetic_of(base) if rule.needs_kinetic else None
        self.every, self.checked, self.clip = every, checked, clip
        self.rule_state: State = {}
        self.length = 0.0
        self.energy = 0.0
        self.trail = Trail()
        self._consistent = False  # whether the closures were seen to be so

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs of it."""
        # A rule of the caller's own may have computed with numbers of numpy.
        rule_state = {name: float(number) for name, number in self.rule_state.items()}
        length, energy = float(self.length), float(self.energy)
        return {"length": length, "energy": energy, "rule_state": rule_state}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave; other entries are passed over."""
        self.length, self.energy = state["length"], state["energy"]
        self.rule_state = dict(state["rule_state"])

    def due(self, iteration: int) -> bool:
        """Whether this step takes an estimate."""
        return self.rule.due(iteration, self.every, self.rule_state)

    def step(self, iteration: int, batch: Batch, due: bool) -> tuple[Any, StepRecord]:
        """Evaluate the closures and go along the base's direction, or leave the base as before.

        Returns:
            What the closures gave, whose effects stand, and the record of the step.
        """
        recorder = self.estimator.recorder if due else Plain
        found = evaluate(batch, recorder, all_leaves=True)
        if found.unusable is not None:
            return found.result, StepRecord(iteration, skipped=found.unusable)
        # The square must be finite too: preconditioners that hold it would never recover.
        setting = batch.setting
        squared_norm, behind = setting.ranks.means(found.squared_norm, setting.called.behind)
        if behind > 0 and not (due and self.estimator.needs_graph):
            with SideEffects(setting.called):
                batch.effects.rewind()
                learn_calls(batch.closures, batch.params, setting)
        overflowed = not squared_norm <= _largest(found.params)
        if overflowed:
            record = StepRecord(iteration, skipped=OVERFLOW)
        else:
            record = self._advance(iteration, batch, found, due)
        # Not before: it writes to the scale, which the graph has saved.
        setting.loss_scale.update(overflowed=overflowed)
        return found.result, record

    def ahead(self, iteration: int, batch: Batch) -> Plan:
        """What the step would be, with an estimate; the base and the rule stay as they are.

        Raises:
            ValueError: a loss is NaN or infinite.
        """
        found = evaluate(batch, self.estimator.recorder)
        if found.unusable is not None:
            raise ValueError(f"no step lies ahead: {found.unusable}")
        before = Snapshot(self.base)
        own = self.rule_state, self.length, self._consistent
        try:
            return self._plan(iteration, batch, found, True)
        finally:
            before.restore()
            self.rule_state, self.length, self._consistent = own

    def _advance(self, iteration: int, batch: Batch, found: Evaluation, due: bool) -> StepRecord:
        check_hooks(self.base)
        before = Snapshot(self.base)
        record = None
        try:
            plan = self._plan(iteration, batch, found, due)
            if plan.record.skipped is None:
                self._go(plan)
            record = plan.record
        finally:
            if record is None or record.skipped is not None:
                before.restore()
        return record

    def _plan(self, iteration: int, batch: Batch, found: Evaluation, due: bool) -> Plan:
        """Ask the base for a direction, and the rule how far to go along it."""
        self._hand_over(batch, found)
        rates = [rate(group) for group in self.base.param_groups]
        ell = max(rates)
        ratios = [each / ell if ell > 0 else 1.0 for each in rates]
        proposed = self._proposer.propose(ratios)
        direction = [proposed[p] if p in proposed else torch.zeros_like(p) for p in found.params]
        trial = Trial(batch, found, penalty_of(self.base, found.params), direction)
        kinetic = None if self._kinetic_of is None else self._kinetic_of(ratios, self.energy)
        slope, squared_norm = trial.slope_and_squared_norm()
        line = Line(
            iteration,
            value=trial.value(),
            slope=slope,
            squared_norm=squared_norm,
            momentum=momentum(self.base),
            ell=ell,
            kinetic=kinetic,
            limit=self._proposer.limit(ratios),
            hindsight=self._hindsight(trial),
        )
        plan = Plan(trial, line)
        why = self._choose(plan, due)
        if why is not None:
            plan.numbers["skipped"] = why
        return plan

    def _hindsight(self, trial: Trial) -> float:
        way = self.trail.along(trial.params)
        slope = 0.0 if way is None else way[0] * trial.slope_along(way[1])
        return slope if math.isfinite(slope) else 0.0

    def _hand_over(self, batch: Batch, found: Evaluation) -> None:
        """Put the gradients into ``p.grad``, where the base looks for them."""
        for p in batch.params:
            if not p.requires_grad:
                # The base would go on along its momentum, of which the trial knows nothing.
                p.grad = None
        if not found.accumulated:
            set_grads(found.params, found.grads, copied=self.clip is not None)
        if self.clip is not None:
            self.clip([p for p in found.params if p.grad is not None])

    def _choose(self, plan: Plan, due: bool) -> str | None:
        """Fill in how far to go, or say why no step follows."""
        trial, line, numbers = plan.trial, plan.line, plan.numbers
        if line.kinetic is not None:
            numbers["energy"] = line.value + line.kinetic.before
        if not math.isfinite(line.slope) or not math.isfinite(line.squared_norm):
            return "the direction of the base optimizer is NaN or infinite"
        if line.squared_norm < _LEAST and not trial.is_flat():
            return _TOO_SMALL
        numbers["slope"] = line.slope
        if due and line.squared_norm > 0:
            estimate = self._measure(trial, line)
            if isinstance(estimate, str):
                return estimate
            plan.estimate = estimate
            numbers["curvature"], numbers["magnitude"] = estimate.curvature, estimate.magnitude
        checks = line.iteration <= self.checked
        looks_ahead = checks or (due and not self.estimator.needs_graph)
        if looks_ahead and line.squared_norm > 0 and not self._consistent:
            # Not before: buffers are written to, which the graph may have saved.
            check_consistent(trial, line)
            self._consistent = True
        r, plan.state = self.rule.choose(line, plan.estimate, self.rule_state)
        if isinstance(r, str):
            return r
        numbers["r"] = r
        step = min(line.ell * r, line.limit)
        if not abs(step) * max(1.0, math.sqrt(line.squared_norm)) < _largest(trial.direction):
            return f"a step of {step:.1e} overflows the parameters' dtype"
        if checks and step > 0 and (line.slope > 0 or line.kinetic is not None):
            step = _shortened(trial, line, step, r)
        numbers["step"] = step
        return None

    def _go(self, plan: Plan) -> None:
        line, step = plan.line, plan.numbers["step"]
        params, mu, looks_back = plan.trial.params, line.momentum, self.rule.needs_hindsight
        # First, since there may be no memory for it, and d is the proposer's.
        held = self.trail.before(params, plan.trial.direction, mu) if looks_back else []
        self._proposer.move(step)
        if looks_back:
            self.trail.after(params, held, step, mu)
        if line.kinetic is not None:
            self.energy = line.kinetic.after(step, plan.numbers["r"])
        self.rule_state = plan.state
        if line.ell * step > 0:
            # A schedule that takes ell to 0 must not take the probes into the rounding.
            self.length = step / line.ell * math.sqrt(line.squared_norm)

    def _measure(self, trial: Trial, line: Line) -> Estimate | str:
        reach = math.inf
        try:
            # Differentiating may evaluate checkpointed modules again, and so their statistics.
            with trial.aside():
                reach = self._reach(trial, line)
                bend = abs(line.slope) / reach if reach < math.inf else math.inf
                if line.slope and bend < _SMALLEST and not trial.is_flat():
                    return _TOO_SMALL
                found = self.estimator.estimate(trial, line, reach)
        except NonFiniteLoss:
            self.rule_state = self.rule.after_bad_probe(self.rule_state)
            if reach < math.inf:
                self.length = reach * math.sqrt(line.squared_norm) / _NEARER
            return "the loss at a probe is NaN or infinite"
        if isinstance(found, str):
            return found
        if not math.isfinite(found.magnitude):
            return "the curvature along the direction is NaN or infinite"
        return replace(found, reach=reach)

    def _reach(self, trial: Trial, line: Line) -> float:
        """How far along d a probe shall go: as the rule says, or as the last step at ell = 1."""
        reach = self.rule.reach(line, self.rule_state)
        if reach is not None:
            return reach
        if self.length:
            return self.length / math.sqrt(line.squared_norm)
        return self.estimator.first_reach(trial, line)


def _shortened(trial: Trial, line: Line, step: float, r: float) -> float:
    """The step, halved until the loss of its batch, or the energy, does not rise."""
    kinetic = line.kinetic or Kinetic(0.0, 0.0, 0.0, 0.0)
    allowed = line.value + kinetic.before
    for _ in range(_HALVINGS):
        if trial.loss_after(step) + kinetic.after(step, r) <= allowed + trial.rounding(allowed):
            break
        step /= 2
    return step


def _largest(tensors: Sequence[Tensor]) -> float:
    """The largest number that each of them may hold."""
    return min(torch.finfo(dtype).max for dtype in {t.dtype for t in tensors})
