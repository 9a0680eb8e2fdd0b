"""Rules for operations, one file per family; importing this package fills the table."""

from curvature.rules import (
    attention,
    bilinear,
    choice,
    convolution,
    elementwise,
    gradient_of_norm,
    linear,
    loss,
    lstm,
    moments,
    normalisation,
    product,
    softmax,
    views,
)
from curvature.rules.table import rule_of

__all__ = [
    "attention",
    "bilinear",
    "choice",
    "convolution",
    "elementwise",
    "gradient_of_norm",
    "linear",
    "loss",
    "lstm",
    "moments",
    "normalisation",
    "product",
    "rule_of",
    "softmax",
    "views",
]
