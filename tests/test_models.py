"""Whole models: what autograd can record, the fast engine must get right."""

import gc
import weakref

import pytest
import torch
from agreement import check_agreement, fast_only, shows_what_it_packed
from small_models import MODELS, objective
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from curvature import NotTwiceDifferentiable, Objective, Tape, directional, forward, hvp

pytestmark = fast_only
F64 = torch.float64


@pytest.mark.parametrize("products", ["kept", "not kept"])
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if products == "kept":
        monkeypatch.setattr(forward, "_LEAST_WORK", 0)
        monkeypatch.setattr(forward, "_LEAST_LENGTH", 0)
    J, v = objective(name)
    check_agreement(J, J.params, v)


def test_dropout_keeps_its_mask_and_the_batch_may_change() -> None:
    model = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Tanh(), nn.Linear(50, 1)).to(F64)
    params = dict(model.named_parameters())
    for batch in (5, 2, 7):
        x = torch.randn(batch, 3, dtype=F64)
        results = []
        for engine in ("auto", "reference"):
            torch.manual_seed(1)
            with Tape(engine=engine) as tape:
                losses = model(x).square().sum(1)
            gradient = tape.backward(losses, params)
            results.append(tape.directional(gradient).curvature)
        torch.testing.assert_close(*results, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_without_cotangents_the_numbers_are_the_same(name: str) -> None:
    J, v = objective(name)
    params = {k: p.clone().requires_grad_() for k, p in J.params.items()}
    results = []
    for low_memory, cotangents in ((False, True), (True, True), (False, False)):
        torch.manual_seed(0)
        with Tape(low_memory=low_memory) as tape:
            losses = J(params)
        tape.backward(losses, params, cotangents=cotangents)
        q = tape.directional(v)
        assert q.engine.startswith("tangent" if cotangents and not low_memory else "jet")
        if low_memory and shows_what_it_packed:
            with pytest.raises(RuntimeError, match="a low-memory tape answers one question"):
                tape.hvp(v)
            torch.manual_seed(0)
            with Tape(low_memory=low_memory) as tape:
                losses = J(params)
            tape.backward(losses, params)
        results.append((q.slope, q.curvature, tape.hvp(v)))
        torch.testing.assert_close(results[-1], results[0], rtol=1e-8, atol=1e-10)


class Watched(torch.autograd.Function):
    """Holds an object as long as its graph lives."""

    @staticmethod
    def forward(ctx, x, held):  # type: ignore[no-untyped-def]
        ctx.held = held
        return x.clone()

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g, None


def test_a_tape_frees_its_graph_without_the_garbage_collector() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 2))
    params = dict(model.named_parameters())
    gc.collect()
    gc.disable()
    try:
        held = nn.Identity()
        freed: list[bool] = []
        weakref.finalize(held, freed.append, True)
        with Tape() as tape:
            losses = Watched.apply(model(torch.randn(4, 3)), held).square().sum(1)
        gradient = tape.backward(losses, params)
        q = tape.directional(gradient, per_sample=True)
        contributions = tape.directional(gradient).contributions
        tape.hvp(gradient)
        del held, losses
        assert not freed
        del tape
        assert freed
    finally:
        gc.enable()
    assert torch.isfinite(q.curvature)
    assert contributions is not None
    assert contributions[0].origin.module == "1"


def test_contributions_name_where_the_loss_bends() -> None:
    J, v = objective("gpt")
    q = directional(J, J.params, v)
    terms = q.contributions
    assert terms is not None
    torch.testing.assert_close(sum(term.curvature for term in terms), q.curvature)
    origins = [term.origin for term in terms]
    gelu = next(origin for origin in origins if origin.function == "gelu")
    assert gelu.module == "blocks.0.mlp.1"
    attention = next(o for o in origins if o.function == "scaled_dot_product_attention")
    assert attention.module == "blocks.0.attention"
    assert "small_models.py:" in attention.line
    sums = terms.by_module()
    torch.testing.assert_close(sum(sums.values()), q.curvature)
    assert {"blocks.0.attention", "blocks.1.mlp.1", ""} <= set(sums)


def test_operations_without_a_rule_are_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.rand(3, dtype=F64)
    with caplog.at_level("INFO", logger="curvature"):
        for _ in range(2):
            q = directional(lambda x: torch.special.i0e(x), x, x)
    assert q.engine == "tangent (double backward: SpecialI0EBackward0)"
    notes = [r for r in caplog.records if "SpecialI0EBackward0" in r.getMessage()]
    assert len(notes) == 1


def test_refusals_name_the_call_the_module_and_the_line() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.hardsigmoid(x)

    model = nn.Sequential(nn.Linear(2, 2), Gate())
    J = Objective(model, lambda y, _: y.sum(), (torch.randn(3, 2), None))
    line = Gate.forward.__code__.co_firstlineno + 1
    for verb in (directional, hvp):
        with pytest.raises(
            NotTwiceDifferentiable,
            match=rf"hardsigmoid, in module 1, .*test_models.py:{line}: PyTorch cannot",
        ):
            verb(J, J.params, J.params)


@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"bias": False}, {"num_layers": 2}, {"batch_first": True}],
    ids=str,
)
@pytest.mark.parametrize("moving", ["all", "weights", "inputs"])
def test_the_lstm_of_the_cpu_in_single_precision(options: dict[str, object], moving: str) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(4, 5, **options)
    ends = 2 if "bidirectional" in options or "num_layers" in options else 1
    batch = 7 if "batch_first" in options else 3
    given = [torch.randn(7, 3, 4), torch.randn(ends, batch, 5), torch.randn(ends, batch, 5)]
    results = []
    for dtype, engine in ((torch.float32, "auto"), (F64, "reference")):
        module = lstm.to(dtype).requires_grad_(moving != "inputs")
        inputs = [x.to(dtype).requires_grad_(moving != "weights") for x in given]
        params = [p for p in [*inputs, *module.parameters()] if p.requires_grad]
        v = [torch.linspace(-1, 1, p.numel(), dtype=dtype).view(p.shape) for p in params]
        for per_sample in (False, True):
            with Tape(engine=engine) as tape:
                x, h, c = (x.sin() for x in inputs)
                output, (h, c) = module(x, (h, c))
                time = 1 if "batch_first" in options else 0
                losses = output.sin().sum((time, 2)) + h.square().sum((0, 2)) + c.pow(3).sum((0, 2))
            tape.backward(losses, params)
            q = tape.directional(v, per_sample=per_sample)
            numbers = [q.slope.view(1), q.curvature.view(1)]
            if q.per_sample is not None:
                numbers += [q.per_sample.slope, q.per_sample.curvature]
            results.append((dtype, torch.cat(numbers).to(F64)))
        results.append((dtype, torch.cat([h.flatten() for h in tape.hvp(v)]).to(F64)))
    single, double = ([t for d, t in results if d == dtype] for dtype in (torch.float32, F64))
    for mine, exact in zip(single, double, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_gauss_newton_is_the_loss_seen_through_the_jacobian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).to(F64)
    x, y = torch.randn(6, 3, dtype=F64), torch.randint(4, (6,))
    params = dict(model.named_parameters())
    v = {name: torch.randn_like(p) for name, p in params.items()}
    with Tape() as tape:
        logits = model(x)
        losses = F.cross_entropy(logits, y, reduction="none") + params["0.bias"].pow(4).sum()
    tape.backward(losses, params)
    q = tape.gauss_newton(v, logits)

    def outputs(*p: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(params, p, strict=True)), (x,))

    _, moved = torch.autograd.functional.jvp(outputs, tuple(params.values()), tuple(v.values()))
    loss = lambda z: F.cross_entropy(z, y)  # noqa: E731
    penalty = 12 * (params["0.bias"] ** 2 * v["0.bias"] ** 2).sum()
    exact = directional(loss, logits.detach(), moved.detach()).curvature + penalty
    torch.testing.assert_close(q.curvature, exact.detach())
    torch.testing.assert_close(q.slope, tape.directional(v).slope)
    with pytest.raises(TypeError, match="what the model returned"):
        tape.gauss_newton(v, x)


def test_gauss_newton_by_the_edges_of_outputs_that_are_written_to() -> None:
    model, x = nn.Linear(3, 2).to(F64), torch.randn(5, 3, dtype=F64)
    params, found = list(model.parameters()), []
    for inplace in (False, True):
        with Tape() as tape:
            logits = model(x)
            edge = torch.autograd.graph.get_gradient_edge(logits)
            loss = F.silu(logits, inplace=inplace).square().sum()
        found.append(tape.gauss_newton(tape.backward(loss, params), edge).curvature)
    torch.testing.assert_close(*found)


def test_gauss_newton_names_what_only_the_whole_graph_can_differentiate() -> None:
    x = torch.tensor([[0.0, 1, 0], [-1, 0, 0.5], [0.2, 0, 1]], dtype=F64, requires_grad=True)
    with Tape() as tape:
        output = sum(e.abs().square().sum() for e in torch.linalg.eig(x.sin()))
        loss = output**2
    tape.backward(loss, [x])
    assert tape.directional([x.detach()]).engine == "reference"
    with pytest.raises(NotTwiceDifferentiable, match=r"linalg_eig, .*test_models\.py"):
        tape.gauss_newton([x.detach()], output)
