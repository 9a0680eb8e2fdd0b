"""A real torch optimizer around another: it keeps the direction and chooses the step."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from curvature import RandomState, SideEffects
from optim.direction import proposer
from optim.record import Records, StepRecord
from optim.snapshot import Snapshot


class Recorder(Protocol):
    """Runs the closure and gives the gradient; :class:`curvature.Tape` is one."""

    def __enter__(self) -> Any: ...

    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> None: ...

    def backward(self, losses: Tensor, params: Any) -> Any: ...


R = TypeVar("R", bound=Recorder)


@dataclass(frozen=True, eq=False)
class Trial(Generic[R]):
    """One evaluation of the loss: the closure, what it gave, and what recorded it."""

    iteration: int
    closure: Callable[[], Tensor]
    recorder: R
    random: RandomState
    params: list[Tensor]
    losses: Tensor


@dataclass(frozen=True, eq=False)
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


class Wrapper(Optimizer, Generic[R]):
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
            _check_rate(group)
        fastest = max(float(group["lr"]) for group in base.param_groups)
        for group in base.param_groups:
            group["lr"] = ell * float(group["lr"]) / fastest if fastest > 0 else ell
        base.defaults["lr"] = ell
        self.records = Records()
        self.skipped = 0
        self.iteration = 0
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
            [0.5, 0.25]
        """
        # A base may have bounds for its own lr, which ell need not meet.
        ell = param_group.get("lr", self.defaults["lr"])
        _check_rate({"lr": ell})
        self.base.add_param_group({**param_group, "lr": 0.0})
        group = self.param_groups.pop()
        _check_group(group)
        self.param_groups.append({**group, "lr": ell})

    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Evaluate the loss and its gradient, ask the base for a direction, and go the right way.

        Args:
            closure: returns the loss, a scalar or one per sample, without calling backward.

        Returns:
            What the closure returned, without graph. ``p.grad`` holds the gradient of the mean.

        A step is skipped if a loss or gradient is NaN or infinite, or if no step length follows
        from the curvature: parameters and ``p.grad``, buffers, optimizer and random state are
        then as before the step, and it is counted in ``skipped``, recorded and warned of. If the
        closure raises, likewise, and the exception goes on to the caller. Draw the batch outside
        the closure: one that draws it from a global generator would draw the same again. What
        the forward pass itself writes to parameters stands (``Embedding`` with ``max_norm``).

        Raises:
            TypeError, ValueError: no closure, it returned no usable loss, or the base's step is
                not linear in lr, as its first ten steps are made to prove.
            NotTwiceDifferentiable: for Rescaled, PyTorch has no second derivative of the loss.

        Example:
            >>> import torch
            >>> from optim import Rescaled
            >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
            >>> optimizer = Rescaled(torch.optim.SGD([x]))
            >>> optimizer.step(lambda: x**2)  # one loss per sample
            tensor([1., 4.])
            >>> x.detach()
            tensor([0., 0.])
        """
        if not callable(closure):
            raise TypeError(
                f"{type(self).__name__}.step needs a closure that returns the loss, a scalar or "
                f"one per sample, without calling backward; it was given {type(closure).__name__}"
            )
        for group in self.param_groups:
            _check_rate(group)
        params = [p for group in self.param_groups for p in group["params"]]
        old_grads = [p.grad for p in params]
        iteration = self.iteration + 1
        record = None
        try:
            # Also for a parameter that is frozen by now: the base would go on along the last one.
            for p in params:
                p.grad = None
            with SideEffects() as effects:
                recorder = self._recorder()
                with recorder:
                    losses = closure()
                params_now = [p for p in params if p.requires_grad]
                grads = _gradient(recorder, losses, params_now)
                losses = losses.detach()
                if isinstance(grads, str):
                    record = StepRecord(iteration, skipped=grads)
                else:
                    trial = Trial(iteration, closure, recorder, effects.random, params_now, losses)
                    record = self._advance(trial, grads)
                    if record.skipped is None:
                        effects.keep()
        finally:
            if record is None or record.skipped is not None:
                for p, g in zip(params, old_grads, strict=True):
                    p.grad = g
        self.iteration = iteration
        self.records.append(record)
        if record.skipped is not None:
            self.skipped += 1
            message = f"step {iteration} skipped, nothing changed: {record.skipped}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        return losses

    def _advance(self, trial: Trial[R], grads: list[Tensor | None]) -> StepRecord:
        """Go along the base's direction, or leave the base and the own numbers as before."""
        before, own = Snapshot(self.base), self._own_state()
        record = None
        try:
            record = self._go(trial, grads)
        finally:
            if record is None or record.skipped is not None:
                before.restore()
                self._load_own_state(own)
        return record

    def _go(self, trial: Trial[R], grads: list[Tensor | None]) -> StepRecord:
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
        record = StepRecord(trial.iteration, value)
        if not math.isfinite(slope) or not math.isfinite(line.squared_norm):
            return replace(record, skipped="the direction of the base optimizer is NaN or infinite")
        # Differentiating may evaluate checkpointed modules again, and so their statistics.
        with SideEffects():
            choice = self._choose(trial, line)
        record = replace(record, slope=slope)
        if isinstance(choice, str):
            return replace(record, skipped=choice)
        step = min(ell * choice.r, self._proposer.limit(ratios))
        record = replace(record, curvature=choice.curvature, r=choice.r)
        largest = min(torch.finfo(d.dtype).max for d in direction)
        if not abs(step) * max(1.0, math.sqrt(line.squared_norm)) < largest:
            return replace(record, skipped=f"a step of {step:.1e} overflows the parameters' dtype")
        self._proposer.move(step)
        return replace(record, step=step)

    @abstractmethod
    def _recorder(self) -> R:
        """What runs the closure and differentiates its losses."""

    @abstractmethod
    def _choose(self, trial: Trial[R], line: Line) -> Choice | str:
        """The factor r for this step, or why the parameters must stay where they are."""

    def _own_state(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "skipped": self.skipped}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.iteration, self.skipped = state["iteration"], state["skipped"]

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's ``state_dict``, and beside it the wrapper's own numbers.

        Example:
            >>> import torch
            >>> from optim import GeN
            >>> optimizer = GeN(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
            >>> saved = optimizer.state_dict()
            >>> saved["wrapper"]["eta"]
            0.001
            >>> optimizer.load_state_dict(saved)
        """
        own = {"kind": type(self).__name__, **self._own_state()}
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
        differing = own.keys() ^ {"kind", *self._own_state()}
        if differing:
            raise ValueError(f"the state_dict's 'wrapper' lacks or adds {sorted(differing)}")
        self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "wrapper"})
        self._load_own_state(own)

    def __getstate__(self) -> dict[str, Any]:
        hooks_and_patches = {k for k in self.__dict__ if k.startswith("_optimizer_")} | {"step"}
        return {k: v for k, v in self.__dict__.items() if k not in hooks_and_patches}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"


def _inner(left: Sequence[Tensor], right: Sequence[Tensor | None]) -> float:
    """<left, right> in float64; None is zero."""
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if b is not None]
    return _sum([(a.double() * b.double()).sum() for a, b in pairs])


def _sum(numbers: Sequence[Tensor]) -> float:
    if not numbers:
        return 0.0
    return torch.stack([x.to(numbers[0].device) for x in numbers]).sum().item()


def _gradient(recorder: Recorder, losses: Any, params: list[Tensor]) -> list[Tensor | None] | str:
    """The gradient of the mean loss, or why the step must be skipped."""
    if isinstance(losses, Tensor) and losses.is_floating_point() and losses.numel() > 0:
        bad = int((~torch.isfinite(losses)).sum())
        if bad:
            return f"{bad} of {losses.numel()} losses are NaN or infinite"
    grads: list[Tensor | None] = recorder.backward(losses, params)
    # The square must be finite too: preconditioners that hold it would never recover.
    if not math.isfinite(_sum([g.square().sum().double() for g in grads if g is not None])):
        return "the gradient, or its square, is NaN or infinite"
    return grads


def _check_rate(group: dict[str, Any]) -> None:
    if "lr" not in group:
        raise TypeError("the base optimizer has no lr in its groups, by which to set its step")
    if not 0 <= float(group["lr"]) < math.inf:
        raise ValueError(f"lr is {group['lr']}; it must be finite and at least 0")


def _check_group(group: dict[str, Any]) -> None:
    if group.get("maximize"):
        raise ValueError("maximize=True cannot be wrapped; negate the loss instead")
    if group.get("differentiable"):
        raise ValueError("differentiable=True cannot be wrapped: no graph is kept of a step")
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
