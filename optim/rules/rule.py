"""What every step rule answers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from optim.line import Estimate, Line

State = dict[str, float]


class Rule(ABC):
    """How far to go along d: from numbers to a number, without side effects.

    What a rule remembers from step to step is a dictionary of numbers, handed in and out.
    """

    @property
    def needs_kinetic(self) -> bool:
        """Whether it needs the kinetic energy of the base optimizer."""
        return False

    @property
    def needs_hindsight(self) -> bool:
        """Whether it needs ``line.hindsight``, which is 0 otherwise.

        A rule that asks another one answers for that one too.
        """
        return False

    @abstractmethod
    def choose(
        self, line: Line, estimate: Estimate | None, state: State
    ) -> tuple[float | str, State]:
        """The factor r of this step, or why none follows, and what to remember.

        Args:
            estimate: the curvature; None at steps that do without.
            state: what the last step gave; empty at first.
        """

    def due(self, iteration: int, every: int, state: State) -> bool:
        """Whether this step needs an estimate, where one is made every so many steps."""
        return not state or (iteration - 1) % every == 0

    def reach(self, line: Line, state: State) -> float | None:
        """How far along d estimators that probe shall go, if the rule has a say."""
        return None

    def after_bad_probe(self, state: State) -> State:
        """What to remember after a step whose probes were NaN or infinite."""
        return state
