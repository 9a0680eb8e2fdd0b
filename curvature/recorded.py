"""What the exact verbs have in common: a function of its parameters, put on a tape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from curvature.arguments import check_callable
from curvature.side_effects import SideEffects
from curvature.tape import Tape
from curvature.trees import Flat, flatten_direction, flatten_params


@contextmanager
def recorded(
    func: Callable[[Any], Tensor], params: Any, vector: Any, argument: str, engine: str
) -> Iterator[tuple[Tape, Flat, list[Tensor]]]:
    """Check the arguments and put ``func`` at ``params`` on a tape; take its side effects back.

    The tape is used inside the block: restoring buffers would invalidate a graph that saved them.
    """
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
        yield tape, flat, direction
