"""Samples of operations that layers and losses are made of."""

from typing import Any

import torch
from hypothesis import strategies as st
from rule_samples import (
    Sample,
    batches,
    dim_of,
    image,
    matrices,
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

simple(matrices, MmBackward0=torch.mm)
simple(batches, BmmBackward0=torch.bmm)
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
