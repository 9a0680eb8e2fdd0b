"""What the exact verbs have in common: a function of its parameters, put on a tape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from curvature.arguments import check_callable
from curvature.side_effects import SideEffects
from curvature.tape import Tape
from curvature.trees import Flat, flatten_direction, flatten_params

Answer = TypeVar("Answer")


def answer(
    func: Callable[[Any], Tensor],
    params: Any,
    vector: Any,
    argument: str,
    engine: str,
    question: Callable[[Tape, Flat, list[Tensor]], Answer],
) -> Answer:
    """Check the arguments, put ``func`` on a tape and ask it, taking back its side effects."""
    check_callable("func", func)
    tape = Tape(engine=engine)
    flat = flatten_params(params)
    direction = flatten_direction(vector, flat, argument=argument)
    # Copies, since a function may write to its parameters (embedding with max_norm does).
    leaves = [leaf.detach().clone().requires_grad_() for leaf in flat.leaves]
    with SideEffects():
        with tape:
            losses = func(flat.rebuild(leaves))
        tape.backward(losses, leaves)
        # Restoring buffers would invalidate a graph that saved them.
        return question(tape, flat, direction)
