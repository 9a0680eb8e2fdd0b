"""Tell whether a hook or function has made the gradient another than that of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_EXACT, _ROUGH = 1e-6, 2e-2  # of the sum of absolute values: in double precision, and otherwise


def check_slope(
    slope: Tensor, gradient: Sequence[Tensor | None], direction: Sequence[Tensor]
) -> None:
    """Compare <g, v> with the slope as a tangent pass has it, in which hooks take no part.

    Raises:
        ValueError: they differ by more than rounding.
    """
    pairs = zip(gradient, direction, strict=True)
    terms = [g.double() * v.double() for g, v in pairs if g is not None]
    along = sum(term.sum().item() for term in terms)
    size = abs(slope.item()) + sum(term.abs().sum().item() for term in terms)
    rough = any(v.dtype != torch.float64 for v in direction)
    if not abs(along - slope.item()) <= (_ROUGH if rough else _EXACT) * size:
        raise ValueError(
            f"the loss has slope {slope.item():.6g} along the direction, but its gradient gives "
            f"{along:.6g}: a backward hook or the backward pass of a function of your own has "
            "changed it, as to clip it or to solve for a fixed point, or a rule of your own is "
            "wrong; mend that, or use curvature.fit, which needs only forward passes"
        )
