"""How a product moves, by two products where its value is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Kept = TypeVar("Kept")


def karatsuba(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    onto: Callable[[float], Tensor],
    kept: Callable[[Tensor], Kept],
) -> tuple[Tensor, Kept]:
    """One product instead of two for B(a, B) + B(A, b), where B(A, B) is known.

    B(A + t a, b + B/t) = B(A, B)/t + B(A, b) + B(a, B) + t B(a, b), as in Karatsuba's
    product. With t = ‖B‖ / ‖b‖ the rounding of the difference is that of the two products,
    since B(A, B) / t is then of the size of B(A, b), and t B(a, b) of B(a, B); with
    t = ‖A‖ / ‖a‖ likewise.

    Args:
        product: (a, b, onto) -> B(a, b), added to ``onto`` if that is given.
        left, right: (A, a) and (B, b).
        onto: t -> -B(A, B) / t, with whatever else the sum is to contain; it is written to.
        kept: what is wanted of B(a, b).

    Returns:
        The sum, and what was kept of B(a, b), half of the bend.
    """
    (A, a), (B, b) = left, right
    t = _balance(left, right)
    half = product(a, b, None)
    bend = kept(half)
    rest = onto(t).sub_(half, alpha=t)
    del half
    return product(torch.add(A, a, alpha=t), torch.add(b, B, alpha=1 / t), rest), bend


def _balance(*pairs: tuple[Tensor, Tensor]) -> float:
    """The power of two next to ‖A‖ / ‖a‖ of the smaller pair; one that has a zero has no say."""
    for value, move in sorted(pairs, key=lambda pair: pair[0].numel()):
        norms = torch.stack(torch._foreach_norm([value, move])).tolist()
        if min(norms) > 0 and math.isfinite(sum(norms)):
            return 2.0 ** max(-60, min(60, round(math.log2(norms[0] / norms[1]))))
    return 1.0
