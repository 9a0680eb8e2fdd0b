"""What stands in ``p.grad``: put there as ``backward`` would, kept aside, or left by a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from optim.accumulated import hooks_on_accumulated, run_accumulated_hooks
from optim.sharded import local


@contextmanager
def without_grads(params: Sequence[Tensor]) -> Iterator[None]:
    """Inside, ``p.grad`` starts at None; what is done to it there is undone."""
    own = [p.grad for p in params]
    try:
        for p in params:
            p.grad = None
        yield
    finally:
        for p, g in zip(params, own, strict=True):
            p.grad = g


def check_no_grads(params: Iterable[Tensor]) -> None:
    """Refuse gradients from elsewhere, which the step could only drop; zeros are none."""
    if any(p.grad is not None and bool(local(p.grad).any()) for p in params):
        raise ValueError(
            "p.grad holds gradients that were computed outside this step's closure; call zero_grad "
            "in it, or, to accumulate several parts of a batch, give step a list of closures, or, "
            "where a hook of steps clips what the last one left, give the wrapper clip=; to log a "
            "norm, take torch.nn.utils.get_total_norm, since clip_grad_norm_ writes at any bound"
        )


def set_grads(params: Iterable[Tensor], grads: Iterable[Tensor | None], *, copied: bool) -> None:
    """Put gradients into ``p.grad`` as ``backward`` leaves them: each in memory of its own.

    Of a parameter that the loss does not use, zeros that are there stay: by them a base's momentum
    goes on, as it does not by None.

    The hooks of a parameter itself change what is put there, or find it there. Like clipping, they
    change the direction and not the loss.

    Args:
        copied: leave the given gradients as they are where ``p.grad`` is written to.
    """
    taken: set[int] = set()
    for p, given in zip(params, grads, strict=True):
        if given is None:
            continue
        g = _hooked(p, given)
        memory = local(g).data_ptr()
        expanded = 0 in g.stride()
        if copied or expanded or memory in taken or hooks_on_accumulated(p):
            form = torch.contiguous_format if expanded else torch.preserve_format
            g = g.clone(memory_format=form)
        taken.add(memory)
        p.grad = g
        run_accumulated_hooks(p)


def _hooked(p: Tensor, g: Tensor) -> Tensor:
    """What the hooks of a parameter make of its gradient, which stays as it is."""
    hooks = list((p._backward_hooks or {}).values())
    g = g.clone() if hooks else g
    for hook in hooks:
        changed = hook(g)
        g = g if changed is None else changed
    return g


class LeftGrads:
    """The gradients that the last step has left, to be cleared by the next one.

    Those of other parts of a batch, accumulated outside the step, are not the step's to drop.
    """

    def __init__(self) -> None:
        self._left: dict[int, tuple[TensorWeakRef, int]] = {}
        self._cleared: list[Tensor] = []

    def note(self, params: Iterable[Tensor]) -> None:
        """Know the gradients that are there at the end of a step."""
        grads = [p.grad for p in params if p.grad is not None]
        self._left = {id(g): (TensorWeakRef(g), g._version) for g in grads}

    def clear(self, params: Iterable[Tensor]) -> None:
        """Set to None the gradients that the last step left and nobody wrote to since."""
        self._cleared = []
        for p in params:
            ref, version = self._left.get(id(p.grad), (None, 0))
            if ref is not None and ref() is p.grad and p.grad._version == version:
                p.grad = None
                self._cleared.append(p)

    def zero(self) -> None:
        """Put zeros where they would be, had the gradients not been cleared."""
        for p in self._cleared:
            if p.grad is None:
                p.grad = torch.zeros_like(p)

    def forget(self) -> None:
        """Take those that were cleared for None from now on."""
        self._cleared = []

    def __getstate__(self) -> dict[str, object]:
        return {"_left": {}, "_cleared": []}
