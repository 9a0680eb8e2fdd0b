"""Bad functions, parameters and directions, of all verbs that take them."""

from typing import Any

import torch
from bad_inputs import INF, NAN, World, bad, square
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import curvature


def _tree(w: World) -> dict[str, Tensor]:
    return {"a": w.v[:2], "b": w.v}


def _square_tree(p: dict[str, Any]) -> Tensor:
    return sum((x.square().sum() for x in p.values()), torch.zeros(()))


def _nested(x: Tensor) -> Tensor:
    return torch.nested.as_nested_tensor([x, x[:2]], layout=torch.jagged)


def _exhausted(x: Tensor) -> Tensor:
    raise StopIteration("no more batches")


def _faked(x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return x * 2


def _fake(w: World) -> Tensor:
    return FakeTensorMode().from_tensor(w.v)


def _lazy(w: World) -> Tensor:
    return nn.parameter.UninitializedParameter()


# Errors, messages, and (func, params, direction); hvp calls its direction a vector.
_FUNCTIONS = (
    (TypeError, "func is a NoneType; give a function", lambda w: (None, w.v, w.v)),
    (TypeError, "loss is a float, not a tensor", lambda w: (lambda x: 1.0, w.v, w.v)),
    (TypeError, "loss is a tuple", lambda w: (lambda x: (x.sum(),), w.v, w.v)),
    (TypeError, r"loss has dtype torch\.int", lambda w: (lambda x: x.int().sum(), w.v, w.v)),
    (
        TypeError,
        r"loss has dtype torch\.complex64",
        lambda w: (lambda x: x.sum() + 0j, w.v, w.v),
    ),
    (
        TypeError,
        r"loss has layout torch\.sparse_coo",
        lambda w: (lambda x: x.to_sparse(), w.v, w.v),
    ),
    (TypeError, "loss is a nested tensor", lambda w: (_nested, w.v, w.v)),
    (TypeError, "loss is on the meta device", lambda w: (lambda x: x.to("meta"), w.v, w.v)),
    (TypeError, "loss is a fake tensor", lambda w: (_faked, w.v, w.v)),
    (
        ValueError,
        r"loss has shape \(3, 3\); return a scalar",
        lambda w: (lambda x: x.outer(x), w.v, w.v),
    ),
    (ValueError, "the batch is empty", lambda w: (lambda x: x[:0], w.v, w.v)),
    (StopIteration, "no more batches", lambda w: (_exhausted, w.v, w.v)),
    (
        curvature.NonFiniteLoss,
        r"3 of 3 samples .* \(sample 0, 1, 2\)",
        lambda w: (lambda x: (-x).log(), w.v, w.v),
    ),
    (curvature.NonFiniteLoss, "the loss is nan", lambda w: (square, w.v * NAN, w.v)),
    (
        curvature.NonFiniteLoss,
        "the loss of 6 of 6 samples is NaN or infinite",
        lambda w: (lambda x: w.losses() * x.sum() * NAN, w.p, w.v),
    ),
)
_PARAMS = (
    (TypeError, "params is a NoneType, not a tensor", lambda w: (square, None, w.v)),
    (TypeError, r"params\['a'\] is a float", lambda w: (_square_tree, {"a": 1.0}, {"a": w.v})),
    (ValueError, "params holds no tensor", lambda w: (_square_tree, {}, {})),
    (
        TypeError,
        r"dict\(model.named_parameters\(\)\)",
        lambda w: (square, iter([w.v]), [w.v]),
    ),
    (TypeError, r"params has dtype torch\.int32", lambda w: (square, w.v.int(), w.v.int())),
    (TypeError, r"params has dtype torch\.float16", lambda w: (square, w.v.half(), w.v.half())),
    (TypeError, "complex64.*real and imaginary", lambda w: (square, w.v + 0j, w.v + 0j)),
    (TypeError, r"layout torch\.sparse_coo", lambda w: (square, w.v.to_sparse(), w.v)),
    (TypeError, "on the meta device", lambda w: (square, w.v.to("meta"), w.v.to("meta"))),
    (
        TypeError,
        "params is a fake tensor, .* FakeTensorMode",
        lambda w: (square, _fake(w), w.v),
    ),
    (TypeError, "params is not initialised yet", lambda w: (square, _lazy(w), w.v)),
    (TypeError, "params is a nested tensor", lambda w: (square, _nested(w.v), w.v)),
    (
        ValueError,
        "params names 'wieght', which the model does not have",
        lambda w: (w.objective(), {"wieght": w.v}, {"wieght": w.v}),
    ),
    (
        TypeError,
        r"params is a list; .* J\.params",
        lambda w: (w.objective(), [w.v], [w.v]),
    ),
)
_DIRECTIONS = (
    (TypeError, "direction is a NoneType", lambda w: (square, w.p, None)),
    (TypeError, "direction is a float", lambda w: (square, w.v, 1.0)),
    (TypeError, "direction is an iterator", lambda w: (square, w.v, iter([w.v]))),
    (TypeError, r"direction has dtype torch\.float64", lambda w: (square, w.v, w.v.double())),
    (TypeError, "direction is on the meta device", lambda w: (square, w.v, w.v.to("meta"))),
    (TypeError, "direction is a fake tensor", lambda w: (square, w.v, _fake(w))),
    (TypeError, "direction is not initialised yet", lambda w: (square, w.v, _lazy(w))),
    (
        ValueError,
        r"direction has shape \(2,\), .* has \(3,\)",
        lambda w: (square, w.v, w.v[:2]),
    ),
    (ValueError, "direction holds NaN or infinite", lambda w: (square, w.v, w.v * NAN)),
    (
        ValueError,
        r"missing \[\"\['b'\]\"\]",
        lambda w: (_square_tree, _tree(w), {"a": w.v[:2]}),
    ),
    (
        ValueError,
        r"unexpected \[\"\['c'\]\"\]",
        lambda w: (_square_tree, _tree(w), {**_tree(w), "c": w.v}),
    ),
    (
        ValueError,
        r"direction\['b'\] has shape \(4,\)",
        lambda w: (_square_tree, _tree(w), {"a": w.v[:2], "b": torch.ones(4)}),
    ),
    (
        ValueError,
        r"direction\['b'\] holds NaN or infinite",
        lambda w: (_square_tree, _tree(w), {"a": w.v[:2], "b": w.v * INF}),
    ),
)
_GRAPHS = (
    (ValueError, "loss has no graph", lambda w: (lambda x: x.detach().sum(), w.v, w.v)),
    (
        ValueError,
        "does not depend on any tensor of params",
        lambda w: (lambda x: w.net[0](w.x).sum(), w.v, w.v),
    ),
)
for _of in ("directional", "hvp", "fit"):
    _verb = getattr(curvature, _of)
    _rest = ([-0.5, 0.0, 0.5],) if _of == "fit" else ()
    _graphs = () if _of == "fit" else _GRAPHS
    for _error, _message, _args in (*_FUNCTIONS, *_PARAMS, *_DIRECTIONS, *_graphs):
        bad(
            f"curvature.{_of}",
            _error,
            _message.replace("direction", "vector") if _of == "hvp" else _message,
            lambda w, _, verb=_verb, args=_args, rest=_rest: verb(*args(w), *rest),
        )
for _of in ("directional", "hvp"):
    _verb = getattr(curvature, _of)
    for _engine in (None, "fast"):
        bad(
            f"curvature.{_of}",
            ValueError,
            f"engine is {_engine!r}; it must be one of 'auto', 'reference'",
            lambda w, _, verb=_verb, engine=_engine: verb(square, w.p, w.v, engine=engine),
        )
bad(
    "curvature.directional",
    ValueError,
    'reduction="none"',
    lambda w, _: curvature.directional(square, w.p, w.v, per_sample=True),
)
_LOST = r"coefficients .* exceed torch.float32: the steps \[1e"
for _error, _message, _options in (
    (ValueError, r"the steps \[\] do not determine the 3 unknown", {"steps": []}),
    (ValueError, "do not determine the 3 unknown", {"steps": [0, 1]}),
    (
        ValueError,
        "do not determine the 1 unknown",
        {"steps": [0], "value": 1.0, "slope": 1.0},
    ),
    # 1 and t² look the same there.
    (ValueError, "do not determine", {"steps": [-1, 1], "slope": 1.0}),
    (ValueError, "do not determine", {"steps": [-1, 1], "degree": 3, "slope": 1.0}),
    (ValueError, _LOST, {"steps": [1e-200], "value": 3.0, "slope": 6.0}),
    (ValueError, _LOST, {"steps": [1e-150], "value": 3.0, "slope": 6.0}),
    (TypeError, "steps is None; give a list of numbers", {"steps": None}),
    (TypeError, r"steps is 0\.1; give a list", {"steps": 0.1}),
    (TypeError, r"steps is \['a'\]; give a list of numbers", {"steps": ["a"]}),
    (ValueError, "steps holds a NaN", {"steps": [NAN, 0.0, 1.0]}),
    (ValueError, "the same point twice", {"steps": [1.0, 1.0, 0.0]}),
    (ValueError, "degree is 1; a curvature needs an integer of at least 2", {"degree": 1}),
    (ValueError, r"degree is 2\.5", {"degree": 2.5}),
    (ValueError, "degree is nan", {"degree": NAN}),
    (ValueError, "degree is a", {"degree": "a"}),
    (ValueError, "value is nan; give a finite number", {"value": NAN}),
    (ValueError, "value is inf", {"value": INF}),
    (TypeError, "value is 'a'; give a number", {"value": "a"}),
    (ValueError, "slope is nan", {"slope": NAN}),
    (TypeError, r"slope is tensor\(.*; give a number", {"slope": torch.ones(2)}),
):
    bad(
        "curvature.fit",
        _error,
        _message,
        lambda w, _, o=_options: curvature.fit(square, w.p, w.v, **{"steps": [-1, 0, 1], **o}),
    )
