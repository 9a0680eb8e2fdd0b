"""Bad inputs of the optimizers."""

from typing import Any

import torch
from bad_inputs import INF, NAN, World, bad
from torch import nn

import optim

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
