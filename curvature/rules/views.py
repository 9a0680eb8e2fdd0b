"""Operations that hand entries on: views, parts, rearrangements, masks, copies."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from curvature.graph import Call
from curvature.rules.families import Linear
from curvature.rules.local import TRANSPOSED
from curvature.rules.rule import Rule
from curvature.rules.table import linear, register


@linear("TBackward0", rematerialised=True)
def _t(call: Call, x: Tensor) -> Tensor:
    return x.t()


@linear("TransposeBackward0", "TransposeBackward1", rematerialised=True)
def _transpose(call: Call, x: Tensor) -> Tensor:
    return x.transpose(call.dim0, call.dim1)


@linear("PermuteBackward0", rematerialised=True)
def _permute(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.dims)


@linear(
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "SqueezeBackward4",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "UnsqueezeBackward1",
    "ViewBackward0",
    rematerialised=True,
)
def _view(call: Call, x: Tensor) -> Tensor:
    return x.reshape(call.shape())


@linear("ExpandBackward0")
def _expand(call: Call, x: Tensor) -> Tensor:
    return x.expand(call.shape())


@linear("CloneBackward0", "AliasBackward0", rematerialised=True)
def _same(call: Call, x: Tensor) -> Tensor:
    return x


@linear("ToCopyBackward0")
def _to_copy(call: Call, x: Tensor) -> Tensor:
    like = call.node._input_metadata[0]
    return x.to(like.device, like.dtype)


@linear("SelectBackward0")
def _select(call: Call, x: Tensor) -> Tensor:
    return x.select(call.dim, call.index)


@linear("SliceBackward0")
def _slice(call: Call, x: Tensor) -> Tensor:
    return torch.ops.aten.slice(x, call.dim, call.start, call.end, call.step)


@linear("SplitBackward0", "UnsafeSplitBackward0")
def _split(call: Call, x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, call.split_size, call.dim)


@linear("SplitWithSizesBackward0", "UnsafeSplitWithSizesBackward0")
def _split_with_sizes(call: Call, x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, list(call.split_sizes), call.dim)


@linear("DiagonalBackward0")
def _diagonal(call: Call, x: Tensor) -> Tensor:
    return x.diagonal(call.offset, call.dim1, call.dim2)


@linear("FlipBackward0")
def _flip(call: Call, x: Tensor) -> Tensor:
    return x.flip(call.dims)


@linear("RollBackward0")
def _roll(call: Call, x: Tensor) -> Tensor:
    return x.roll(call.shifts, call.dims)


@linear("RepeatBackward0")
def _repeat(call: Call, x: Tensor) -> Tensor:
    return x.repeat(call.repeats)


@linear("ConstantPadNdBackward0")
def _constant_pad_nd(call: Call, x: Tensor) -> Tensor:
    return F.pad(x, call.pad)


@linear("TrilBackward0")
def _tril(call: Call, x: Tensor) -> Tensor:
    return x.tril(call.diagonal)


@linear("TriuBackward0")
def _triu(call: Call, x: Tensor) -> Tensor:
    return x.triu(call.diagonal)


@linear("IndexBackward0")
def _index(call: Call, x: Tensor) -> Tensor:
    return torch.ops.aten.index(x, call.indices)


@linear("IndexSelectBackward0")
def _index_select(call: Call, x: Tensor) -> Tensor:
    return x.index_select(call.dim, call.index)


@linear("GatherBackward0")
def _gather(call: Call, x: Tensor) -> Tensor:
    return x.gather(call.dim, call.index)


@linear("TakeBackward0")
def _take(call: Call, x: Tensor) -> Tensor:
    return x.take(call.index)


@linear("MaskedFillBackward0")
def _masked_fill(call: Call, x: Tensor) -> Tensor:
    return x.masked_fill(call.mask, 0)


@linear("MaskedFillBackward1")
def _masked_fill_by(call: Call, x: Tensor | None, value: Tensor | None) -> Tensor:
    return _where_mask(call, call.mask, value, x)


@linear("WhereBackward0")
def _where(call: Call, x: Tensor | None, y: Tensor | None) -> Tensor:
    return _where_mask(call, call.condition, x, y)


def _where_mask(call: Call, mask: Tensor, x: Tensor | None, y: Tensor | None) -> Tensor:
    shape, dtype = call.kinds[0]
    out = torch.where(mask, 0 if x is None else x, 0 if y is None else y)
    return out.to(dtype).expand(shape)


@linear("ScatterAddBackward0")
def _scatter_add(call: Call, x: Tensor | None, source: Tensor | None) -> Tensor:
    out = _or_zeros(call, x)
    return out if source is None else out.scatter_add(call.dim, call.index, source)


@linear("IndexAddBackward0")
def _index_add(call: Call, x: Tensor | None, source: Tensor | None) -> Tensor:
    out = _or_zeros(call, x)
    if source is None:
        return out
    return out.index_add(call.dim, call.index, source, alpha=call.alpha)


class _IndexPut(Linear):
    def of(self, call: Call) -> Rule | None:
        # Which of several values stays at an index that comes twice, nobody says.
        return self if call.accumulate else None


def _index_put(call: Call, x: Tensor | None, values: Tensor | None) -> Tensor:
    out = _or_zeros(call, x)
    if values is None:
        return out
    return torch.ops.aten.index_put(out, call.indices, values, True)


register("IndexPutBackward0", _IndexPut(_index_put))


@linear("SelectScatterBackward0")
def _select_scatter(call: Call, x: Tensor | None, source: Tensor | None) -> Tensor:
    out = _or_zeros(call, x).clone()
    part = out.select(call.dim, call.index)
    part.copy_(torch.zeros_like(part) if source is None else source)
    return out


@linear("SliceScatterBackward0")
def _slice_scatter(call: Call, x: Tensor | None, source: Tensor | None) -> Tensor:
    out = _or_zeros(call, x).clone()
    part = torch.ops.aten.slice(out, call.dim, call.start, call.end, call.step)
    part.copy_(torch.zeros_like(part) if source is None else source)
    return out


def _or_zeros(call: Call, x: Tensor | None) -> Tensor:
    if x is not None:
        return x
    (zeros,) = call.zeros()
    assert zeros is not None
    return zeros


@linear("DiagEmbedBackward0")
def _diag_embed(call: Call, x: Tensor) -> Tensor:
    return torch.diag_embed(x, call.offset, call.dim1, call.dim2)


@linear("PixelShuffleBackward0")
def _pixel_shuffle(call: Call, x: Tensor) -> Tensor:
    return F.pixel_shuffle(x, call.upscale_factor)


@linear("PixelUnshuffleBackward0")
def _pixel_unshuffle(call: Call, x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, call.downscale_factor)


class _Joined(Linear):
    """What is made of a list of tensors."""

    def of(self, call: Call) -> Rule:
        # Nothing tells the shape of one that does not move.
        return TRANSPOSED if None in call.inputs else self


def _cat(call: Call, *dots: Tensor | None) -> Tensor:
    return torch.cat(call.filled(dots), call.dim)


def _stack(call: Call, *dots: Tensor | None) -> Tensor:
    return torch.stack(call.filled(dots), call.dim)


register("CatBackward0", _Joined(_cat))
register("StackBackward0", _Joined(_stack))


@linear("UnbindBackward0")
def _unbind(call: Call, x: Tensor) -> tuple[Tensor, ...]:
    return x.unbind(call.dim)


class _Sink(Linear):
    """What hands on the outputs of a model in ``DistributedDataParallel``.

    Its backward pass, which would have to serve without this rule, works inside autograd alone.
    """

    def of(self, call: Call) -> Rule | None:
        # By its name, since builds without torch.distributed lack the class.
        module = "torch.nn.parallel.distributed"
        return self if getattr(call.function, "__module__", None) == module else None


def _sink(call: Call, *dots: Tensor | None) -> tuple[Tensor | None, ...]:
    parents = [parent for parent, _ in call.node.next_functions]
    rest = iter([dot for dot, parent in zip(dots, parents, strict=True) if parent is not None])
    # The model may give what is no tensor too.
    needed = call.node.needs_input_grad[1:]  # type: ignore[attr-defined]
    return tuple(next(rest) if need else None for need in needed)


register("_DDPSinkBackward", _Sink(_sink))
