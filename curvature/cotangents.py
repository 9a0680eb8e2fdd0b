"""The cotangents that operations need, kept from the backward pass or found again from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from curvature.graph import Graph, Tensors
from curvature.rules.rule import Rule


class Cotangents:
    """The cotangents of the outputs of every call that bends.

    Attributes:
        collected: whether a backward pass has run inside :meth:`collecting`.
    """

    def __init__(self, graph: Graph, rules: Sequence[Rule]) -> None:
        self._graph, self._rules = graph, rules
        self._kept: dict[int, Tensors] = {}
        self._versions: dict[int, list[int]] = {}
        self._recent: dict[int, Tensors] = {}
        self._followers = _followers(graph, rules)
        self.collected = False

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Around the backward pass of the mean loss."""
        sources = {self._source(i) for i, rule in enumerate(self._rules) if not rule.linear}
        hooks = [
            self._graph.calls[i].node.register_prehook(partial(self._keep, i)) for i in sources
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.collected = True

    def _keep(self, i: int, cotangents: Tensors) -> None:
        if self._graph.calls[i].is_python:
            # Its backward pass may write to them.
            cotangents = tuple(None if c is None else c.clone() for c in cotangents)
        self._kept[i] = cotangents
        self._versions[i] = _versions(cotangents)

    def apart(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients that may be written to: copies of those that share memory with a cotangent."""
        kept = {_memory(c) for each in self._kept.values() for c in each if c is not None} - {None}
        return [g.clone() if g is not None and _memory(g) in kept else g for g in gradients]

    def of(self, i: int) -> Tensors | None:
        """The cotangents of call i: kept, or pulled back through the operations that follow it."""
        if self._rules[i].linear:
            return None
        chain = [i]
        while chain[-1] in self._followers and chain[-1] not in self._recent:
            chain.append(self._followers[chain[-1]][0])
        last = chain.pop()
        cotangents = self._recent.get(last) or self._kept.get(last)
        if cotangents is None:
            return None
        if last in self._kept and _versions(self._kept[last]) != self._versions[last]:
            raise ValueError(
                f"the cotangents of {self._graph.calls[last].name} were written to after its "
                "backward pass, by a hook or the backward pass of another function: let these "
                "return new tensors"
            )
        # The calls on the way are asked for theirs next.
        self._recent = {last: cotangents}
        for j in reversed(chain):
            after, place = self._followers[j]
            cotangents = (self._pulled(j, after, cotangents)[place],)
            self._recent[j] = cotangents
        return cotangents

    def _pulled(self, i: int, after: int, cotangents: Tensors) -> Tensors:
        """Through the call after i."""
        call = self._graph.calls[after]
        if self._rules[i].needs_sums:
            return self._rules[after].pull_sums(call, cotangents, self._graph.calls[i].dim)
        return call.pull(*cotangents)

    def rest(self) -> None:
        """Drop what was found for the pass that has ended."""
        self._recent.clear()

    def _source(self, i: int) -> int:
        """The call whose cotangents tell those of call i."""
        while i in self._followers:
            i, _ = self._followers[i]
        return i


def _versions(cotangents: Tensors) -> list[int]:
    return [0 if c is None else c._version for c in cotangents]


def _memory(t: Tensor) -> int | None:
    # By its own identity, since the zeros of some derivatives have no address.
    return t.untyped_storage()._cdata if t.layout == torch.strided else None


def _followers(graph: Graph, rules: Sequence[Rule]) -> dict[int, tuple[int, int]]:
    """For calls used by a rematerialised one alone: that one, and the place among its inputs."""
    followers = {}
    made = {call.node: i for i, call in enumerate(graph.calls)}
    for j, (call, rule) in enumerate(zip(graph.calls, rules, strict=True)):
        for place, edge in enumerate(call.inputs):
            if rule.rematerialised and edge is not None and edge[0] in made:
                i = made[edge[0]]
                alone = graph.uses[edge] == 1 and edge != graph.root
                if alone and len(graph.calls[i].outputs) == 1:
                    followers[i] = j, place
    return followers
