"""The direction of those of torch's optimizers whose step is known to be linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, optim

from optim.penalty import is_coupled
from optim.twins import OnTwins

# Steps linear in lr that see the parameters through weight decay alone; not so all subclasses.
BLIND = {
    optim.SGD,
    optim.RMSprop,
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.Adagrad,
    optim.Adadelta,
    optim.Adamax,
}


class FromOrigin(OnTwins):
    """The direction of an optimizer that sees the parameters through weight decay alone.

    Its step from the origin at lr = -1, without weight decay, is d itself, to the last digit and
    without a copy of the parameters; weight decay is added to the gradients, or to d.
    """

    def _propose(self, ratios: Sequence[float]) -> dict[Tensor, Tensor]:
        groups = self._base.param_groups
        grads = self._grads()
        if type(self._base) is optim.SGD and all(map(_is_plain, groups, ratios)):
            return grads
        twins = {p: torch.zeros_like(p) for p in grads}
        decays = [group["weight_decay"] for group in groups]
        try:
            for group, ratio in zip(groups, ratios, strict=True):
                decay, group["weight_decay"] = group["weight_decay"], 0
                for p in group["params"] if decay else ():
                    if p not in grads:
                        continue
                    if is_coupled(self._base, group):
                        grads[p] = grads[p].add(p, alpha=decay)
                    else:
                        twins[p].add_(p, alpha=ratio * decay)
            self._step(twins, grads, [-ratio for ratio in ratios])
        finally:
            for group, decay in zip(groups, decays, strict=True):
                group["weight_decay"] = decay
        return twins

    def _writes_gradients(self) -> bool:
        # As nesterov momentum does where several tensors are stepped at once.
        return any(group.get("nesterov") for group in self._base.param_groups)


def _is_plain(group: dict[str, Any], ratio: float) -> bool:
    """Whether gradient descent has the gradient itself for d, and no state."""
    return bool(group["momentum"] == group["weight_decay"] == 0 and ratio == 1)
