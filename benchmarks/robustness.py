"""Whether rescaled training needs no tuning: its final training loss against tuned rates.

    python benchmarks/robustness.py [--quick] [--data DIR] [--out DIR]

Each optimizer is trained on each task at nine fixed learning rates with a cosine schedule, and
rescaled with nothing set but the number of steps, by which its schedule cools down. The ratio is
that of a rescaled run to the mean over seeds of the best fixed rate. Without ``--data``, a folder
with mnist, fashion-mnist and tiny-shakespeare, only the digits that come with scikit-learn are
used. Writes raw losses as JSON and prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tasks
import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.optim import SGD, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR

from optim import Rescaled
from optim.schedules import cooldown

RATES = 9  # by factors of two
BASES: dict[str, tuple[Callable[..., Optimizer], float]] = {
    "SGD": (SGD, 0.02),
    "SGD, momentum 0.9": (partial(SGD, momentum=0.9), 0.004),
    "RMSprop": (RMSprop, 1e-4),
    "RMSprop, momentum 0.9": (partial(RMSprop, momentum=0.9), 2e-5),
    "AdamW": (AdamW, 2e-4),
}


@dataclass
class Case:
    """One line of the table: a task, its name, and the optimizer underneath."""

    task: str
    make: Callable[[], tasks.Task]
    base: str


def cases(data: Path | None, quick: bool) -> Iterator[Case]:
    batches = (128,) if quick else (32, 128, 700)
    for activation in ("tanh",) if quick else tasks.ACTIVATIONS:
        for batch in batches:
            for base in [name for name in BASES if name != "AdamW"]:
                epochs = 2 if quick else 20
                make = partial(tasks.digits, activation, batch, epochs)
                yield Case(f"digits, {activation}, batch {batch}", make, base)
    if data is not None:
        for name, make_task, base in (
            ("LeNet, MNIST", tasks.lenet, "RMSprop, momentum 0.9"),
            ("ResNet, Fashion-MNIST", tasks.resnet, "SGD, momentum 0.9"),
            ("GPT, Shakespeare", tasks.gpt, "AdamW"),
        ):
            yield Case(name, partial(make_task, data), base)


def train(case: Case, rate: float | None, seed: int) -> float:
    """The final training loss, at a fixed rate with a cosine or, for None, rescaled."""
    torch.manual_seed(seed)
    task = case.make()
    make, _ = BASES[case.base]
    base = make(task.model.parameters(), lr=1.0 if rate is None else rate)
    torch.manual_seed(100 + seed)  # all runs of a seed see the same batches
    if rate is None:
        rescaled = Rescaled(base)
        scheduler = cooldown(rescaled, task.steps)
        for _ in range(task.epochs):
            for x, y in task.batches():
                rescaled.step(partial(task.losses, x, y))
                scheduler.step()
    else:
        cosine = CosineAnnealingLR(base, task.steps)
        for _ in range(task.epochs):
            for x, y in task.batches():
                base.zero_grad()
                task.losses(x, y).mean().backward()
                base.step()
                cosine.step()
    loss = task.training_loss()
    return loss if math.isfinite(loss) else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one task, two epochs, for CI")
    parser.add_argument("--data", type=Path, help="folder of the larger data sets")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the raw losses")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seeds = range(1) if args.quick else range(3)
    raw = []
    table = Table(box=box.SIMPLE_HEAD)
    for header in ("task", "optimizer", "best rate", "its loss", "rescaled", "ratio", "worst"):
        table.add_column(header, justify="left" if header in ("task", "optimizer") else "right")
    for case in track(list(cases(args.data, args.quick)), console=Console(stderr=True)):
        _, first = BASES[case.base]
        rates = [first * 2.0**k for k in range(RATES)][:: 4 if args.quick else 1]
        fixed = {rate: [train(case, rate, seed) for seed in seeds] for rate in rates}
        rescaled = [train(case, None, seed) for seed in seeds]
        raw.append({"task": case.task, "base": case.base, "fixed": fixed, "rescaled": rescaled})
        means = {rate: statistics.mean(losses) for rate, losses in fixed.items()}
        rate = min(means, key=lambda r: means[r])
        best = means[rate]
        ratio, worst = statistics.mean(rescaled) / best, max(rescaled) / best
        numbers = (f"{rate:.2g}", f"{best:.2g}", f"{statistics.mean(rescaled):.2g}")
        table.add_row(case.task, case.base, *numbers, f"{ratio:.2f}", f"{worst:.2f}")
    Console(width=120).print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "robustness.json"
    path.write_text(json.dumps(raw, indent=1), encoding="utf-8")
    print(f"raw losses: {path}")


if __name__ == "__main__":
    main()
