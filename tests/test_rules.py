"""Every rule against the reference, in float64 and with any of its inputs moving."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import check_agreement, fast_only
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from curvature import Tape, directional
from curvature.differentiable import WeightNorm
from curvature.rules import families, table

pytestmark = fast_only
F64 = torch.float64
aten = torch.ops.aten


def nodes_of(output: Tensor) -> set[str]:
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
    return {node.name() for node in seen}


def size(draw: Any, low: int = 1, high: int = 4) -> int:
    return draw(st.integers(low, high))


def dim_of(draw: Any, ndim: int) -> int:
    return draw(st.integers(-ndim, ndim - 1))


def image(draw: Any, channels: int = 2) -> list[Tensor]:
    return [torch.randn(size(draw, 1, 2), channels, size(draw, 4, 6), size(draw, 4, 6))]


def vectors(draw: Any) -> list[Tensor]:
    return [torch.randn(*(size(draw) for _ in range(draw(st.integers(1, 3)))))]


def positive(draw: Any) -> list[Tensor]:
    return [x.abs() + 0.5 for x in vectors(draw)]


def steep(draw: Any) -> list[Tensor]:
    """Away from the kinks at -1, 0, 0.5 and 1, where a second derivative does not exist."""
    return [
        torch.randint(-4, 4, x.shape) * 0.5 + 0.15 + 0.2 * torch.rand(x.shape)
        for x in vectors(draw)
    ]


def distinct(draw: Any) -> list[Tensor]:
    shape = (size(draw), size(draw, 2, 5))
    return [torch.randperm(shape[0] * shape[1]).view(shape) / 4.0]


def matrices(draw: Any) -> list[Tensor]:
    n, k, m = size(draw), size(draw), size(draw)
    return [torch.randn(n, k), torch.randn(k, m)]


def batches(draw: Any) -> list[Tensor]:
    b, n, k, m = (size(draw) for _ in range(4))
    return [torch.randn(b, n, k), torch.randn(b, k, m)]


def broadcast(draw: Any) -> list[Tensor]:
    n, m = size(draw), size(draw)
    shapes = draw(st.sampled_from([((n, m), (m,)), ((n, 1), (1, m)), ((n, m), (n, m)), ((), (n,))]))
    return [torch.randn(shape) for shape in shapes]


def nonzero(draw: Any) -> list[Tensor]:
    a, b = broadcast(draw)
    return [a, b.sign() * (b.abs() + 0.5)]


Sample = tuple[Callable[..., Tensor], list[Tensor]]
SAMPLES: dict[str, Callable[[Any], Sample]] = {}


def sample(*names: str) -> Callable[[Callable[[Any], Sample]], Callable[[Any], Sample]]:
    def decorate(build: Callable[[Any], Sample]) -> Callable[[Any], Sample]:
        for name in names:
            assert name not in SAMPLES
            SAMPLES[name] = build
        return build

    return decorate


def simple(inputs: Callable[[Any], list[Tensor]], **functions: Callable[..., Tensor]) -> None:
    for name, function in functions.items():
        sample(name)(lambda draw, function=function: (function, inputs(draw)))


simple(
    vectors,
    ExpBackward0=torch.exp,
    TanhBackward0=torch.tanh,
    SigmoidBackward0=torch.sigmoid,
    SinBackward0=torch.sin,
    CosBackward0=torch.cos,
    SiluBackward0=F.silu,
    Expm1Backward0=torch.expm1,
    AtanBackward0=torch.atan,
    SinhBackward0=torch.sinh,
    CoshBackward0=torch.cosh,
    ErfBackward0=torch.erf,
    ErfcBackward0=torch.erfc,
    Exp2Backward0=torch.exp2,
    AsinhBackward0=torch.asinh,
    AsinBackward0=lambda x: (x.tanh() / 2).asin(),
    AcosBackward0=lambda x: (x.tanh() / 2).acos(),
    AtanhBackward0=lambda x: (x.tanh() / 2).atanh(),
    SafeSoftmaxBackward0=lambda x: aten._safe_softmax(x, -1),
    DiagEmbedBackward0=lambda x: torch.diag_embed(x, -1, -1, -2),
    TakeBackward0=lambda x: x.take(torch.tensor([[0, 0]])),
    LogSigmoidBackward0=F.logsigmoid,
    MishBackward0=F.mish,
    NegBackward0=torch.neg,
    AddBackward1=lambda x: aten.add.Scalar(x, 0.5),
    SubBackward1=lambda x: aten.sub.Scalar(x, 0.5),
    RsubBackward1=lambda x: torch.rsub(x, 2, alpha=3),
    MulBackward1=lambda x: aten.mul.Scalar(x, 3),
    DivBackward1=lambda x: aten.div.Scalar(x, 3),
    CloneBackward0=torch.clone,
    AliasBackward0=lambda x: aten.alias(x),
    SumBackward0=torch.sum,
    MeanBackward0=torch.mean,
    UnsqueezeBackward0=lambda x: x.unsqueeze(0),
    UnsqueezeBackward1=lambda x: x.clone().unsqueeze_(0),
    ViewBackward0=lambda x: x.view(-1),
    UnsafeViewBackward0=lambda x: aten._unsafe_view(x, [-1]),
    ReshapeAliasBackward0=lambda x: aten._reshape_alias(x, [x.numel()], [1]),
    RepeatBackward0=lambda x: x.repeat(2, *[1] * x.ndim),
    FlipBackward0=lambda x: x.flip(0, -1) if x.ndim > 1 else x.flip(0),
    RollBackward0=lambda x: x.roll(-1, 0),
    ToCopyBackward0=lambda x: x.to(F64, copy=True),
    ConstantPadNdBackward0=lambda x: F.pad(x, (2, -1)),
    AsStridedBackward0=lambda x: x.as_strided((2, x.numel()), (0, 1)),
    SqueezeBackward0=torch.squeeze,
    SqueezeBackward4=lambda x: x.clone().unsqueeze(0).squeeze_(0),
)
simple(
    positive,
    SincBackward0=lambda x: torch.sinc(x - 0.5),
    LogBackward0=torch.log,
    Log2Backward0=torch.log2,
    Log10Backward0=torch.log10,
    AcoshBackward0=lambda x: (x + 1).acosh(),
    Log1PBackward0=torch.log1p,
    TanBackward0=lambda x: torch.tan(x / 4),
    SqrtBackward0=torch.sqrt,
    RsqrtBackward0=torch.rsqrt,
    ReciprocalBackward0=torch.reciprocal,
)
simple(
    steep,
    AbsBackward0=torch.abs,
    ReluBackward0=torch.relu,
    ClampBackward1=lambda x: x.clamp(-1, 1),
    ClampMinBackward0=lambda x: x.clamp_min(0),
    ClampMaxBackward0=lambda x: x.clamp_max(0),
    HardtanhBackward0=F.hardtanh,
    LeakyReluBackward0=F.leaky_relu,
    EluBackward0=lambda x: F.elu(x, 0.7) + F.selu(x),
    ThresholdBackward0=lambda x: F.threshold(x, 0.5, 0.1),
    HardshrinkBackward0=F.hardshrink,
    SoftshrinkBackward0=F.softshrink,
    SignBackward0=lambda x: x.sign() * x,
)
simple(
    distinct,
    MaxBackward0=lambda x: x.max(1)[0],
    MinBackward0=lambda x: x.min(1)[0],
    SortBackward0=lambda x: x.sort(1)[0],
    TopkBackward0=lambda x: x.topk(2, 1)[0],
    DiagonalBackward0=lambda x: x.diagonal(1),
    TBackward0=torch.t,
    TraceBackward0=torch.trace,
    TrilBackward0=lambda x: x.tril(-1),
    TriuBackward0=lambda x: x.triu(1),
    MaskedFillBackward0=lambda x: x.masked_fill(x > 1, 3.0),
    MaskedSelectBackward0=lambda x: x.masked_select(x < 1),
    GatherBackward0=lambda x: x.gather(1, torch.zeros(len(x), 3, dtype=torch.long)),
    IndexSelectBackward0=lambda x: x.index_select(1, torch.tensor([1, 0, 1])),
    IndexBackward0=lambda x: x[:, [1, 0, 1]] + x[range(len(x)), [1] * len(x)].sum(),
    UnfoldBackward0=lambda x: x.unfold(1, 2, 1),
    SelectBackward0=lambda x: x[:, 1],
    SliceBackward0=lambda x: x[:, ::2].sum() + x[:, -2:],
    UnbindBackward0=lambda x: x.unbind(1)[1],
    SplitBackward0=lambda x: x.split(1, 1)[1],
    UnsafeSplitBackward0=lambda x: x.unsafe_split(1, 1)[1],
    UnsafeSplitWithSizesBackward0=lambda x: x.unsafe_split_with_sizes([1, x.shape[1] - 1], 1)[1],
    TransposeBackward1=lambda x: x.clone().transpose_(0, 1),
    SplitWithSizesBackward0=lambda x: x.split([1, x.shape[1] - 1], 1)[1],
    CumsumBackward0=lambda x: x.cumsum(1),
)
simple(matrices, MmBackward0=torch.mm)
simple(batches, BmmBackward0=torch.bmm)
simple(broadcast, MulBackward0=torch.mul)
simple(nonzero, DivBackward0=torch.div)
simple(
    image,
    MaxPool2DWithIndicesBackward0=lambda x: F.max_pool2d(x, 2, 1, 1),
    AdaptiveAvgPool2DBackward0=lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    AdaptiveAvgPool3DBackward0=lambda x: F.adaptive_avg_pool3d(x, (1, 2, 3)),
    AvgPool3DBackward0=lambda x: F.avg_pool3d(x, (1, 2, 2)),
    ReflectionPad2DBackward0=lambda x: F.pad(x, (1, 2, 1, 0), mode="reflect"),
    ReflectionPad1DBackward0=lambda x: F.pad(x[0], (1, 2), mode="reflect"),
    ReplicationPad2DBackward0=lambda x: F.pad(x, (1, 2, 1, 0), mode="replicate"),
    UpsampleNearest2DBackward0=lambda x: F.interpolate(x, scale_factor=2),
    UpsampleBilinear2DBackward0=lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    UpsampleBicubic2DBackward0=lambda x: F.interpolate(x, size=(5, 3), mode="bicubic"),
    UpsampleNearest1DBackward0=lambda x: F.interpolate(x[0], scale_factor=2),
    UpsampleNearest3DBackward0=lambda x: F.interpolate(x[None], scale_factor=2),
    UpsampleLinear1DBackward0=lambda x: F.interpolate(x[0], size=7, mode="linear"),
    UpsampleTrilinear3DBackward0=lambda x: F.interpolate(x[None], size=(3, 3, 5), mode="trilinear"),
    MaxPool3DWithIndicesBackward0=lambda x: F.max_pool3d(x[None], 2, 1, 1),
    AdaptiveMaxPool2DBackward0=lambda x: F.adaptive_max_pool2d(x, (2, 3)),
    AdaptiveMaxPool3DBackward0=lambda x: F.adaptive_max_pool3d(x[None], (1, 2, 3)),
    Im2ColBackward0=lambda x: F.unfold(x, 2, 2, 1, (1, 2)),
    Col2ImBackward0=lambda x: F.fold(F.unfold(x, (2, 3), 1, 1), x.shape[-2:], (2, 3), 1, 1),
    PixelShuffleBackward0=lambda x: F.pixel_shuffle(x.repeat(1, 2, 1, 1), 2),
    PixelUnshuffleBackward0=lambda x: F.pixel_unshuffle(x[..., :4, :4], 2),
)


@sample("SoftplusBackward0")
def _softplus(draw: Any) -> Sample:
    beta, threshold = draw(st.sampled_from([(1.0, 20.0), (2.0, 20.0), (1.0, 0.3)]))
    return lambda x: F.softplus(x, beta, threshold), steep(draw)


@sample("GeluBackward0")
def _gelu(draw: Any) -> Sample:
    kind = draw(st.sampled_from(["none", "tanh"]))
    return lambda x: F.gelu(x, approximate=kind), vectors(draw)


@sample("PowBackward0")
def _pow(draw: Any) -> Sample:
    exponent = draw(st.sampled_from([0, 1, 2, 3, 0.5, -1.5]))
    return lambda x: x.pow(exponent), positive(draw)


@sample("RsubBackward0")
def _rsub(draw: Any) -> Sample:
    return lambda a, b: torch.rsub(a, b, alpha=1.5), broadcast(draw)


@sample("AddBackward0", "SubBackward0")
def _add(draw: Any) -> Sample:
    alpha = draw(st.sampled_from([1, 2.5]))
    return lambda a, b: torch.add(a, b, alpha=alpha) + torch.sub(b, a, alpha=alpha), broadcast(draw)


@sample("SumBackward1", "MeanBackward1", "SqueezeBackward1")
def _reduction(draw: Any) -> Sample:
    (x,) = vectors(draw)
    dim, keep = dim_of(draw, x.ndim), draw(st.booleans())
    return lambda x: x.sum(dim, keep) + x.mean(dim, keep) + x.sum(dim, True).squeeze(dim).sum(), [x]


@sample("AmaxBackward0", "AminBackward0", "MaxBackward1", "MinBackward1")
def _extremes(draw: Any) -> Sample:
    x = torch.randint(3, (size(draw), size(draw, 1, 5)))
    dims, keep = draw(st.sampled_from([(), 0, -1, (0, 1)])), draw(st.booleans())
    return lambda x: x.amax(dims, keep) * x.amin(dims, keep) + x.max().amax(0) * x.min(), [x]


@sample("MaximumBackward0", "MinimumBackward0")
def _larger(draw: Any) -> Sample:
    a, b = (x.round() for x in broadcast(draw))
    return lambda a, b: torch.maximum(a, b) + 2 * torch.minimum(a, b), [a, b]


@sample("LogsumexpBackward0")
def _logsumexp(draw: Any) -> Sample:
    (x,) = vectors(draw)
    dims, keep = draw(st.sampled_from([0, -1, tuple(range(x.ndim))])), draw(st.booleans())
    return lambda x: x.logsumexp(dims, keep) + x.sum().logsumexp(0), [x]


@sample("VarBackward0", "VarMeanBackward0", "StdBackward0", "StdMeanBackward0")
def _moments(draw: Any) -> Sample:
    x = torch.randn(size(draw, 2), size(draw, 2), size(draw, 2))
    dims = draw(st.sampled_from([None, (0,), (-1,), (0, 2)]))
    options = {"dim": dims, "correction": draw(st.sampled_from([0, 1, 0.5])), "keepdim": True}

    def func(x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(x, **options)
        return torch.var_mean(x, **options)[0] * mean + x.var(**options) + x.std() * deviation

    return func, [x]


@sample("LinalgVectorNormBackward0", "NormBackward0", "NormBackward1")
def _norm(draw: Any) -> Sample:
    (x,) = vectors(draw)
    dim, keep = dim_of(draw, x.ndim), draw(st.booleans())

    def func(x: Tensor) -> Tensor:
        both = torch.linalg.vector_norm(x, 2, dim, keep) + aten.norm(x, 2.0, [dim], keep)
        return both * aten.norm(x, 2) + torch.linalg.vector_norm(x)

    return func, [x]


@sample("ScatterAddBackward0", "IndexAddBackward0", "IndexPutBackward0")
def _accumulated(draw: Any) -> Sample:
    n, m, k = (size(draw) for _ in range(3))
    at, everywhere = torch.randint(n, (k,)), torch.randint(n, (k, m))

    def func(x: Tensor, source: Tensor) -> Tensor:
        added = x.scatter_add(0, everywhere, source) + x.index_add(0, at, source, alpha=1.5)
        return added + x.index_put((at,), source, accumulate=True)

    return func, [torch.randn(n, m), torch.randn(k, m)]


@sample("SelectScatterBackward0", "SliceScatterBackward0", "MaskedFillBackward1")
def _written(draw: Any) -> Sample:
    n, m = size(draw, 2), size(draw, 2)

    def func(x: Tensor, row: Tensor, number: Tensor) -> Tensor:
        parts = x.slice_scatter(row.expand(1, m), 0, -1) + x.select_scatter(row, 0, 1)
        return parts + x.masked_fill(torch.arange(m) < 1, number)

    return func, [torch.randn(n, m), torch.randn(m), torch.randn(())]


@sample("AddcmulBackward0", "AddcdivBackward0")
def _added_product(draw: Any) -> Sample:
    a, b = broadcast(draw)
    c = torch.randn(torch.broadcast_shapes(a.shape, b.shape))
    func = lambda c, a, b: (  # noqa: E731
        torch.addcmul(c, a, b, value=1.5) + torch.addcdiv(c, a, b.cosh(), value=-2)
    )
    return func, [c, a, b]


@sample("LerpBackward0", "LerpBackward1")
def _lerp(draw: Any) -> Sample:
    a, b = broadcast(draw)
    still = draw(st.booleans())

    def func(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        return torch.lerp(a, b, 0.3) + torch.lerp(b, a, w.detach() if still else w) * w

    return func, [a, b, torch.randn(b.shape)]


@sample("PreluKernelBackward0")
def _prelu(draw: Any) -> Sample:
    n, m = size(draw), size(draw)
    channels = draw(st.sampled_from([1, m]))
    return F.prelu, [torch.randn(n, m) + 1e-3, torch.randn(channels)]


@sample("GluBackward0")
def _glu(draw: Any) -> Sample:
    (x,) = vectors(draw)
    dim = dim_of(draw, x.ndim)
    return lambda x: F.glu(torch.cat([x, 2 * x], dim), dim), [x]


@sample("SqueezeBackward2")
def _squeeze(draw: Any) -> Sample:
    return lambda x: x.unsqueeze(0).squeeze((0,)), vectors(draw)


@sample("TransposeBackward0", "PermuteBackward0", "ExpandBackward0")
def _views(draw: Any) -> Sample:
    (x,) = vectors(draw)
    a, b = dim_of(draw, x.ndim), dim_of(draw, x.ndim)
    dims = draw(st.permutations(range(-x.ndim, 0)))
    return lambda x: x.transpose(a, b).permute(dims).unsqueeze(0).expand(3, *[-1] * x.ndim), [x]


@sample("CatBackward0", "StackBackward0", "WhereBackward0")
def _joined(draw: Any) -> Sample:
    (x,) = vectors(draw)
    dim = dim_of(draw, x.ndim)
    return (
        lambda x, y: torch.cat([torch.where(x > 0, x, y), y], dim) * torch.stack([x, y], 0).sum(),
        [x, torch.randn(x.shape)],
    )


@sample("EmbeddingBackward0")
def _embedding(draw: Any) -> Sample:
    indices = torch.randint(5, (size(draw), size(draw)))
    padding = draw(st.sampled_from([None, 0, 3]))
    return lambda w: F.embedding(indices, w, padding_idx=padding), [torch.randn(5, size(draw))]


@sample("AvgPool2DBackward0")
def _avg_pool(draw: Any) -> Sample:
    options = {
        "stride": draw(st.integers(1, 3)),
        "padding": draw(st.integers(0, 1)),
        "ceil_mode": draw(st.booleans()),
        "count_include_pad": draw(st.booleans()),
        "divisor_override": draw(st.sampled_from([None, 3])),
    }
    return lambda x: F.avg_pool2d(x, 2, **options), image(draw)


@sample("AddmmBackward0")
def _addmm(draw: Any) -> Sample:
    a, b = matrices(draw)
    c = torch.randn(draw(st.sampled_from([(b.shape[1],), (len(a), b.shape[1])])))
    alpha, beta = draw(st.sampled_from([(1, 1), (2, 0.5), (-1.5, 0)]))
    return lambda c, a, b: torch.addmm(c, a, b, alpha=alpha, beta=beta), [c, a, b]


@sample("BaddbmmBackward0")
def _baddbmm(draw: Any) -> Sample:
    a, b = batches(draw)
    alpha, beta = draw(st.sampled_from([(1, 1), (2, 0.5)]))
    c = torch.randn(len(a), a.shape[1], b.shape[2])
    return lambda c, a, b: torch.baddbmm(c, a, b, alpha=alpha, beta=beta), [c, a, b]


@sample("MvBackward0", "DotBackward0")
def _mv(draw: Any) -> Sample:
    a, _ = matrices(draw)
    return lambda a, x: torch.mv(a, x) * x.dot(x), [a, torch.randn(a.shape[1])]


@sample("ConvolutionBackward0")
def _convolution(draw: Any) -> Sample:
    groups = draw(st.integers(1, 2))
    bias = draw(st.booleans())
    options = {
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
    }
    ndim = draw(st.integers(1, 2))
    x = torch.randn(size(draw, 1, 2), 2 * groups, *[size(draw, 5, 7) for _ in range(ndim)])
    if draw(st.booleans()):
        w = torch.randn(3 * groups, 2, *[size(draw, 1, 3) for _ in range(ndim)])
        function = (F.conv1d, F.conv2d)[ndim - 1]
    else:
        w = torch.randn(2 * groups, 3, *[size(draw, 1, 3) for _ in range(ndim)])
        function = (F.conv_transpose1d, F.conv_transpose2d)[ndim - 1]
    inputs = [x, w, *([torch.randn(3 * groups)] if bias else [])]
    return lambda x, w, b=None: function(x, w, b, **options), inputs


@sample("NativeLayerNormBackward0")
def _layer_norm(draw: Any) -> Sample:
    shape = [size(draw, 2, 4) for _ in range(draw(st.integers(1, 2)))]
    affine = [torch.randn(shape) for _ in range(draw(st.integers(0, 2)))]
    x = torch.randn(*[size(draw) for _ in range(draw(st.integers(0, 2)))], *shape)
    return lambda x, *wb: F.layer_norm(x, shape, *wb, eps=1e-2), [x, *affine]


@sample("NativeGroupNormBackward0")
def _group_norm(draw: Any) -> Sample:
    groups, channels = size(draw), size(draw)
    places = [size(draw, 2, 3) for _ in range(draw(st.integers(1, 2)))]
    x = torch.randn(size(draw), groups * channels, *places)
    affine = [torch.randn(groups * channels) for _ in range(draw(st.integers(0, 2)))]
    return lambda x, *wb: F.group_norm(x, groups, *wb, eps=1e-2), [x, *affine]


@sample("NativeBatchNormBackward0")
def _batch_norm(draw: Any) -> Sample:
    x = torch.randn(
        size(draw, 3, 5), 2, *[size(draw, 1, 3) for _ in range(draw(st.integers(0, 2)))]
    )
    affine = [torch.randn(2) for _ in range(draw(st.integers(0, 2)))]
    training = draw(st.booleans())
    mean, var = torch.randn(2, dtype=F64), torch.rand(2, dtype=F64) + 0.5

    def function(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        return F.batch_norm(x, mean.clone(), var.clone(), w, b, training, eps=1e-2)

    return function, [x, *affine]


@sample("WeightNormInterfaceBackward0")
def _weight_norm(draw: Any) -> Sample:
    v = torch.randn(size(draw, 2, 4), size(draw, 2, 4))
    dim = draw(st.integers(0, 1))
    g = torch.randn(v.norm(dim=1 - dim, keepdim=True).shape)
    return lambda v, g: torch._weight_norm(v, g, dim), [v, g]


@sample("ScaledDotProductFlashAttentionForCpuBackward0")
def _attention(draw: Any) -> Sample:
    samples, heads, width = size(draw, 1, 3), size(draw, 1, 2), size(draw, 2, 4)
    rows = size(draw, 2, 5)
    kind = draw(st.sampled_from(["plain", "causal", "mask", "masks", "scale"]))
    columns = rows if kind == "causal" else size(draw, 2, 5)
    options: dict[str, Any] = {"is_causal": kind == "causal"}
    if kind == "mask":
        options["attn_mask"] = torch.randn(rows, columns, dtype=F64)
    if kind == "masks":
        options["attn_mask"] = torch.randn(samples, 1, rows, columns, dtype=F64)
    if kind == "scale":
        options["scale"] = 0.3
    q = torch.randn(samples, heads, rows, width)
    k, v = torch.randn(2, samples, heads, columns, width)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), [q, k, v]


@sample("LogSoftmaxBackward0", "SoftmaxBackward0")
def _softmax(draw: Any) -> Sample:
    (x,) = vectors(draw)
    dim = dim_of(draw, x.ndim)
    return lambda x: x.log_softmax(dim) + x.softmax(dim), [x]


@sample("NllLossBackward0", "NllLoss2DBackward0")
def _nll_loss(draw: Any) -> Sample:
    reduction = draw(st.sampled_from(["none", "mean", "sum"]))
    n, classes = size(draw), size(draw, 2, 4)
    weight = draw(st.sampled_from([None, torch.rand(classes, dtype=F64) + 0.1]))
    y = torch.randint(classes, (n,))
    y[0], y[1:2] = 0, 1
    ignore = draw(st.sampled_from([-100, 1]))
    options: dict[str, Any] = {"weight": weight, "ignore_index": ignore, "reduction": reduction}
    dim = draw(st.integers(-2, 1))

    def function(x: Tensor) -> Tensor:
        flat = F.nll_loss(x, y, **options)
        deep = F.nll_loss(x.view(n, classes, 1, 1), y.view(n, 1, 1), **options)
        entropy = F.nll_loss(x.log_softmax(dim), y, **options).sum()
        entropy = entropy * F.nll_loss(x[0].log_softmax(0), y[0], **options)
        images = x.view(n, classes, 1, 1).log_softmax(dim % 2)
        return flat.sum() * deep.sum() + entropy * F.nll_loss(images, y.view(n, 1, 1)).sum()

    return function, [torch.randn(n, classes)]


@sample("MseLossBackward0")
def _mse_loss(draw: Any) -> Sample:
    (x,) = vectors(draw)
    reduction = draw(st.sampled_from(["none", "mean", "sum"]))
    return lambda x, y: F.mse_loss(x, y, reduction=reduction), [x, torch.randn(x.shape)]


@sample("SmoothL1LossBackward0", "HuberLossBackward0")
def _huber_loss(draw: Any) -> Sample:
    (x,) = steep(draw)
    reduction = draw(st.sampled_from(["none", "mean", "sum"]))
    bound = draw(st.sampled_from([0.5, 1.0]))

    def function(x: Tensor, y: Tensor) -> Tensor:
        smooth = F.smooth_l1_loss(x, y, reduction=reduction, beta=bound)
        sharp = aten.smooth_l1_loss(x, y, 0, 0.0).sum()
        return smooth + sharp * F.huber_loss(x, y, reduction=reduction, delta=bound)

    return function, [x, torch.randint(-2, 2, x.shape) * 0.5]


@sample("BinaryCrossEntropyWithLogitsBackward0")
def _bce_with_logits(draw: Any) -> Sample:
    (x,) = vectors(draw)
    options: dict[str, Any] = {"reduction": draw(st.sampled_from(["none", "mean", "sum"]))}
    for name in ("weight", "pos_weight"):
        if draw(st.booleans()):
            options[name] = torch.rand(x.shape[-1], dtype=F64) + 0.5
    return lambda x, t: F.binary_cross_entropy_with_logits(x, t, **options), [
        x,
        torch.rand(x.shape),
    ]


SINGLE_PRECISION = {"MkldnnRnnLayerBackward0"}
GRADIENTS = {"NativeLayerNormBackwardBackward0", "NativeBatchNormBackwardBackward0"}
IN_TAPES_ALONE = {WeightNorm}  # in place of WeightNormInterfaceBackward0


def test_every_rule_is_sampled() -> None:
    elsewhere = SINGLE_PRECISION | GRADIENTS | IN_TAPES_ALONE
    assert set(table.registered()) == SAMPLES.keys() | elsewhere


# In other orders PyTorch refuses these, takes another kernel, or (of the weight of group norm
# alone, on channels last) crashes in its own gradient.
CONTIGUOUS = {
    "NativeGroupNormBackward0",
    "NllLoss2DBackward0",
    "NllLossBackward0",
    "ScaledDotProductFlashAttentionForCpuBackward0",
    "UnsafeViewBackward0",
    "ViewBackward0",
}


def laid_out(draw: Any, x: Tensor) -> Tensor:
    """In one of the orders in memory that a tensor of these dimensions comes in."""
    order = draw(st.sampled_from(["as it is", "channels last", "reversed"]))
    if order == "channels last" and x.ndim in (4, 5):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return x.contiguous(memory_format=formats[x.ndim])
    if order == "reversed":
        dims = tuple(reversed(range(x.ndim)))
        return x.permute(dims).contiguous().permute(dims)
    return x


def bend(output: Tensor) -> Tensor:
    """A loss per entry, with first and second derivatives everywhere."""
    flat = output.reshape(-1)
    weights = torch.linspace(0.5, 1.5, flat.numel(), dtype=flat.dtype)
    return flat * weights + flat.square() / 3


@pytest.mark.parametrize("name", SAMPLES)
@settings(max_examples=10)
@given(data=st.data(), seed=st.integers(0, 999))
def test_rule(name: str, data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    function, inputs = SAMPLES[name](data.draw)
    inputs = [x.to(F64) for x in inputs]
    if name not in CONTIGUOUS:
        inputs = [laid_out(data.draw, x) for x in inputs]
    params = {i: torch.zeros_like(x) for i, x in enumerate(inputs)}
    for moving in itertools.product([True, False], repeat=len(inputs)):
        if not any(moving):
            continue

        def loss(p: dict[int, Tensor], moving: tuple[bool, ...] = moving) -> Tensor:
            # Not the parameters themselves: their second derivative is then that of a chain.
            return bend(
                function(
                    *[
                        x + p[i] + p[i] ** 2 / 5 if moves else x
                        for i, (x, moves) in enumerate(zip(inputs, moving, strict=True))
                    ]
                )
            )

        leaves = {i: p.clone().requires_grad_() for i, p in params.items()}
        if all(moving):
            assert name in nodes_of(loss(leaves))
        check_agreement(loss, params, {i: torch.randn_like(p) for i, p in params.items()})


@fast_only
@pytest.mark.parametrize("function", [F.gelu, F.softplus, torch.tanh])
def test_entries_are_served_some_rows_at_a_time(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "IN_CACHE", 6)
    x, v = torch.randn(2, 5, 2, 2, dtype=F64)
    check_agreement(lambda x: function(x.sin()).square().sum((1, 2)), x, v)


@fast_only
@pytest.mark.parametrize("affine", [False, True])
def test_group_norm_of_channels_last(affine: bool) -> None:
    x, v = torch.randn(2, 2, 8, 4, 4, dtype=F64)
    x = x.contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(8, dtype=F64), torch.randn(8, dtype=F64)] if affine else []
    check_agreement(lambda x: F.group_norm(x, 4, *weights).sin().sum((1, 2, 3)), x, v)


@fast_only
def test_the_statistics_of_group_norm_are_outputs_too() -> None:
    def loss(x: Tensor) -> Tensor:
        outputs = torch.native_group_norm(x.sin(), None, None, 2, 4, 3, 2, 1e-2)
        return sum(y.pow(3).sum() for y in outputs)  # type: ignore[return-value]

    x, v = torch.randn(2, 2, 4, 3, dtype=F64)
    check_agreement(loss, x, v)


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_deviation_of_equal_numbers_has_derivative_zero(low_memory: bool) -> None:
    """As autograd has it, where there is none."""
    x = torch.tensor([[1.0, 1.0], [1.0, 3.0]], dtype=F64, requires_grad=True)
    v = torch.tensor([[1.0, 2.0], [0.5, 2.0]], dtype=F64)
    with Tape(low_memory=low_memory) as tape:
        loss = x.std(1).square().sum() + x.std(1, correction=0)[:1].sum()
    tape.backward(loss, [x])
    q = tape.directional([v])
    assert q.engine == ("jet" if low_memory else "tangent")
    torch.testing.assert_close(q.slope, torch.tensor(3.0, dtype=F64))
    torch.testing.assert_close(q.curvature, torch.tensor(2.25, dtype=F64))
    if not low_memory:
        expected = torch.tensor([[0.0, 0.0], [-1.5, 1.5]], dtype=F64)
        torch.testing.assert_close(tape.hvp([v])[0], expected)


def test_moments_of_a_single_number() -> None:
    x = torch.tensor(2.0, dtype=F64, requires_grad=True)
    with Tape() as tape:
        loss = x.var(0, correction=0) + x.square() + torch.linalg.vector_norm(x, dim=0)
    tape.backward(loss, [x])
    q = tape.directional([torch.ones((), dtype=F64)])
    assert (q.engine, q.slope, q.curvature) == ("tangent", 5, 2)


def test_logsumexp_of_nothing_stays_zero() -> None:
    x = torch.randn(3, dtype=F64, requires_grad=True)
    nothing = torch.tensor([[True], [False]])

    def masked(x: Tensor) -> Tensor:
        return torch.stack([x, x.sin()]).masked_fill(nothing, -torch.inf).logsumexp(1).exp().sum()

    answers = []
    for func in (masked, lambda x: x.sin().exp().sum()):
        with Tape() as tape:
            loss = func(x)
        tape.backward(loss, [x])
        answers.append(tape.directional([x.detach()]))
    torch.testing.assert_close(answers[0].slope, answers[1].slope)
    torch.testing.assert_close(answers[0].curvature, answers[1].curvature)


def test_saturated_functions_have_no_curvature() -> None:
    x = torch.tensor([1e9, -1e9, 1e3], requires_grad=True)
    with Tape() as tape:
        loss = F.gelu(x, approximate="tanh").sum() + F.mish(x).sum() + F.silu(x).sum()
    tape.backward(loss, [x])
    assert tape.directional([torch.ones(3)]).curvature == 0


def test_sums_of_expanded_cotangents_keep_their_digits() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 400, requires_grad=True)
    with Tape() as tape:
        loss = x.square().sum()
    tape.backward(loss, [x])
    q = tape.directional([x.detach()])
    torch.testing.assert_close(q.curvature, 2 * loss.detach(), rtol=1e-6, atol=0)


def test_a_function_of_which_one_output_has_no_second_cotangent() -> None:
    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            ctx.save_for_backward(x)
            return x * x, x + 1

        @staticmethod
        def backward(ctx: Any, to_square: Tensor, to_sum: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 2 * to_square * x + to_sum

    def func(x: Tensor) -> Tensor:
        square, shifted = Both.apply(x)
        return square.sin() + shifted

    check_agreement(func, torch.randn(3, dtype=F64), torch.randn(3, dtype=F64))


@pytest.mark.parametrize("x", [0.0, 1e-9, 1e-3, 0.1, 0.16, 0.5, 1.0, -0.1])
def test_the_second_derivative_of_sinc_where_its_formula_loses_digits(x: float) -> None:
    terms = ((-1) ** k * math.pi ** (2 * k) / math.factorial(2 * k + 1) for k in range(30))
    second = sum(c * 2 * k * (2 * k - 1) * x ** (2 * k - 2) for k, c in enumerate(terms) if k)
    q = directional(torch.sinc, torch.tensor(x, dtype=F64), torch.tensor(1.0, dtype=F64))
    assert float(q.curvature) == pytest.approx(second, rel=1e-11)
