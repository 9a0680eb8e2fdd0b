"""A database of what is refused: how it is called, the exception, and what the message says."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import curvature
import optim
from curvature import testing
from optim import estimators, plots, rules, schedules, sinks

NAN, INF = math.nan, math.inf


class World:
    """What a call may spoil: a network, bases and wrappers that have taken a step, a tape."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.v = torch.ones(3)
        self.net = nn.Sequential(
            nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.2), nn.Linear(3, 2)
        )
        self.x, self.y = torch.randn(6, 4), torch.randint(2, (6,))
        self.base = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.losses().mean().backward()
        self.base.step()
        self.base.zero_grad()
        self.memory = optim.Memory(4, 2)
        self.memory(torch.ones(3, 2), torch.zeros(3, dtype=torch.long))
        self.records = optim.Records()

    def losses(self) -> Tensor:
        return F.cross_entropy(self.net(self.x), self.y, reduction="none")

    def wrapped(self, wrapper: str) -> Any:
        """A wrapper that has taken a step; made once, before the call that is refused."""
        optimizer = getattr(optim, wrapper)(self.base)
        optimizer.step(self.losses)
        optimizer.zero_grad()  # the next step would drop its gradients, also if it fails
        return optimizer

    def taped(self, *, backward: bool = True) -> Any:
        tape = curvature.Tape()
        with tape:
            self.loss = self.p.square()
        if backward:
            tape.backward(self.loss, [self.p])
        return tape

    def objective(self) -> Any:
        return curvature.Objective(self.net, F.cross_entropy, (self.x, self.y))


@dataclass(frozen=True)
class Bad:
    """One call that must be refused.

    Attributes:
        of: the public name that is called.
        call: with the world and what ``given`` made of it.
        message: a regular expression.
        given: what exists before the call.
    """

    of: str
    call: Callable[[World, Any], Any]
    error: type[Exception]
    message: str
    given: Callable[[World], Any] = lambda w: None


ENTRIES: list[Bad] = []


def bad(
    of: str,
    error: type[Exception],
    message: str,
    call: Callable[..., Any],
    given: Callable[[World], Any] = lambda w: None,
) -> None:
    ENTRIES.append(Bad(of, call, error, message, given))


def _sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))])


def square(x: Tensor) -> Tensor:
    return x.square().sum()


# Optimizers.
for _name in ("INNA", "INNAprop", "DINAdam", "INNApropMomentum"):
    _make = getattr(optim, _name)
    _of = f"optim.{_name}"
    for _params, _error, _message in (
        (lambda w: [], ValueError, "empty parameter list"),
        (lambda w: w.p, TypeError, "should be an iterable of Tensors or dicts"),
        (lambda w: [w.p * 2], ValueError, "can't optimize a non-leaf Tensor"),
        (lambda w: [w.v.int()], TypeError, r"needs real parameters, got torch\.int32"),
        (
            lambda w: [nn.Parameter(w.v + 0j)],
            TypeError,
            r"needs real parameters, got torch\.complex64",
        ),
        (lambda w: [3.0], TypeError, "can only optimize Tensors"),
    ):
        bad(_of, _error, _message, lambda w, _, make=_make, params=_params: make(params(w)))
    for _options, _error, _message in (
        ({"lr": NAN}, ValueError, "lr is nan"),
        ({"lr": -1.0}, ValueError, r"lr is -1\.0"),
        ({"lr": INF}, ValueError, "lr is inf"),
        ({"lr": "fast"}, TypeError, "lr is 'fast'; it must be a number"),
        ({"lr": torch.ones(2)}, TypeError, r"lr is tensor\(.*; it must be a number"),
        ({"alpha": NAN}, ValueError, "alpha is nan"),
        ({"alpha": None}, TypeError, "alpha is None; it must be a number"),
        ({"beta": NAN}, ValueError, "beta is nan"),
        ({"weight_decay": -1.0}, ValueError, r"weight_decay is -1\.0"),
        ({"weight_decay": NAN}, ValueError, "weight_decay is nan"),
    ):
        bad(
            _of, _error, _message, lambda w, _, make=_make, options=_options: make([w.p], **options)
        )

    for _group, _error, _message in (
        (lambda w: [w.v], TypeError, "param_group is a list; give a dictionary, as"),
        (lambda w: None, TypeError, "param_group is a NoneType"),
        (lambda w: {"lr": 0.01}, ValueError, r"param_group holds \['lr'\] and lacks 'params'"),
    ):
        bad(
            _of,
            _error,
            _message,
            lambda w, o, g=_group: o.add_param_group(g(w)),
            lambda w, make=_make: make([w.p]),
        )

    def _sparse(w: World, optimizer: Any) -> None:
        optimizer.step()

    def _with_sparse(w: World, make: Any = _make) -> Any:
        w.p.grad = torch.ones(3).to_sparse()
        return make([w.p])

    bad(_of, TypeError, "does not support sparse gradients", _sparse, _with_sparse)
for _options, _error, _message in (
    ({"betas": 0.9}, TypeError, r"betas is 0\.9; give two numbers"),
    ({"betas": (0.9,)}, TypeError, "give two numbers"),
    ({"betas": (0.9, "a")}, TypeError, r"betas\[1\] is 'a'; it must be a number"),
    ({"betas": (NAN, 0.9)}, ValueError, r"betas\[0\] is nan; it must be in \[0, 1\)"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1\.0; it must be in \[0, 1\)"),
    ({"eps": 0.0}, ValueError, r"eps is 0\.0"),
):
    bad("optim.DINAdam", _error, _message, lambda w, _, o=_options: optim.DINAdam([w.p], **o))
for _name in ("INNAprop", "INNApropMomentum"):
    _make = getattr(optim, _name)
    for _options in ({"sigma": NAN}, {"sigma": 1.0}, {"eps": 0.0}, {"eps": NAN}):
        ((_key, _value),) = _options.items()
        bad(
            f"optim.{_name}",
            ValueError,
            f"{_key} is {_value}",
            lambda w, _, make=_make, options=_options: make([w.p], **options),
        )

# Wrappers, at construction.
for _name in ("Rescaled", "GeN"):
    _make = getattr(optim, _name)
    _of = f"optim.{_name}"
    for _base, _error, _message in (
        (lambda w: None, TypeError, r"base is a NoneType, not a torch\.optim\.Optimizer"),
        (lambda w: torch.optim.SGD, TypeError, "base is a type, not"),
        (lambda w: w.net, TypeError, "base is a Sequential, not"),
        (lambda w: list(w.net.parameters()), TypeError, "base is a list, not"),
        (lambda w: torch.optim.LBFGS([w.p]), TypeError, "LBFGS cannot be wrapped"),
        (
            lambda w: torch.optim.SGD([nn.Parameter(w.v.bfloat16())]),
            TypeError,
            r"parameter 0 of its group, of shape \(3,\), has dtype torch\.bfloat16.*autocast",
        ),
        (
            lambda w: torch.optim.SGD([nn.Parameter(w.v + 0j)]),
            TypeError,
            r"has dtype torch\.complex64",
        ),
        (
            lambda w: torch.optim.SGD([w.p, nn.Parameter(w.v.to("meta"))]),
            TypeError,
            r"parameter 1 of its group, of shape \(3,\), is on the meta device.*to_empty",
        ),
        (
            lambda w: torch.optim.SGD([w.p], lr=0.1, maximize=True),
            ValueError,
            "negate the loss",
        ),
    ):
        bad(_of, _error, _message, lambda w, base, make=_make: make(base), _base)
    for _options, _error, _message in (
        ({"ell": 0.0}, ValueError, r"ell is 0\.0; it must be positive"),
        ({"ell": NAN}, ValueError, "ell is nan"),
        ({"ell": "a"}, TypeError, "ell is 'a'; it must be a number"),
        ({"ell": None}, TypeError, "ell is None; it must be a number"),
        ({"checked": -1}, ValueError, "checked is -1; it must be an integer of at least 0"),
        ({"checked": 1.5}, ValueError, r"checked is 1\.5"),
        ({"clip": 1.0}, TypeError, r"clip is 1\.0; give a function of the list of parameters"),
        ({"scaler": 1024.0}, TypeError, r"scaler is 1024\.0; give a torch\.amp\.GradScaler"),
        ({"process_group": 2}, TypeError, r"process_group is 2; .*group\.WORLD"),
    ):
        bad(
            _of,
            _error,
            _message,
            lambda w, _, make=_make, options=_options: make(w.base, **options),
        )
for _options, _error, _message in (
    ({"every": 0}, ValueError, "every is 0; it must be an integer of at least 1"),
    ({"every": NAN}, ValueError, "every is nan"),
    ({"every": True}, ValueError, "every is True"),
    ({"rule": "trust"}, TypeError, r"rule is 'trust'; give a rule of optim\.rules, as Cautious"),
    ({"rule": rules.Trust}, TypeError, "rule is the class Trust; give a rule"),
    ({"estimator": estimators.Exact}, TypeError, "estimator is the class Exact; give one of"),
    ({"estimator": 3}, TypeError, r"estimator is 3; give one of optim\.estimators"),
):
    bad("optim.Rescaled", _error, _message, lambda w, _, o=_options: optim.Rescaled(w.base, **o))
for _phi in (0, 1.5, NAN):
    bad("optim.GeN", ValueError, f"phi is {_phi}", lambda w, _, n=_phi: optim.GeN(w.base, phi=n))

# Wrappers, at a step and afterwards.
for _name in ("Rescaled", "GeN"):
    _of = f"optim.{_name}"

    def _wrapped(w: World, name: str = _name) -> Any:
        return w.wrapped(name)

    for _closure, _error, _message in (
        (lambda w: None, TypeError, "needs a closure .* given none"),
        (lambda w: w.p.sum(), TypeError, "needs a closure .* given Tensor"),
        (lambda w: [], TypeError, "a list of nothing"),
        (lambda w: [w.losses, 3], TypeError, "a list of method, int"),
        (lambda w: lambda: None, TypeError, "the loss is a NoneType, not a tensor"),
        (lambda w: lambda: w.losses().mean().item(), TypeError, "the loss is a float"),
        (lambda w: lambda: (w.losses(), 1), TypeError, "the loss is a tuple"),
        (lambda w: lambda: w.losses()[:0], ValueError, "the batch is empty"),
        (lambda w: lambda: w.losses().outer(w.losses()), ValueError, r"has shape \(6, 6\)"),
        (lambda w: lambda: w.losses() + 0j, TypeError, r"dtype torch\.complex64"),
        (lambda w: lambda: w.losses().detach(), ValueError, "the loss has no graph"),
        (lambda w: lambda: w.p.square().sum(), ValueError, "does not depend on any tensor"),
        (lambda w: lambda: w.missing(), AttributeError, "missing"),
        (
            lambda w: lambda: [w.losses().mean().backward() for _ in range(2)],
            ValueError,
            "calls backward more than once",
        ),
        (
            lambda w: [w.losses, lambda: w.losses().mean()],
            ValueError,
            "some closures return a scalar, others one loss",
        ),
    ):
        bad(_of, _error, _message, lambda w, o, c=_closure: o.step(c(w)), _wrapped)
    for _closure, _options, _error, _message in (
        (lambda w: None, {}, TypeError, "look_ahead needs a closure .* given none"),
        (lambda w: lambda: w.losses() * NAN, {}, ValueError, "no step lies ahead: the loss"),
        (lambda w: lambda: None, {}, TypeError, "the loss is a NoneType, not a tensor"),
        (lambda w: w.losses, {"points": 2}, ValueError, "points is 2"),
        (lambda w: w.losses, {"reach": 0.0}, ValueError, r"reach is 0\.0"),
        (lambda w: w.losses, {"reach": "far"}, TypeError, "reach is 'far'"),
    ):
        bad(
            _of,
            _error,
            _message,
            lambda w, o, c=_closure, k=_options: o.look_ahead(c(w), **k),
            _wrapped,
        )

    def _sparse_layer(w: World, name: str = _name) -> Any:
        w.net = nn.Embedding(3, 2, sparse=True)
        return getattr(optim, name)(torch.optim.SGD(w.net.parameters(), lr=0.1))

    bad(
        _of,
        TypeError,
        r"of shape \(3, 2\) is sparse.*sparse=False",
        lambda w, o: o.step(lambda: w.net(w.y).square().sum()),
        _sparse_layer,
    )
    for _group, _error, _message in (
        (lambda w: [w.p], TypeError, "param_group is a list; give a dictionary, as"),
        (lambda w: {"lr": 0.5}, ValueError, r"param_group holds \['lr'\] and lacks 'params'"),
        (lambda w: {"params": [w.p], "lr": NAN}, ValueError, "lr is nan"),
        (lambda w: {"params": [w.p], "maximize": True}, ValueError, "negate the loss"),
        (lambda w: {"params": [w.p * 2]}, ValueError, "non-leaf"),
        (lambda w: {"params": [nn.Parameter(w.v.half())]}, TypeError, r"torch\.float16"),
        (lambda w: {"params": [nn.Parameter(w.v.to("meta"))]}, TypeError, "meta device"),
        (lambda w: {"params": list(w.net.parameters())}, ValueError, "more than one"),
    ):
        bad(_of, _error, _message, lambda w, o, g=_group: o.add_param_group(g(w)), _wrapped)
    for _state, _error, _message in (
        (
            lambda w, o: {},
            ValueError,
            "no state_dict of an optimizer: it lacks",
        ),
        (lambda w, o: w.base.state_dict(), ValueError, "not wrapped"),
        (
            lambda w, o: {**o.state_dict(), "wrapper": {"kind": type(o).__name__}},
            ValueError,
            "lacks or adds",
        ),
        (lambda w, o: {**o.state_dict(), "param_groups": []}, ValueError, "parameter groups"),
    ):
        bad(_of, _error, _message, lambda w, o, s=_state: o.load_state_dict(s(w, o)), _wrapped)

# Named settings.
for _name in ("gen_published", "lqa", "qlabgrad", "gen_hod"):
    _make = getattr(optim, _name)
    bad(f"optim.{_name}", TypeError, "base is a int", lambda w, _, make=_make: make(3))
    for _eta in (0.0, NAN):
        bad(
            f"optim.{_name}",
            ValueError,
            f"eta is {_eta}",
            lambda w, _, make=_make, eta=_eta: make(w.base, eta=eta),
        )
    bad(
        f"optim.{_name}",
        TypeError,
        "eta is 'a'; it must be a number",
        lambda w, _, make=_make: make(w.base, eta="a"),
    )
for _options, _error, _message in (
    ({"gamma": 1.0}, ValueError, r"gamma is 1\.0"),
    ({"phi": 0}, ValueError, "phi is 0"),
    ({"points": ()}, ValueError, r"points is \(\); a polynomial of degree 2 needs at least 2"),
    ({"degree": 1}, ValueError, "degree is 1"),
):
    bad(
        "optim.gen_published",
        _error,
        _message,
        lambda w, _, o=_options: optim.gen_published(w.base, **o),
    )

# Estimators, rules and schedules.
for _of, _error, _message, _call in (
    ("Estimator", TypeError, "abstract", lambda: estimators.Estimator()),
    ("Exact", TypeError, "per_sample is 5; it must be True", lambda: estimators.Exact(5)),
    (
        "GaussNewton",
        TypeError,
        "model is the class Linear; give the module that",
        lambda: estimators.GaussNewton(nn.Linear),
    ),
    ("GaussNewton", TypeError, "model is None", lambda: estimators.GaussNewton(None)),
    ("Probes", TypeError, "points is 1; give a tuple", lambda: estimators.Probes(points=1)),
    ("Probes", TypeError, "a point is 'a'", lambda: estimators.Probes(points=("a", 1.0))),
    ("Probes", ValueError, "at least 2 of them", lambda: estimators.Probes(points=(1.0,))),
    ("Probes", ValueError, "different", lambda: estimators.Probes(points=(1.0, 1.0))),
    ("Probes", ValueError, "none of them 0", lambda: estimators.Probes(points=(0.0, 1.0))),
    ("Probes", ValueError, "finite", lambda: estimators.Probes(points=(NAN, 1.0, 2.0))),
    ("Probes", ValueError, "at least 3 of them", lambda: estimators.Probes(degree=3)),
    ("Probes", ValueError, "degree is nan", lambda: estimators.Probes(degree=NAN)),
):
    bad(f"optim.estimators.{_of}", _error, _message, lambda w, _, call=_call: call())
for _of, _error, _message, _call in (
    ("Rule", TypeError, "abstract", lambda: rules.Rule()),
    ("Cautious", TypeError, "positional argument", lambda: rules.Cautious(0.9)),
    ("Edge", ValueError, r"factor is 0\.0", lambda: rules.Edge(factor=0.0)),
    ("Edge", TypeError, "factor is 'a'", lambda: rules.Edge(factor="a")),
    ("Edge", ValueError, r"beta is 1\.0", lambda: rules.Edge(beta=1.0)),
    ("Lipschitz", ValueError, "beta3 is nan", lambda: rules.Lipschitz(beta3=NAN)),
    ("Lipschitz", TypeError, "beta3 is None", lambda: rules.Lipschitz(beta3=None)),
    ("Lyapunov", ValueError, r"beta3 is 1\.0", lambda: rules.Lyapunov(beta3=1.0)),
    ("Newton", ValueError, r"eta is 0\.0", lambda: rules.Newton(eta=0.0)),
    ("Newton", ValueError, "gamma is nan", lambda: rules.Newton(gamma=NAN)),
    ("RobbinsMonro", ValueError, "0 < low <= high", lambda: rules.RobbinsMonro(2.0, 1.0)),
    ("RobbinsMonro", ValueError, "0 < low <= high", lambda: rules.RobbinsMonro(NAN, 1.0)),
    ("RobbinsMonro", ValueError, r"delta is 0\.5", lambda: rules.RobbinsMonro(1.0, 2.0, 0.5)),
    ("RobbinsMonro", TypeError, "low is 'a'", lambda: rules.RobbinsMonro("a", 1.0)),
    ("RobbinsMonro", TypeError, "rule is 5", lambda: rules.RobbinsMonro(1.0, 2.0, rule=5)),
    ("Trust", ValueError, r"beta3 is -0\.1", lambda: rules.Trust(beta3=-0.1)),
):
    bad(f"optim.rules.{_of}", _error, _message, lambda w, _, call=_call: call())
_SCHEDULES: dict[str, tuple[Any, ...]] = {
    "cooldown": (5,),
    "red": (5,),
    "ran": (),
    "warmup_cosine": (1, 3),
    "warmup_linear": (1, 3),
}
for _of, _args in _SCHEDULES.items():
    bad(
        f"optim.schedules.{_of}",
        TypeError,
        r"optimizer is None; give a torch\.optim\.Optimizer",
        lambda w, _, of=_of, args=_args: getattr(schedules, of)(None, *args),
    )
for _of, _error, _message, _args in (
    ("cooldown", ValueError, "steps is 0", (0,)),
    ("cooldown", ValueError, "steps is nan", (NAN,)),
    ("red", ValueError, r"epochs is 1\.5", (1.5,)),
    ("warmup_cosine", ValueError, "warmup is -1", (-1, 2)),
    ("warmup_cosine", ValueError, "decay is 2; it must be an integer above warmup", (2, 2)),
    ("warmup_linear", ValueError, "steps is 2; it must be an integer above warmup", (2, 2)),
):
    bad(
        f"optim.schedules.{_of}",
        _error,
        _message,
        lambda w, _, of=_of, args=_args: getattr(schedules, of)(w.base, *args),
    )
for _of, _error, _message, _args, _options in (
    ("cooldown", ValueError, "share is nan", (5,), {"share": NAN}),
    ("cooldown", TypeError, "share is 'a'", (5,), {"share": "a"}),
    ("red", ValueError, r"eta is 0\.0", (5,), {"eta": 0.0}),
    ("red", TypeError, "eta is 'a'", (5,), {"eta": "a"}),
    ("warmup_cosine", ValueError, "least is nan", (1, 3), {"least": NAN}),
    ("warmup_cosine", TypeError, "least is 'a'", (1, 3), {"least": "a"}),
):
    bad(
        f"optim.schedules.{_of}",
        _error,
        _message,
        lambda w, _, of=_of, a=_args, o=_options: getattr(schedules, of)(w.base, *a, **o),
    )

# Memory and records.
for _error, _message, _call in (
    (ValueError, "capacity is 0", lambda w: optim.Memory(0, 2)),
    (ValueError, "capacity is nan", lambda w: optim.Memory(NAN, 2)),
    (TypeError, r"features is 1\.5; give an integer", lambda w: optim.Memory(2, 1.5)),
    (ValueError, "an entry of features is 0", lambda w: optim.Memory(2, 0)),
    (ValueError, "an entry of features is -1", lambda w: optim.Memory(2, (3, -1))),
    (TypeError, "x is None; give a tensor", lambda w: w.memory(None, w.y)),
    (TypeError, r"targets have dtype torch\.float32", lambda w: w.memory(w.x[:, :2], w.x[:, 0])),
    (ValueError, r"features of shape \(6, 4\)", lambda w: w.memory(w.x, w.y)),
    (ValueError, r"targets of shape \(3,\) do not fit", lambda w: w.memory(w.x[:, :2], w.y[:3])),
):
    bad("optim.Memory", _error, _message, lambda w, _, call=_call: call(w))
for _error, _message, _call in (
    (
        ValueError,
        "keep is -1; it must be an integer of at least 0",
        lambda w: optim.Records(keep=-1),
    ),
    (ValueError, "keep is 'a'", lambda w: optim.Records(keep="a")),
    (TypeError, "a sink is 'records.jsonl'; give one of", lambda w: optim.Records("records.jsonl")),
    (FileNotFoundError, "missing", lambda w: w.records.write("missing/records.jsonl")),
    (TypeError, "record is 5; give a StepRecord", lambda w: w.records.append(5)),
    (ValueError, "last is -1", lambda w: w.records.descent_share(last=-1)),
    (IndexError, "out of range", lambda w: w.records[0]),
):
    bad("optim.Records", _error, _message, lambda w, _, call=_call: call(w))
for _of, _error, _message, _call in (
    (
        "sinks.JsonLines",
        TypeError,
        "expected str, bytes or os.PathLike",
        lambda: sinks.JsonLines(1),
    ),
    (
        "sinks.JsonLines",
        FileNotFoundError,
        "missing",
        lambda: sinks.JsonLines("missing/records.jsonl"),
    ),
    ("sinks.TensorBoard", TypeError, "expected str, bytes or", lambda: sinks.TensorBoard(1)),
    (
        "sinks.WeightsAndBiases",
        TypeError,
        "run is 'mine'; give what wandb.init returned",
        lambda: sinks.WeightsAndBiases("mine"),
    ),
    ("plots.run", ValueError, "there are no records", lambda: plots.run([])),
    ("plots.run", FileNotFoundError, "missing", lambda: plots.run("missing.jsonl")),
    ("plots.run", TypeError, "records holds a float", lambda: plots.run([1.0])),
    ("plots.run", TypeError, r"records is GeN\(SGD", lambda: plots.run(optim.GeN(_sgd()))),
    (
        "plots.ahead",
        TypeError,
        "seen is <optim.record.Records",
        lambda: plots.ahead(optim.Records()),
    ),
):
    bad(f"optim.{_of}", _error, _message, lambda w, _, call=_call: call())
bad("optim.StepRecord", TypeError, "iteration", lambda w, _: optim.StepRecord())

# The verbs of curvature; test_bad_input.py has what all three have in common.
for _of in ("directional", "hvp", "fit"):
    _verb = getattr(curvature, _of)
    _rest = ([-1.0, 0.0, 1.0],) if _of == "fit" else ()
    for _error, _message, _args in (
        (TypeError, "func is a NoneType; give a function", lambda w: (None, w.p, w.v)),
        (TypeError, "params is a NoneType, not a tensor", lambda w: (square, None, w.v)),
        (TypeError, "(direction|vector) is a NoneType", lambda w: (square, w.p, None)),
        (ValueError, "holds NaN or infinite", lambda w: (square, w.p, w.v * NAN)),
        (
            ValueError,
            "params names 'wieght', which the model does not have",
            lambda w: (w.objective(), {"wieght": w.v}, {"wieght": w.v}),
        ),
        (
            curvature.NonFiniteLoss,
            "the loss of 6 of 6 samples is NaN or infinite",
            lambda w: (lambda x: w.losses() * x.sum() * NAN, w.p, w.v),
        ),
    ):
        bad(
            f"curvature.{_of}",
            _error,
            _message,
            lambda w, _, verb=_verb, args=_args, rest=_rest: verb(*args(w), *rest),
        )
for _of in ("directional", "hvp"):
    _verb = getattr(curvature, _of)
    bad(
        f"curvature.{_of}",
        ValueError,
        "engine is None; it must be one of",
        lambda w, _, verb=_verb: verb(square, w.p, w.v, engine=None),
    )
for _error, _message, _options in (
    (ValueError, r"the steps \[\] do not determine the 3 unknown", {"steps": []}),
    (TypeError, "steps is None; give a list of numbers", {"steps": None}),
    (TypeError, r"steps is \['a'\]; give a list of numbers", {"steps": ["a"]}),
    (ValueError, "steps holds a NaN", {"steps": [NAN, 0.0, 1.0]}),
    (ValueError, "the same point twice", {"steps": [1.0, 1.0, 0.0]}),
    (ValueError, "degree is 1; a curvature needs an integer of at least 2", {"degree": 1}),
    (ValueError, "degree is nan", {"degree": NAN}),
    (ValueError, "degree is a", {"degree": "a"}),
    (ValueError, "value is nan; give a finite number", {"value": NAN}),
    (TypeError, "value is 'a'; give a number", {"value": "a"}),
    (TypeError, r"slope is tensor\(.*; give a number", {"slope": torch.ones(2)}),
):
    bad(
        "curvature.fit",
        _error,
        _message,
        lambda w, _, o=_options: curvature.fit(square, w.p, w.v, **{"steps": [-1, 0, 1], **o}),
    )
for _error, _message, _call in (
    (TypeError, "the loss is a NoneType", lambda w: curvature.gradient(None, [w.p])),
    (TypeError, "params is a int", lambda w: curvature.gradient(square(w.p), 5)),
    (ValueError, "params holds no tensor", lambda w: curvature.gradient(square(w.p), [])),
    (ValueError, "does not require grad", lambda w: curvature.gradient(square(w.p), [w.v])),
    (ValueError, "the loss has no graph", lambda w: curvature.gradient(square(w.v), [w.p])),
    (ValueError, r"has shape \(3, 1\)", lambda w: curvature.gradient(w.p.view(3, 1), [w.p])),
    (curvature.NonFiniteLoss, "nan", lambda w: curvature.gradient(square(w.p) * NAN, [w.p])),
):
    bad("curvature.gradient", _error, _message, lambda w, _, call=_call: call(w))
for _error, _message, _options in (
    (ValueError, "engine is 'fast'; it must be one of 'auto'", {"engine": "fast"}),
    (TypeError, "tangent_dtype is bf16; it must be one of torch", {"tangent_dtype": "bf16"}),
    (TypeError, r"tangent_dtype is torch\.int8", {"tangent_dtype": torch.int8}),
    (TypeError, r"tangent_dtype is torch\.float8", {"tangent_dtype": torch.float8_e5m2}),
    (ValueError, "reference engine has neither", {"engine": "reference", "low_memory": True}),
):
    bad("curvature.Tape", _error, _message, lambda w, _, o=_options: curvature.Tape(**o))
for _error, _message, _ask in (
    (ValueError, "does not have the structure of params", lambda w, t: t.directional(None)),
    (ValueError, r"unexpected \['\[1\]'\]", lambda w, t: t.directional([w.v, w.v])),
    (TypeError, r"\[0\] has dtype torch\.float64", lambda w, t: t.directional([w.v.double()])),
    (ValueError, r"vector\[0\] has shape \(2,\)", lambda w, t: t.hvp([w.v[:2]])),
    (RuntimeError, "make a new one for the next", lambda w, t: t.__enter__()),
    (ValueError, "does not depend on any", lambda w, t: t.backward(w.net[0].weight.sum(), [w.p])),
    (TypeError, "outputs must be tensors with a graph", lambda w, t: t.gauss_newton([w.v], None)),
    (TypeError, "outputs must be tensors with a graph", lambda w, t: t.gauss_newton([w.v], w.v)),
    (
        ValueError,
        "was not computed from these outputs",
        lambda w, t: t.gauss_newton([w.v], w.net[0].weight * 2),
    ),
):
    bad("curvature.Tape", _error, _message, _ask, World.taped)
bad(
    "curvature.Tape",
    RuntimeError,
    r"call backward\(losses, params\) before",
    lambda w, tape: tape.directional([w.v]),
    lambda w: w.taped(backward=False),
)
for _error, _message, _call in (
    (TypeError, "model is a type", lambda w: curvature.Objective(nn.Linear, square, (w.x, w.y))),
    (
        TypeError,
        r"a scripted module, .*pass torch\.nn\.Sequential\(model\)",
        lambda w: curvature.Objective(torch.jit.ScriptModule(), square, (w.x, w.y)),
    ),
    (TypeError, "loss is a NoneType", lambda w: curvature.Objective(w.net, None, (w.x, w.y))),
    (TypeError, "batch must be a pair", lambda w: curvature.Objective(w.net, square, (w.x,))),
    (
        ValueError,
        "batch is empty",
        lambda w: curvature.Objective(w.net, square, (w.x[:0], w.y[:0])),
    ),
    (TypeError, "params is a int; pass the model's", lambda w: w.objective()(5)),
    (ValueError, "'zz', which the model does not have", lambda w: w.objective()({"zz": w.v})),
):
    bad("curvature.Objective", _error, _message, lambda w, _, call=_call: call(w))
for _error, _message, _args, _options in (
    (TypeError, "operation is 5; it must be a subclass", (5, square), {}),
    (TypeError, "operation is ''", ("", square), {}),
    (TypeError, "give either push or tangent", ("Nope",), {}),
    (TypeError, "push is a int; give a function", ("Nope", 5), {}),
    (TypeError, "tangent is a int; give a function", ("Nope",), {"tangent": 5}),
    (ValueError, "there is a rule for AddmmBackward0 already", ("AddmmBackward0", square), {}),
):
    bad(
        "curvature.register_rule",
        _error,
        _message,
        lambda w, _, a=_args, o=_options: curvature.register_rule(*a, **o),
    )
for _of in ("finite_difference", "check_directional"):
    _check = getattr(testing, _of)
    for _error, _message, _args, _options in (
        (TypeError, "func is a NoneType", lambda w: (None, w.v.double(), w.v.double()), {}),
        (TypeError, "finite differences need float64", lambda w: (square, w.v, w.v), {}),
        (ValueError, "direction is zero", lambda w: (square, w.v.double(), 0 * w.v.double()), {}),
        (ValueError, "step is nan", lambda w: (square, w.v, w.v), {"step": NAN}),
        (ValueError, "step is -1", lambda w: (square, w.v, w.v), {"step": -1}),
        (TypeError, "step is 'a'; give a number", lambda w: (square, w.v, w.v), {"step": "a"}),
    ):
        bad(
            f"curvature.testing.{_of}",
            _error,
            _message,
            lambda w, _, check=_check, args=_args, o=_options: check(*args(w), **o),
        )
for _error, _message, _args in (
    (TypeError, "func is a NoneType", lambda w: (None, w.v.double())),
    (ValueError, "no inputs that could move", lambda w: (square,)),
    (TypeError, "input 0 is a int; finite differences need", lambda w: (square, 5)),
    (TypeError, r"input 0 is a torch\.float32", lambda w: (square, w.v)),
):
    bad(
        "curvature.testing.check_rule",
        _error,
        _message,
        lambda w, _, args=_args: testing.check_rule(*args(w)),
    )
bad(
    "curvature.module_calls",
    TypeError,
    "before is a int; give a function",
    lambda w, _: curvature.module_calls(5).__enter__(),
)
bad(
    "curvature.parameter_hooks_off",
    TypeError,
    "params must hold tensors alone",
    lambda w, _: curvature.parameter_hooks_off([5]).__enter__(),
)
bad(
    "curvature.SideEffects",
    TypeError,
    r"modules must hold torch\.nn\.Module",
    lambda w, _: curvature.SideEffects([5]),
)

# What takes no input that could be wrong, or is given by the package and not made by hand.
NOTHING_TO_GET_WRONG = {
    "curvature.NonFiniteLoss",
    "curvature.NotTwiceDifferentiable",
    "curvature.Quadratic",
    "curvature.RandomState",
    "curvature.uncompiled",
    "optim.estimators.GradientDifferences",
    "optim.estimators.Secant",
}


def public_names() -> set[str]:
    """Everything that the two packages offer to be called."""
    names = set()
    for module in (curvature, testing, optim, estimators, plots, rules, schedules, sinks):
        listed = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", None) == module.__name__ and name[0] != "_"
        ]
        names |= {f"{module.__name__}.{name}" for name in listed}
    modules = {"estimators", "plots", "rules", "schedules", "sinks"}
    return names - {f"optim.{m}" for m in modules} - {"curvature.testing"}
