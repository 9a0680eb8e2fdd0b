"""Exact directional curvature of any PyTorch model."""

from curvature import testing
from curvature.compilations import compilations
from curvature.differentiable import evaluation_mode
from curvature.directional import directional
from curvature.errors import NonFiniteLoss, NotTwiceDifferentiable
from curvature.extend import register_rule
from curvature.fit import fit
from curvature.gradient import gradient
from curvature.hooks import parameter_hooks_off
from curvature.hvp import hvp
from curvature.module_calls import module_calls
from curvature.objective import Objective
from curvature.quadratic import Quadratic
from curvature.side_effects import RandomState, SideEffects
from curvature.tape import Tape
from curvature.uncompiled import uncompiled

__all__ = [
    "NonFiniteLoss",
    "NotTwiceDifferentiable",
    "Objective",
    "Quadratic",
    "RandomState",
    "SideEffects",
    "Tape",
    "compilations",
    "directional",
    "evaluation_mode",
    "fit",
    "gradient",
    "hvp",
    "module_calls",
    "parameter_hooks_off",
    "register_rule",
    "testing",
    "uncompiled",
]
