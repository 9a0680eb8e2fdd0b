"""Every test begins alike: seeds, nothing compiled, hypothesis without its database or clock."""

import sys

import pytest
import torch
from agreement import fast_only
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=25)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    # Where something was compiled a first step evaluates its closure once more.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


FAST_EXAMPLES = ("curvature/contributions.py", "curvature/extend.py", "gauss_newton", "test_readme")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(part in item.nodeid for part in FAST_EXAMPLES):
            item.add_marker(fast_only)
