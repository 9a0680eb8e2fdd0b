"""Whether rescaled training needs no tuning: its final training loss against tuned rates.

    python benchmarks/robustness.py [--quick] [--data DIR] [--fixed FILE] [--only NAME]
        [--jobs N] [--out DIR]

Each optimizer is trained on each task at nine fixed learning rates with a cosine schedule, and
wrapped with nothing set but the number of steps, by which its schedule cools down. The ratios are
those of the wrapped runs to the mean over seeds of the best fixed rate: their mean, and in
brackets the highest. Without ``--data``, a folder with mnist, fashion-mnist and tiny-shakespeare,
only the digits that come with scikit-learn are used. Writes raw losses as JSON and prints a table.
``--fixed`` takes those of the fixed rates from an earlier run's JSON, and with ``--only`` those of
all wrappers but this one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
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

from optim import GeN, INNAprop, Rescaled, gen_published

RATES = 9  # by factors of two
BASES: dict[str, tuple[Callable[..., Optimizer], float]] = {
    "SGD": (SGD, 0.02),
    "SGD, momentum 0.9": (partial(SGD, momentum=0.9), 0.004),
    "RMSprop": (RMSprop, 1e-4),
    "RMSprop, momentum 0.9": (partial(RMSprop, momentum=0.9), 2e-5),
    "INNAprop": (partial(INNAprop, weight_decay=0.0), 5e-4),
    "AdamW": (AdamW, 2e-4),
}
WRAPPERS: dict[str, Callable[[Optimizer], Rescaled | GeN]] = {
    "Rescaled": Rescaled,
    "GeN, phi 1": partial(GeN, phi=1),
    "GeN, phi 8": partial(GeN, phi=8),
    "as published": gen_published,
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


def train(case: Case, how: float | str, seed: int) -> float:
    """The final training loss, at a fixed rate with a cosine or in the wrapper of that name."""
    torch.manual_seed(seed)
    task = case.make()
    make, lowest = BASES[case.base]
    base = make(task.model.parameters(), lr=lowest if isinstance(how, str) else how)
    torch.manual_seed(100 + seed)  # all runs of a seed see the same batches
    return task.train_wrapped(WRAPPERS[how](base)) if isinstance(how, str) else task.train(base)


def losses(
    case: Case, seeds: range, rates: list[float], wrappers: list[str]
) -> dict[str, dict[str, list[float]]]:
    """Of the fixed rates and of the wrappers, one for each seed."""
    return {
        "fixed": {str(rate): [train(case, rate, seed) for seed in seeds] for rate in rates},
        "wrapped": {name: [train(case, name, seed) for seed in seeds] for name in wrappers},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one task, two epochs, for CI")
    parser.add_argument("--data", type=Path, help="folder of the larger data sets")
    parser.add_argument("--fixed", type=Path, help="raw losses of an earlier run")
    parser.add_argument("--only", choices=WRAPPERS, help="the others' from the earlier run")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the raw losses")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    args = parser.parse_args()
    if args.only and not args.fixed:
        parser.error("--only needs the others' losses: give --fixed FILE")
    wrappers = [args.only] if args.only else list(WRAPPERS)
    seeds = range(1) if args.quick else range(3)
    earlier = json.loads(args.fixed.read_text(encoding="utf-8")) if args.fixed else []
    known = {(run["task"], run["base"]): run for run in earlier}
    todo = list(cases(args.data, args.quick))
    with ProcessPoolExecutor(args.jobs, initializer=partial(torch.set_num_threads, 1)) as pool:
        waiting = []
        for case in todo:
            rates = [BASES[case.base][1] * 2.0**k for k in range(RATES)]
            rates = [] if (case.task, case.base) in known else rates[:: 4 if args.quick else 1]
            waiting.append(pool.submit(losses, case, seeds, rates, wrappers))
        tracked = track(waiting, console=Console(stderr=True))
        found = [future.result() for future in tracked]

    raw = []
    table = Table(box=box.SIMPLE_HEAD)
    for header in ("task", "optimizer", "best rate", "its loss", *WRAPPERS):
        table.add_column(header, justify="left" if header in ("task", "optimizer") else "right")
    for case, run in zip(todo, found, strict=True):
        before = known.get((case.task, case.base), run)
        run["fixed"] = run["fixed"] or before["fixed"]
        run["wrapped"] = {
            name: run["wrapped"].get(name) or before["wrapped"][name] for name in WRAPPERS
        }
        raw.append({"task": case.task, "base": case.base, **run})
        means = {rate: statistics.mean(values) for rate, values in run["fixed"].items()}
        rate = min(means, key=lambda r: means[r])
        ratios = [[loss / means[rate] for loss in values] for values in run["wrapped"].values()]
        cells = [f"{statistics.mean(r):.2g} ({max(r):.2g})" for r in ratios]
        numbers = (f"{float(rate):.2g}", f"{means[rate]:.2g}")
        table.add_row(case.task, case.base, *numbers, *cells)
    Console(width=150).print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "robustness.json"
    path.write_text(json.dumps(raw, indent=1), encoding="utf-8")
    print(f"raw losses: {path}")


if __name__ == "__main__":
    main()
