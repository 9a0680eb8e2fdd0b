"""Step rules: how far to go along a direction, from what is known of the loss along it."""

from optim.rules.cautious import Cautious
from optim.rules.edge import Edge
from optim.rules.lipschitz import Lipschitz
from optim.rules.lyapunov import Lyapunov
from optim.rules.newton import Newton
from optim.rules.robbins_monro import RobbinsMonro
from optim.rules.rule import Rule
from optim.rules.trust import Trust

__all__ = ["Cautious", "Edge", "Lipschitz", "Lyapunov", "Newton", "RobbinsMonro", "Rule", "Trust"]
