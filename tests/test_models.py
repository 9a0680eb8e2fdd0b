"""Whole models: what autograd can record, the fast engine must get right."""

import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from agreement import check_agreement, fast_only, shows_what_it_packed
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from curvature import NotTwiceDifferentiable, Objective, Tape, directional, forward, hvp

pytestmark = fast_only
F64 = torch.float64


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts.unbind(0), is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 2, causal=causal)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class Gpt(nn.Module):
    """With the embedding's weight tied to the output's."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 8), nn.Embedding(5, 8)
        self.blocks = nn.Sequential(Block(8, causal=True), Block(8, causal=True))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        return self.norm(self.blocks(y)) @ self.tokens.weight.t()


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.first = nn.Parameter(torch.randn(1, 1, 8))
        self.block = Block(8, causal=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.first.expand(len(x), -1, -1), y], 1)
        return self.head(self.block(y)[:, 0])


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y += x
        return F.relu(y, inplace=True)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(4, 3, 2, 2), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        across = F.softplus(self.down(x))
        deep = F.silu(self.deep(F.max_pool2d(across, 2)))
        return self.out(torch.cat([across, self.up(deep)], 1))


class Languages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(5, 7)
        self.lstm = nn.LSTM(4, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 7)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = self.transformer.generate_square_subsequent_mask(target.shape[1], dtype=F64)
        return self.head(self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True))


def images(channels: int, size: int = 6) -> Tensor:
    return torch.randn(4, channels, size, size, dtype=F64)


def tokens() -> Tensor:
    return torch.randint(7, (3, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], object]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh()),
        lambda: torch.randn(4, 3, dtype=F64),
    ),
    "lenet": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)
        ),
        lambda: images(1),
    ),
    "vgg": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.Softplus(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)
        ),
        lambda: images(3),
    ),
    "resnet": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), Residual(3), nn.AdaptiveAvgPool2d(1)),
        lambda: images(1),
    ),
    "gpt": (Gpt, tokens),
    "vit": (Vit, lambda: images(3)),
    "lstm": (Languages, tokens),
    "u-net": (UNet, lambda: images(1)),
    "transformer": (
        Translator,
        lambda: (torch.randn(2, 4, 8, dtype=F64), torch.randn(2, 3, 8, dtype=F64)),
    ),
}


def objective(name: str) -> tuple[Objective, dict[str, Tensor]]:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = make().to(F64)

    def loss(output: Tensor, _: object) -> Tensor:
        logits = output.flatten(2).mean(2) if output.ndim == 4 else output
        classes = torch.arange(len(logits)) % logits.shape[-1]
        if logits.ndim == 3:
            logits = logits.mean(1)
        return F.cross_entropy(logits, classes, reduction="none", label_smoothing=0.1)

    J = Objective(model, loss, (inputs(), None))
    return J, {name: torch.randn_like(p) / 3 for name, p in J.params.items()}


@pytest.mark.parametrize("products", ["kept", "not kept"])
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if products == "kept":
        monkeypatch.setattr(forward, "_LEAST_WORK", 0)
        monkeypatch.setattr(forward, "_LEAST_LENGTH", 0)
    J, v = objective(name)
    check_agreement(J, J.params, v)


def write_to_views(x: Tensor) -> Tensor:
    y = x.sin()
    y[:, 0] += x[:, 1] ** 2
    y[1:].mul_(x[1:].exp())
    z = y.t()
    z[0].copy_(x.sum(1))
    return y.square().sum(1)


def detached_islands(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.exp()
    return (x**3 * scale + x.detach() * x.sin()).sum(1)


def branches(x: Tensor) -> Tensor:
    a = torch.tanh(x)
    b = torch.logaddexp(a, a.exp() * x)
    return (b.sort(1)[0] * torch.arange(3)).sum(1) + b.prod(1) * a.norm(dim=1)


def one_tensor_as_two_inputs(x: Tensor) -> Tensor:
    y = x.exp()
    return (torch.xlogy(y, y) + torch.logaddexp(x, x) * torch.hypot(y, y) + x / y / y).sum(1)


def strided(x: Tensor) -> Tensor:
    y = x.expand(2, 4, 3).permute(2, 0, 1)[::2]
    return torch.nn.functional.conv1d(y, y[:1]).sin().sum((1, 2))


def many_outputs(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x.t() @ x + torch.diag(torch.arange(3.0, dtype=F64)))
    return values.exp() + (vectors[0] ** 2).cumsum(0)


def complex_numbers(x: Tensor) -> Tensor:
    z = torch.fft.fft(x, dim=1) * torch.fft.fft(x.sin(), dim=1).conj()
    return torch.fft.ifft(z.exp()).real.sum(1) + z.abs().sum(1)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, y)
        return x**3 * y, y.sin()

    @staticmethod
    def backward(ctx, g, h):  # type: ignore[no-untyped-def]
        x, y = ctx.saved_tensors
        return 3 * x**2 * y * g, x**3 * g + y.cos() * h


def custom_function(x: Tensor) -> Tensor:
    a, b = Cube.apply(x, x.sin())
    return (a * b).sum(1)


def rebinding(x: Tensor) -> Tensor:
    weights = x.square()
    y = x
    for w in weights:
        y = F.relu(y * w + 1, inplace=True)
        y = (y + w).mul_(2)
    return y.sum(1)


@pytest.mark.parametrize("products", ["kept", "not kept"])
@pytest.mark.parametrize(
    "func",
    [
        write_to_views,
        detached_islands,
        branches,
        one_tensor_as_two_inputs,
        strided,
        many_outputs,
        complex_numbers,
        custom_function,
        rebinding,
    ],
)
def test_graph(
    func: Callable[[Tensor], Tensor], products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if products == "kept":
        monkeypatch.setattr(forward, "_LEAST_WORK", 0)
        monkeypatch.setattr(forward, "_LEAST_LENGTH", 0)
    torch.manual_seed(0)
    x, v = torch.randn(2, 4, 3, dtype=F64)
    check_agreement(func, x, v)


def test_a_product_that_was_written_to_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_LEAST_WORK", 0)
    monkeypatch.setattr(forward, "_LEAST_LENGTH", 0)
    w, v = torch.randn(2, 3, 3, dtype=F64)

    def func(w: Tensor) -> Tensor:
        y = torch.tanh(w) @ w
        y.mul_(2).add_(w)
        bias = w.sum(0)
        z = F.linear(y, w, bias)
        bias.add_(1)
        return z.sum(1) * bias

    check_agreement(func, w, v)


def test_the_product_of_an_input_that_is_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """F.linear adds the bias in a call of its own there."""
    monkeypatch.setattr(forward, "_LEAST_WORK", 0)
    monkeypatch.setattr(forward, "_LEAST_LENGTH", 0)
    torch.manual_seed(0)
    x, v = torch.randn(2, 2, 4, 3, dtype=F64)

    def func(x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = x[0, :3].sin()
        y = F.linear(x.transpose(0, 1).tanh(), weight, x[1, 0] if bias is None else bias)
        return y.square().sum((1, 2))

    with Tape() as tape:
        func(x.requires_grad_())
    assert tape._forward is None or len(tape._forward.products) == 1
    for bias in (None, torch.randn(3, dtype=F64)):
        check_agreement(partial(func, bias=bias), x.detach(), v)


@pytest.mark.parametrize("still", ["0.weight", "2.weight", "0.weight 0.bias"])
def test_products_whose_factors_do_not_move(still: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions that are zero, tiny or large in one factor keep all digits of the tangent."""
    monkeypatch.setattr(forward, "_LEAST_WORK", 0)
    monkeypatch.setattr(forward, "_LEAST_LENGTH", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1))
    model = model.to(F64)
    J = Objective(model, lambda y, _: y.square().sum(1), (torch.randn(4, 3, dtype=F64), None))
    for size, other in ((0.0, 1.0), (1e-30, 1.0), (1e30, 1.0), (0.0, 1e-20)):
        v = {
            name: torch.randn_like(p) * (size if name in still.split() else other)
            for name, p in J.params.items()
        }
        exact = directional(J, J.params, v, engine="reference")
        fast = directional(J, J.params, v)
        torch.testing.assert_close(fast.curvature, exact.curvature, rtol=1e-9, atol=0)
        torch.testing.assert_close(fast.slope, exact.slope, rtol=1e-9, atol=0)


def test_a_direction_far_below_its_parameter_does_not_overflow_in_single_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward, "_LEAST_WORK", 0)
    monkeypatch.setattr(forward, "_LEAST_LENGTH", 0)
    torch.manual_seed(0)
    x, a = torch.randn(2, 6, 3)
    w, b = 1e10 * torch.randn(3, 3), 1e-12 * torch.randn(3, 3)

    def losses(factors: tuple[Tensor, Tensor]) -> Tensor:
        return (factors[0] @ factors[1]).square().sum(1)

    fast = directional(losses, (x, w), (a, b))
    exact = directional(losses, (x, w), (a, b), engine="reference")
    torch.testing.assert_close(fast.curvature, exact.curvature, rtol=1e-5, atol=0)


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


def test_a_loss_near_zero_keeps_its_digits() -> None:
    """Where a class is all but certain, the tangent of its logarithm is a small difference."""
    logits = torch.tensor([[14.0, 0.0, 1.0], [0.5, 13.0, 0.0]])
    v, y = torch.randn(2, 3), torch.tensor([0, 1])

    def entropy(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="none")

    def binary(z: Tensor) -> Tensor:
        truth = (z > 5).to(z)
        return F.binary_cross_entropy_with_logits(2 * z - 10, truth, reduction="none").sum(1)

    for losses in (entropy, binary):
        exact = directional(losses, logits.double(), v.double(), per_sample=True).per_sample
        fast = directional(losses, logits, v, per_sample=True).per_sample
        assert exact is not None
        assert fast is not None
        torch.testing.assert_close(fast.slope.double(), exact.slope, rtol=1e-5, atol=0)
        torch.testing.assert_close(fast.curvature.double(), exact.curvature, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(32), nn.GroupNorm(4, 32), nn.BatchNorm1d(32), nn.Identity()]
)
def test_autocast_is_followed(norm: nn.Module) -> None:
    """Products are in bfloat16, forward and backward; all engines differentiate these."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), norm, nn.Tanh(), nn.Linear(32, 8))
    x, y = torch.randn(64, 16), torch.randint(8, (64,))
    params = dict(model.named_parameters())
    v = {name: torch.randn_like(p) for name, p in params.items()}
    curvatures = []
    for engine in ("auto", "reference"):
        with Tape(engine=engine) as tape, torch.autocast("cpu", dtype=torch.bfloat16):
            losses = F.cross_entropy(model(x), y, reduction="none")
        tape.backward(losses, params)
        curvatures.append(tape.directional(v).curvature)
        curvatures.append(tape.directional(v, per_sample=True).per_sample.curvature.mean())
    exact = directional(Objective(model, F.cross_entropy, (x, y)), params, v)
    assert exact.contributions is not None
    size = float(sum(term.curvature.abs() for term in exact.contributions))
    for rounded in curvatures:
        assert 1e-5 * size < abs(rounded - exact.curvature) < 2**-7 * size


@pytest.mark.parametrize("length", [1e-6, 1e6])
def test_half_precision_holds_directions_of_any_length(length: float) -> None:
    """Squares of tangents would be zero or infinite in float16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    x, y, params = torch.randn(64, 16), torch.randint(4, (64,)), list(model.parameters())
    v = [torch.randn_like(p) for p in params]
    with Tape() as tape, torch.autocast("cpu", dtype=torch.float16):
        losses = F.cross_entropy(model(x), y, reduction="none")
    tape.backward(losses, params)
    results = []
    for t in (1.0, length):
        w = [t * vi for vi in v]
        q, per_sample = (tape.directional(w, per_sample=each) for each in (False, True))
        product = sum((h * vi).sum() for h, vi in zip(tape.hvp(w), v, strict=True))
        results.append([q.slope / t, q.curvature / t**2, per_sample.curvature / t**2, product / t])
    torch.testing.assert_close(*results, rtol=2e-3, atol=0)


def test_a_tangent_is_promoted_as_what_moves() -> None:
    def func(x: torch.Tensor) -> torch.Tensor:
        return (((x.half() + torch.ones(4, 4)) @ torch.full((4, 4), 1e-9)) * 1e9).square().mean()

    x = torch.ones(4, 4)
    q, expected = (directional(func, x, x, engine=engine) for engine in ("auto", "reference"))
    torch.testing.assert_close((q.slope, q.curvature), (expected.slope, expected.curvature))


def test_products_in_lower_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8))
    x, y = torch.randn(64, 16), torch.randint(8, (64,))
    params = dict(model.named_parameters())
    results = []
    for dtype in (None, torch.bfloat16):
        with Tape(tangent_dtype=dtype) as tape:
            loss = F.cross_entropy(model(x), y)
        gradient = tape.backward(loss, params)
        results.append(tape.directional(gradient))
    exact, rounded = results
    assert rounded.curvature.dtype == torch.float32
    assert 1e-6 < abs(rounded.curvature / exact.curvature - 1) < 2e-2


def test_a_parameter_computed_from_another() -> None:
    """The derivative is along both: theta_2 = f(theta_1) moves by f' v_1 + v_2."""
    x = torch.tensor([0.3, 0.4], dtype=F64, requires_grad=True)
    v, w = torch.randn(2, 2, dtype=F64)
    results = []
    for engine in ("auto", "reference"):
        with Tape(engine=engine) as tape:
            y = x.sin()
            losses = (y * x).exp()
        tape.backward(losses, [x, y])
        q = tape.directional([v, w], per_sample=True)
        results.append([q.slope, q.per_sample.curvature, *tape.hvp([v, w])])
    torch.testing.assert_close(*results)


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
    assert "test_models.py:" in attention.line
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
