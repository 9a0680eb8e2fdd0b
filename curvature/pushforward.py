"""Tangents carried along a recorded graph, call by call, from the parameters to the losses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvature.errors import NotTwiceDifferentiable
from curvature.forward import Forward
from curvature.graph import Call, Edge, Graph, Tensors
from curvature.half_precision import in_range, promoted
from curvature.rules import rule_of
from curvature.rules.local import LocalDoubleBackward
from curvature.rules.precision import products_in
from curvature.rules.rule import Rule

_log = logging.getLogger(__name__)
_noted: set[str] = set()

Step = Callable[[int, Call, Rule, Tensors], Tensors]


class Pushforward:
    """The rules of a graph, and the walk in which each gets the tangents of its inputs.

    Args:
        graph: of the losses.
        forward: what was noted in the forward pass.
        product_dtype: the dtype in which to multiply matrices, if not the tangents' own.

    Raises:
        NotTwiceDifferentiable: an operation has neither a rule nor a double backward of its own.

    Attributes:
        rules: one for each call.
        unruled: the names of the operations that their own double backward serves.
        surely_from: the position of the last such call. Only a derivative tells whether an
            operation has one; that of a rule is known.
    """

    def __init__(self, graph: Graph, forward: Forward, product_dtype: torch.dtype | None) -> None:
        self._graph, self._forward, self._product_dtype = graph, forward, product_dtype
        self.rules = [rule_of(call) for call in graph.calls]
        for call, rule in zip(graph.calls, self.rules, strict=True):
            try:
                rule.check(call)
            except NotTwiceDifferentiable as error:
                raise self.located(call, error) from error
        unruled = [i for i, rule in enumerate(self.rules) if isinstance(rule, LocalDoubleBackward)]
        self.surely_from = unruled[-1] if unruled else 0
        self.unruled = sorted({graph.calls[i].name for i in unruled})
        for name in set(self.unruled) - _noted:
            _noted.add(name)
            _log.info("no rule for %s: it is differentiated by its own double backward", name)

    def run(
        self,
        direction: Sequence[Tensor],
        step: Step,
        dying: Callable[[Edge], object] = lambda edge: None,
        done: Callable[[int], object] = lambda i: None,
    ) -> Tensor | None:
        """The tangent of the losses, or None if they do not move.

        Args:
            direction: the tangents of the parameters.
            step: the tangents of a call's outputs, from its position, the call, its rule and the
                tangents of its inputs, of which one is not None.
            dying: called with an edge when its tangent is dropped, after its last use.
            done: called with the position of each call after it.
        """
        uses = dict(self._graph.uses)
        dots: dict[Edge, Tensor] = {}
        for edge, v in zip(self._graph.leaves, direction, strict=True):
            dots[edge] = v if edge not in dots else dots[edge] + v
        with products_in(self._product_dtype):
            for i, (call, rule) in enumerate(zip(self._graph.calls, self.rules, strict=True)):
                arriving = tuple([None if edge is None else dots.get(edge) for edge in call.inputs])
                if any(dot is not None for dot in arriving):
                    try:
                        outputs = step(i, call, rule, arriving)
                    except NotTwiceDifferentiable as error:
                        raise self.located(call, error) from error
                    for k, dot in enumerate(outputs):
                        if dot is not None:
                            moving = promoted(dot, call.kinds[k][1])
                            # A parameter that is itself computed moves on its own as well.
                            before = dots.get((call.node, k))
                            dots[call.node, k] = moving if before is None else before + moving
                for used in call.inputs:
                    if used is not None:
                        uses[used] -= 1
                        if uses[used] == 0:
                            dots.pop(used, None)
                            dying(used)
                done(i)
        return dots.get(self._graph.root)

    def in_range(
        self, direction: Sequence[Tensor], params: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], float]:
        """A direction whose tangents this graph can hold, and by how much it is longer."""
        half = self._product_dtype == torch.float16 or any(
            dtype == torch.float16 for call in self._graph.calls for _, dtype in call.kinds
        )
        return in_range(direction, params) if half else (direction, 1.0)

    def located(self, call: Call, error: NotTwiceDifferentiable) -> NotTwiceDifferentiable:
        """The refusal, with the call's name, module and line before it."""
        origin = self._forward.origins.of(call.name, call.node._sequence_nr())
        return NotTwiceDifferentiable(f"{origin}: {error}")
