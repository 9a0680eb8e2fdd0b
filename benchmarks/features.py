"""What training loops are made of, and which estimator serves each; every number is checked.

    python benchmarks/features.py [--out docs/features.md]

Trains a small network by each estimator with each feature and compares value, slope and curvature
of every step with those of a plain float64 function of the parameters, and the step with that of
the base optimizer. Exits with an error where one differs, or where something is refused that
FEATURES holds for served, or the other way round. tests/test_features.py runs each cell around one
of the base optimizers.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from feature_case import BASES, COLUMNS, Case, Wrong
from feature_kinds import (
    Adapters,
    Autocast,
    Between,
    Checkpointed,
    Clipped,
    Compiled,
    Decay,
    Devices,
    Feature,
    Frozen,
    Groups,
    Half,
    Parts,
    Scheduled,
    Table,
    Tied,
)
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

HEADING = """# Features

Printed by `python benchmarks/features.py`, which trains a small network in each way, three steps
around each of SGD with momentum, AdamW, RMSprop and INNAprop. It compares value, slope and
curvature of every step with a float64 function of the parameters that knows nothing of the feature
(under autocast to a few percent), and parameters, buffers and random state with those of the base
optimizer at the step taken. The first six columns are `Rescaled(base, estimator=...)`."""
NOTES = """- Several processes (tests/test_data_parallel.py): `DistributedDataParallel` serves every
  estimator; `fully_shard` serves `Secant`, `Probes`, `GradientDifferences` and `GeN`, and `Exact`
  and `GaussNewton` say that they follow the graph of whole parameters.
- Parameters on several devices are refused.
- What `torch.compile` has made has no second derivative: a step in which `Exact` or `GaussNewton`
  take an estimate runs it uncompiled (PyTorch 2.6 or newer); with `every=8` that is one step in
  eight. The others run it compiled in all steps, and have it compiled twice, with and without
  gradients. An evaluation more, uncompiled, tells which modules compiled functions call: at the
  first step, and where something was compiled since. A run that is loaded goes on bit for bit if
  the compiler makes the same code again, which it need not after shapes have changed. `inductor`,
  compiled functions and `model.compile()` are no different."""

STEPS = 3


def _nowhere(message: str) -> dict[str, str]:
    return dict.fromkeys(COLUMNS, message)


FEATURES: dict[str, Feature] = {
    "nothing of these": Feature(),
    "frozen parameters": Frozen(),
    "low-rank adapters beside frozen layers (LoRA)": Adapters(),
    "tied weights": Tied(),
    "`Dropout`": Between(lambda: nn.Dropout(0.3)),
    "`BatchNorm1d`": Between(lambda: nn.BatchNorm1d(5)),
    "`checkpoint(use_reentrant=False)`": Checkpointed(False),
    "`checkpoint(use_reentrant=True)`": Checkpointed(
        True, _nowhere("you can either set use_reentrant=False")
    ),
    '`torch.compile(backend="eager")`': Compiled("eager"),
    '`torch.compile(backend="aot_eager")`': Compiled("aot_eager"),
    "clipping by norm, `clip=`": Clipped(lambda p: clip_grad_norm_(p, 0.05)),
    "clipping by value, `clip=`": Clipped(lambda p: clip_grad_value_(p, 0.02)),
    "clipping in a closure that calls `backward`": Clipped(
        lambda p: clip_grad_norm_(p, 0.05), inside=True
    ),
    "accumulation, a list of closures": Parts(),
    "parameter groups of several lr": Groups(),
    "`torch.optim.lr_scheduler`": Scheduled(),
    "coupled weight decay": Decay(0.3, torch.optim.SGD, coupled=True),
    "decoupled weight decay": Decay(0.3, torch.optim.AdamW, coupled=False),
    "autocast, bfloat16": Autocast(torch.bfloat16, 0.05),
    "autocast, float16, `GradScaler`": Autocast(torch.float16, 0.02, scale=2.0**10),
    "parameters in bfloat16": Half(_nowhere("only float32 and float64 can be used")),
    "`Embedding(sparse=True)`": Between(Table, _nowhere("make its layer with sparse=False")),
    "parameters on the meta device": Devices(
        ["first", "middle", "last"], _nowhere("is on the meta device and has no values")
    ),
    "a part of the parameters on the meta device": Devices(
        ["last"], _nowhere("is on the meta device and has no values")
    ),
}


def run(name: str, column: str, base: str) -> str | None:
    """Train a little; None if every number was right, or the refusal.

    Raises:
        Wrong: one was not.
    """
    try:
        case = Case(FEATURES[name], column, base)
        for _ in range(STEPS):
            case.step()
    except (TypeError, ValueError, RuntimeError) as refusal:
        return str(refusal)
    return None


def surprise(name: str, column: str, base: str) -> str | None:
    """What is not as FEATURES has it."""
    cell = f"{name}, {column}, {base}"
    expected = FEATURES[name].refused.get(column)
    try:
        found = run(name, column, base)
    except Wrong as error:
        return f"{cell}: {error}"
    if (expected is None) == (found is None) and (found is None or expected in found):
        return None
    return f"{cell}: refused: {found}" if found else f"{cell} is served"


def one_base(name: str, column: str) -> str:
    """Another from cell to cell."""
    k = list(FEATURES).index(name) + list(COLUMNS).index(column)
    return list(BASES)[k % len(BASES)]


def as_markdown() -> str:
    """The table of FEATURES."""
    lines = [HEADING, "", f"| | {' | '.join(map(_code, COLUMNS))} |", "|---" * 8 + "|"]
    for name, feature in FEATURES.items():
        cells = ["refused" if column in feature.refused else "yes" for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Where it is refused, the message says:", ""]
    for name, feature in FEATURES.items():
        for message in dict.fromkeys(feature.refused.values()):
            lines.append(f"- {name}: *{message}*")
    return "\n".join([*lines, "", NOTES]) + "\n"


def _code(column: str) -> str:
    return column if column.startswith("`") else f"`{column}`"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/features.md"))
    args = parser.parse_args()
    cells = itertools.product(FEATURES, COLUMNS, BASES)
    surprises = [text for cell in cells if (text := surprise(*cell))]
    for text in surprises:
        print("WRONG", text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(as_markdown(), encoding="utf-8")
    print(f"{len(FEATURES)} features, {len(COLUMNS)} columns, {len(BASES)} bases: {args.out}")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
