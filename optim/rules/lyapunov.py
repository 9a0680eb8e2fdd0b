"""The step for which an energy falls, where the loss alone need not."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optim.line import Estimate, Line
from optim.rules.lipschitz import Lipschitz, newton_step
from optim.rules.rule import State


@dataclass(frozen=True)
class Lyapunov(Lipschitz):
    """The longest step that does not raise the energy E = J + K in J's quadratic model.

    For INNA and INNAprop, whose continuous dynamics make E fall (Castera's slides on INNA), with
    v = (alpha - 1/beta) theta + psi/beta, which a step moves by w, both exactly known::

        K = ‖v‖²_P / (2 (1 + alpha beta)),   w = -alpha v + (1 - alpha beta) P^-1 g
        E(s) - E(0) = -s (<d, g> - <v, w>_P / (1 + alpha beta))
                      + s²/2 (L ‖d‖² + ‖w‖²_P / (1 + alpha beta))
        r = the positive root,   d = v + beta P^-1 g

    The bracket of s is a positive form in (P^-1/2 g, P^1/2 v) whenever alpha beta > 0, so that
    there is always a step, also where J must rise. For heavy-ball momentum, m <- mu m + g and
    theta <- theta - s m, with s = ell r::

        r = the positive root of L ‖m‖² r²/2 - (<m, g> - ‖m‖²/2) r = K_old
        K = (1 - ell) K_old + ell r/2 ‖m‖²,   at least s/2 ‖m‖²

    With C the factor of s²/2, for heavy ball L ‖m‖², both have E - E_old = -ell (1 - ell) r² C/2,
    least at ell = 1/2 and 0 at ell = 1. Were K just s/2 ‖m‖² after a step s < r, it would waste
    energy of which the next r is made, and steps would shrink by ell again and again.

    L is that of :class:`Lipschitz`. With a fixed P, a deterministic loss and J quadratic, E never
    rises at ell <= 1; where J is not, ``checked`` steps of the wrapper are halved until E does
    not rise. K is weighted so that several groups with their own alpha, beta, mu and ratios of
    lr share one energy.

    Args:
        beta3: decay of the moving average of the curvature, in [0, 1).

    Raises:
        ValueError: beta3 is out of range.
        TypeError, ValueError: (when wrapping, or at a step) the base optimizer has no such
            energy, or decoupled weight decay, for which it does not hold.

    Example:
        >>> import torch
        >>> from optim import INNA, Rescaled
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = Rescaled(INNA([x]), rule=Lyapunov())
        >>> for _ in range(30):
        ...     _ = optimizer.step(lambda: (x**2).sum())
        >>> energies = [record.energy for record in optimizer.records]
        >>> energies == sorted(energies, reverse=True)
        True
    """

    @property
    def needs_kinetic(self) -> bool:
        return True

    def choose(
        self, line: Line, estimate: Estimate | None, state: State
    ) -> tuple[float | str, State]:
        kinetic = line.kinetic
        assert kinetic is not None
        if line.squared_norm == 0:
            return 0.0, state
        state = self.averaged(line, estimate, state)
        curvature = state.get("lipschitz", 0.0) * line.squared_norm + kinetic.curvature
        falling = line.slope - kinetic.slope
        left = max(0.0, kinetic.before - kinetic.value)
        root = math.hypot(falling, math.sqrt(2 * curvature) * math.sqrt(left))
        return newton_step(max(0.0, falling + root), curvature), state
