"""The page about robustness says what the raw losses do."""

import json
from pathlib import Path
from typing import Any

from robustness_page import NAMES, as_markdown, cell, every_case, summary

DOCS = Path(__file__).parent.parent / "docs"


def test_the_documented_page_is_that_of_the_losses() -> None:
    runs = json.loads((DOCS / "robustness.json").read_text(encoding="utf-8"))
    page = (DOCS / "robustness.md").read_text(encoding="utf-8")
    assert page == as_markdown(runs), "run python benchmarks/robustness.py --known ... --out ..."


def case(task: str, *losses: float) -> dict[str, Any]:
    """The better of two rates ends at 2 in the mean, the other has the lowest run."""
    fixed = {"0.1": [1.0, 3.0], "0.2": [0.5, 9.0]}
    return {
        "task": task,
        "base": "SGD",
        "fixed": fixed,
        "wrapped": {name: list(losses) for name in NAMES},
    }


def test_ratios_are_to_the_mean_of_the_best_rate() -> None:
    runs = [case("digits", 1.0, 2.0), case("digits", 4.0, 6.0), case("digits", 4.0, 4.1)]
    row = summary(runs, [case("LeNet, MNIST", 3.0, 4.0)]).splitlines()[2]
    assert row == "| `Rescaled(base)` | 2.02 | 2.50 | 4 of 6 | 3.00 | 1.75 |"
    row = every_case(runs).splitlines()[2]
    assert row.startswith("| digits | SGD | 0.1 | 2 | 0.75 (1.00) |")


def test_a_ratio_beyond_all_bounds_is_called_so() -> None:
    assert [cell(x) for x in (0.004, 9.99, 9.996, 1e4, 1.1e4, float("inf"))] == [
        "0.00",
        "9.99",
        "10",
        "10000",
        "diverged",
        "diverged",
    ]
    assert "| diverged |" in every_case([case("digits", 1e6, 1e6)])
