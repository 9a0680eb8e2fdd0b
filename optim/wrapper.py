"""A real torch optimizer around another: it keeps the direction and chooses the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.amp import GradScaler
from torch.optim import Optimizer

from curvature import SideEffects, compilations, uncompiled
from optim.again import learn_calls
from optim.ahead import Ahead, along
from optim.apart import places
from optim.autocast import forget_casts
from optim.called import Called
from optim.configuration import checked_entry, described, shapes
from optim.estimators import Estimator
from optim.evaluation import Batch, Closure, Setting
from optim.grads import LeftGrads, without_grads
from optim.groups import check_options, check_rate, check_together, check_wrappable
from optim.loss_scale import LossScale
from optim.portable import asks_for_state, with_entry, without_entry
from optim.ranges import check_count, check_kind, check_param_group, check_positive
from optim.ranks import Ranks
from optim.record import Records
from optim.rules import Rule
from optim.stepper import OVERFLOW, Stepper
from optim.trail import Trail
from optim.warn import warn

if TYPE_CHECKING:  # some builds of torch are without it
    from torch.distributed import ProcessGroup


class Wrapper(Optimizer):
    """A base optimizer that says where to, an estimator of the curvature there, and a rule.

    The common part of :class:`optim.Rescaled` and :class:`optim.GeN`, which choose the two.
    ``param_groups``, ``state`` and ``defaults`` are the base optimizer's own; ``group["lr"]``
    is ell, a factor on the step chosen here, so torch's schedulers drive it. Attach them to the
    wrapper, after wrapping. Groups with different lr keep their ratios. What the wrapper itself
    remembers is stored beside them.

    Attributes:
        base: the wrapped optimizer.
        stepper: it with the estimator and the rule, and what the rule remembers.
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
        process_group: ProcessGroup | None = None,
    ) -> None:
        if isinstance(base, Wrapper):
            raise TypeError(f"base is a {type(base).__name__}, which already chooses the step")
        check_positive("ell", ell)
        ell = float(ell)
        check_kind("rule", rule, Rule, "a rule of optim.rules, as Cautious()")
        check_kind("estimator", estimator, Estimator, "one of optim.estimators, as Exact()")
        if clip is not None and not callable(clip):
            raise TypeError(f"clip is {clip!r}; give a function of the list of parameters")
        if scaler is not None:
            check_kind("scaler", scaler, GradScaler, "a torch.amp.GradScaler")
        self.base = base
        self.stepper = Stepper(
            base, estimator=estimator, rule=rule, every=every, checked=checked, clip=clip
        )
        self._setting = Setting(LossScale(scaler), Ranks(process_group), Called())
        self._check_groups(base.param_groups)
        # Nothing is refused from here on, so that a base that is stays as it was.
        fastest = max(float(group["lr"]) for group in base.param_groups)
        for group in base.param_groups:
            group["lr"] = ell * float(group["lr"]) / fastest if fastest > 0 else ell
        base.defaults["lr"] = ell
        self.records = Records()
        self.skipped = 0
        self.iteration = 0
        self._left_grads = LeftGrads()
        self._places: list[int] | None = None
        self.__setstate__({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Only the hooks of Optimizer are set up: its constructor would make a second state.
        super().__setstate__(state)
        # Hooks on saving and loading run where the base saves and loads.
        for name, hooks in vars(self.base).items():
            if name.startswith(("_optimizer_state_dict", "_optimizer_load_state_dict")):
                setattr(self, name, hooks)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    @property
    def records(self) -> Records:
        """What was chosen at the latest steps; another :class:`optim.Records` may be assigned."""
        return self._records

    @records.setter
    def records(self, records: Records) -> None:
        # Nothing else could hold the record of a step that is already taken.
        check_kind("records", records, Records, "an optim.Records, as Records(JsonLines(path))")
        self._records = records

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
        check_param_group(param_group)
        # A base may have bounds for its own lr, which ell need not meet.
        ell = param_group.get("lr", self.defaults["lr"])
        check_rate({"lr": ell})
        self.base.add_param_group({**param_group, "lr": 0.0})
        group = self.param_groups.pop()
        self._check_groups([group], self.param_groups)
        self.param_groups.append({**group, "lr": float(ell)})

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients to None, or to zeros, as any torch optimizer does.

        Zeros let a base's momentum and weight decay go on where the loss does not use a parameter.

        Example:
            >>> import torch
            >>> from optim import Rescaled
            >>> x = torch.nn.Parameter(torch.ones(2))
            >>> x.grad = torch.ones(2)
            >>> Rescaled(torch.optim.SGD([x])).zero_grad(set_to_none=False)
            >>> x.grad
            tensor([0., 0.])
        """
        super().zero_grad(set_to_none)
        if set_to_none:
            self._left_grads.forget()
        else:
            self._left_grads.zero()

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _checked_params(self) -> list[Tensor]:
        """The parameters of all groups, looked at again where one is new or has moved."""
        for group in self.param_groups:
            check_options(group)
        params = self._params()
        found = places(params)
        if found is None or found != self._places:
            check_together(self.param_groups)
            self._places = found
        return params

    def _check_groups(
        self, new: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]] = ()
    ) -> None:
        estimator = self.stepper.estimator
        exact = type(estimator).__name__ if estimator.needs_graph else None
        check_wrappable(new, others, several=self._setting.ranks.several, exact=exact)

    @_disable_dynamo  # as zero_grad of torch's own optimizers
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
            What the closure returned, a tensor without its graph; of several, all losses.
            ``p.grad`` holds the gradient of the mean, as clipped.

        A step is skipped if a loss or gradient is NaN or infinite, or if no step length follows
        from the curvature: parameters, buffers, optimizer and random state are then as before the
        step, and it is counted in ``skipped``, recorded and warned of. If the closure raises,
        likewise, and the exception goes on to the caller. Gradients that the
        last step left in ``p.grad`` are then gone, and the caller's own as they were. The closure
        runs again where a loss ahead is asked for, by the same random numbers of torch, numpy and
        Python and from the same buffers: draw the batch outside it, and log or count after the
        step, from ``records[-1]`` or what ``step`` returns. Targets that the same network gives, as
        in Q-learning, belong outside too: inside, they would move with the parameters in the
        losses ahead, ``detach()`` or not. What the forward pass itself writes
        to parameters stands (``Embedding`` with ``max_norm``).

        Raises:
            TypeError, ValueError: no closure, it gave no usable loss, or none that is a function of
                the parameters, ``p.grad`` holds gradients from elsewhere, or the base's step is not
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
        if closure is None and asks_for_state(self.param_groups):
            # As torch.distributed.checkpoint, before it loads into a new optimizer.
            return self.base.step()
        closures = _closures(closure, f"{type(self).__name__}.step")
        params = self._checked_params()
        # At once: while they are held, the pass to come needs as much memory again.
        self._left_grads.clear(params)
        old_grads = [p.grad for p in params]
        due = self.stepper.due(self.iteration + 1)
        called = self._setting.called
        called.begin()
        plainly, first = due and self.stepper.estimator.needs_graph, not called.known
        record = None
        try:
            if not (plainly or called.known):
                # A model that is compiled inside the first step is from the next one on.
                plainly = not self._anything_compiled()
                if not plainly:
                    learn_calls(closures, params, self._setting)
            # A tape sees to itself; around it this would take time of each of its operations.
            plainly = plainly and (first or compilations() > 0)
            with uncompiled() if plainly else nullcontext(), SideEffects(called) as effects:
                batch = Batch(closures, params, self._setting, effects)
                result, record = self.stepper.step(self.iteration + 1, batch, due)
                if record.skipped is None:
                    effects.keep()
                called.note(effects.called)
        finally:
            forget_casts()
            if record is None or record.skipped is not None:
                for p, g in zip(params, old_grads, strict=True):
                    p.grad = g
            else:
                self._left_grads.note(params)
        self.iteration = record.iteration
        self.skipped += record.skipped is not None
        self.records.append(record)
        # A loss scale finds its place by overflows.
        expected = record.skipped == OVERFLOW and self._setting.loss_scale.used
        if record.skipped is not None and not expected:
            warn(f"step {record.iteration} skipped, nothing changed: {record.skipped}")
        return result

    def _anything_compiled(self) -> bool:
        # What is evaluated on one process must be on all, which wait for each other.
        return self._setting.ranks.means(compilations())[0] > 0

    def look_ahead(
        self, closure: Closure | Sequence[Closure], *, points: int = 41, reach: float = 1.5
    ) -> Ahead:
        """The loss along the step that ``step(closure)`` would take, without taking it.

        Nothing is changed by it: for :func:`optim.plots.ahead`, in the middle of a training. It
        takes an estimate of its own; where ``step`` would go by an older one, as GeN does at seven
        of eight steps, the step shown is the one that a new estimate would make.

        Args:
            closure: as for :meth:`step`; a whole batch, for the picture to be of use.
            points: how many losses to evaluate, from a quarter of the step at ell = 1 behind the
                parameters.
            reach: up to this multiple of that step.

        Raises:
            TypeError, ValueError: as for :meth:`step`, or no step would be taken.

        Example:
            >>> import torch
            >>> from optim import GeN
            >>> x = torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
            >>> optimizer = GeN(torch.optim.SGD([x]), ell=0.5)
            >>> ahead = optimizer.look_ahead(lambda: x.square().sum() + 1)
            >>> ahead.value, ahead.step, x.item()
            (10.0, 0.5, 3.0)
        """
        check_count("points", points, 3)
        check_positive("reach", reach)
        closures = _closures(closure, f"{type(self).__name__}.look_ahead")
        params = self._checked_params()
        try:
            with uncompiled(), without_grads(params), SideEffects() as effects:
                batch = Batch(closures, params, self._setting, effects)
                plan = self.stepper.ahead(self.iteration + 1, batch)
                return along(plan, points=points, reach=reach)
        finally:
            forget_casts()

    def _own_state(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "skipped": self.skipped,
            "states": len(self.base.state),
            "steady": self._setting.loss_scale.steady,
            "trail": self.stepper.trail.saved(self._params()),
            **self.stepper.trail.numbers(),
            **self.stepper.state(),
        }

    def _configuration(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "base": type(self.base).__name__,
            "shapes": shapes(self.param_groups),
            "rule": described(self.stepper.rule, (Rule, Estimator)),
            "estimator": described(self.stepper.estimator, (Rule, Estimator)),
            "every": self.stepper.every,
            "checked": self.stepper.checked,
        }

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's ``state_dict``, and beside it what the wrapper remembers.

        ``torch.load`` reads it with ``weights_only=True``. In its groups ``lr`` is ell, which an
        optimizer that is not wrapped would take for a rate of 0.95. Its tensors are those in use,
        as with torch's own: ``copy.deepcopy`` it to keep it in memory. ``records`` are not in it.
        The first group holds the wrapper's numbers too, as text: ``get_state_dict`` and
        ``set_state_dict`` of ``torch.distributed.checkpoint`` keep nothing beside the groups (and
        by ``flatten_optimizer_state_dict`` lose that too, which is then refused).
        examples/checkpoint.py saves and continues a run.

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
        return with_entry(self.base.state_dict(), own)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where the wrapper that gave ``state_dict`` stood.

        The groups' hyperparameters, ell among them, become those of the checkpoint, as in torch.

        Raises:
            ValueError: it was saved by another wrapper, base, rule or estimator, or for other
                parameters; nothing has changed then.

        Example: see :meth:`state_dict`.
        """
        own = checked_entry(state_dict, self._configuration(), self._own_state())
        # Hooks may give the base another order of the parameters, of which nothing is known here.
        reordered = bool(self.base._optimizer_load_state_dict_pre_hooks)
        params = self._params()
        trail = Trail()
        trail.load(params, [None] * len(params) if reordered else own["trail"], own)
        self.base.load_state_dict(without_entry(state_dict))
        self.stepper.trail = trail
        self.iteration, self.skipped = own["iteration"], own["skipped"]
        self._setting.loss_scale.steady = own["steady"]
        self.stepper.load(own)

    def __getstate__(self) -> dict[str, Any]:
        hooks_and_patches = {k for k in self.__dict__ if k.startswith("_optimizer_")} | {"step"}
        return {k: v for k, v in self.__dict__.items() if k not in hooks_and_patches}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"


def _closures(given: Any, name: str) -> Sequence[Closure]:
    closures = [given] if callable(given) else given
    if isinstance(closures, (list, tuple)) and closures and all(map(callable, closures)):
        return closures
    kind = type(given).__name__
    if given is None:
        kind = (
            "none. After a backward outside of the step there is no loss left to look at; a "
            f"GradScaler, which steps so, goes into {name.partition('.')[0]}(base, scaler=...)"
        )
    if isinstance(given, (list, tuple)):
        kind = f"a {kind} of {', '.join(type(c).__name__ for c in given) or 'nothing'}"
    raise TypeError(
        f"{name} needs a closure that returns the loss, a scalar or one per sample, or a "
        f"list of such closures; it was given {kind}"
    )
