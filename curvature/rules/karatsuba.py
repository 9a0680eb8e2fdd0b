"""How a product moves, by two products where its value is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Lengths = tuple[Tensor, Tensor]

_LOSS = 32.0  # times the rounding of two products that an entry may have at most
_TINY, _HUGE = 1e-10, 1e10  # between these, squares and products stay far from the dtype's range


def karatsuba(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    t: float,
    known: Tensor,
    plus: Tensor | None,
    of_half: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """One product instead of two for B(a, B) + B(A, b), where B(A, B) is known.

    B(A + t a, b + B/t) = B(A, B)/t + B(A, b) + B(a, B) + t B(a, b), as in Karatsuba's product.

    Args:
        product: (a, b, onto) -> B(a, b), added to ``onto`` if that is given.
        left, right: (A, a) and (B, b).
        t: of :func:`balance`.
        known: B(A, B).
        plus: what to add to the sum, to which it broadcasts.
        of_half: a linear function of half the bend, B(a, b), which is not kept.

    Returns:
        The sum, and ``of_half(B(a, b))``.
    """
    (A, a), (B, b) = left, right
    # Times a power of two all digits stay as they are.
    short = a.numel() < b.numel()
    out = product(a * -t, b, None) if short else product(a, b * -t, None)
    bend = of_half(out) / -t
    out.sub_(known, alpha=1 / t)
    if plus is not None:
        out.add_(plus)
    return product(torch.add(A, a, alpha=t), torch.add(b, B, alpha=1 / t), out), bend


def balance(rows: Lengths, columns: Lengths, bias: Tensor | None = None) -> float | None:
    """The t with which :func:`karatsuba` rounds about as two products do, if there is one.

    An entry of the two products is rounded by |A_i| |b_j| + |a_i| |B_j|, of the one besides by
    |A_i| |B_j| / t and t |a_i| |b_j|. With alpha_i = |a_i| / |A_i| and beta_j = |b_j| / |B_j| these
    are no larger if 1 / (alpha_i + beta_j) <= t <= 1 / alpha_i + 1 / beta_j.

    Args:
        rows: lengths of the rows of A, and of those of a.
        columns: lengths of the columns of B and of b.
        bias: what B(A, B) is known with, to be subtracted: one number a column.

    Returns:
        A power of two, or None where some entries would lose more than five bits.
    """
    (A, a), (B, b) = [[_numbers(each) for each in pair] for pair in (rows, columns)]
    if not all(_TINY < each.max(initial=0) < _HUGE for each in (A, a, B, b)):
        return None
    # A row of zeros divides zero by zero, if it stays one.
    with np.errstate(divide="ignore", invalid="ignore"):
        alphas, betas = _extremes(a / A), _extremes(b / B)
        if bias is not None:
            shift = _extremes(abs(_numbers(bias)) / B)[1]
            if not shift <= _LOSS * float(A[A > 0].min()):
                return None
    least = alphas[0] + betas[0]
    lowest, highest = 1 / least if least > 0 else math.inf, 1 / alphas[1] + 1 / betas[1]
    if not lowest <= _LOSS**2 * highest:
        return None
    t = lowest if lowest <= highest else math.sqrt(lowest * highest)
    t = 2.0 ** round(math.log2(t))
    return t if t * a.max() < _HUGE**2 and B.max() / t < _HUGE**2 else None


def _numbers(lengths: Tensor) -> NDArray[np.floating]:
    numbers: NDArray[np.floating] = lengths.reshape(-1).cpu().numpy()
    return numbers


def _extremes(ratios: NDArray[np.floating]) -> tuple[float, float]:
    """The least and the largest, but for those that are none."""
    least, most = float(ratios.min()), float(ratios.max())
    if math.isnan(least):
        least, most = float(np.nanmin(ratios)), float(np.nanmax(ratios))
    return least, most
