"""Robbins-Monro bounds on another rule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from optim.line import Estimate, Line
from optim.ranges import check_kind, check_number, take_floats
from optim.rules.lipschitz import Lipschitz
from optim.rules.rule import Rule, State


@dataclass(frozen=True)
class RobbinsMonro(Rule):
    """``low <= ell r_k k^delta <= high``: equation (12) of *Adaptive scaling*.

    (de Gournay, Gossard 2022.) With delta in ]1/2, 1[ the steps sum to infinity and their squares
    do not, which forces convergence under the noise of batches.

    Args:
        low, high: alpha and beta of the paper, bounds of the step at k = 1.
        delta: how fast they fall.
        rule: what chooses within them.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: not 0 < low <= high, or delta is not between 1/2 and 1.

    Example:
        >>> from optim.line import Estimate, Line
        >>> line = Line(iteration=16, value=9.0, slope=4.0, squared_norm=1.0)
        >>> rule = RobbinsMonro(low=0.1, high=1.0, delta=0.75)
        >>> r, _ = rule.choose(line, Estimate(4.0, 2.0, 2.0), {})
        >>> r  # 4 is cut to 1 / 16^0.75
        0.125
    """

    low: float
    high: float
    delta: float = 0.75
    rule: Rule = field(default_factory=Lipschitz)

    def __post_init__(self) -> None:
        for name in ("low", "high", "delta"):
            check_number(name, getattr(self, name))
        check_kind("rule", self.rule, Rule, "a rule of optim.rules, as Lipschitz()")
        if not 0 < self.low <= self.high < math.inf:
            raise ValueError(f"low is {self.low} and high {self.high}; 0 < low <= high is needed")
        if not 0.5 < self.delta < 1:
            raise ValueError(f"delta is {self.delta}; it must be between 1/2 and 1")
        take_floats(self, "low", "high", "delta")

    @property
    def needs_kinetic(self) -> bool:
        return self.rule.needs_kinetic

    @property
    def needs_hindsight(self) -> bool:
        return self.rule.needs_hindsight

    def choose(
        self, line: Line, estimate: Estimate | None, state: State
    ) -> tuple[float | str, State]:
        r, state = self.rule.choose(line, estimate, state)
        if isinstance(r, str) or line.ell == 0 or line.squared_norm == 0:
            return r, state
        unit = line.iteration**-self.delta / line.ell
        return min(max(r, self.low * unit), self.high * unit), state

    def due(self, iteration: int, every: int, state: State) -> bool:
        return self.rule.due(iteration, every, state)

    def reach(self, line: Line, state: State) -> float | None:
        return self.rule.reach(line, state)

    def after_bad_probe(self, state: State) -> State:
        return self.rule.after_bad_probe(state)
