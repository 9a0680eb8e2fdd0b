"""Bad functions, parameters and directions, of all verbs that take them."""

import torch
from bad_inputs import NAN, bad, square

import curvature

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
