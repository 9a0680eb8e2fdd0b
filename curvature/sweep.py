"""What tangent passes over a graph answer: Algorithm 2, jets, and Hessian-vector products."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from curvature.allocation import keep_freed_memory
from curvature.contributions import Contributions
from curvature.cotangents import Cotangents
from curvature.differentiable import WeightNorm
from curvature.errors import NotTwiceDifferentiable
from curvature.forward import Forward
from curvature.graph import Call, Edge, Graph, Tensors
from curvature.half_precision import over, promoted
from curvature.pushforward import Pushforward
from curvature.quadratic import Quadratic
from curvature.rules.rule import Rule
from curvature.saved import Saved

keep_freed_memory()


class Sweep:
    """Second derivatives of recorded losses with respect to their parameters.

    Args:
        losses: with a graph, a scalar or one per sample.
        params: tensors that the losses were computed from.
        forward: what was noted in the forward pass.
        product_dtype: the dtype in which to multiply matrices, if not the tangents' own.

    Raises:
        NotTwiceDifferentiable: an operation has neither a rule nor a double backward of its own.

    Attributes:
        cotangents: to be collected in the backward pass; where they are not, :meth:`directional`
            goes without, and :meth:`hvp` runs another.
    """

    def __init__(
        self,
        losses: Tensor,
        params: Sequence[Tensor],
        forward: Forward,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        forward.forget_products()
        self._graph = Graph(losses, params, forward.products)
        self._pushforward = Pushforward(self._graph, forward, product_dtype)
        self._forward = forward
        self._root = losses
        self._losses = losses.detach().clone()
        self._params = list(params)
        unruled = ", ".join(self._pushforward.unruled)
        self._note = f" (double backward: {unruled})" if unruled else ""
        self.cotangents = Cotangents(self._graph, self._pushforward.rules)

    @staticmethod
    def available() -> bool:
        """Whether this PyTorch shows what its graph saved and what it leads to (2.5 or newer)."""
        return hasattr(Node, "_input_metadata")

    def directional(self, direction: Sequence[Tensor], *, per_sample: bool) -> Quadratic:
        """Slope and curvature of the mean loss, and of each sample's if asked."""
        value = self._losses.mean()
        if per_sample or not self._trustworthy():
            name = "jet" + self._note
            slopes, curvatures = self.jets(direction, last=True)
            samples = Quadratic(self._losses, slopes, curvatures, name) if per_sample else None
            return Quadratic(value, slopes.mean(), curvatures.mean(), name, samples)
        slopes, terms = self.adjoint(direction)
        curvature = _total([number for _, _, number in terms], value)
        return Quadratic(
            value,
            slopes.mean(),
            curvature,
            "tangent" + self._note,
            contributions=Contributions(self._forward.origins, terms),
        )

    def _need_cotangents(self) -> None:
        if not self.cotangents.collected:
            self._collect()
        if self.hooked():
            raise ValueError(
                "a backward hook may have changed the cotangents, so that they are not those of "
                'the loss: remove it, or use engine="reference", which differentiates through it'
            )

    def _collect(self) -> None:
        weights = torch.full_like(self._losses, 1 / self._losses.numel())
        with self.cotangents.collecting():
            torch.autograd.grad(
                self._root, self._params, weights, retain_graph=True, allow_unused=True
            )

    def _trustworthy(self) -> bool:
        """Whether the cotangents were collected, and no hook had a hand in them."""
        return self.cotangents.collected and not self.hooked()

    def hooked(self) -> bool:
        """Whether a hook may have changed a cotangent of the backward pass."""
        # Modules with backward hooks put this operation into the graph.
        modules = any(call.name == "BackwardHookFunctionBackward" for call in self._graph.calls)
        return modules or self._forward.hooks_interfere

    def doubtful(self) -> bool:
        """Whether the backward pass may compute another gradient than that of the loss."""
        functions = {call.function for call in self._graph.calls if call.is_python}
        return self.hooked() or bool(functions - {WeightNorm})

    def in_double(self) -> bool:
        """Whether all was computed in double precision."""
        kinds = {dtype for call in self._graph.calls for _, dtype in call.kinds}
        return kinds <= {torch.float64, torch.complex128}

    def checked(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients that autograd gave, as tensors that may be written to.

        Raises:
            NotTwiceDifferentiable: autograd reached a parameter that the graph does not show.
        """
        for k, g in enumerate(gradients):
            if g is not None and not self._graph.reaches(k):
                raise NotTwiceDifferentiable(
                    f"autograd gives a gradient to a parameter of type {type(self._params[k])}, "
                    "but shows no path to it: make it a plain torch.nn.Parameter"
                )
        return self.cotangents.apart(gradients)

    @torch.no_grad()
    def adjoint(
        self, direction: Sequence[Tensor], skip: Container[int] = ()
    ) -> tuple[Tensor, list[tuple[str, int, Tensor]]]:
        """The losses' tangent, and the terms <yhat, D²F[xdot, xdot]> of v^T H v of the mean.

        Algorithm 2 of *Adaptive scaling of the learning rate*. A term is given with the name of
        its operation and its number in autograd's sequence; calls to skip count for linear.
        """
        terms = []
        direction, s = self._pushforward.in_range(direction, self._params)

        def step(i: int, call: Call, rule: Rule, dots: Tensors) -> Tensors:
            cotangents = None if i in skip else self.cotangents.of(i)
            if cotangents is None:
                return rule.tangent(call, dots)
            outputs, number = rule.adjoint(call, dots, cotangents)
            if number is not None:
                number = over(number.to(self._losses), s**2)
                terms.append((call.name, call.node._sequence_nr(), number))
            return outputs

        tangent = self._pushforward.run(direction, step)
        self.cotangents.rest()
        return over(self._filled(tangent), s), terms

    @torch.no_grad()
    def gauss_newton(
        self, direction: Sequence[Tensor], outputs: Sequence[Tensor | GradientEdge]
    ) -> Quadratic:
        """Slope, and the curvature v^T G v: the terms of what ``outputs`` do not depend on.

        Raises:
            ValueError: a hook changed the cotangents that this needs, or the outputs are others.
        """
        self._need_cotangents()
        model = self._graph.behind(outputs)
        if not model and not any(self._graph.is_parameter(y) for y in outputs):
            raise ValueError("the loss was not computed from these outputs, nor they from params")
        slopes, terms = self.adjoint(direction, skip=model)
        curvature = _total([number for _, _, number in terms], self._losses)
        return Quadratic(self._losses.mean(), slopes.mean(), curvature, "gauss-newton")

    @torch.no_grad()
    def jets(self, direction: Sequence[Tensor], *, last: bool = False) -> tuple[Tensor, Tensor]:
        """The losses' first and second derivative along v, each in the shape of the losses.

        y'' = J x'' + D²F[x', x'], with x'' = 0 for the parameters. No cotangent takes part. With
        ``last``, what the forward pass lets be freed is freed on the way.
        """
        seconds: dict[Edge, Tensor] = {}
        direction, s = self._pushforward.in_range(direction, self._params)

        def step(i: int, call: Call, rule: Rule, dots: Tensors) -> Tensors:
            ddots = tuple(None if e is None else seconds.get(e) for e in call.inputs)
            outputs, bent = rule.jet(call, dots, ddots)
            for k, second in enumerate(bent):
                if second is not None:
                    seconds[call.node, k] = promoted(second, call.kinds[k][1])
            return outputs

        saved = self._forward.saved if last else None
        tangent = self._pushforward.run(
            direction,
            step,
            dying=lambda edge: seconds.pop(edge, None),
            done=lambda i: None if saved is None else self._free(i, saved),
        )
        second = self._filled(seconds.get(self._graph.root))
        return over(self._filled(tangent), s), over(second, s**2)

    def _free(self, i: int, saved: Saved) -> None:
        """Drop what call i has saved; but as long as a call may refuse, it is needed to go back."""
        if i < self._pushforward.surely_from:
            return
        for call in self._graph.calls[0 if i == self._pushforward.surely_from else i : i + 1]:
            call.product = None
            self._forward.products.pop(call.node, None)
            saved.free(call.node)

    @torch.no_grad()
    def hvp(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """H v of the mean loss, by one more reverse sweep: equation (24), appendix A.1.

        Raises:
            ValueError: a hook changed the cotangents that this needs.
        """
        self._need_cotangents()
        vector, s = self._pushforward.in_range(vector, self._params)
        moving: list[tuple[int, Tensors, Any]] = []

        def step(i: int, call: Call, rule: Rule, dots: Tensors) -> Tensors:
            outputs, residual = rule.tangent_with_residual(call, dots)
            moving.append((i, dots, residual))
            return outputs

        self._pushforward.run(vector, step)
        cots: dict[Edge, Tensor] = {}
        leaves = set(self._graph.leaves)
        while moving:
            i, dots, residual = moving.pop()
            call, rule = self._graph.calls[i], self._pushforward.rules[i]
            cotangent_dots = tuple(cots.get(edge) for edge in call.outputs)
            cotangents = self.cotangents.of(i) or (None,) * len(cotangent_dots)
            try:
                changes = rule.pullback_tangent(call, dots, cotangents, cotangent_dots, residual)
            except NotTwiceDifferentiable as error:
                raise self._pushforward.located(call, error) from error
            for done in call.outputs:
                if done not in leaves:
                    cots.pop(done, None)
            for edge, cot in zip(call.inputs, changes, strict=True):
                if edge is not None and cot is not None:
                    dense = cot.to_dense()
                    cots[edge] = dense if edge not in cots else cots[edge] + dense
        self.cotangents.rest()
        return [
            over(cots[edge].to(p), s) if edge in cots else torch.zeros_like(p)
            for edge, p in zip(self._graph.leaves, self._params, strict=True)
        ]

    def _filled(self, losses: Tensor | None) -> Tensor:
        if losses is None:
            return torch.zeros_like(self._losses)
        return losses.to(self._losses.dtype).expand_as(self._losses)


def _total(numbers: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(numbers).sum() if numbers else like.new_zeros(())
