"""Every feature of a training loop with every estimator: the table in docs/features.md."""

from pathlib import Path

import pytest
import torch
from agreement import fast_only
from feature_case import COLUMNS
from feature_kinds import Compiled
from features import FEATURES, as_markdown, one_base, surprise

uncompiling = pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="needs PyTorch 2.6"
)


@pytest.mark.parametrize(
    "column", [pytest.param(c, marks=fast_only if "Gauss" in c else ()) for c in COLUMNS]
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=uncompiling if isinstance(feature, Compiled) else ())
        for name, feature in FEATURES.items()
    ],
)
def test_served_with_the_right_numbers_or_refused(name: str, column: str) -> None:
    assert surprise(name, column, one_base(name, column)) is None


def test_the_documented_table_is_that_of_the_tests() -> None:
    path = Path(__file__).parent.parent / "docs" / "features.md"
    assert path.read_text(encoding="utf-8") == as_markdown(), "run python benchmarks/features.py"
