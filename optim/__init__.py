"""Optimizers whose step sizes come from curvature, and INNA and INNAprop."""

from optim import estimators, rules, schedules
from optim.gen import GeN
from optim.inna import INNA
from optim.innaprop import INNAprop
from optim.record import Records, StepRecord
from optim.rescaled import Rescaled

__all__ = [
    "INNA",
    "GeN",
    "INNAprop",
    "Records",
    "Rescaled",
    "StepRecord",
    "estimators",
    "rules",
    "schedules",
]
