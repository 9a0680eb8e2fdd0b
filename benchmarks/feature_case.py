"""A small network that is trained with a feature, and every number of each step checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from feature_kinds import F64, Feature
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from curvature import directional
from optim import GeN, INNAprop, Rescaled
from optim.direction import momentum
from optim.estimators import (
    Estimator,
    Exact,
    GaussNewton,
    GradientDifferences,
    Probes,
    Secant,
)

GRAPH = ("Exact()", "Exact(per_sample=False)", "GaussNewton(model)")
COLUMNS: dict[str, Callable[..., Any]] = {
    "Exact()": lambda model, base, **k: Rescaled(base, **k),
    "Exact(per_sample=False)": lambda model, base, **k: Rescaled(
        base, estimator=Exact(per_sample=False), **k
    ),
    "GaussNewton(model)": lambda model, base, **k: Rescaled(
        base, estimator=GaussNewton(model), **k
    ),
    "Secant()": lambda model, base, **k: Rescaled(base, estimator=Secant(), **k),
    "Probes()": lambda model, base, **k: Rescaled(base, estimator=Probes(), **k),
    "GradientDifferences()": lambda model, base, **k: Rescaled(
        base, estimator=GradientDifferences(), **k
    ),
    "`GeN`": lambda model, base, **k: GeN(base, phi=1, **k),
}
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "INNAprop": lambda p: INNAprop(p, lr=0.1, weight_decay=0.0),
}


class Wrong(Exception):
    """A number that is not that of the loss, or a step that is not the base's."""


class Spy(Estimator):
    """Notes how far along the direction an estimate looked."""

    def __init__(self, estimator: Estimator) -> None:
        self._estimator = estimator
        self.needed = estimator.needs_graph
        self.reach = 0.0

    @property
    def needs_graph(self) -> bool:
        return self.needed

    def recorder(self) -> Any:
        return self._estimator.recorder()

    def first_reach(self, trial: Any, line: Any) -> float:
        return self._estimator.first_reach(trial, line)

    def estimate(self, trial: Any, line: Any, reach: float) -> Any:
        self.reach = reach
        return self._estimator.estimate(trial, line, reach)


class Case:
    """A network that is trained with a feature by an estimator, and a plain copy beside it."""

    def __init__(self, feature: Feature, column: str, base: str) -> None:
        torch.manual_seed(0)
        self.column, self.feature = column, feature
        self.net = feature.net().to(feature.dtype)
        self.plain = copy.deepcopy(self.net).to(F64)
        self.same = copy.deepcopy(self.net)
        if feature.dtype != F64:
            feature.called(self.same)
        self.x, self.y = torch.randn(9, 4, dtype=feature.dtype), torch.randint(3, (9,))
        model = feature.called(self.net)
        wrapped = feature.base(feature.groups(self.net), BASES[base])
        self.optimizer = COLUMNS[column](model, wrapped, checked=0, **feature.options())
        self.after_step = feature.attach(self.optimizer)
        self.spy = Spy(self.optimizer.stepper.estimator)
        self.optimizer.stepper.estimator = self.spy
        self.closures = [
            feature.closure(lambda r=rows: self.losses(model, r), self.optimizer)
            for rows in feature.parts()
        ]
        self.twin = feature.base(feature.groups(self.plain), BASES[base])

    def losses(self, call: Callable[[Tensor], Tensor], rows: slice) -> Tensor:
        return F.cross_entropy(call(self.x[rows]), self.y[rows], reduction="none")

    def step(self) -> None:
        """One step, and the comparison of all that it did."""
        state = self.net.state_dict()
        self.plain.load_state_dict(state)
        self.same.load_state_dict(state)
        lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.ratios = [lr / max(lrs) for lr in lrs]
        self.random = torch.get_rng_state()
        self.optimizer.step(self.closures if len(self.closures) > 1 else self.closures[0])
        random = torch.get_rng_state()
        self.record = self.optimizer.records[-1]
        if self.record.skipped is not None:
            raise Wrong(self.record.skipped)
        self._check_effects(random)
        self._check_numbers()
        self._check_move(max(lrs))
        torch.set_rng_state(random)
        self.after_step()

    def _check_effects(self, random: Tensor) -> None:
        once = copy.deepcopy(self.plain)
        torch.set_rng_state(self.random)
        for rows in self.feature.parts():
            once(self.x[rows].to(F64))
        _compare("random state", random.double(), torch.get_rng_state().double(), 0.0)
        for name, buffer in once.named_buffers():
            _compare(name, self.net.get_buffer(name), buffer, self.feature.rtol)

    def _check_numbers(self) -> None:
        feature, record = self.feature, self.record
        params = self._params(self.plain)
        # What the base adds to the gradient for its weight decay is its own affair.
        _, bare = self._loss(self.plain, params, penalised=False)
        clipped = [nn.Parameter(p) for p in params.values()]
        for p, g in zip(clipped, bare.values(), strict=True):
            p.grad = g
        feature.clip(clipped)
        self.used = {name: self.net.get_parameter(name).grad.to(F64) for name in params}
        used, expected = _joined(self.used.values()), _joined(p.grad for p in clipped)
        _compare("gradient", used, expected, feature.rtol)
        d = self._direction()
        whole = self._objective(self.plain)
        per_sample = self.column == "Exact()" and not self._scalar()
        exact = directional(whole, params, d, per_sample=per_sample, engine="reference")
        size = float(expected.norm() * _joined(d.values()).norm())
        _compare("value", record.value, exact.value, feature.rtol)
        _compare("slope", record.slope, exact.slope, feature.rtol, size)
        if self.column in GRAPH:
            curvature = self._gauss_newton(params, d) if "Gauss" in self.column else exact.curvature
            magnitude = curvature.abs()
            if exact.per_sample is not None:
                magnitude = exact.per_sample.curvature.abs().mean()
            _compare("curvature", record.curvature, curvature, feature.rtol, magnitude.item())
            _compare("magnitude", record.magnitude, magnitude, feature.rtol)
        else:
            self._check_probes(d)

    def _check_probes(self, d: dict[str, Tensor]) -> None:
        """Against the losses or gradients themselves, at the points that the estimate took."""
        params, t = self._params(self.same), self.spy.reach
        slope = self.record.slope

        def at(step: float) -> tuple[float, dict[str, Tensor]]:
            moved = {n: (p.to(F64) - step * d[n]).to(p.dtype) for n, p in params.items()}
            return self._loss(self.same, moved)

        if self.column == "GradientDifferences()":
            there = sum(float((d[n] * g.to(F64)).sum()) for n, g in at(t)[1].items())
            estimates = [(slope - there) / t]
        elif self.column == "Probes()":
            estimates = [(at(t)[0] - 2 * self.record.value + at(-t)[0]) / t**2]
        else:
            shares = (1.0,) if momentum(self.optimizer.base) == 0 else (1.0, 0.25)
            estimates = [
                2 * (at(k * t)[0] - self.record.value + k * t * slope) / (k * t) ** 2
                for k in shares
            ]
            t *= shares[-1]
        rtol, magnitude = self.feature.rtol, max(map(abs, estimates))
        # Curvatures are differences of losses, which are rounded.
        size = magnitude + 2 * self.feature.eps * self.record.value / t**2 / rtol
        _compare("curvature", self.record.curvature, estimates[0], rtol, size)
        _compare("magnitude", self.record.magnitude, magnitude, rtol, size)

    def _check_move(self, ell: float) -> None:
        record = self.record
        limit = max(group["beta"] for group in self.twin.param_groups) if self._bounded() else None
        if record.step != ell * record.r and not (limit and record.step <= limit):
            raise Wrong(f"the step is {record.step}, not {ell} * {record.r}")
        self._move(self.plain, self.twin, record.step)
        for name, p in self.plain.named_parameters():
            moved = self.net.get_parameter(name)
            _compare(f"{name} after the step", moved, p, max(1e-6, torch.finfo(moved.dtype).eps))

    def _bounded(self) -> bool:
        return isinstance(self.twin, INNAprop)

    def _scalar(self) -> bool:
        return self.feature.closure(len, None) is not len  # type: ignore[arg-type]

    def _direction(self) -> dict[str, Tensor]:
        """How far the base goes from here with a small lr, over it."""
        plain, twin = copy.deepcopy((self.plain, self.twin))
        self._move(plain, twin, 0.5)
        after = self._params(plain)
        return {name: (p - after[name]) / 0.5 for name, p in self._params(self.plain).items()}

    def _move(self, net: nn.Module, optimizer: torch.optim.Optimizer, step: float) -> None:
        for name, gradient in self.used.items():
            net.get_parameter(name).grad = gradient.clone()
        for group, ratio in zip(optimizer.param_groups, self.ratios, strict=True):
            group["lr"] = step * ratio
        optimizer.step()

    def _params(self, net: nn.Module) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}

    def _objective(self, net: nn.Module, *, penalised: bool = True) -> Callable[[Any], Tensor]:
        """The step's losses as a function of the trainable parameters, plainly."""
        dtype = next(net.parameters()).dtype

        def losses(params: dict[str, Tensor]) -> Tensor:
            torch.set_rng_state(self.random)
            call = lambda x: functional_call(net, params, (x.to(dtype),))  # noqa: E731
            found = torch.cat([self.losses(call, rows) for rows in self.feature.parts()])
            return found + self.feature.penalty(params) if penalised else found

        return losses

    def _loss(
        self, net: nn.Module, params: dict[str, Tensor], *, penalised: bool = True
    ) -> tuple[float, dict[str, Tensor]]:
        leaves = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
        loss = self._objective(net, penalised=penalised)(leaves).double().mean()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return loss.item(), dict(zip(leaves, grads, strict=True))

    def _gauss_newton(self, params: dict[str, Tensor], d: dict[str, Tensor]) -> Tensor:
        """The curvature of the loss alone, with the outputs moving linearly."""
        names = list(params)

        def outputs(*values: Tensor) -> Tensor:
            torch.set_rng_state(self.random)
            moved = dict(zip(names, values, strict=True))
            parts = [self.x[rows].to(F64) for rows in self.feature.parts()]
            return torch.cat([functional_call(self.plain, moved, (x,)) for x in parts])

        at, along = tuple(params.values()), tuple(d[n] for n in names)
        z, zdot = torch.autograd.functional.jvp(outputs, at, along)
        rows = lambda z: F.cross_entropy(z, self.y, reduction="none")  # noqa: E731
        bent = directional(rows, z.detach(), zdot.detach(), engine="reference").curvature
        if not self.feature.penalty(params):
            return bent
        return bent + directional(self.feature.penalty, params, d, engine="reference").curvature


def _joined(tensors: Iterable[Any]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def _compare(name: str, found: Any, expected: Any, rtol: float, size: float = 0.0) -> None:
    a = torch.as_tensor(found, dtype=F64).detach()
    b = torch.as_tensor(expected, dtype=F64).detach()
    if not (a - b).abs().max() <= rtol * max(float(b.abs().max()), size):
        raise Wrong(f"{name}: {a.flatten()[:5].tolist()} instead of {b.flatten()[:5].tolist()}")
