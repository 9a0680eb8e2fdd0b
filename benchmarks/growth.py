"""Resident memory over a thousand steps: a tape, a direction and a Hessian-vector product each.

    python benchmarks/growth.py

Exits with an error if memory grows by more than 2 % from step 100 to step 1,000.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch.nn import functional as F  # noqa: N812
from workloads import lenet

from curvature import Tape
from optim import Rescaled

STEPS = 1000


def resident() -> float:
    """Megabytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    torch.manual_seed(0)
    work = lenet()
    work.inputs, work.targets = work.inputs[:32], work.targets[:32]
    params = work.params
    optimizer = Rescaled(torch.optim.SGD(params.values()))
    sizes = {}
    for step in range(1, STEPS + 1):
        with Tape() as tape:
            loss = work.loss()
        gradient = tape.backward(loss, params)
        tape.directional(gradient)
        tape.hvp(gradient)
        optimizer.step(lambda: F.cross_entropy(work.model(work.inputs), work.targets))
        if step % 100 == 0:
            sizes[step] = resident()
            print(f"step {step:5}: {sizes[step]:.1f} MB")
    growth = sizes[STEPS] / sizes[100] - 1
    print(f"growth from step 100 to {STEPS}: {growth:.2%}")
    return int(growth > 0.02)


if __name__ == "__main__":
    sys.exit(main())
