"""Rules for operations, one file per family; importing this package fills the table."""

from curvature.graph import Call
from curvature.rules import (
    attention,
    bilinear,
    choice,
    convolution,
    elementwise,
    gradient_of_norm,
    linear,
    loss,
    moments,
    normalisation,
    product,
    recurrent,
    softmax,
    views,
)
from curvature.rules.local import LocalDoubleBackward
from curvature.rules.rule import Rule
from curvature.rules.table import find

__all__ = [
    "attention",
    "bilinear",
    "choice",
    "convolution",
    "elementwise",
    "gradient_of_norm",
    "linear",
    "loss",
    "moments",
    "normalisation",
    "product",
    "recurrent",
    "rule_of",
    "softmax",
    "views",
]

_ANY = LocalDoubleBackward()


def rule_of(call: Call) -> Rule:
    """The rule for a call; its own double backward where there is none, or a number is complex."""
    rule = None if call.is_complex() else find(call)
    return (None if rule is None else rule.of(call)) or _ANY
