"""Estimators: how the curvature along a direction is measured."""

from optim.estimators.estimator import Estimator
from optim.estimators.exact import Exact
from optim.estimators.gauss_newton import GaussNewton
from optim.estimators.gradient_differences import GradientDifferences
from optim.estimators.probes import Probes
from optim.estimators.secant import Secant

__all__ = ["Estimator", "Exact", "GaussNewton", "GradientDifferences", "Probes", "Secant"]
