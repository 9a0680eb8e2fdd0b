"""A small training loop for each way to estimate curvature."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import fast_only
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from optim import GeN, INNAprop, Rescaled
from optim.estimators import Exact, GaussNewton, GradientDifferences, Probes, Secant

F64 = torch.float64
OPTIMIZERS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "tangent pass": lambda model, base: Rescaled(base, estimator=Exact(per_sample=False)),
    "jet": lambda model, base: Rescaled(base),
    "lazy": lambda model, base: Rescaled(base, every=2),
    "Gauss-Newton": lambda model, base: Rescaled(base, estimator=GaussNewton(model)),
    "gradients": lambda model, base: Rescaled(base, estimator=GradientDifferences()),
    "losses": lambda model, base: Rescaled(base, estimator=Probes()),
    "one loss": lambda model, base: Rescaled(base, estimator=Secant()),
    "GeN": lambda model, base: GeN(base, phi=2),
}
BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, momentum=0.9, weight_decay=0.01),
    "AdamW": torch.optim.AdamW,
    "INNAprop": INNAprop,
}
every_optimizer = pytest.mark.parametrize(
    "optimizer",
    [pytest.param(n, marks=fast_only if n == "Gauss-Newton" else ()) for n in OPTIMIZERS],
)
every_base = pytest.mark.parametrize("base", BASES)


class Problem:
    def __init__(self, optimizer: str, base: str = "SGD", **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64)
        self.optimizer = OPTIMIZERS[optimizer](self.model, BASES[base](self.model.parameters()))
        self.batches = [(torch.randn(8, 4, dtype=F64), torch.randint(3, (8,))) for _ in range(5)]

    def losses(self, k: int, rows: slice = slice(None)) -> Tensor:
        x, y = self.batches[k]
        return F.cross_entropy(self.model(x[rows]), y[rows], reduction="none")

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]
