"""Train a small convolutional network on 8x8 digits with step sizes that set themselves.

SGD, RMSprop and INNAprop, each at the best of a small grid of learning rates, and each with steps
from the curvature along them with nothing tuned: by Rescaled, from the exact curvature, and by
GeN, from the loss at the end of the step. Prints a table and saves a picture.

    python examples/digits.py [--smoke] [--out DIR]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from optim import GeN, INNAprop, Rescaled
from optim.schedules import cooldown

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

BATCH = 64
BASES: dict[str, tuple[Callable[..., Optimizer], list[float]]] = {
    "SGD": (torch.optim.SGD, [0.03, 0.1, 0.3, 1.0]),
    "RMSprop": (torch.optim.RMSprop, [1e-3, 3e-3, 1e-2, 3e-2]),
    "INNAprop": (INNAprop, [1e-3, 3e-3, 1e-2, 3e-2]),
}
WRAPPERS: dict[str, Callable[[Optimizer], Rescaled | GeN]] = {
    "Rescaled": Rescaled,
    "GeN": lambda base: GeN(base, phi=1),
}


@dataclass
class Run:
    name: str
    rate: str
    losses: list[float]
    steps: list[float]
    accuracy: float
    seconds: float


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    x_train, x_test, y_train, y_test = map(torch.as_tensor, split)
    shape = (-1, 1, 8, 8)
    return x_train.float().div(16).view(shape), y_train, x_test.float().div(16).view(shape), y_test


def make_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


def train(base: str, how: float | str, epochs: int, data: tuple[Tensor, ...], bar: Progress) -> Run:
    """One run: plain with a cosine schedule at that rate, or in the wrapper of that name."""
    x_train, y_train, x_test, y_test = data
    torch.manual_seed(0)
    network = make_network()
    make, _ = BASES[base]
    batches_per_epoch = len(x_train) // BATCH
    scheduler: LRScheduler
    if isinstance(how, str):
        name, rate = f"{how}({base})", "none"
        optimizer = WRAPPERS[how](make(network.parameters()))
        scheduler = cooldown(optimizer, epochs * batches_per_epoch)
    else:
        name, rate = f"{base} {how:g}", f"{how:g}"
        optimizer = make(network.parameters(), lr=how)
        scheduler = CosineAnnealingLR(optimizer, epochs * batches_per_epoch)

    history, steps, accuracy = [], [], 0.0
    start = time.perf_counter()
    task = bar.add_task(name, total=epochs, info="")
    for _ in range(epochs):
        total, step_total = 0.0, 0.0
        for batch in torch.randperm(len(x_train)).split(BATCH)[:batches_per_epoch]:
            x, y = x_train[batch], y_train[batch]
            if isinstance(optimizer, (Rescaled, GeN)):
                losses = optimizer.step(
                    lambda x=x, y=y: F.cross_entropy(network(x), y, reduction="none")
                )
                loss = losses.mean()
                step_total += optimizer.records[-1].step
            else:
                optimizer.zero_grad()
                loss = F.cross_entropy(network(x), y)
                loss.backward()
                optimizer.step()
                step_total += optimizer.param_groups[0]["lr"]
            scheduler.step()
            total += loss.item()
        history.append(total / batches_per_epoch)
        steps.append(step_total / batches_per_epoch)
        accuracy = evaluate(network, x_test, y_test)
        info = f"loss {history[-1]:.1e}  accuracy {accuracy:.1%}  step {steps[-1]:.1e}"
        bar.update(task, advance=1, info=info)
    return Run(name, rate, history, steps, accuracy, time.perf_counter() - start)


@torch.no_grad()
def evaluate(network: nn.Module, x: Tensor, y: Tensor) -> float:
    network.eval()
    accuracy = (network(x).argmax(1) == y).float().mean().item()
    network.train()
    return accuracy


def plot(runs: dict[str, list[Run]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for color, of_base in zip(("C0", "C1", "C2"), runs.values(), strict=True):
        for run, style in zip(of_base, ("--", "-", ":"), strict=True):
            epochs = range(1, len(run.losses) + 1)
            left.semilogy(epochs, run.losses, style, color=color, label=run.name)
            right.semilogy(epochs, run.steps, style, color=color, label=run.name)
    left.set(ylabel="training loss (mean of the epoch)")
    right.set(ylabel="step (mean of the epoch)")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two epochs and one rate, for CI")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    args = parser.parse_args()
    epochs = 2 if args.smoke else 20
    data = load_data()
    console = Console()
    columns = (TextColumn("{task.description:18}"), BarColumn(10), MofNCompleteColumn())
    runs: dict[str, list[Run]] = {}
    with Progress(*columns, TextColumn("{task.fields[info]}")) as bar:
        for base, (_, grid) in BASES.items():
            rates = grid[1:2] if args.smoke else grid
            plain = [train(base, lr, epochs, data, bar) for lr in rates]
            best = min(plain, key=lambda run: run.losses[-1])
            best.rate += f" (best of {len(rates)})"
            wrapped = [train(base, name, epochs, data, bar) for name in WRAPPERS]
            runs[base] = [best, *wrapped]

    title = f"8x8 digits, batch {BATCH}, after {epochs} epochs"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for header in ("optimizer", "learning rate", "loss", "accuracy", "seconds"):
        justify = "left" if header == "optimizer" else "right"
        table.add_column(header, justify=justify, no_wrap=True)
    for base, (plain, *wrapped) in runs.items():
        for name, run in ((base, plain), *((run.name, run) for run in wrapped)):
            row = (f"{run.losses[-1]:.1e}", f"{run.accuracy:.1%}", f"{run.seconds:.1f}")
            table.add_row(name, run.rate, *row)
    console.print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "digits.png"
    plot(runs, path)
    console.print(f"picture: {path}")


if __name__ == "__main__":
    main()
