"""Optimizers whose step sizes come from curvature, and INNA, INNAprop and their variants."""

from optim import estimators, plots, rules, schedules, sinks
from optim.dinadam import DINAdam
from optim.gen import GeN
from optim.inna import INNA
from optim.innaprop import INNAprop
from optim.innaprop_momentum import INNApropMomentum
from optim.memory import Memory
from optim.named import gen_hod, gen_published, lqa, qlabgrad
from optim.record import Records, StepRecord
from optim.rescaled import Rescaled

__all__ = [
    "INNA",
    "DINAdam",
    "GeN",
    "INNAprop",
    "INNApropMomentum",
    "Memory",
    "Records",
    "Rescaled",
    "StepRecord",
    "estimators",
    "gen_hod",
    "gen_published",
    "lqa",
    "plots",
    "qlabgrad",
    "rules",
    "schedules",
    "sinks",
]
