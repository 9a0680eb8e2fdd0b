"""The losses of a closure as they are differentiated, on one process of perhaps several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim.loss_scale import LossScale
from optim.ranks import Ranks


@dataclass(frozen=True, eq=False)
class Weighed:
    """Losses, and their product with a weight, of which the gradient is taken.

    The weight makes the mean of the ranks' gradients that of the mean loss over all samples, and
    holds the scale of half precision.

    Attributes:
        losses: as the closure gave them.
        product: the losses times share and scale.
        count: how many losses there are on all ranks together.
        share: of this rank's mean in that of all; 1 if each rank has as many.
        scale: a factor by which half precision holds the gradients.
        unusable: why there is nothing to differentiate, if a loss is NaN or infinite.
    """

    losses: Any
    product: Any
    count: float
    share: float
    scale: float = 1.0
    unusable: str | None = None

    @property
    def weight(self) -> float:
        return self.share * self.scale


def weighed(losses: Any, loss_scale: LossScale, ranks: Ranks) -> Weighed:
    """Multiply losses by their weight, inside the block of a recorder, which has to see it.

    Raises:
        ValueError: a rank has no losses.
    """
    count = losses.numel() if isinstance(losses, Tensor) else 0
    share = 1.0
    if ranks.several:
        finite = isinstance(losses, Tensor) and bool(torch.isfinite(losses).all())
        counts, finites = zip(*ranks.gather([count, float(finite)]), strict=True)
        if 0 in counts:
            raise ValueError(
                f"rank {counts.index(0)} gave no loss: each rank needs a part of the batch"
            )
        share = count * ranks.size / sum(counts)
        count = sum(counts)
        bad = [str(rank) for rank, each in enumerate(finites) if not each]
        if bad:
            unusable = f"a loss of rank {', '.join(bad)} is NaN or infinite"
            return Weighed(losses, losses, count, share, unusable=unusable)
    product, scale = loss_scale.scaled(losses if share == 1 else losses * share)
    return Weighed(losses, product, count, share, scale)
