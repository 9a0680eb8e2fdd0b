"""Slope and curvature against finite differences, for layers and losses of torch.nn.

The input moves along with the parameters, so that second derivatives with respect to both, and
mixed ones, are compared. Inputs keep a distance from the kinks of piecewise functions.
"""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules import activation as activations
from torch.nn.modules import loss as losses

from curvature import NotTwiceDifferentiable, directional
from curvature.testing import check_directional

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
    check_directional(func, params, direction, step=step)


# PyTorch offers no second derivative of these; the call must say so.
REFUSED = {"Hardsigmoid", "CTCLoss", "MultiLabelMarginLoss", "MultiMarginLoss"}

ARGUMENTS = {"Threshold": (0.5, 0.1)}
ACTIVATIONS = sorted(set(activations.__all__) - {"MultiheadAttention"})


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    module = getattr(nn, name)(*ARGUMENTS.get(name, ()))
    if name in REFUSED:
        with pytest.raises(NotTwiceDifferentiable, match=rf"derivative for .*{name.lower()}"):
            check_module(module, away_from_kinks(3, 4))
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Implicit dimension choice", UserWarning)
        check_module(module, away_from_kinks(3, 4, 2, 2), step=0.05)


def test_gelu_with_tanh() -> None:
    check_module(nn.GELU(approximate="tanh"), torch.randn(3, 5, dtype=F64))


@given(
    batch=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
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
    seed=st.integers(0, 99),
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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.LayerNorm(6), (3, 6)),
        (nn.LayerNorm([2, 3], elementwise_affine=False), (3, 2, 3)),
        (nn.RMSNorm(6), (3, 6)),
        (nn.BatchNorm1d(4), (5, 4)),
        (nn.BatchNorm2d(3), (4, 3, 2, 2)),
        (nn.BatchNorm3d(2, affine=False), (3, 2, 2, 2, 2)),
        (nn.InstanceNorm1d(3, affine=True), (2, 3, 5)),
        (nn.InstanceNorm2d(2, affine=True, track_running_stats=True), (2, 2, 3, 3)),
        (nn.GroupNorm(2, 4), (3, 4, 3)),
        (nn.LocalResponseNorm(2), (2, 4, 3)),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (3, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_normalisation(module: nn.Module, shape: tuple[int, ...], training: bool) -> None:
    check_module(module.train(training), torch.randn(shape, dtype=F64))


def test_spectral_norm() -> None:
    # In training its power iteration follows the weights, which the gradient takes for constant.
    module = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval()
    check_module(module, torch.randn(3, 4, dtype=F64))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.MaxPool1d(2), (2, 2, 6)),
        (nn.MaxPool2d(2, stride=1, padding=1), (2, 2, 4, 4)),
        (nn.MaxPool3d(2), (1, 2, 4, 4, 4)),
        (nn.AvgPool1d(2), (2, 2, 6)),
        (nn.AvgPool2d(3, stride=2, ceil_mode=True), (2, 2, 5, 5)),
        (nn.AvgPool3d(2), (1, 2, 4, 4, 4)),
        (nn.LPPool2d(2, 2), (2, 2, 4, 4)),
        (nn.AdaptiveAvgPool2d(2), (2, 2, 5, 5)),
        (nn.AdaptiveMaxPool2d(2), (2, 2, 5, 5)),
        (nn.FractionalMaxPool2d(2, output_size=2), (2, 2, 5, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_pooling(module: nn.Module, shape: tuple[int, ...]) -> None:
    check_module(module, distinct(*shape), step=0.05)


@pytest.mark.parametrize("causal", [True, False])
def test_scaled_dot_product_attention(causal: bool) -> None:
    query, key, value = (torch.randn(2, 2, 4, 3, dtype=F64) for _ in range(3))

    def func(p: dict) -> torch.Tensor:
        return bend(F.scaled_dot_product_attention(p["q"], p["k"], p["v"], is_causal=causal))

    params = {"q": query, "k": key, "v": value}
    check_directional(func, params, {k: torch.randn_like(p) for k, p in params.items()})


@pytest.mark.parametrize(
    ("module", "copies"),
    [
        (nn.MultiheadAttention(6, 2, batch_first=True), 3),
        (nn.TransformerEncoderLayer(6, 2, 8, 0.3, F.gelu, batch_first=True), 1),
        (nn.TransformerDecoderLayer(6, 2, 8, activation=F.gelu, batch_first=True), 2),
    ],
    ids=["attention", "encoder", "decoder"],
)
def test_attention_modules(module: nn.Module, copies: int) -> None:
    check_module(module, *[torch.randn(2, 3, 6, dtype=F64)] * copies)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_recurrent(name: str) -> None:
    module = getattr(nn, name)(3, 4, num_layers=2, batch_first=True)
    check_module(module, torch.randn(2, 5, 3, dtype=F64))


def test_embedding() -> None:
    indices = torch.tensor([[0, 3, 3], [1, 0, 2]])
    check_module(nn.Embedding(5, 4, padding_idx=4), indices)
    with pytest.raises(NotTwiceDifferentiable, match=r"_embedding_bag_.*backward"):
        check_module(nn.EmbeddingBag(5, 4, mode="mean"), indices)


def test_bilinear() -> None:
    check_module(nn.Bilinear(3, 2, 4), torch.randn(3, 3, dtype=F64), torch.randn(3, 2, dtype=F64))


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=F64) + 0.5


def signs(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape).to(F64) * 2 - 1


# Inputs of each loss: those that move along the direction, and those that stay.
LOSSES = {
    "L1Loss": ([away_from_kinks(4, 3)], [torch.zeros(4, 3, dtype=F64)], {}),
    "NLLLoss": ([torch.randn(4, 3, dtype=F64)], [torch.tensor([0, 2, 1, 1])], {}),
    "PoissonNLLLoss": ([torch.randn(4, 3, dtype=F64)], [positive(4, 3)], {}),
    "GaussianNLLLoss": ([torch.randn(4, 3, dtype=F64)], [torch.randn(4, 3, dtype=F64)], {}),
    "KLDivLoss": (
        [torch.randn(4, 3, dtype=F64)],
        [positive(4, 3)],
        {"log_target": True},
    ),
    "MSELoss": ([torch.randn(4, 3, dtype=F64)], [torch.randn(4, 3, dtype=F64)], {}),
    "BCELoss": ([positive(4, 3) / 2], [positive(4, 3) / 2], {}),
    "BCEWithLogitsLoss": ([torch.randn(4, 3, dtype=F64)], [positive(4, 3) / 2], {}),
    "HingeEmbeddingLoss": ([away_from_kinks(4, 3)], [signs(4, 3)], {}),
    "MultiLabelMarginLoss": ([away_from_kinks(4, 3)], [torch.tensor([[1, 2, -1]] * 4)], {}),
    "SmoothL1Loss": ([away_from_kinks(4, 3)], [torch.zeros(4, 3, dtype=F64)], {}),
    "HuberLoss": ([away_from_kinks(4, 3)], [torch.zeros(4, 3, dtype=F64)], {}),
    "SoftMarginLoss": ([torch.randn(4, 3, dtype=F64)], [signs(4, 3)], {}),
    "CrossEntropyLoss": (
        [torch.randn(4, 3, dtype=F64)],
        [torch.tensor([0, 2, -100, 1])],
        {"weight": positive(3), "label_smoothing": 0.1},
    ),
    "MultiLabelSoftMarginLoss": ([torch.randn(4, 3, dtype=F64)], [positive(4, 3) / 2], {}),
    "CosineEmbeddingLoss": (
        [torch.randn(4, 3, dtype=F64), torch.randn(4, 3, dtype=F64)],
        [torch.ones(4, dtype=F64)],
        {},
    ),
    "MarginRankingLoss": ([away_from_kinks(4), torch.zeros(4, dtype=F64)], [signs(4)], {}),
    "MultiMarginLoss": ([torch.randn(4, 3, dtype=F64)], [torch.tensor([0, 2, 1, 1])], {}),
    "TripletMarginLoss": ([torch.randn(4, 3, dtype=F64) for _ in range(3)], [], {}),
    "TripletMarginWithDistanceLoss": ([torch.randn(4, 3, dtype=F64) for _ in range(3)], [], {}),
    "CTCLoss": (
        [torch.randn(6, 2, 4, dtype=F64).log_softmax(-1)],
        [torch.tensor([[1, 2], [3, 1]]), torch.tensor([6, 6]), torch.tensor([2, 2])],
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
    check_directional(func, params, torch.utils._pytree.tree_map(torch.randn_like, params))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss(name: str, reduction: str) -> None:
    moving, fixed, options = LOSSES[name]
    if (name, reduction) == ("KLDivLoss", "mean"):
        reduction = "batchmean"
    module = getattr(nn, name)(reduction=reduction, **options)
    if name == "GaussianNLLLoss":
        moving = [*moving, positive(4, 3)]
        fixed, moving = [], [moving[0], fixed[0], moving[1]]

    def func(inputs: list[torch.Tensor]) -> torch.Tensor:
        # Not plain inputs: their second derivative is then that of a chain, as in a network.
        loss = module(*[x + x**2 / 20 for x in inputs], *fixed)
        return loss.flatten(1).sum(1) if loss.ndim > 1 else loss

    direction = [torch.randn_like(x) for x in moving]
    if name in REFUSED:
        with pytest.raises(NotTwiceDifferentiable, match=r"curvature\.fit"):
            directional(func, moving, direction)
    else:
        check_directional(func, moving, direction, step=0.01)
