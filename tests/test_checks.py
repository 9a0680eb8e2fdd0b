"""The public check of second derivatives fails where it should."""

import pytest
import torch

from curvature.testing import check_directional

X, V = (torch.ones(3, dtype=torch.float64) for _ in range(2))


def test_a_kink_between_the_points_leaves_the_check_uncertain() -> None:
    with pytest.raises(AssertionError, match="uncertain"):
        check_directional(lambda x: (x - 1.001).relu().square().sum(), X, V)


def test_a_gradient_that_is_not_that_of_the_values_is_seen() -> None:
    # The gradient of x² with one factor detached is x: half of what the values say.
    with pytest.raises(AssertionError, match="slope differs"):
        check_directional(lambda x: (x * x.detach()).sum(), X, V)
