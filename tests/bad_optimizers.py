"""Bad inputs of the optimizers."""

from typing import Any

import torch
from bad_inputs import INF, NAN, World, bad
from torch import nn

import optim


def refused(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    """Of an optimizer and of a group that is added to it."""
    make = getattr(optim, name)
    bad(f"optim.{name}", error, message, lambda w, _: make([w.p], **options))
    bad(
        f"optim.{name}",
        error,
        message,
        lambda w, o: o.add_param_group({"params": [nn.Parameter(w.v)], **options}),
        lambda w: make([w.p]),
    )


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
        ({"alpha": INF}, ValueError, "alpha is inf"),
        ({"alpha": -0.1}, ValueError, r"alpha is -0\.1"),
        ({"alpha": None}, TypeError, "alpha is None; it must be a number"),
        ({"beta": NAN}, ValueError, "beta is nan"),
        ({"beta": INF}, ValueError, "beta is inf"),
        ({"beta": -0.1}, ValueError, r"beta is -0\.1"),
        ({"weight_decay": -1.0}, ValueError, r"weight_decay is -1\.0"),
        ({"weight_decay": NAN}, ValueError, "weight_decay is nan"),
        ({"weight_decay": INF}, ValueError, "weight_decay is inf"),
    ):
        refused(_name, _options, _error, _message)

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
for _name in ("INNA", "INNAprop"):
    for _options, _message in (
        ({"beta": 0.0}, r"beta is 0\.0"),
        ({"lr": 0.9, "beta": 0.9}, "the step must stay below beta"),
        ({"lr": 2.0, "beta": 0.9}, "lower lr or raise beta"),
    ):
        refused(_name, _options, ValueError, _message)
for _options, _error, _message in (
    ({"betas": 0.9}, TypeError, r"betas is 0\.9; give two numbers"),
    ({"betas": (0.9,)}, TypeError, "give two numbers"),
    ({"betas": (0.9, "a")}, TypeError, r"betas\[1\] is 'a'; it must be a number"),
    ({"betas": (NAN, 0.9)}, ValueError, r"betas\[0\] is nan; it must be in \[0, 1\)"),
    ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] is 1\.0"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1\.0; it must be in \[0, 1\)"),
    ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\] is -0\.1"),
    ({"eps": 0.0}, ValueError, r"eps is 0\.0"),
):
    refused("DINAdam", _options, _error, _message)
for _name in ("INNAprop", "INNApropMomentum"):
    for _key, _value in (("sigma", NAN), ("sigma", 1.0), ("eps", 0.0), ("eps", NAN), ("eps", INF)):
        refused(_name, {_key: _value}, ValueError, f"{_key} is {_value}")
for _options, _message in (
    ({"lr": 0.9}, "lr must stay below beta"),
    ({"lr": 0.5, "alpha": 2.0}, "product must stay below 1"),
):
    refused("INNApropMomentum", _options, ValueError, _message)
