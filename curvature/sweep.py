"""The tangent passes over a graph: Algorithm 2, second-order jets, and Hessian-vector products."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import Node

from curvature.contributions import Contributions
from curvature.errors import NotTwiceDifferentiable
from curvature.forward import Forward
from curvature.graph import Call, Edge, Graph, Tensors
from curvature.quadratic import Quadratic
from curvature.rules import rule_of
from curvature.rules.local import LocalDoubleBackward
from curvature.rules.precision import products_in
from curvature.rules.rule import Rule, add

_log = logging.getLogger(__name__)
_noted: set[str] = set()

# glibc gives freed memory back to the system above a threshold, which the largest block freed so
# far sets, up to 32 MB; without this, every pass would fault the pages of its temporaries in anew.
torch.empty(2**25 - 2**16, dtype=torch.uint8)


class Sweep:
    """Second derivatives of recorded losses with respect to their parameters.

    Args:
        losses: with a graph, a scalar or one per sample.
        params: tensors that the losses were computed from.
        forward: what was noted in the forward pass.
        product_dtype: the dtype in which to multiply matrices, if not the tangents' own.

    Raises:
        NotTwiceDifferentiable: an operation has neither a rule nor a double backward of its own.
    """

    def __init__(
        self,
        losses: Tensor,
        params: Sequence[Tensor],
        forward: Forward,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        self._graph = Graph(losses, params, forward.products)
        self._forward_pass, self._product_dtype = forward, product_dtype
        self._root = losses
        self._losses = losses.detach()
        self._params = list(params)
        self._rules = [rule_of(call) for call in self._graph.calls]
        for call, rule in zip(self._graph.calls, self._rules, strict=True):
            with self._located(call):
                rule.check(call)
        names = {
            call.name
            for call, rule in zip(self._graph.calls, self._rules, strict=True)
            if isinstance(rule, LocalDoubleBackward)
        }
        self._note = f" (double backward: {', '.join(sorted(names))})" if names else ""
        for name in sorted(names - _noted):
            _noted.add(name)
            _log.info("no rule for %s: it is differentiated by its own double backward", name)
        self._followers = self._find_followers()
        self._cotangents: dict[int, Tensors] = {}
        self._collected = False

    @staticmethod
    def available() -> bool:
        """Whether this PyTorch shows what its graph saved and what it leads to (2.5 or newer)."""
        return hasattr(Node, "_input_metadata")

    def directional(self, direction: Sequence[Tensor], *, per_sample: bool) -> Quadratic:
        """Slope and curvature of the mean loss, and of each sample's if asked."""
        value = self._losses.mean()
        if per_sample or not self._trustworthy():
            name = "jet" + self._note
            slopes, curvatures = self.jets(direction)
            samples = Quadratic(self._losses, slopes, curvatures, name) if per_sample else None
            return Quadratic(value, slopes.mean(), curvatures.mean(), name, samples)
        slopes, terms = self.adjoint(direction)
        curvature = _total([number for _, _, number in terms], value)
        return Quadratic(
            value,
            slopes.mean(),
            curvature,
            "tangent" + self._note,
            contributions=Contributions(self._forward_pass.origins, terms),
        )

    def _find_followers(self) -> dict[int, int]:
        """Calls used only by a light operation that bends: its cotangent tells theirs."""
        uses, followers = self._graph.uses(), {}
        made = {call.node: i for i, call in enumerate(self._graph.calls)}
        for j, (call, rule) in enumerate(zip(self._graph.calls, self._rules, strict=True)):
            edge = call.inputs[0]
            if rule.light and not rule.linear and edge is not None and edge[0] in made:
                i = made[edge[0]]
                alone = uses[edge] == 1 and edge != self._graph.root
                if alone and len(self._graph.calls[i].outputs) == 1:
                    followers[i] = j
        return followers

    def _cotangents_of(self, i: int) -> Tensors | None:
        if i not in self._followers:
            return self._cotangents.get(i)
        after = self._followers[i]
        cotangents = self._cotangents_of(after)
        return None if cotangents is None else self._graph.calls[after].pull(*cotangents)[:1]

    def _need_cotangents(self) -> None:
        if not self._collected:
            self._collect()
        if self._hooked():
            raise ValueError(
                "a backward hook may have changed the cotangents, so that they are not those of "
                'the loss: remove it, or use engine="reference", which differentiates through it'
            )

    def _collect(self) -> None:
        weights = torch.full_like(self._losses, 1 / self._losses.numel())
        with self.collecting():
            torch.autograd.grad(
                self._root, self._params, weights, retain_graph=True, allow_unused=True
            )

    def _trustworthy(self) -> bool:
        """Whether the cotangents were collected, and no hook had a hand in them."""
        return self._collected and not self._hooked()

    def _hooked(self) -> bool:
        # Modules with backward hooks put this operation into the graph.
        modules = any(call.name == "BackwardHookFunctionBackward" for call in self._graph.calls)
        return modules or self._forward_pass.hooks_interfere

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Around the backward pass of the mean loss: keep the cotangents that bend."""
        hooks = [
            call.node.register_prehook(_keeper(self._cotangents, i))
            for i, (call, rule) in enumerate(zip(self._graph.calls, self._rules, strict=True))
            if not rule.linear and i not in self._followers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._collected = True

    @torch.no_grad()
    def adjoint(
        self, direction: Sequence[Tensor], skip: Container[int] = ()
    ) -> tuple[Tensor, list[tuple[str, int, Tensor]]]:
        """The losses' tangent, and the terms <yhat, D²F[xdot, xdot]> of v^T H v of the mean.

        Algorithm 2 of *Adaptive scaling of the learning rate*. A term is given with the name of
        its operation and its number in autograd's sequence; calls to skip count for linear.
        """
        terms = []

        def step(i: int, call: Call, rule: Rule, dots: Tensors) -> Tensors:
            cotangents = None if i in skip else self._cotangents_of(i)
            if cotangents is None:
                return rule.tangent(call, dots)
            outputs, number = rule.adjoint(call, dots, cotangents)
            if number is not None:
                terms.append((call.name, call.node._sequence_nr(), number.to(self._losses)))
            return outputs

        return self._filled(self._forward(direction, step)), terms

    @torch.no_grad()
    def gauss_newton(
        self, direction: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The losses' tangent, and v^T G v: the terms of what ``outputs`` do not depend on.

        Raises:
            ValueError: a hook changed the cotangents that this needs.
        """
        self._need_cotangents()
        model = self._graph.behind(outputs)
        slopes, terms = self.adjoint(direction, skip=model)
        return slopes, _total([number for _, _, number in terms], self._losses)

    @torch.no_grad()
    def jets(self, direction: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The losses' first and second derivative along v, each in the shape of the losses.

        y'' = J x'' + D²F[x', x'], with x'' = 0 for the parameters. No cotangent takes part.
        """
        seconds: dict[Edge, Tensor] = {}

        def step(i: int, call: Call, rule: Rule, dots: Tensors) -> Tensors:
            ddots = tuple(None if e is None else seconds.get(e) for e in call.inputs)
            outputs, bends = rule.jet(call, dots)
            if any(d is not None for d in ddots):
                pushed = rule.tangent(call, ddots)
                bends = tuple(map(add, pushed, bends))
            for k, bend in enumerate(bends):
                if bend is not None:
                    seconds[call.node, k] = bend
            return outputs

        tangent = self._forward(direction, step, dying=lambda edge: seconds.pop(edge, None))
        return self._filled(tangent), self._filled(seconds.get(self._graph.root))

    @torch.no_grad()
    def hvp(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """H v of the mean loss, by one more reverse sweep: equation (24), appendix A.1.

        Raises:
            ValueError: a hook changed the cotangents that this needs.
        """
        self._need_cotangents()
        moving: list[tuple[int, Tensors]] = []

        def step(i: int, call: Call, rule: Rule, dots: Tensors) -> Tensors:
            moving.append((i, dots))
            return rule.tangent(call, dots)

        self._forward(vector, step)
        cots: dict[Edge, Tensor] = {}
        kept = set(self._graph.leaves)
        while moving:
            i, dots = moving.pop()
            call, rule = self._graph.calls[i], self._rules[i]
            turned = tuple(cots.get(edge) for edge in call.outputs)
            moved = any(t is not None for t in turned)
            with self._located(call):
                parts = rule.turn(call, dots, self._cotangents_of(i), turned if moved else None)
            for done in call.outputs:
                if done not in kept:
                    cots.pop(done, None)
            for part in parts:
                for edge, cot in zip(call.inputs, part, strict=True):
                    if edge is not None and cot is not None:
                        cots[edge] = cot if edge not in cots else cots[edge] + cot
        return [
            cots.get(edge, torch.zeros_like(p)).to(p)
            for edge, p in zip(self._graph.leaves, self._params, strict=True)
        ]

    def _forward(
        self,
        direction: Sequence[Tensor],
        step: Callable[[int, Call, Rule, Tensors], Tensors],
        dying: Callable[[Edge], object] = lambda edge: None,
    ) -> Tensor | None:
        """Carry tangents from the parameters to the losses, dropping each after its last use."""
        with products_in(self._product_dtype):
            return self._carry(direction, step, dying)

    def _carry(
        self,
        direction: Sequence[Tensor],
        step: Callable[[int, Call, Rule, Tensors], Tensors],
        dying: Callable[[Edge], object],
    ) -> Tensor | None:
        uses = self._graph.uses()
        dots: dict[Edge, Tensor] = {}
        for edge, v in zip(self._graph.leaves, direction, strict=True):
            dots[edge] = v if edge not in dots else dots[edge] + v
        for i, (call, rule) in enumerate(zip(self._graph.calls, self._rules, strict=True)):
            arriving = tuple(None if e is None else dots.get(e) for e in call.inputs)
            if any(d is not None for d in arriving):
                with self._located(call):
                    outputs = step(i, call, rule, arriving)
                for k, dot in enumerate(outputs):
                    if dot is not None:
                        # A parameter that is itself computed moves on its own as well.
                        before = dots.get((call.node, k))
                        dots[call.node, k] = dot if before is None else before + dot
            for used in call.inputs:
                if used is not None:
                    uses[used] -= 1
                    if uses[used] == 0:
                        dots.pop(used, None)
                        dying(used)
        return dots.get(self._graph.root)

    @contextmanager
    def _located(self, call: Call) -> Iterator[None]:
        try:
            yield
        except NotTwiceDifferentiable as error:
            origin = self._forward_pass.origins.of(call.name, call.node._sequence_nr())
            raise NotTwiceDifferentiable(f"{origin}: {error}") from error

    def _filled(self, losses: Tensor | None) -> Tensor:
        if losses is None:
            return torch.zeros_like(self._losses)
        return losses.to(self._losses.dtype).expand_as(self._losses)


def _total(numbers: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(numbers).sum() if numbers else like.new_zeros(())


def _keeper(store: dict[int, Tensors], i: int) -> Callable[[Tensors], None]:
    def keep(cotangents: Tensors) -> None:
        store[i] = cotangents

    return keep
