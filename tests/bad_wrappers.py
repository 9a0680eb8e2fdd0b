"""Bad inputs of the wrappers: when they are made, at a step and afterwards."""

from typing import Any

import torch
from bad_inputs import INF, NAN, World, bad
from torch import nn

import optim
from optim import estimators, rules


class Lookahead(torch.optim.SGD):
    """It steps by an optimizer of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.inner = torch.optim.SGD(self.param_groups)


def _without_rate(w: World) -> torch.optim.Optimizer:
    base = torch.optim.SGD([w.p])
    del base.param_groups[0]["lr"]
    return base


def _hooked(w: World) -> torch.optim.Optimizer:
    w.base.register_step_pre_hook(lambda *_: None)
    return w.base


def _scheduled(w: World) -> torch.optim.Optimizer:
    torch.optim.lr_scheduler.ConstantLR(w.base)
    return w.base


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
            r"has dtype torch\.complex64.*real parameter of it, as by torch\.view_as_real",
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
        (
            lambda w: torch.optim.Adam([w.p], differentiable=True),
            ValueError,
            "no graph is kept",
        ),
        (_without_rate, TypeError, "has no lr in its groups"),
        (_hooked, ValueError, "attach them to the wrapper"),
        (_scheduled, ValueError, "attach it to the wrapper"),
        (
            lambda w: Lookahead([w.p]),
            TypeError,
            "holds another optimizer as 'inner'.*wrap that one",
        ),
        (
            lambda w: optim.Rescaled(w.base),
            TypeError,
            "base is a Rescaled, which already chooses",
        ),
    ):
        bad(_of, _error, _message, lambda w, base, make=_make: make(base), _base)
    for _options, _error, _message in (
        ({"ell": 0.0}, ValueError, r"ell is 0\.0; it must be positive"),
        ({"ell": NAN}, ValueError, "ell is nan"),
        ({"ell": -1.0}, ValueError, r"ell is -1\.0"),
        ({"ell": INF}, ValueError, "ell is inf"),
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
        (
            lambda w: torch.inference_mode()(w.losses),
            ValueError,
            "no graph: .* no_grad or inference_mode",
        ),
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

    def _norms_logged(w: World, name: str = _name) -> Any:
        optimizer = w.wrapped(name)
        optimizer.step(w.losses)
        nn.utils.clip_grad_norm_(w.net.parameters(), INF)
        return optimizer

    bad(
        _of,
        ValueError,
        r"to log a norm, take torch\.nn\.utils\.get_total_norm",
        lambda w, o: o.step(w.losses),
        _norms_logged,
    )
    bad(
        _of,
        TypeError,
        r"records is None; give an optim\.Records",
        lambda w, o: setattr(o, "records", None),
        _wrapped,
    )

    def _hooked_later(w: World, name: str = _name) -> Any:
        optimizer = w.wrapped(name)
        w.base.register_step_post_hook(lambda *_: None)
        return optimizer

    bad(
        _of,
        ValueError,
        "attach them to the wrapper",
        lambda w, o: o.step(w.losses),
        _hooked_later,
    )
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
        (lambda w: {"params": {w.p}}, TypeError, "ordered"),
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
    ({"phi": 1.5}, ValueError, r"phi is 1\.5"),
    ({"phi": 8.0}, ValueError, r"phi is 8\.0"),
    ({"points": ()}, ValueError, r"points is \(\); a polynomial of degree 2 needs at least 2"),
    ({"degree": 1}, ValueError, "degree is 1"),
):
    bad(
        "optim.gen_published",
        _error,
        _message,
        lambda w, _, o=_options: optim.gen_published(w.base, **o),
    )
