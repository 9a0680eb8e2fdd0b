"""The page about robustness, docs/robustness.md, from the raw losses of robustness.py."""

from __future__ import annotations

import statistics
from typing import Any

HEADING = """# Is a learning rate missed?

Each optimizer is trained at nine fixed learning rates, a factor of two apart, with a cosine
schedule, and wrapped with nothing set, under `schedules.cooldown(optimizer, steps)`. A *ratio* is
the final training loss of a wrapped run over that of the best fixed learning rate, a mean over
three seeds: at 0.5 the wrapped run ended at half the tuned loss, at 2 at twice. Ratios above 10,000
are shown as *diverged*. A *case* is one network, batch size and base optimizer, with one run for
each seed.

Printed by `python benchmarks/robustness.py --data DIR --out docs/robustness.md` in about an hour on
one core, or half of that with `--jobs 2`; raw losses in [robustness.json](robustness.json), from
which `--known docs/robustness.json` prints the page without training. The wrappers were trained on
another processor than the fixed rates and GeN as published, by `--again`.

Scikit-learn's digits, with SGD and RMSprop with and without momentum underneath, and one case each
of larger networks:"""
AFTER_SUMMARY = """GeN has no first learning rate to set: the first length is searched upwards from
1e-6 of the parameters. As published it has; with its defaults it fails on more than half of the
digits' runs, and is the best of all on the two tasks that its step happens to suit.

INNAprop underneath, on the same digits:"""
STREAM_HEADING = """A stream of fresh samples, of which none repeats, by the base optimizer:"""
AFTER_STREAM = """No network fits samples that it has not seen, so a step that is right for one
batch undoes what others have taught, and noise of the batches holds the loss. Where new batches did
not shorten the steps, as told [below](#what-the-rules-rest-on), the defaults ended at 1.8 to 5.9.
With momentum `ell=0.1` ends still lower.

The ratio of each case, the mean over its seeds, and in brackets the highest of them:"""
AFTER_INNAPROP = """Its best rate at batch 128, 0.03, is ten times a step that is right for the
loss as it stands: it starts by raising the loss to four times its first value and ends lowest. No
rule here does that."""
NOTES = """The networks: an MLP 64-128-128-10 on scikit-learn's 8x8 digits, 20 epochs; LeNet with
tanh on MNIST, batch 256, 3 epochs; a small residual network with batch norm and ReLU on 12,800
images of Fashion-MNIST, batch 64, 3 epochs; a character model of two layers of width 64 on tiny
Shakespeare, 600 batches of 32 x 64 characters; the digits' MLP with tanh on 400 batches of 128
normal inputs that a linear map labels ([tasks.py](../benchmarks/tasks.py)).

## What the rules rest on

The rules were found on the digits by trying about 150 variants; what stayed, and what it did there:

- One batch's own gradient overrates the slope of a direction with momentum. The lower of the slope
  and its average (over the time that the direction remembers) keeps what the sign of the slope
  alone does not: with abs(b), or max(b, 0), runs diverge.
- Curvature must be remembered as long as the direction is, and no longer. Without momentum,
  averaging it raises the median ratio from 0.47 to 0.80. With momentum mu, holding its peak by the
  factor mu a step, in place of mu², raises it from 0.34 to 0.54. Without momentum a curvature that
  may fall to a quarter at a step costs nothing in the median, and is safer.
- The chord to the end of the step tells more than d^T H d at its beginning: with it the median
  ratio falls from 0.43 to 0.33. Cross entropy grows linearly far off, so a chord that is looked at
  farther than the steps go justifies longer steps, and those longer chords; a length is trusted
  only as far as it was looked, and grows fourfold at most.
- With eight steps to an estimate, measuring again right after one that surprised takes the worst
  case from 2.37 to 1.61, with estimates at about a fifth of the steps in place of an eighth.
- On LeNet and the residual network steps that are right for each batch stay several times as long
  as the tuned ones. The agreement of the samples' curvatures shortens them (LeNet from 1.7 to 1.3,
  without the next point), which needs them one by one: `Rescaled` has them, GeN does not. Its
  square root shortens the digits' steps too much: the worst case is 2.13 with it and 1.81 with its
  cube root.
- Steps that are right for each batch may be too long for all of them, and nothing at a step tells:
  training settles where steps are twice as long as the parabola of all samples wants them, at any
  rate, on the stream as on the digits. What differs is how often a new batch finds the parameters
  beyond its own minimum along the way that led to them: on the stream at every step, as with the
  character model, on the digits at one of two, once most samples fit.
- To answer each of them alike, down or up by 5 %, ends the stream at 1.5 to 2.0 and ruins the
  digits (46 of 108 runs within twice the tuned loss): their samples come again, and in the end
  long steps pay. So the rules answer only while the average loss does not fall by a tenth, and
  only to more than ten new batches of eleven.
- Along the last step alone, directions with momentum overshoot now and then at any rate, along the
  way of as many steps as they remember steadily: with constants found on the way, the stream ends
  at 2.1 in place of 2.9 with momentum, and at 2.4 in place of 3.1 with AdamW (`GeN`). To ask every
  fourth or eighth batch alone costs the digits more than it saves.
- Tried and worse: lower confidence bounds of slope and curvature, growth
  of the step by a tenth, Gauss-Newton curvature with ReLU, the energy of heavy ball on batches."""

DIVERGED = 1e4
STREAM = "a stream of fresh samples"
NAMES = {
    "Rescaled": "`Rescaled(base)`",
    "GeN, phi 1": "`GeN(base, phi=1)`",
    "GeN, phi 8": "`GeN(base)`, phi 8",
    "as published": "`gen_published(base)`, eta 1e-3, phi 8",
}
SHORTER_NAMES = {
    "Rescaled, ell 0.1": "`Rescaled(base, ell=0.1)`",
    "GeN, phi 8, ell 0.1": "`GeN(base, ell=0.1)`",
}

# One case: its task and base, and one loss for each seed, "fixed" by rate and "wrapped" by name.
Run = dict[str, Any]


def as_markdown(runs: list[Run]) -> str:
    innaprop = [run for run in runs if run["base"] == "INNAprop"]
    parts = (
        HEADING,
        first_table(runs),
        AFTER_SUMMARY,
        summary(innaprop, []),
        AFTER_INNAPROP,
        STREAM_HEADING,
        by_base([run for run in runs if run["task"] == STREAM]),
        AFTER_STREAM,
        every_case(runs),
        NOTES,
    )
    return "\n\n".join(parts) + "\n"


def first_table(runs: list[Run]) -> str:
    """What matters most; README.md has it too."""
    digits = [run for run in runs if run["task"].startswith("digits")]
    larger = [run for run in runs if run not in digits and run["task"] != STREAM]
    return summary([run for run in digits if run["base"] != "INNAprop"], larger)


def summary(runs: list[Run], larger: list[Run]) -> str:
    """One row a wrapper: the runs together, and the larger tasks each by itself."""
    rows = [
        [
            "",
            f"digits: median of {len(runs)} cases",
            "worst case, mean over seeds",
            "runs that end within twice the tuned loss",
            "worst run",
            *[run["task"].partition(",")[0] for run in larger],
        ]
    ]
    for wrapper, name in NAMES.items():
        by_case = [ratios(run, wrapper) for run in runs]
        means = [statistics.mean(found) for found in by_case]
        each = [ratio for found in by_case for ratio in found]
        rows.append(
            [
                name,
                cell(statistics.median(means)),
                cell(max(means)),
                f"{sum(ratio <= 2 for ratio in each)} of {len(each)}",
                cell(max(each)),
                *[cell(statistics.mean(ratios(run, wrapper))) for run in larger],
            ]
        )
    return _table(1, rows)


def by_base(runs: list[Run]) -> str:
    """One row a wrapper, one column a base optimizer."""
    rows = [["", *[run["base"] for run in runs]]]
    for wrapper, name in (NAMES | SHORTER_NAMES).items():
        rows.append([name, *[cell(statistics.mean(ratios(run, wrapper))) for run in runs]])
    return _table(1, rows)


def every_case(runs: list[Run]) -> str:
    rows = [["task", "optimizer", "best learning rate", "its loss", *NAMES.values()]]
    for run in runs:
        rate, loss = best(run)
        row = [run["task"], run["base"], f"{float(rate):.2g}", f"{loss:.2g}"]
        for wrapper in NAMES:
            found = ratios(run, wrapper)
            row.append(f"{cell(statistics.mean(found))} ({cell(max(found))})")
        rows.append([text.replace("diverged (diverged)", "diverged") for text in row])
    return _table(2, rows)


def ratios(run: Run, wrapper: str) -> list[float]:
    """Final losses of the wrapped runs over that of the best fixed rate, one for each seed."""
    return [loss / best(run)[1] for loss in run["wrapped"][wrapper]]


def best(run: Run) -> tuple[str, float]:
    """The fixed rate whose runs end lowest in the mean over seeds, and that mean."""
    means = {rate: statistics.mean(losses) for rate, losses in run["fixed"].items()}
    rate = min(means, key=lambda r: means[r])
    return rate, means[rate]


def cell(ratio: float) -> str:
    if ratio > DIVERGED:
        return "diverged"
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.0f}"


def _table(left: int, rows: list[list[str]]) -> str:
    """The first row is the head; so many columns are aligned to the left, and numbers follow."""
    head, *rest = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]
    return "\n".join([head, "|---" * left + "|---:" * (len(rows[0]) - left) + "|", *rest])
