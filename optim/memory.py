"""A memory in front of a classifier head, for batches smaller than the number of classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optim.ranges import check_count, check_kind


class Memory(nn.Module):
    """The memory layer of *Adaptive scaling of the learning rate*, appendix C.2.

    (de Gournay, Gossard 2022.) Between a feature extractor and a linear classifier it adds the
    features of earlier batches to those of this one, up to ``capacity`` in all, with their
    targets. The classifier is then trained as by a batch of that size, and its curvature
    measured, where a small batch misses most classes; the features of earlier batches are a
    little old and pass no gradient back. In evaluation mode nothing is added.

    Args:
        capacity: how many samples the classifier sees; the paper takes 256.
        features: the shape of one sample's features, or its only entry.

    Shapes: ``memory(x, y)`` takes x (batch, *features) and y (batch,) and returns the same with
    up to ``capacity`` rows, those of this batch first; a larger batch stays as it is.

    Raises:
        TypeError: an argument is of the wrong kind, or targets are no integers.
        ValueError: a shape does not fit.

    Example:
        >>> import torch
        >>> memory, head = Memory(4, features=2), torch.nn.Linear(2, 10)
        >>> for step in range(3):
        ...     x, y = memory(torch.ones(3, 2) * step, torch.tensor([0, 1, 2]))
        >>> losses = torch.nn.functional.cross_entropy(head(x), y, reduction="none")
        >>> x[:, 0], losses.shape
        (tensor([2., 2., 2., 1.]), torch.Size([4]))
    """

    features: Tensor
    targets: Tensor
    held: Tensor

    def __init__(self, capacity: int, features: int | tuple[int, ...]) -> None:
        super().__init__()
        check_count("capacity", capacity)
        shape = (features,) if isinstance(features, int) else features
        if not isinstance(shape, tuple):
            raise TypeError(f"features is {features!r}; give an integer or a tuple of them")
        for size in shape:
            check_count("an entry of features", size)
        self.register_buffer("features", torch.zeros(capacity, *shape))
        self.register_buffer("targets", torch.zeros(capacity, dtype=torch.long))
        self.register_buffer("held", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Features and targets of this batch, and behind them those of earlier ones.

        Example: see :class:`Memory`.
        """
        check_kind("x", x, Tensor, "a tensor of features")
        check_kind("y", y, Tensor, "a tensor of targets")
        if y.is_floating_point() or y.is_complex():
            raise TypeError(f"targets have dtype {y.dtype}; give the numbers of classes, integers")
        capacity, *shape = self.features.shape
        if list(x.shape[1:]) != shape or y.shape != x.shape[:1]:
            raise ValueError(
                f"features of shape {tuple(x.shape)} and targets of shape {tuple(y.shape)} do not "
                f"fit: (batch, {', '.join(map(str, shape))}) and (batch,) are needed"
            )
        if not self.training:
            return x, y
        old = min(int(self.held), max(0, capacity - len(x)))
        x = torch.cat([x, self.features[:old].to(x.dtype)])
        y = torch.cat([y, self.targets[:old]])
        held = min(len(x), capacity)
        with torch.no_grad():
            self.features[:held] = x[:held]
            self.targets[:held] = y[:held]
            self.held.fill_(held)
        return x, y
