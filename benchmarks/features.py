"""What training loops are made of, and which estimator serves each; every number is checked.

    python benchmarks/features.py [--out docs/features.md]

Trains a small network by each estimator with each feature and compares value, slope and curvature
of every step with those of a plain float64 function of the parameters, and the step with that of
the base optimizer. Exits with an error where one differs, or where something is refused that
FEATURES holds for served, or the other way round. tests/test_features.py runs each cell around one
of the base optimizers.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.checkpoint import checkpoint

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

HEADING = """# Features

Printed by `python benchmarks/features.py`, which trains a small network in each way, three steps
around each of SGD with momentum, AdamW, RMSprop and INNAprop. It compares value, slope and
curvature of every step with a float64 function of the parameters that knows nothing of the feature
(under autocast to a few percent), and parameters, buffers and random state with those of the base
optimizer at the step taken. The first six columns are `Rescaled(base, estimator=...)`."""
NOTES = """- Several processes (tests/test_data_parallel.py): `DistributedDataParallel` serves every
  estimator; `fully_shard` serves `Secant`, `Probes`, `GradientDifferences` and `GeN`, and `Exact`
  and `GaussNewton` say that they follow the graph of whole parameters.
- Parameters on several devices are refused.
- What `torch.compile` has made has no second derivative: a step in which `Exact` or `GaussNewton`
  take an estimate runs it uncompiled (PyTorch 2.6 or newer); with `every=8` that is one step in
  eight. The others run it compiled in all steps but the first, and have it compiled twice, with
  and without gradients. `inductor`, compiled functions and `model.compile()` are no different."""

F64 = torch.float64
STEPS = 3
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


class Net(nn.Module):
    """Three layers, between which a feature may put something."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.between = nn.Identity() if between is None else between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.deep(self.between(self.first(x))))

    def deep(self, x: Tensor) -> Tensor:
        return self.middle(x.tanh()).tanh()


class Feature:
    """Something in a training loop; the defaults are those of a loop without any.

    Attributes:
        refused: the message by column, where it cannot be served.
        dtype: of the parameters.
        rtol: of the numbers, against those that float64 gives without the feature.
        eps: to which a loss is rounded.
    """

    dtype = F64
    rtol = 1e-6
    eps = torch.finfo(F64).eps

    def __init__(self, refused: dict[str, str] | None = None) -> None:
        self.refused = refused or {}

    def net(self) -> nn.Module:
        return Net()

    def called(self, net: nn.Module) -> Any:
        """What the closure calls, with the same outputs as the network."""
        return net

    def groups(self, net: nn.Module) -> list[Any]:
        return list(net.parameters())

    def base(self, groups: list[Any], default: Callable[[Any], Any]) -> torch.optim.Optimizer:
        return default(groups)

    def options(self) -> dict[str, Any]:
        return {}

    def parts(self) -> list[slice]:
        """The parts of the batch that a closure each evaluates."""
        return [slice(None)]

    def closure(self, losses: Callable[[], Tensor], optimizer: Any) -> Callable[[], Any]:
        return losses

    def attach(self, optimizer: Any) -> Callable[[], Any]:
        """What the loop calls after each step."""
        return lambda: None

    def clip(self, params: list[Tensor]) -> None:
        """What the loop does to the gradients before a step."""

    def penalty(self, params: dict[str, Tensor]) -> Any:
        """What coupled weight decay adds to the loss."""
        return 0.0


class Frozen(Feature):
    def net(self) -> nn.Module:
        net = Net()
        net.first.requires_grad_(False)
        return net


class Adapted(nn.Module):
    """A frozen layer and a product of low rank beside it, as in LoRA."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, layer.in_features) / 2)
        self.up = nn.Parameter(torch.zeros(layer.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(F.linear(x, self.down), self.up)


class Adapters(Feature):
    def net(self) -> nn.Module:
        net = Net().requires_grad_(False)
        net.first, net.last = Adapted(net.first), Adapted(net.last)  # type: ignore[assignment]
        return net

    def groups(self, net: nn.Module) -> list[Any]:
        return [p for p in net.parameters() if p.requires_grad]


class Between(Feature):
    def __init__(
        self, make: Callable[[], nn.Module], refused: dict[str, str] | None = None
    ) -> None:
        super().__init__(refused)
        self._make = make

    def net(self) -> nn.Module:
        return Net(self._make())


class Tied(Feature):
    def net(self) -> nn.Module:
        net = Net(nn.Linear(5, 5))
        net.between.weight = net.middle.weight
        return net


class Checkpointed(Feature):
    def __init__(self, reentrant: bool, refused: dict[str, str] | None = None) -> None:
        super().__init__(refused)
        self._reentrant = reentrant

    def called(self, net: nn.Module) -> Any:
        net.forward = lambda x: net.last(  # type: ignore[method-assign]
            checkpoint(net.deep, net.between(net.first(x)), use_reentrant=self._reentrant)
        )
        return net


class Compiled(Feature):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self._backend = backend

    def called(self, net: nn.Module) -> Any:
        return torch.compile(net, backend=self._backend)


class Clipped(Feature):
    def __init__(self, clip: Callable[[list[Tensor]], Any], *, inside: bool = False) -> None:
        super().__init__()
        self.clip, self._inside = clip, inside  # type: ignore[method-assign]

    def options(self) -> dict[str, Any]:
        return {} if self._inside else {"clip": self.clip}

    def closure(self, losses: Callable[[], Tensor], optimizer: Any) -> Callable[[], Any]:
        if not self._inside:
            return losses

        def backward() -> Tensor:
            optimizer.zero_grad()
            loss = losses().mean()
            loss.backward()
            self.clip([p for g in optimizer.param_groups for p in g["params"]])
            return loss

        return backward


class Parts(Feature):
    def parts(self) -> list[slice]:
        return [slice(0, 5), slice(5, 6), slice(6, 9)]


class Groups(Feature):
    def groups(self, net: nn.Module) -> list[Any]:
        first, *rest = net.parameters()
        return [{"params": [first], "lr": 0.02}, {"params": rest, "lr": 0.1}]


class Scheduled(Groups):
    def attach(self, optimizer: Any) -> Callable[[], Any]:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5).step


class Decay(Feature):
    def __init__(self, decay: float, make: Callable[..., Any], *, coupled: bool) -> None:
        super().__init__()
        self._decay, self._make, self._coupled = decay, make, coupled

    def base(self, groups: list[Any], default: Callable[[Any], Any]) -> torch.optim.Optimizer:
        return self._make(groups, lr=0.1, weight_decay=self._decay)

    def penalty(self, params: dict[str, Tensor]) -> Any:
        squares = sum(p.square().sum() for p in params.values())
        return self._decay / 2 * squares if self._coupled else 0.0


class Autocast(Feature):
    dtype = torch.float32

    def __init__(self, low: torch.dtype, rtol: float, *, scale: float | None = None) -> None:
        super().__init__()
        self._low, self.rtol, self._scale = low, rtol, scale
        self.eps = torch.finfo(low).eps

    def base(self, groups: list[Any], default: Callable[[Any], Any]) -> torch.optim.Optimizer:
        # Others make unit steps of gradients that are rounding alone.
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    def options(self) -> dict[str, Any]:
        if self._scale is None:
            return {}
        return {"scaler": torch.amp.GradScaler("cpu", init_scale=self._scale)}

    def called(self, net: nn.Module) -> Any:
        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", self._low):
                return type(net).forward(net, x)

        net.forward = call  # type: ignore[method-assign]
        return net


class Half(Feature):
    dtype = torch.bfloat16


class Devices(Feature):
    """Layers on other devices than the rest."""

    def __init__(self, names: Sequence[str], refusal: str) -> None:
        super().__init__(dict.fromkeys(COLUMNS, refusal))
        self._names = names

    def groups(self, net: nn.Module) -> list[Any]:
        for name in self._names:
            net.get_submodule(name).to("meta")
        return list(net.parameters())


class Table(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 5, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table((x[:, :1].sign() + 1).long().sum(1))


def _nowhere(message: str) -> dict[str, str]:
    return dict.fromkeys(COLUMNS, message)


FEATURES: dict[str, Feature] = {
    "nothing of these": Feature(),
    "frozen parameters": Frozen(),
    "low-rank adapters beside frozen layers (LoRA)": Adapters(),
    "tied weights": Tied(),
    "`Dropout`": Between(lambda: nn.Dropout(0.3)),
    "`BatchNorm1d`": Between(lambda: nn.BatchNorm1d(5)),
    "`checkpoint(use_reentrant=False)`": Checkpointed(False),
    "`checkpoint(use_reentrant=True)`": Checkpointed(
        True, _nowhere("you can either set use_reentrant=False")
    ),
    '`torch.compile(backend="eager")`': Compiled("eager"),
    '`torch.compile(backend="aot_eager")`': Compiled("aot_eager"),
    "clipping by norm, `clip=`": Clipped(lambda p: clip_grad_norm_(p, 0.05)),
    "clipping by value, `clip=`": Clipped(lambda p: clip_grad_value_(p, 0.02)),
    "clipping in a closure that calls `backward`": Clipped(
        lambda p: clip_grad_norm_(p, 0.05), inside=True
    ),
    "accumulation, a list of closures": Parts(),
    "parameter groups of several lr": Groups(),
    "`torch.optim.lr_scheduler`": Scheduled(),
    "coupled weight decay": Decay(0.3, torch.optim.SGD, coupled=True),
    "decoupled weight decay": Decay(0.3, torch.optim.AdamW, coupled=False),
    "autocast, bfloat16": Autocast(torch.bfloat16, 0.05),
    "autocast, float16, `GradScaler`": Autocast(torch.float16, 0.02, scale=2.0**10),
    "parameters in bfloat16": Half(_nowhere("only float32 and float64 can be used")),
    "`Embedding(sparse=True)`": Between(Table, _nowhere("make its layer with sparse=False")),
    "parameters on the meta device": Devices(
        ["first", "middle", "last"], "is on the meta device and has no values"
    ),
    "a part of the parameters on the meta device": Devices(
        ["last"], "is on the meta device and has no values"
    ),
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

    def __init__(self, name: str, column: str, base: str) -> None:
        torch.manual_seed(0)
        self.column = column
        self.feature = feature = FEATURES[name]
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


def run(name: str, column: str, base: str) -> str | None:
    """Train a little; None if every number was right, or the refusal.

    Raises:
        Wrong: one was not.
    """
    try:
        case = Case(name, column, base)
        for _ in range(STEPS):
            case.step()
    except (TypeError, ValueError, RuntimeError) as refusal:
        return str(refusal)
    return None


def surprise(name: str, column: str, base: str) -> str | None:
    """What is not as FEATURES has it."""
    cell = f"{name}, {column}, {base}"
    expected = FEATURES[name].refused.get(column)
    try:
        found = run(name, column, base)
    except Wrong as error:
        return f"{cell}: {error}"
    if (expected is None) == (found is None) and (found is None or expected in found):
        return None
    return f"{cell}: refused: {found}" if found else f"{cell} is served"


def one_base(name: str, column: str) -> str:
    """Another from cell to cell."""
    k = list(FEATURES).index(name) + list(COLUMNS).index(column)
    return list(BASES)[k % len(BASES)]


def as_markdown() -> str:
    """The table of FEATURES."""
    lines = [HEADING, "", f"| | {' | '.join(map(_code, COLUMNS))} |", "|---" * 8 + "|"]
    for name, feature in FEATURES.items():
        cells = ["refused" if column in feature.refused else "yes" for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Where it is refused, the message says:", ""]
    for name, feature in FEATURES.items():
        for message in dict.fromkeys(feature.refused.values()):
            lines.append(f"- {name}: *{message}*")
    return "\n".join([*lines, "", NOTES]) + "\n"


def _code(column: str) -> str:
    return column if column.startswith("`") else f"`{column}`"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/features.md"))
    args = parser.parse_args()
    cells = itertools.product(FEATURES, COLUMNS, BASES)
    surprises = [text for cell in cells if (text := surprise(*cell))]
    for text in surprises:
        print("WRONG", text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(as_markdown(), encoding="utf-8")
    print(f"{len(FEATURES)} features, {len(COLUMNS)} columns, {len(BASES)} bases: {args.out}")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
