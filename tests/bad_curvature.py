"""Bad inputs of the other parts of curvature."""

import torch
from bad_inputs import NAN, World, bad, square
from torch import nn

import curvature
from curvature import testing

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
for _error, _message, _ask in (
    (
        RuntimeError,
        r"call backward\(losses, params\) before",
        lambda w, t: t.directional([w.v]),
    ),
    (
        ValueError,
        r"params\[0\] does not require grad",
        lambda w, t: t.backward(w.loss, [w.v]),
    ),
):
    bad("curvature.Tape", _error, _message, _ask, lambda w: w.taped(backward=False))


def _after_own_backward(w: World) -> curvature.Tape:
    with curvature.Tape() as tape:
        w.loss = square(w.p)
        w.loss.backward()
    return tape


bad(
    "curvature.Tape",
    ValueError,
    "without calling backward",
    lambda w, t: t.backward(w.loss, [w.p]),
    _after_own_backward,
)
for _error, _message, _call in (
    (TypeError, "model is a function", lambda w: curvature.Objective(square, square, (w.x, w.y))),
    (TypeError, "model is a type", lambda w: curvature.Objective(nn.Linear, square, (w.x, w.y))),
    (
        TypeError,
        r"a scripted module, .*pass torch\.nn\.Sequential\(model\)",
        lambda w: curvature.Objective(torch.jit.ScriptModule(), square, (w.x, w.y)),
    ),
    (TypeError, "loss is a NoneType", lambda w: curvature.Objective(w.net, None, (w.x, w.y))),
    (TypeError, "batch must be a pair", lambda w: curvature.Objective(w.net, square, (w.x,))),
    (TypeError, "batch must be a pair", lambda w: curvature.Objective(w.net, square, w.x)),
    (
        ValueError,
        "batch is empty",
        lambda w: curvature.Objective(w.net, square, (w.x[:0], w.y[:0])),
    ),
    (
        ValueError,
        "batch is empty",
        lambda w: curvature.Objective(w.net, square, ({"x": w.x[:0]}, w.y[:0])),
    ),
    (TypeError, "params is a int; pass the model's", lambda w: w.objective()(5)),
    (ValueError, "'zz', which the model does not have", lambda w: w.objective()({"zz": w.v})),
):
    bad("curvature.Objective", _error, _message, lambda w, _, call=_call: call(w))
for _error, _message, _args, _options in (
    (TypeError, "operation is 5; it must be a subclass", (5, square), {}),
    (TypeError, "operation is ''", ("", square), {}),
    (TypeError, "it must be a subclass", (torch.sin, square), {}),
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
for _error, _message, _func, _step in (
    (ValueError, "step is .* the squares of such steps cannot", square, 1e-300),
    (ValueError, "step is .* the squares of such steps cannot", square, 1e300),
    (curvature.NonFiniteLoss, r"at step -1\.7.*, the loss is nan", lambda x: x.log().sum(), 3),
):
    bad(
        "curvature.testing.finite_difference",
        _error,
        _message,
        lambda w, _, func=_func, step=_step: testing.finite_difference(
            func, w.v.double(), w.v.double(), step=step
        ),
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
