"""A factor on the steps that falls where they overshoot the minimum of nearly every new batch."""

from __future__ import annotations

from optim.line import Line
from optim.rules.rule import State

_RECENT, _LONGER = 0.9, 0.98  # decays of the moving averages of the loss
_PROGRESS = 0.1  # of the longer average, by which the recent one is lower where the loss falls
_WHILE_IT_FALLS, _OVERSHOT, _SHORT = 1.02, 0.9, 3.0  # factors on q
_LOWEST = 0.01


def cautioned(line: Line, state: State) -> State:
    """The state with ``caution``, the factor q, and the moving averages of the loss renewed.

    ::

        h = <g, w>, w the way of the last steps      slope of the new batch along it
        q <- 1.02 q     where the loss falls: its average over the last ten steps is below that
                        over the last fifty by a tenth of it
        q <- 0.9 q      otherwise, where h < 0: the steps overshot the new batch's minimum
        q <- 3 q        otherwise, where h > 0; q stays within [0.01, 1]

    Steps that are right for each batch may be too long for all of them together. Then the loss
    stays where it is, and the steps overshoot the minimum of nearly every new batch. Where the
    batches have a minimum in common, they overshoot that of one in two, and long steps are the
    better ones in the end. So q falls only while the loss does not, and only where the steps
    overshoot for more than ten new batches of eleven. A loss that is large by a constant counts
    as one that does not fall.

    ``surprised`` is 1 where the loss is above twice the average of the steps before.
    """
    first, steps = state.get("first", line.value), state.get("steps", 0)
    recent, longer = state.get("recent", 0.0), state.get("longer", 0.0)
    before = first + recent / (1 - _RECENT**steps) if steps else line.value
    steps += 1
    # Around the first loss, so that the two are exactly the same where it never changes.
    recent = _RECENT * recent + (1 - _RECENT) * (line.value - first)
    longer = _LONGER * longer + (1 - _LONGER) * (line.value - first)
    level = longer / (1 - _LONGER**steps)
    falls = recent / (1 - _RECENT**steps) < level - _PROGRESS * abs(first + level)
    caution = state.get("caution", 1.0)
    if falls:
        caution *= _WHILE_IT_FALLS
    elif line.hindsight < 0:
        caution *= _OVERSHOT
    elif line.hindsight > 0:
        caution *= _SHORT
    return {
        **state,
        "first": first,
        "steps": steps,
        "recent": recent,
        "longer": longer,
        "caution": min(max(caution, _LOWEST), 1.0),
        "surprised": float(line.value - before > abs(before)),
    }
