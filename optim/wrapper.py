"""A real torch optimizer around another: it keeps the direction and chooses the step."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from curvature import SideEffects, Tape
from optim.direction import copy_state, proposer, restore_state
from optim.record import Records, StepRecord


@dataclass(frozen=True)
class Trial:
    """One evaluation of the loss, as the closure gave it."""

    iteration: int
    tape: Tape
    closure: Callable[[], Tensor]
    effects: SideEffects
    params: list[Tensor]
    losses: Tensor


@dataclass(frozen=True)
class Line:
    """The direction d of one step, the mean loss, <d, g> and ‖d‖²."""

    direction: list[Tensor]
    value: float
    slope: float
    squared_norm: float


@dataclass(frozen=True)
class Choice:
    """The rescaling factor of one step, and the curvature it came from."""

    r: float
    curvature: float | None


class Wrapper(Optimizer):
    """The common part of :class:`optim.Rescaled` and :class:`optim.GeN`.

    ``param_groups``, ``state`` and ``defaults`` are the base optimizer's own; ``group["lr"]``
    is ell, a factor on the step chosen here, so torch's schedulers drive it. Attach them to the
    wrapper, after wrapping. Groups with different lr keep their ratios. What the wrapper itself
    remembers is stored beside them.

    Attributes:
        base: the wrapped optimizer.
        records: one :class:`optim.record.StepRecord` per step.
        skipped: how many steps left the parameters as they were.
    """

    def __init__(self, base: Optimizer, *, ell: float) -> None:
        if isinstance(base, Wrapper):
            raise TypeError(f"base is a {type(base).__name__}, which already chooses the step")
        self._proposer = proposer(base)
        self.base = base
        if not ell > 0 or not math.isfinite(ell):
            raise ValueError(f"ell is {ell}; it must be positive")
        for group in base.param_groups:
            _check_group(group)
        fastest = max(float(group["lr"]) for group in base.param_groups)
        for group in base.param_groups:
            group["lr"] = ell * float(group["lr"]) / fastest if fastest > 0 else ell
        base.defaults["lr"] = ell
        self.records = Records()
        self.skipped = 0
        self.iteration = 0
        # Only the hooks of Optimizer are set up: its constructor would make a second state.
        super().__setstate__({})

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
        """Add a group to the base optimizer; its lr, if given, is its ell."""
        group = dict(param_group)
        params = group["params"]
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
        _check_group({**self.defaults, **group})
        # A base may have bounds for its own lr, which ell need not meet.
        ell = group.pop("lr", self.defaults["lr"])
        self.base.add_param_group({**group, "lr": 0.0})
        self.param_groups[-1]["lr"] = ell

    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Evaluate the loss and its gradient, ask the base for a direction, and go the right way.

        Args:
            closure: returns the loss, a scalar or one per sample, without calling backward.

        Returns:
            What the closure returned, without graph. ``p.grad`` holds the gradient of the mean.

        If a loss or gradient is NaN or infinite, parameters, buffers, optimizer state and random
        state stay as before; the step is counted in ``skipped``, recorded, and warned of. If the
        closure raises, likewise, and the exception goes on to the caller. A step can also be
        skipped after the base has advanced, where the wrapper finds no length for it.

        Raises:
            TypeError, ValueError: no closure, or it returned no usable loss.
        """
        if closure is None:
            raise TypeError(
                f"{type(self).__name__}.step needs a closure that returns the loss, a scalar or "
                "one per sample, without calling backward"
            )
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        iteration = self.iteration + 1
        with SideEffects() as effects:
            with Tape() as tape:
                losses = closure()
            grads = _gradient(tape, losses, params)
            losses = losses.detach()
            if isinstance(grads, str):
                record = StepRecord(iteration, skipped=grads)
            else:
                trial = Trial(iteration, tape, closure, effects, params, losses)
                with self._undone_if_it_fails(trial):
                    record = self._advance(trial, grads)
                effects.keep()
        self.iteration = iteration
        self.records.append(record)
        if record.skipped is not None:
            self.skipped += 1
            message = f"step {iteration} skipped, parameters unchanged: {record.skipped}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        return losses

    def _advance(self, trial: Trial, grads: list[Tensor | None]) -> StepRecord:
        """Ask the base for a direction and go along it as far as the choice says."""
        for p, g in zip(trial.params, grads, strict=True):
            p.grad = g
        ell = max(float(group["lr"]) for group in self.param_groups)
        ratios = [float(group["lr"]) / ell if ell > 0 else 1.0 for group in self.param_groups]
        proposed = self._proposer.propose(ratios)
        direction = [proposed[p] if p in proposed else torch.zeros_like(p) for p in trial.params]
        value = trial.losses.double().mean().item()
        slope = _inner(direction, grads)
        line = Line(direction, value, slope, squared_norm=_inner(direction, direction))
        if not math.isfinite(slope) or not math.isfinite(line.squared_norm):
            reason = "the direction of the base optimizer is NaN or infinite"
            return StepRecord(trial.iteration, value, skipped=reason)
        choice = self._choose(trial, line)
        if isinstance(choice, str):
            return StepRecord(trial.iteration, value, slope, skipped=choice)
        step = min(ell * choice.r, self._proposer.limit(ratios))
        largest = min(torch.finfo(d.dtype).max for d in direction)
        if not abs(step) * max(1.0, math.sqrt(line.squared_norm)) < largest:
            reason = f"a step of {step:.1e} overflows the parameters' dtype"
            return StepRecord(
                trial.iteration, value, slope, choice.curvature, choice.r, 0.0, reason
            )
        self._proposer.move(step)
        return StepRecord(trial.iteration, value, slope, choice.curvature, choice.r, step)

    @abstractmethod
    def _choose(self, trial: Trial, line: Line) -> Choice | str:
        """The factor r for this step, or why the parameters must stay where they are."""

    @abstractmethod
    def _may_fail(self, iteration: int) -> bool:
        """Whether choosing this step runs what has not run before, so that it may raise."""

    @contextmanager
    def _undone_if_it_fails(self, trial: Trial) -> Iterator[None]:
        grads = [p.grad for p in trial.params]
        state = copy_state(self.base) if self._may_fail(trial.iteration) else None
        try:
            yield
        except BaseException:
            for p, g in zip(trial.params, grads, strict=True):
                p.grad = g
            if state is not None:
                restore_state(self.base, state)
            raise

    def _own_state(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "skipped": self.skipped}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.iteration, self.skipped = state["iteration"], state["skipped"]

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's ``state_dict``, and beside it the wrapper's own numbers."""
        own = {"kind": type(self).__name__, **self._own_state()}
        return {**self.base.state_dict(), "wrapper": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where the wrapper that gave ``state_dict`` stood.

        Raises:
            ValueError: it comes from another kind of optimizer; nothing has changed then.
        """
        own = state_dict.get("wrapper", {"kind": "an optimizer that is not wrapped"})
        if own["kind"] != type(self).__name__:
            raise ValueError(
                f"the state_dict was saved by {own['kind']}, this is {type(self).__name__}"
            )
        self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "wrapper"})
        self._load_own_state(own)

    def __getstate__(self) -> dict[str, Any]:
        hooks_and_patches = {k for k in self.__dict__ if k.startswith("_optimizer_")} | {"step"}
        return {k: v for k, v in self.__dict__.items() if k not in hooks_and_patches}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"


def _inner(left: Sequence[Tensor], right: Sequence[Tensor | None]) -> float:
    """<left, right> in float64; None is zero."""
    return sum(
        (a.double() * b.double()).sum().item()
        for a, b in zip(left, right, strict=True)
        if b is not None
    )


def _gradient(tape: Tape, losses: Any, params: list[Tensor]) -> list[Tensor | None] | str:
    """The gradient of the mean loss, or why the step must be skipped."""
    if isinstance(losses, Tensor) and losses.is_floating_point() and losses.numel() > 0:
        bad = int((~torch.isfinite(losses)).sum())
        if bad:
            return f"{bad} of {losses.numel()} losses are NaN or infinite"
    grads: list[Tensor | None] = tape.backward(losses, params)
    for g in grads:
        # The square must be finite too: preconditioners that hold it would never recover.
        if g is not None and not math.isfinite(g.square().sum().item()):
            return "the gradient, or its square, is NaN or infinite"
    return grads


def _check_group(group: dict[str, Any]) -> None:
    if group.get("maximize"):
        raise ValueError("maximize=True cannot be wrapped; negate the loss instead")
    if "initial_lr" in group:
        raise ValueError(
            "a scheduler is attached to the base optimizer already; attach it to the wrapper, "
            "after wrapping: there lr is the factor ell"
        )
    for p in group["params"]:
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"a parameter has dtype {p.dtype}; only float32 and float64 can be used"
            )
