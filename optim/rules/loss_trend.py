"""A factor on the steps that answers a loss which rises from batch to batch."""

from __future__ import annotations

from optim.line import Line
from optim.rules.rule import State

_RECENT, _LONGER = 0.9, 0.98  # decays of the moving averages of the loss
_LOWEST = 0.03


def cautioned(line: Line, state: State, *, fall: float, rise: float) -> State:
    """The state with ``caution`` and the moving averages of the loss renewed.

    ``caution`` falls by the share ``fall`` where the loss, averaged over the last ten steps, is
    above that of the last fifty, and rises by ``rise`` where it is not; it stays within [0.03, 1].
    If it falls faster, a loss that is as often above as below shortens the steps.
    ``surprised`` is 1 where the loss is above twice the average of the steps before.
    """
    first, steps = state.get("first", line.value), state.get("steps", 0)
    recent, longer = state.get("recent", 0.0), state.get("longer", 0.0)
    before = first + recent / (1 - _RECENT**steps) if steps else line.value
    steps += 1
    # Around the first loss, so that the two are exactly the same where it never changes.
    recent = _RECENT * recent + (1 - _RECENT) * (line.value - first)
    longer = _LONGER * longer + (1 - _LONGER) * (line.value - first)
    rising = recent / (1 - _RECENT**steps) > longer / (1 - _LONGER**steps)
    caution = state.get("caution", 1.0) * (1 - fall if rising else 1 + rise)
    return {
        **state,
        "first": first,
        "steps": steps,
        "recent": recent,
        "longer": longer,
        "caution": min(max(caution, _LOWEST), 1.0),
        "surprised": float(line.value - before > abs(before)),
    }
