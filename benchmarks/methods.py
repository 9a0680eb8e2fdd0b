"""Ways to the curvature along the gradient: each a gradient and v^T H v, from nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import Workload

from curvature import Tape


def gradient(work: Workload) -> Tensor:
    """The yardstick: an ordinary forward and backward pass; gives the slope <g, g>."""
    return inner(*[torch.autograd.grad(work.loss(), list(work.params.values()))] * 2)


def tangent(work: Workload) -> Tensor:
    return _taped(work, Tape())


def per_sample(work: Workload) -> Tensor:
    return _taped(work, Tape(), per_sample=True)


def low_memory(work: Workload) -> Tensor:
    return _taped(work, Tape(low_memory=True))


def bfloat16(work: Workload) -> Tensor:
    return _taped(work, Tape(tangent_dtype=torch.bfloat16))


def reference(work: Workload) -> Tensor:
    return _taped(work, Tape(engine="reference"))


def _taped(work: Workload, tape: Tape, *, per_sample: bool = False) -> Tensor:
    params = list(work.params.values())
    with tape:
        losses = work.losses() if per_sample else work.loss()
    g = tape.backward(losses, params, cotangents=not per_sample)
    return tape.directional(g, per_sample=per_sample).curvature


def product(work: Workload) -> Tensor:
    """A Hessian-vector product, by one more reverse sweep."""
    params = list(work.params.values())
    with Tape() as tape:
        loss = work.loss()
    g = tape.backward(loss, params)
    return inner(g, tape.hvp(g))


def reverse_over_reverse(work: Workload) -> Tensor:
    """What a user would write: the gradient with its graph, then the derivative of <g, v>."""
    params = list(work.params.values())
    with sdpa_kernel(SDPBackend.MATH):
        g = torch.autograd.grad(work.loss(), params, create_graph=True)
        v = [x.detach() for x in g]
        return inner(torch.autograd.grad(inner(g, v), params), v)


def jvp_of_grad(work: Workload) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        v = torch.func.grad(work.loss)(work.params)
        _, h = torch.func.jvp(torch.func.grad(work.loss), (work.params,), (v,))
        return inner(list(h.values()), list(v.values()))


def jvp_of_jvp(work: Workload) -> Tensor:
    """Forward over forward; silently wrong through normalisation in PyTorch."""
    with sdpa_kernel(SDPBackend.MATH):
        v = torch.func.grad(work.loss)(work.params)

        def along(p: dict[str, Tensor]) -> Tensor:
            return torch.func.jvp(work.loss, (p,), (v,))[1]

        return torch.func.jvp(along, (work.params,), (v,))[1]


def inner(left: object, right: object) -> Tensor:
    pairs = zip(left, right, strict=True)  # type: ignore[call-overload]
    return torch.stack([(a * b).sum() for a, b in pairs]).sum()


METHODS: dict[str, Callable[[Workload], Tensor]] = {
    "gradient": gradient,
    "tangent pass": tangent,
    "per sample": per_sample,
    "low memory": low_memory,
    "bfloat16": bfloat16,
    "hvp": product,
    "reference": reference,
    "reverse over reverse": reverse_over_reverse,
    "jvp of grad": jvp_of_grad,
    "jvp of jvp": jvp_of_jvp,
}
