"""Slope and curvature against finite differences, for layers and losses of torch.nn.

The input moves along with the parameters, so that second derivatives with respect to both, and
mixed ones, are compared. Inputs keep a distance from the kinks of piecewise functions.
"""

import warnings
from collections.abc import Callable

import pytest
import torch
from agreement import check_engines, fast_only
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules import activation, batchnorm, instancenorm, normalization, pooling
from torch.nn.modules import loss as losses

from curvature import NotTwiceDifferentiable, Objective, directional, hvp

F64 = torch.float64


def away_from_kinks(*shape: int) -> torch.Tensor:
    """Entries between -2.5 and 2.5, at least 0.15 from the multiples of 0.5, no two equal."""
    x = torch.randint(-5, 5, shape) * 0.5 + 0.25
    return (x + 0.2 * torch.rand(shape) - 0.1).to(F64)


def distinct(*shape: int) -> torch.Tensor:
    """Entries 0.3 apart in random order, so that a small move changes no maximum."""
    count = torch.Size(shape).numel()
    return (torch.randperm(count).to(F64) * 0.3 - 0.15 * count).view(shape) / 3


def bend(output: torch.Tensor) -> torch.Tensor:
    """One loss per sample with first and second derivatives everywhere."""
    flat = output.flatten(1)
    weights = torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)
    return (flat * weights).mean(1) + flat.square().mean(1) / 2


def check_module(module: nn.Module, *inputs: torch.Tensor, step: float = 0.1) -> None:
    """Compare along a random direction through the parameters and floating-point inputs."""
    module = module.to(F64)
    moving = {str(i): x for i, x in enumerate(inputs) if x.is_floating_point()}
    params = {"weights": dict(module.named_parameters()), "inputs": moving}

    def func(p: dict) -> torch.Tensor:
        args = [p["inputs"].get(str(i), x) for i, x in enumerate(inputs)]
        output = torch.func.functional_call(module, p["weights"], tuple(args))
        return bend(output[0] if isinstance(output, tuple) else output)

    direction = {
        part: {name: torch.randn_like(x) for name, x in tensors.items()}
        for part, tensors in params.items()
    }
    check_engines(func, params, direction, step=step)


# PyTorch offers no second derivative of these; the call must say so.
REFUSED = {"Hardsigmoid", "CTCLoss", "MultiLabelMarginLoss", "MultiMarginLoss"}

ARGUMENTS = {"Threshold": (0.5, 0.1)}
ACTIVATIONS = sorted(set(activation.__all__) - {"MultiheadAttention"})


SEEDS = st.integers(0, 9999)
seeds = given(seed=SEEDS)
few = settings(max_examples=5)


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - REFUSED))
@few
@given(batch=st.integers(1, 3), width=st.integers(1, 3), seed=SEEDS)
def test_activation(name: str, batch: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    module = getattr(nn, name)(*ARGUMENTS.get(name, ()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Implicit dimension choice", UserWarning)
        check_module(module, away_from_kinks(batch, 4, 2, 2 * width), step=0.05)


def test_hardsigmoid_has_no_second_derivative() -> None:
    with pytest.raises(NotTwiceDifferentiable, match="hardsigmoid_backward"):
        check_module(nn.Hardsigmoid(), away_from_kinks(3, 4))


def test_gelu_with_tanh() -> None:
    check_module(nn.GELU(approximate="tanh"), torch.randn(3, 5, dtype=F64))


@given(
    batch=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    bias=st.booleans(),
    seed=SEEDS,
)
def test_linear(batch: int, sizes: tuple[int, int], bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    check_module(nn.Linear(*sizes, bias=bias), torch.randn(batch, sizes[0], dtype=F64))


@given(
    dims=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    transposed=st.booleans(),
    seed=SEEDS,
)
def test_convolution(
    dims: int, stride: int, padding: int, dilation: int, groups: int, transposed: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    kind = f"Conv{'Transpose' if transposed else ''}{dims}d"
    module = getattr(nn, kind)(
        2, 4, 2, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    check_module(module, torch.randn(2, 2, *[5] * dims, dtype=F64))


def instance_norm(dims: int) -> nn.Module:
    kind = getattr(nn, f"InstanceNorm{dims}d")
    return kind(2, affine=dims < 3, track_running_stats=dims == 2)


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: nn.LayerNorm(6, eps=1e-2), (3, 6)),
    "LayerNorm, two dimensions": (
        lambda: nn.LayerNorm([2, 3], elementwise_affine=False),
        (3, 2, 3),
    ),
    "RMSNorm": (lambda: nn.RMSNorm(6), (3, 6)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (3, 4, 3)),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), (2, 4, 3)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2, affine=False), (3, 2, 2, 2, 2)),
    "InstanceNorm1d": (lambda: instance_norm(1), (2, 2, 5)),
    "InstanceNorm2d": (lambda: instance_norm(2), (2, 2, 3, 3)),
    "InstanceNorm3d": (lambda: instance_norm(3), (2, 2, 2, 2, 2)),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (3, 4)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
@few
@seeds
def test_normalisation(name: str, training: bool, seed: int) -> None:
    torch.manual_seed(seed)
    make, shape = NORMS[name]
    check_module(make().train(training), 1 + torch.randn(shape, dtype=F64))


def test_every_norm_is_listed() -> None:
    every = {*batchnorm.__all__, *instancenorm.__all__, *normalization.__all__}
    elsewhere = {"SyncBatchNorm", "CrossMapLRN2d"}  # needs a GPU; is tested below
    assert {n for n in every if not n.startswith("Lazy")} - elsewhere <= set(NORMS)


def test_cross_map_lrn_is_refused() -> None:
    with pytest.raises(NotTwiceDifferentiable, match="automatic differentiation"):
        check_module(nn.CrossMapLRN2d(2), torch.randn(2, 4, 3, 3, dtype=F64))


def test_spectral_norm() -> None:
    # In training its power iteration follows the weights, which the gradient takes for constant.
    module = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval()
    check_module(module, torch.randn(3, 4, dtype=F64))


POOLS: dict[str, tuple[tuple, dict]] = {
    "MaxPool": ((2,), {"stride": 1, "padding": 1}),
    "AvgPool": ((3,), {"stride": 2, "ceil_mode": True}),
    "LPPool": ((2, 2), {}),
    "AdaptiveAvgPool": ((2,), {}),
    "AdaptiveMaxPool": ((2,), {}),
    "FractionalMaxPool": ((2,), {"output_size": 2}),
}


POOL_CASES = [(name, dims) for name in POOLS for dims in (1, 2, 3) if hasattr(nn, f"{name}{dims}d")]
small = settings(max_examples=8)


@pytest.mark.parametrize(("name", "dims"), POOL_CASES)
@few
@given(batch=st.integers(1, 3), channels=st.integers(1, 2), extra=st.integers(0, 1), seed=SEEDS)
def test_pooling(name: str, dims: int, batch: int, channels: int, extra: int, seed: int) -> None:
    torch.manual_seed(seed)
    args, options = POOLS[name]
    x = distinct(batch, channels, *[4] * (dims - 1), 4 + extra)
    check_module(getattr(nn, f"{name}{dims}d")(*args, **options), x, step=0.05)


def test_every_pool_is_listed() -> None:
    every = {name.rstrip("123d") for name in pooling.__all__}
    assert every - {"MaxUnpool"} == set(POOLS)


@pytest.mark.parametrize("dims", [1, 2, 3])
@few
@given(batch=st.integers(1, 3), size=st.sampled_from([2, 4]), seed=SEEDS)
def test_unpooling(dims: int, batch: int, size: int, seed: int) -> None:
    class Unpool(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pooled, indices = getattr(F, f"max_pool{dims}d")(x, 2, return_indices=True)
            return getattr(F, f"max_unpool{dims}d")(pooled, indices, 2)

    torch.manual_seed(seed)
    check_module(Unpool(), distinct(batch, 1, *[4] * (dims - 1), size), step=0.05)


@pytest.mark.parametrize("name", ["PairwiseDistance", "CosineSimilarity"])
@small
@given(batch=st.integers(1, 3), width=st.integers(2, 4), seed=SEEDS)
def test_distance(name: str, batch: int, width: int, seed: int) -> None:
    class Pairs(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return getattr(nn, name)()(x, y).unsqueeze(1)

    torch.manual_seed(seed)
    check_module(Pairs(), normal(batch, width), normal(batch, width), step=0.01)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
@few
@given(batch=st.integers(1, 3), width=st.integers(1, 4), seed=SEEDS)
def test_recurrent_cell(name: str, batch: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    check_module(getattr(nn, name)(width, 4), normal(batch, width))


@small
@given(
    heads=st.integers(1, 2),
    lengths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    width=st.integers(1, 3),
    causal=st.booleans(),
    seed=SEEDS,
)
def test_scaled_dot_product_attention(
    heads: int, lengths: tuple[int, int], width: int, causal: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    queries, keys = lengths

    def func(p: dict) -> torch.Tensor:
        return bend(F.scaled_dot_product_attention(p["q"], p["k"], p["v"], is_causal=causal))

    params = {
        "q": normal(2, heads, queries, width),
        "k": normal(2, heads, keys, width),
        "v": normal(2, heads, keys, width + 1),
    }
    check_engines(func, params, {k: torch.randn_like(p) for k, p in params.items()})


@fast_only
@small
@given(
    groups=st.integers(1, 2), lengths=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=SEEDS
)
def test_attention_with_shared_keys_and_rows_without_any(
    groups: int, lengths: tuple[int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    queries, keys = lengths
    mask = torch.rand(queries, keys) < 0.5

    def func(p: dict) -> torch.Tensor:
        return bend(F.scaled_dot_product_attention(**p, attn_mask=mask, enable_gqa=True))

    params = {"query": normal(2, 2 * groups, queries, 3)}
    params |= {name: normal(2, groups, keys, 3) for name in ("key", "value")}
    check_engines(func, params, {k: torch.randn_like(p) for k, p in params.items()})


@pytest.mark.parametrize("name", ["attention", "encoder", "decoder"])
@few
@given(batch=st.integers(1, 2), length=st.integers(1, 3), heads=st.integers(1, 3), seed=SEEDS)
def test_attention_modules(name: str, batch: int, length: int, heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    make, copies = {
        "attention": (nn.MultiheadAttention, 3),
        "encoder": (nn.TransformerEncoderLayer, 1),
        "decoder": (nn.TransformerDecoderLayer, 2),
    }[name]
    options = {} if name == "attention" else {"dim_feedforward": 8, "activation": F.gelu}
    module = make(6, heads, dropout=0.3, batch_first=True, **options)
    check_module(module, *[normal(batch, length, 6)] * copies)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@few
@given(batch=st.integers(1, 2), length=st.integers(1, 4), both=st.booleans(), seed=SEEDS)
def test_recurrent(name: str, batch: int, length: int, both: bool, seed: int) -> None:
    torch.manual_seed(seed)
    module = getattr(nn, name)(3, 4, num_layers=2, batch_first=True, bidirectional=both)
    check_module(module, normal(batch, length, 3))


@small
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.sampled_from([None, 0, 4]),
    seed=SEEDS,
)
def test_embedding(shape: tuple[int, int], padding: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    module = nn.Embedding(5, 3, padding_idx=padding).to(F64)
    indices = torch.randint(5, shape)
    # What the gradient of a padding row is held at, zero, is not what differences see there.
    still = {"weight": torch.ones(5, 3, dtype=F64)}
    if padding is not None:
        still["weight"][padding] = 0
    params = dict(module.named_parameters())
    direction = {"weight": torch.randn(5, 3, dtype=F64) * still["weight"]}
    func = lambda p: bend(torch.func.functional_call(module, p, (indices,)))  # noqa: E731
    check_engines(func, params, direction)


def test_embedding_bag_is_refused() -> None:
    with pytest.raises(NotTwiceDifferentiable, match=r"_embedding_bag_.*backward"):
        check_module(nn.EmbeddingBag(5, 4, mode="mean"), torch.tensor([[0, 3, 3], [1, 0, 2]]))


@small
@given(
    batch=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    seed=SEEDS,
)
def test_bilinear(batch: int, sizes: tuple[int, int, int], seed: int) -> None:
    torch.manual_seed(seed)
    check_module(nn.Bilinear(*sizes), normal(batch, sizes[0]), normal(batch, sizes[1]))


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=F64) + 0.5


def signs(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape).to(F64) * 2 - 1


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=F64)


def labels(batch: int, classes: int) -> torch.Tensor:
    return torch.randint(classes, (batch,))


# Inputs of each loss: those that move along the direction, those that stay, and options.
Case = tuple[list[torch.Tensor], list[torch.Tensor], dict]
LOSSES: dict[str, Callable[[int, int], Case]] = {
    "L1Loss": lambda n, k: ([away_from_kinks(n, k)], [torch.zeros(n, k, dtype=F64)], {}),
    "NLLLoss": lambda n, k: ([normal(n, k)], [labels(n, k)], {}),
    "PoissonNLLLoss": lambda n, k: ([normal(n, k)], [positive(n, k)], {"full": True}),
    "GaussianNLLLoss": lambda n, k: ([normal(n, k), normal(n, k), positive(n, k)], [], {}),
    "KLDivLoss": lambda n, k: ([normal(n, k)], [normal(n, k)], {"log_target": True}),
    "MSELoss": lambda n, k: ([normal(n, k), normal(n, k)], [], {}),
    "BCELoss": lambda n, k: ([positive(n, k) / 2], [positive(n, k) / 2], {}),
    "BCEWithLogitsLoss": lambda n, k: (
        [normal(n, k)],
        [positive(n, k) / 2],
        {"pos_weight": positive(k)},
    ),
    "HingeEmbeddingLoss": lambda n, k: ([away_from_kinks(n, k)], [signs(n, k)], {}),
    "MultiLabelMarginLoss": lambda n, k: ([normal(n, k)], [torch.full((n, k), -1)], {}),
    "SmoothL1Loss": lambda n, k: ([away_from_kinks(n, k)], [torch.zeros(n, k, dtype=F64)], {}),
    "HuberLoss": lambda n, k: ([away_from_kinks(n, k)], [torch.zeros(n, k, dtype=F64)], {}),
    "SoftMarginLoss": lambda n, k: ([normal(n, k)], [signs(n, k)], {}),
    "CrossEntropyLoss": lambda n, k: (
        [normal(n + 1, k)],
        [torch.cat([labels(n, k), torch.tensor([-100])])],
        {"weight": positive(k), "label_smoothing": 0.1},
    ),
    "MultiLabelSoftMarginLoss": lambda n, k: ([normal(n, k)], [positive(n, k) / 2], {}),
    "CosineEmbeddingLoss": lambda n, k: (
        [normal(n, k), normal(n, k)],
        [torch.ones(n, dtype=F64)],
        {},
    ),
    "MarginRankingLoss": lambda n, k: (
        [away_from_kinks(n), torch.zeros(n, dtype=F64)],
        [signs(n)],
        {},
    ),
    "MultiMarginLoss": lambda n, k: ([normal(n, k)], [labels(n, k)], {}),
    "TripletMarginLoss": lambda n, k: ([normal(n, k) for _ in range(3)], [], {"margin": 9.0}),
    "TripletMarginWithDistanceLoss": lambda n, k: (
        [normal(n, k) for _ in range(3)],
        [],
        {"margin": 9.0},
    ),
    "CTCLoss": lambda n, k: (
        [normal(6, n, k + 1).log_softmax(-1)],
        [labels(n, k)[:, None] + 1, torch.full((n,), 6), torch.full((n,), 1)],
        {},
    ),
}


def test_every_loss_is_listed() -> None:
    elsewhere = {"NLLLoss2d", "LinearCrossEntropyLoss"}
    assert set(LOSSES) == set(losses.__all__) - elsewhere


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="new in torch 2.13")
def test_linear_cross_entropy() -> None:
    module = nn.LinearCrossEntropyLoss(4, 3).to(F64)
    target = torch.tensor([0, 2, 1])

    def func(p: dict) -> torch.Tensor:
        return torch.func.functional_call(module, p["weights"], (p["x"].tanh(), target))

    params = {"weights": dict(module.named_parameters()), "x": torch.randn(3, 4, dtype=F64)}
    check_engines(func, params, torch.utils._pytree.tree_map(torch.randn_like, params))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", sorted(LOSSES))
@few
@given(batch=st.integers(1, 4), width=st.integers(2, 4), seed=SEEDS)
def test_loss(name: str, reduction: str, batch: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    moving, fixed, options = LOSSES[name](batch, width)
    if (name, reduction) == ("KLDivLoss", "mean"):
        reduction = "batchmean"
    module = getattr(nn, name)(reduction=reduction, **options)

    def func(inputs: list[torch.Tensor]) -> torch.Tensor:
        # Not plain inputs: their second derivative is then that of a chain, as in a network.
        loss = module(*[x + x**2 / 20 for x in inputs], *fixed)
        return loss.flatten(1).sum(1) if loss.ndim > 1 else loss

    direction = [torch.randn_like(x) for x in moving]
    if name in REFUSED:
        with pytest.raises(NotTwiceDifferentiable, match=r"curvature\.fit"):
            directional(func, moving, direction)
    else:
        # The margin's rounding drowns differences over a shorter step.
        check_engines(func, moving, direction, step=0.05 if "Triplet" in name else 0.01)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutional": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
        ),
        (8, 1, 6, 6),
    ),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu"),
        (5, 4, 8),
    ),
    "recurrent": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 5, 2)), (6, 4, 3)),
    "normalised": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.SELU()), (7, 6)),
}


@pytest.mark.parametrize("name", MODELS)
@few
@seeds
def test_single_precision_is_double_precision_to_rounding(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    v = {key: torch.randn_like(p) for key, p in model.named_parameters()}
    answers = []
    for dtype in (torch.float32, F64):
        inputs = x.to(dtype)
        J = Objective(
            model.to(dtype), lambda y, _: bend(y[0] if isinstance(y, tuple) else y), (inputs, None)
        )
        direction = {key: u.to(dtype) for key, u in v.items()}
        q = directional(J, J.params, direction, per_sample=True)
        product = torch.cat([h.flatten() for h in hvp(J, J.params, direction).values()])
        answers.append([q.slope, q.curvature, q.per_sample.slope, q.per_sample.curvature, product])
    for single, double in zip(*answers, strict=True):
        assert single.dtype == torch.float32
        gap = (single.double() - double).abs().max()
        assert gap <= 2e-5 * double.abs().max()
