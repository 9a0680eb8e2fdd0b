"""How fast the libraries that PyTorch has on board multiply single-precision matrices.

    python benchmarks/matmul.py

The products are those of a linear layer's tangent pass (x W^T) and of its weight's gradient
(y^T x), by MKL as ``torch.mm`` calls it, by oneDNN, and as ``curvature.rules.matmul`` chooses.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

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


def onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")


def rows() -> list[str]:
    lines = [
        "| rows, inputs, outputs | x W^T: MKL | oneDNN | chosen | y^T x: MKL | oneDNN | chosen |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for n, k, m in SHAPES:
        x, w, y = torch.randn(n, k), torch.randn(m, k), torch.randn(n, m)
        ways = (torch.mm, onednn, matmul)
        forward = seconds(*[lambda f=f, x=x, w=w: f(x, w.t()) for f in ways])
        backward = seconds(*[lambda f=f, x=x, y=y: f(y.t(), x) for f in ways])
        speeds = [f"{2e-9 * n * k * m / t:.0f}" for t in forward + backward]
        lines.append(f"| {n}, {k}, {m} | " + " | ".join(speeds) + " |")
    return lines


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(2)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    print("\n".join(rows()))


if __name__ == "__main__":
    main()
