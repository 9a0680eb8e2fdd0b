"""Bad inputs of what wrappers are made of, and of what they leave."""

from typing import Any

import torch
from bad_inputs import NAN, bad
from torch import nn

import optim
from optim import estimators, plots, rules, schedules, sinks


def _sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))])


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
    ("Lipschitz", ValueError, r"beta3 is 1\.0", lambda: rules.Lipschitz(beta3=1.0)),
    ("Lipschitz", TypeError, "beta3 is None", lambda: rules.Lipschitz(beta3=None)),
    ("Lyapunov", ValueError, r"beta3 is 1\.0", lambda: rules.Lyapunov(beta3=1.0)),
    ("Lyapunov", ValueError, r"beta3 is -0\.1", lambda: rules.Lyapunov(beta3=-0.1)),
    ("Newton", ValueError, r"eta is 0\.0", lambda: rules.Newton(eta=0.0)),
    ("Newton", ValueError, "gamma is nan", lambda: rules.Newton(gamma=NAN)),
    ("Newton", ValueError, r"gamma is 1\.0", lambda: rules.Newton(gamma=1.0)),
    ("RobbinsMonro", ValueError, r"low is 0\.0 and high 1", lambda: rules.RobbinsMonro(0.0, 1.0)),
    ("RobbinsMonro", ValueError, r"low is 2\.0 and high 1", lambda: rules.RobbinsMonro(2.0, 1.0)),
    ("RobbinsMonro", ValueError, "0 < low <= high", lambda: rules.RobbinsMonro(NAN, 1.0)),
    ("RobbinsMonro", ValueError, r"delta is 0\.5", lambda: rules.RobbinsMonro(1.0, 2.0, 0.5)),
    ("RobbinsMonro", TypeError, "low is 'a'", lambda: rules.RobbinsMonro("a", 1.0)),
    ("RobbinsMonro", TypeError, "rule is 5", lambda: rules.RobbinsMonro(1.0, 2.0, rule=5)),
    ("Trust", ValueError, r"beta3 is -0\.1", lambda: rules.Trust(beta3=-0.1)),
    ("Trust", ValueError, r"beta3 is 1\.0", lambda: rules.Trust(beta3=1.0)),
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
    ("cooldown", ValueError, r"steps is 2\.5", (2.5,)),
    ("red", ValueError, "epochs is 0", (0,)),
    ("red", ValueError, r"epochs is 1\.5", (1.5,)),
    ("warmup_cosine", ValueError, "warmup is -1", (-1, 2)),
    ("warmup_cosine", ValueError, "decay is 2; it must be an integer above warmup", (2, 2)),
    ("warmup_linear", ValueError, "steps is 2; it must be an integer above warmup", (2, 2)),
    ("warmup_linear", ValueError, "steps is 2; it must be an integer above warmup", (3, 2)),
):
    bad(
        f"optim.schedules.{_of}",
        _error,
        _message,
        lambda w, _, of=_of, args=_args: getattr(schedules, of)(w.base, *args),
    )
for _of, _error, _message, _args, _options in (
    ("cooldown", ValueError, "share is nan", (5,), {"share": NAN}),
    ("cooldown", ValueError, r"share is 0\.0", (5,), {"share": 0.0}),
    ("cooldown", ValueError, r"share is 1\.1", (5,), {"share": 1.1}),
    ("cooldown", TypeError, "share is 'a'", (5,), {"share": "a"}),
    ("red", ValueError, r"eta is 0\.0", (5,), {"eta": 0.0}),
    ("red", ValueError, r"eta is -1\.0", (5,), {"eta": -1.0}),
    ("red", TypeError, "eta is 'a'", (5,), {"eta": "a"}),
    ("warmup_cosine", ValueError, "least is nan", (1, 3), {"least": NAN}),
    ("warmup_cosine", ValueError, r"least is 2\.0", (1, 3), {"least": 2.0}),
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
