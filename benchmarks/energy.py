"""Whether the energy of inertial methods falls under the Lyapunov rule, and how that trains.

    python benchmarks/energy.py [--quick]

First, deterministic problems: a quadratic with condition number 1e4, Rosenbrock's function, and
the 8x8 digits as one batch. For each method: the largest rise of the energy at any step in units
of its first value, how many steps raised the loss itself, and the loss in the end against that of
the same method at the best of nine fixed rates. Then training on batches of 128 for 20 epochs,
means of three seeds, against the best of nine fixed rates with a cosine schedule.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable
from functools import partial

import tasks
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from optim import INNA, GeN, INNAprop, Rescaled
from optim.rules import Lyapunov

METHODS: dict[str, tuple[Callable[..., Optimizer], float]] = {
    "INNA (0.5, 0.1)": (INNA, 2.0**-4),
    "INNAprop (0.1, 0.9)": (partial(INNAprop, weight_decay=0.0), 2.0**-4),
    "heavy ball 0.9": (partial(SGD, momentum=0.9), 0.5),
}
RATES = 9  # from the largest downwards by factors of three
Problem = tuple[list[nn.Parameter], Callable[[], Tensor]]


def quadratic() -> Problem:
    x = nn.Parameter(torch.ones(20, dtype=torch.float64))
    scales = torch.logspace(-4, 0, 20, dtype=torch.float64)
    return [x], lambda: (scales * x.square()).sum() / 2


def rosenbrock() -> Problem:
    x = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    return [x], lambda: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def digits() -> Problem:
    torch.manual_seed(0)
    task = tasks.digits("tanh", 700)
    x = torch.cat([x for x, _ in task.sample]).double()
    y = torch.cat([y for _, y in task.sample])
    task.model.double()
    return list(task.model.parameters()), lambda: task.losses(x, y)


def deterministic(steps: int) -> Table:
    table = Table(title=f"{steps} steps, deterministic", box=box.SIMPLE_HEAD)
    for header in ("problem", "method", "largest rise of E", "steps that raise J"):
        table.add_column(header)
    for header in ("J", "plain, best rate"):
        table.add_column(header, justify="right")
    for problem in (quadratic, rosenbrock, digits):
        for name, (make, fastest) in METHODS.items():
            params, losses = problem()
            optimizer = Rescaled(make(params), rule=Lyapunov(), ell=0.9, checked=steps)
            for _ in range(steps):
                optimizer.step(losses)
            energies = [r.energy for r in optimizer.records if r.energy is not None]
            values = [r.value for r in optimizer.records if r.value is not None]
            rise = max(b - a for a, b in itertools.pairwise(energies)) / energies[0]
            rose = sum(b > a for a, b in itertools.pairwise(values))
            best = min(plain(problem, make, fastest / 3.0**k, steps) for k in range(RATES))
            end = losses().mean().item()
            row = (f"{max(rise, 0):.1e}", f"{rose / steps:.0%}", f"{end:.1e}", f"{best:.1e}")
            table.add_row(problem.__name__, name, *row)
    return table


def plain(
    problem: Callable[[], Problem], make: Callable[..., Optimizer], rate: float, steps: int
) -> float:
    params, losses = problem()
    base = make(params, lr=rate)
    for _ in range(steps):
        base.zero_grad()
        losses().mean().backward()
        base.step()
    loss = losses().mean().item()
    return loss if math.isfinite(loss) else math.inf


def training(epochs: int, seeds: range) -> Table:
    table = Table(title=f"digits, tanh, batch 128, {epochs} epochs", box=box.SIMPLE_HEAD)
    table.add_column("method")
    for header in ("best rate", "Lyapunov", "Rescaled", "GeN, phi 1"):
        table.add_column(header, justify="right")
    wrappers: list[Callable[[Optimizer], Rescaled | GeN]] = [
        partial(Rescaled, rule=Lyapunov()),
        Rescaled,
        partial(GeN, phi=1),
    ]
    for name, (make, fastest) in METHODS.items():
        rates = [fastest / 3.0**k for k in range(RATES)]
        best = min(mean(partial(at_rate, make, rate, epochs), seeds) for rate in rates)
        ends = [mean(partial(wrapped, make, wrap, epochs), seeds) for wrap in wrappers]
        table.add_row(name, f"{best:.1e}", *(f"{end:.1e}" for end in ends))
    return table


def mean(run: Callable[[int], float], seeds: range) -> float:
    return statistics.mean(run(seed) for seed in seeds)


def at_rate(make: Callable[..., Optimizer], rate: float, epochs: int, seed: int) -> float:
    torch.manual_seed(seed)
    task = tasks.digits("tanh", 128, epochs)
    return task.train(make(task.model.parameters(), lr=rate))


def wrapped(
    make: Callable[..., Optimizer],
    wrap: Callable[[Optimizer], Rescaled | GeN],
    epochs: int,
    seed: int,
) -> float:
    torch.manual_seed(seed)
    task = tasks.digits("tanh", 128, epochs)
    return task.train_wrapped(wrap(make(task.model.parameters())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, one seed, for CI")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    console.print(deterministic(20 if args.quick else 500))
    console.print(training(2 if args.quick else 20, range(1 if args.quick else 3)))


if __name__ == "__main__":
    main()
