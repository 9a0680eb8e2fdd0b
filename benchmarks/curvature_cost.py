"""What the exact curvature along the gradient costs: time, memory and error, method by method.

    python benchmarks/curvature_cost.py [--quick] [--out DIR] [--models MLP GPT ...]

Time is the ratio to the same model's plain gradient, the median over interleaved repeats; it
contains the gradient. Peak memory is the growth of a fresh process, likewise as ratio, the median
of three.
The error is relative to float64. Writes raw numbers and the environment as JSON, and a plot.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import matplotlib as mpl
import torch
from libraries import METHODS as LIBRARIES
from methods import METHODS as OWN
from methods import tangent
from rich.console import Console
from rich.progress import track
from rich.table import Table
from workloads import WORKLOADS, Workload, build

from curvature import Tape

mpl.use("Agg")
from matplotlib import pyplot as plt

METHODS = {**OWN, **LIBRARIES}
NO_CURVATURE = ("gradient", "JAX: gradient alone")
THREADS = 2
QUICK = ("MLP", "LeNet")
MEASURED = ("gradient", "tangent pass", "low memory", "hvp", "reverse over reverse")  # in memory


def times(model: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of every method, in another order each time; a method that raises is left out.

    JAX comes last and by itself: its threads slow down what runs after it.
    """
    work = build(model)
    order = random.Random(0)
    seconds: dict[str, list[float]] = {}
    for name, method in METHODS.items():
        try:
            method(work)
            seconds[name] = []
        except (RuntimeError, NotImplementedError, TypeError) as error:
            print(f"{model}, {name}: {str(error).splitlines()[0]}", file=sys.stderr)
    jax = [name for name in seconds if name.startswith("JAX")]
    others = [name for name in seconds if name not in jax]
    for names in filter(None, (others, jax)):
        for _ in track(range(repeats), f"{model:9}", console=Console(stderr=True)):
            for name in order.sample(names, len(names)):
                start = time.perf_counter()
                METHODS[name](work)
                seconds[name].append(time.perf_counter() - start)
    return seconds


def errors(model: str, names: list[str]) -> dict[str, float]:
    """Relative error of the curvature along the float32 gradient, against float64."""
    work = build(model)
    values = {name: METHODS[name](work).item() for name in names if name not in NO_CURVATURE}
    with Tape() as tape:
        loss = work.loss()
    g = tape.backward(loss, list(work.params.values()))
    work = work.double()
    with Tape(engine="reference") as tape:
        loss = work.loss()
    tape.backward(loss, list(work.params.values()))
    exact = tape.directional([x.double() for x in g]).curvature.item()
    return {name: abs(value / exact - 1) for name, value in values.items()}


def peak(model: str, method: str) -> int:
    """Bytes by which a fresh process grows at most while it runs a method, the median of three."""
    command = [sys.executable, __file__, "--peak", model, method]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    return statistics.median(int(run.stdout) for run in runs)


def print_peak(model: str, method: str) -> None:
    work = build(model)
    tiny = Workload(torch.nn.Linear(2, 10), torch.randn(4, 2), torch.zeros(4, dtype=torch.long))
    tangent(tiny)  # what libraries allocate once
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts anew
    before = _kilobytes("VmRSS")
    for _ in range(3):
        METHODS[method](work)
    # Not getrusage: what it calls the maximum begins with the parent's.
    print(1024 * (_kilobytes("VmHWM") - before))


def _kilobytes(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(name + ":")[2].split()[0])


def environment() -> dict[str, str | int]:
    libraries = ("curvlinops-for-pytorch", "PyHessian", "backpack-for-pytorch", "jax")
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{name: version(name) for name in libraries if _installed(name)},
    }


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def ratio(result: dict[str, dict[str, list[float]]], model: str, name: str) -> float:
    pairs = zip(result[model][name], result[model]["gradient"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def plot(result: dict[str, dict[str, list[float]]], path: Path) -> None:
    names = [name for name in METHODS if name != "gradient"]
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for k, model in enumerate(result):
        points = [(i, ratio(result, model, n)) for i, n in enumerate(names) if n in result[model]]
        axes.plot(*zip(*points, strict=True), "o", color=f"C{k}", label=model)
    axes.set_xticks(range(len(names)), names, rotation=25, ha="right")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("time, in gradients")
    axes.grid(axis="y", alpha=0.4)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two models, few repeats, no memory")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of JSON and plot")
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    if args.peak:
        print_peak(*args.peak)
        return

    models = [m for m in args.models if m in QUICK] if args.quick else args.models
    seconds, wrong, memory = {}, {}, {}
    for model in models:
        seconds[model] = times(model, 3 if args.quick else 15)
        wrong[model] = errors(model, list(seconds[model]))
        if not args.quick:
            memory[model] = {name: peak(model, name) for name in MEASURED if name in seconds[model]}

    args.out.mkdir(parents=True, exist_ok=True)
    raw = {"environment": environment(), "seconds": seconds, "error": wrong, "peak_bytes": memory}
    path = args.out / "curvature_cost.json"
    path.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    console = Console(width=110)
    for title, entry in (
        ("time, in gradients", lambda m, n: f"{ratio(seconds, m, n):.2f}"),
        ("peak memory, in gradients", lambda m, n: f"{memory[m][n] / memory[m]['gradient']:.2f}"),
        ("relative error", lambda m, n: f"{wrong[m][n]:.0e}" if n in wrong[m] else ""),
    ):
        if title.startswith("peak") and not memory:
            continue
        table = Table(title=title)
        table.add_column("")
        for model in models:
            table.add_column(model, justify="right")
        for name in MEASURED if title.startswith("peak") else METHODS:
            cells = [entry(m, name) if name in seconds[m] else "refused" for m in models]
            table.add_row(name, *cells)
        console.print(table)
    plot(seconds, path.with_suffix(".png"))
    console.print(f"raw numbers: {path}, plot: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
