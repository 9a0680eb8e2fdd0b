"""Samples of operations on entries: elementwise, reduced, moved and joined."""

from typing import Any

import torch
from hypothesis import strategies as st
from rule_samples import (
    Sample,
    broadcast,
    dim_of,
    distinct,
    nonzero,
    positive,
    sample,
    simple,
    size,
    steep,
    vectors,
)
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

F64 = torch.float64
aten = torch.ops.aten

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
simple(broadcast, MulBackward0=torch.mul)
simple(nonzero, DivBackward0=torch.div)


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
