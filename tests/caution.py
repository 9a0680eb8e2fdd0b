"""The factor that both cautious rules have in common, transcribed."""

from collections.abc import Sequence

import numpy as np


def average(values: Sequence[float], beta: float) -> float:
    weights = beta ** np.arange(len(values))[::-1]
    return float(weights @ values / weights.sum())


def caution(losses: Sequence[float], hindsights: Sequence[float]) -> list[float]:
    """The docstring of optim.rules.caution, each sum written out over all steps so far."""
    q, qs = 1.0, []
    for k, h in enumerate(hindsights, start=1):
        recent, longer = (average(losses[:k], beta) for beta in (0.9, 0.98))
        if recent < longer - abs(longer) / 10:
            q *= 1.02
        elif h != 0:
            q *= 0.9 if h < 0 else 3.0
        q = min(max(q, 0.01), 1.0)
        qs.append(q)
    return qs
