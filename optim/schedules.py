"""Schedules of ell and of learning rates that the papers use and torch has no equivalent for.

Each returns a :class:`torch.optim.lr_scheduler.LambdaLR`, a factor on the ``lr`` with which the
optimizer starts; chain them with torch's own as usual.
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from optim.ranges import check_count, check_kind, check_number, check_positive


def cooldown(optimizer: Optimizer, steps: int, *, share: float = 0.4) -> LambdaLR:
    """Constant, then linearly to 0 over the last share of the steps.

    With a constant ell the noise of the batches keeps the loss up; shrinking steps take it out.
    Call ``step`` once per optimizer step.

    Args:
        steps: how many there will be.
        share: the share of them that cools down, in (0, 1].

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> scheduler = cooldown(optimizer, 10, share=0.5)
        >>> for _ in range(8):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> round(optimizer.param_groups[0]["lr"], 3)
        0.4
    """
    _check_optimizer(optimizer)
    check_count("steps", steps)
    check_number("share", share)
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be in (0, 1]")
    share = float(share)  # lr takes over its type
    return LambdaLR(optimizer, lambda k: max(0.0, min(1.0, (1 - k / steps) / share)))


def red(optimizer: Optimizer, epochs: int, *, eta: float = 0.5) -> LambdaLR:
    """ell <- eta^(1/N) ell after each epoch: RED, Algorithm 3 of *Adaptive scaling*, line 13.

    (de Gournay, Gossard 2022.) From ell = 1, exploration, to 1/2, convergence. Call ``step`` once
    per epoch, around ``Rescaled(base, ell=1.0, rule=Lipschitz(), checked=0)`` for the paper's RED.

    Args:
        epochs: N.
        eta: the factor that the N epochs make together, positive; the last of them still has
            eta^((N-1)/N).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> scheduler = red(optimizer, epochs=2)
        >>> optimizer.step()
        >>> scheduler.step()
        >>> round(optimizer.param_groups[0]["lr"], 4)
        0.7071
    """
    _check_optimizer(optimizer)
    check_count("epochs", epochs)
    check_positive("eta", eta)
    eta = float(eta)
    return LambdaLR(optimizer, lambda n: eta ** (n / epochs))


def ran(optimizer: Optimizer) -> LambdaLR:
    """Periodically ell = 1 for 5 epochs, 1/2 for 13, 2 for 2: RAn, section 4.2 of the same paper.

    Exploration, convergence and hyperexploration, which raises the loss to leave a local minimum.
    Factors on the ell that the optimizer starts with, which is 1 in the paper. Call ``step`` once
    per epoch.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> scheduler = ran(optimizer)
        >>> ells = []
        >>> for _ in range(21):
        ...     ells.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     scheduler.step()
        >>> ells[4:6], ells[17:21]
        ([1.0, 0.5], [0.5, 2.0, 2.0, 1.0])
    """
    _check_optimizer(optimizer)
    phases = [1.0] * 5 + [0.5] * 13 + [2.0] * 2
    return LambdaLR(optimizer, lambda n: phases[n % len(phases)])


def warmup_cosine(optimizer: Optimizer, warmup: int, decay: int, *, least: float = 0.0) -> LambdaLR:
    """Linear warm-up, then a cosine: appendix D of *INNAprop*, as for GPT-2 and ViT there.

    ::

        gamma_k = gamma_0 k / T_warmup                                      k < T_warmup
                  gamma_min + (gamma_0 - gamma_min) (1 + cos(pi q)) / 2     k <= T_decay
                  gamma_min                                                 k > T_decay

    with q = (k - T_warmup) / (T_decay - T_warmup). The first step, k = 0, has rate 0.

    Args:
        warmup: T_warmup, in steps.
        decay: T_decay, after T_warmup.
        least: gamma_min as a share of gamma_0.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> scheduler = warmup_cosine(optimizer, warmup=2, decay=6)
        >>> rates = []
        >>> for _ in range(8):
        ...     rates.append(round(optimizer.param_groups[0]["lr"], 3))
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    _check_optimizer(optimizer)
    _check_warmup(warmup, "decay", decay)
    check_number("least", least)
    if not 0 <= least <= 1:
        raise ValueError(f"least is {least}; it must be in [0, 1]")
    least = float(least)

    def factor(k: int) -> float:
        if k < warmup:
            return k / warmup
        q = min(1.0, (k - warmup) / (decay - warmup))
        return least + (1 - least) * (1 + math.cos(math.pi * q)) / 2

    return LambdaLR(optimizer, factor)


def warmup_linear(optimizer: Optimizer, warmup: int, steps: int) -> LambdaLR:
    """Linear warm-up, then linear decay to 0: appendix D of *INNAprop*, as for LoRA there.

    ::

        gamma_k = gamma_0 k / T_warmup                                      k < T_warmup
                  gamma_0 (1 - (k - T_warmup) / (T_max - T_warmup))         otherwise

    Args:
        warmup: T_warmup, in steps.
        steps: T_max, above T_warmup; from there on the rate is 0.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> scheduler = warmup_linear(optimizer, warmup=2, steps=6)
        >>> rates = []
        >>> for _ in range(7):
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    _check_optimizer(optimizer)
    _check_warmup(warmup, "steps", steps)

    def factor(k: int) -> float:
        if k < warmup:
            return k / warmup
        return max(0.0, 1 - (k - warmup) / (steps - warmup))

    return LambdaLR(optimizer, factor)


def _check_optimizer(optimizer: Optimizer) -> None:
    check_kind("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer, as a wrapper is one")


def _check_warmup(warmup: int, name: str, end: int) -> None:
    check_count("warmup", warmup, 0)
    if not isinstance(end, int) or end <= warmup:
        raise ValueError(f"{name} is {end}; it must be an integer above warmup, {warmup}")
