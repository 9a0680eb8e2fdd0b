"""What a step costs whose length is chosen: estimator by estimator, in plain steps.

    python benchmarks/step_cost.py [--quick] [--out DIR] [--models MLP GPT ...]

A plain step is a forward and a backward pass and the base optimizer's own step. Time is the
median ratio over interleaved rounds of eight steps, so that a round of a lazy optimizer has one
estimate in it. The rule costs nothing beside: it works on a handful of numbers. Writes raw
seconds as JSON and prints a table.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from workloads import WORKLOADS, Workload, build

from optim import GeN, INNAprop, Rescaled
from optim.estimators import GaussNewton, GradientDifferences, Probes
from optim.rules import Lyapunov

THREADS = 2
ROUND = 8  # steps
TINY = 1e-9  # ell: the training itself is of no interest
QUICK = ("MLP", "LeNet")

Make = Callable[[Workload], Optimizer | GeN | Rescaled]


def rescaled(work: Workload, **options: object) -> Rescaled:
    base = SGD(work.model.parameters(), lr=TINY)
    return Rescaled(base, ell=TINY, checked=0, **options)  # type: ignore[arg-type]


def gen(work: Workload, phi: int, base: Callable[..., Optimizer] = SGD) -> GeN:
    return GeN(base(work.model.parameters(), lr=TINY), phi=phi, ell=TINY, checked=0)


def gauss_newton(work: Workload, every: int) -> Rescaled:
    return rescaled(work, estimator=GaussNewton(work.model), every=every)


def inertial(work: Workload) -> Rescaled:
    base = INNAprop(work.model.parameters(), lr=TINY, weight_decay=0.0)
    return Rescaled(base, rule=Lyapunov(), ell=TINY, checked=0)


momentum = partial(SGD, momentum=0.9)
# name: how it is made, whether its closure returns one loss per sample, its plain twin
METHODS: dict[str, tuple[Make, bool, Callable[..., Optimizer]]] = {
    "Rescaled, per sample": (rescaled, True, SGD),
    "... every 8 steps": (partial(rescaled, every=8), True, SGD),
    "Rescaled, whole batch": (rescaled, False, SGD),
    "... every 8 steps ": (partial(rescaled, every=8), False, SGD),
    "Gauss-Newton": (partial(gauss_newton, every=1), False, SGD),
    "two losses": (partial(rescaled, estimator=Probes()), False, SGD),
    "two gradients": (partial(rescaled, estimator=GradientDifferences()), False, SGD),
    "GeN, phi 1": (partial(gen, phi=1), False, SGD),
    "GeN, phi 8": (partial(gen, phi=8), False, SGD),
    "GeN, phi 8, momentum": (partial(gen, phi=8, base=momentum), False, momentum),
    "GeN, phi 8, AdamW": (partial(gen, phi=8, base=AdamW), False, AdamW),
    "Lyapunov, INNAprop": (inertial, False, partial(INNAprop, weight_decay=0.0)),
}


def steps(optimizer: Optimizer, closure: Callable[[], Tensor], params: list[nn.Parameter]) -> float:
    """Seconds of one round."""
    for p in params:
        p.grad = None  # those of another method would stay, as a caller's own
    start = time.perf_counter()
    for _ in range(ROUND):
        if isinstance(optimizer, (GeN, Rescaled)):
            optimizer.step(closure)
        else:
            for p in params:
                p.grad = None
            closure().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return time.perf_counter() - start


def ratios(model: str, rounds: int) -> dict[str, list[float]]:
    """Of each method to its plain twin, in another order each round."""
    work = build(model)
    params = list(work.model.parameters())
    order = random.Random(0)
    pairs = {}
    for name, (make, per_sample, twin) in METHODS.items():
        closure = work.losses if per_sample else work.loss
        pairs[name] = (make(work), closure, twin(params, lr=TINY))
    found: dict[str, list[float]] = {name: [] for name in pairs}
    for k in track(range(rounds + 1), f"{model:9}", console=Console(stderr=True)):
        for name in order.sample(list(pairs), len(pairs)):
            optimizer, closure, twin = pairs[name]
            plain = steps(twin, work.loss, params)
            ratio = steps(optimizer, closure, params) / plain
            if k:  # the first step searches its length
                found[name].append(ratio)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two models, one round")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the raw ratios")
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    models = [m for m in args.models if m in QUICK] if args.quick else args.models
    found = {model: ratios(model, 1 if args.quick else 5) for model in models}
    table = Table(title="time of a step, in plain steps")
    table.add_column("")
    for model in models:
        table.add_column(model, justify="right")
    for name in METHODS:
        table.add_row(name, *(f"{statistics.median(found[m][name]):.2f}" for m in models))
    Console(width=110).print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "step_cost.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"raw ratios: {path}")


if __name__ == "__main__":
    main()
