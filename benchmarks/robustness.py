"""Whether rescaled training needs no tuning: its final training loss against tuned rates.

    python benchmarks/robustness.py [--quick] [--data DIR] [--known FILE] [--again NAME ...]
        [--jobs N] [--out out/robustness.md]

Each optimizer is trained on each task at nine fixed learning rates with a cosine schedule, and
wrapped with nothing set but the number of steps, by which its schedule cools down. Without
``--data``, a folder with mnist, fashion-mnist and tiny-shakespeare, only the digits that come with
scikit-learn and made-up samples are used. Prints the first table of the page that it writes, whose
tables are all made of the raw losses in a JSON file beside it. ``--known`` takes the losses of an
earlier run from such a file and trains only what it lacks, and the wrappers named by ``--again``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tasks
import torch
from rich.console import Console
from rich.progress import track
from robustness_page import STREAM, Run, as_markdown, first_table
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
SHORTER = {name: partial(WRAPPERS[name], ell=0.1) for name in ("Rescaled", "GeN, phi 8")}
WRAPPERS_OF = {STREAM: WRAPPERS | {f"{name}, ell 0.1": make for name, make in SHORTER.items()}}


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
    if not quick:
        for base in ("SGD", "SGD, momentum 0.9", "AdamW"):
            yield Case(STREAM, tasks.stream, base)
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
    return (
        task.train_wrapped(wrappers_of(case.task)[how](base))
        if isinstance(how, str)
        else task.train(base)
    )


def losses(
    case: Case, seeds: range, rates: list[float], wrappers: list[str]
) -> dict[str, dict[str, list[float]]]:
    """Of the fixed rates and of the wrappers, one for each seed."""
    return {
        "fixed": {str(rate): [train(case, rate, seed) for seed in seeds] for rate in rates},
        "wrapped": {name: [train(case, name, seed) for seed in seeds] for name in wrappers},
    }


def wrappers_of(task: str) -> dict[str, Callable[[Optimizer], Rescaled | GeN]]:
    return WRAPPERS_OF.get(task, WRAPPERS)


def missing(run: Run, again: list[str]) -> list[str]:
    """The wrappers whose losses are not known, or shall not be used."""
    return [
        name for name in wrappers_of(run["task"]) if name in again or name not in run["wrapped"]
    ]


def complete(runs: list[Run], todo: list[Case], args: argparse.Namespace) -> None:
    """Train what ``runs`` lack; ``todo`` are their cases."""
    seeds = range(1) if args.quick else range(3)
    with ProcessPoolExecutor(args.jobs, initializer=partial(torch.set_num_threads, 1)) as pool:
        waiting = []
        for run, case in zip(runs, todo, strict=True):
            rates = [BASES[case.base][1] * 2.0**k for k in range(RATES)]
            rates = [] if run["fixed"] else rates[:: 4 if args.quick else 1]
            waiting.append(pool.submit(losses, case, seeds, rates, missing(run, args.again)))
        tracked = track(waiting, console=Console(stderr=True))
        for run, future in zip(runs, tracked, strict=True):
            for kind, found in future.result().items():
                run[kind].update(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one task, two epochs, for CI")
    parser.add_argument("--data", type=Path, help="folder of the larger data sets")
    parser.add_argument("--known", type=Path, help="raw losses of an earlier run")
    parser.add_argument(
        "--again", nargs="+", default=[], choices=WRAPPERS, help="train these though known"
    )
    parser.add_argument("--out", type=Path, default=Path("out/robustness.md"))
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    args = parser.parse_args()
    earlier = json.loads(args.known.read_text(encoding="utf-8")) if args.known else []
    runs = {(run["task"], run["base"]): run for run in earlier}
    todo = {(case.task, case.base): case for case in cases(args.data, args.quick)}
    for key in runs.keys() - todo.keys():
        if lacking := missing(runs[key], args.again):
            parser.error(f"{key} lacks {lacking} and cannot be trained: give --data DIR")
    for task, base in todo:
        runs.setdefault((task, base), {"task": task, "base": base, "fixed": {}, "wrapped": {}})
    complete([runs[key] for key in todo], list(todo.values()), args)

    raw = list(runs.values())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(raw, indent=1), encoding="utf-8")
    args.out.write_text(as_markdown(raw), encoding="utf-8")
    print(first_table(raw))
    print(f"all cases: {args.out}, raw losses beside it")


if __name__ == "__main__":
    main()
