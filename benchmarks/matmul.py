"""How fast the libraries that PyTorch has on board multiply single-precision matrices.

    python benchmarks/matmul.py [--out FILE]

The products are those of a linear layer's tangent pass (x W^T) and of its weight's gradient
(y^T x), by MKL as ``torch.mm`` calls it and as ``curvature.rules.matmul`` chooses.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from curvature.rules.matmul import matmul

SHAPES = (
    (256, 1024, 1024),
    (2048, 128, 512),
    (2048, 512, 128),
    (2080, 192, 768),
    (700, 200, 10000),
)
REPEATS = 21


def seconds(*functions: Callable[[], Tensor]) -> list[float]:
    """The medians over interleaved repeats."""
    measured: list[list[float]] = [[] for _ in functions]
    for _ in range(REPEATS + 2):
        for function, times in zip(functions, measured, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[2:]) for times in measured]


def rows() -> list[str]:
    lines = [
        "| rows, inputs, outputs | x W^T: MKL | chosen | y^T x: MKL | chosen |",
        "|---|---:|---:|---:|---:|",
    ]
    for n, k, m in SHAPES:
        x, w, y = torch.randn(n, k), torch.randn(m, k), torch.randn(n, m)
        forward = seconds(lambda x=x, w=w: x @ w.t(), lambda x=x, w=w: matmul(x, w.t()))
        backward = seconds(lambda x=x, y=y: y.t() @ x, lambda x=x, y=y: matmul(y.t(), x))
        speeds = [f"{2e-9 * n * k * m / t:.0f}" for t in forward + backward]
        lines.append(f"| {n}, {k}, {m} | " + " | ".join(speeds) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a page in Markdown to write")
    args = parser.parse_args()
    torch.set_num_threads(2)
    table = "\n".join(rows())
    print(table)
    if args.out:
        args.out.write_text(
            "# Products of single-precision matrices\n\n"
            f"Gigaflops per second on two threads, torch {torch.__version__}, "
            f"{torch.backends.cpu.get_cpu_capability()}: `torch.mm`, which calls MKL, and what "
            "`curvature.rules.matmul` chooses; printed by `python benchmarks/matmul.py`.\n\n"
            f"{table}\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
