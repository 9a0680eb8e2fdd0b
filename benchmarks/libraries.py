"""The same number by other libraries, each where it is installed (extra ``comparison``).

PyHessian evaluates in evaluation mode, so that of a model with batch norm it gives another
number. JAX runs its own transcription of a model, for which there is one, compiled.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from methods import inner
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import Workload


class _Rows(nn.Module):
    """A model whose tokens are rows, as these libraries' losses want them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(0, -2)


def curvlinops(work: Workload) -> Tensor:
    from curvlinops import HessianLinearOperator

    params = list(work.params.values())
    batch = [(work.inputs, work.targets.flatten())]
    with sdpa_kernel(SDPBackend.MATH):
        g = list(torch.autograd.grad(work.loss(), params))
        H = HessianLinearOperator(
            _Rows(work.model),
            nn.CrossEntropyLoss(),
            params,
            batch,
            check_deterministic=False,
            num_data=len(work.targets.flatten()),
            batch_size_fn=lambda _: len(work.targets.flatten()),
        )
        return inner(H @ g, g)


def pyhessian(work: Workload) -> Tensor:
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    training = work.model.training
    with sdpa_kernel(SDPBackend.MATH):
        batch = (work.inputs, work.targets.flatten())
        made = hessian(_Rows(work.model), nn.CrossEntropyLoss(), data=batch, cuda=False)
        g = [x.detach() for x in made.gradsH]
        value = inner(hessian_vector_product(made.gradsH, made.params, g), g)
    # It leaves gradients whose graph holds the parameters that hold them.
    work.model.zero_grad()
    work.model.train(training)
    return value


def backpack(work: Workload) -> Tensor:
    from backpack.hessianfree.hvp import hessian_vector_product

    params = list(work.params.values())
    with sdpa_kernel(SDPBackend.MATH):
        loss = work.loss()
        g = torch.autograd.grad(loss, params, create_graph=True)
        v = [x.detach() for x in g]
        return inner(hessian_vector_product(loss, params, v, grad_params=g), v)


def _jax_mlp(params: dict[str, Any], x: Any) -> Any:
    import jax.numpy as jnp

    for layer in ("0", "2"):
        x = jnp.tanh(x @ params[layer + ".weight"].T + params[layer + ".bias"])
    return x @ params["4.weight"].T + params["4.bias"]


def _jax_convolution(params: dict[str, Any], layer: str, x: Any, padding: int) -> Any:
    import jax

    out = jax.lax.conv_general_dilated(
        x, params[layer + ".weight"], (1, 1), [(padding, padding)] * 2
    )
    return out + params[layer + ".bias"][:, None, None]


def _jax_lenet(params: dict[str, Any], x: Any) -> Any:
    import jax.numpy as jnp

    for layer, padding in (("0", 2), ("3", 0)):
        x = jnp.tanh(_jax_convolution(params, layer, x, padding))
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
    x = x.reshape(len(x), -1)
    for layer in ("7", "9"):
        x = jnp.tanh(x @ params[layer + ".weight"].T + params[layer + ".bias"])
    return x @ params["11.weight"].T + params["11.bias"]


def _jax_vgg(params: dict[str, Any], x: Any) -> Any:
    import jax

    for layer, pooled in ((0, 1), (3, 1), (6, 0), (8, 1), (11, 0), (13, 1), (16, 0), (18, 1)):
        x = jax.nn.softplus(_jax_convolution(params, str(layer), x, 1))
        if pooled:
            n, c, h, w = x.shape
            x = x.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))
    x = x.reshape(len(x), -1)
    return x @ params["22.weight"].T + params["22.bias"]


def _jax_gpt(params: dict[str, Any], x: Any) -> Any:
    import jax
    import jax.numpy as jnp

    def linear(name: str, y: Any) -> Any:
        return y @ params[name + ".weight"].T + params[name + ".bias"]

    def norm(name: str, y: Any) -> Any:
        y = y - y.mean(-1, keepdims=True)
        y = y / jnp.sqrt((y * y).mean(-1, keepdims=True) + 1e-5)
        return y * params[name + ".weight"] + params[name + ".bias"]

    batch, tokens = x.shape
    mask = jnp.tril(jnp.ones((tokens, tokens), bool))
    y = params["tokens.weight"][x] + params["positions.weight"][jnp.arange(tokens)]
    for block in range(4):
        at = f"blocks.{block}."
        parts = linear(at + "qkv", norm(at + "first_norm", y)).reshape(batch, tokens, 3, 4, -1)
        q, k, v = parts.transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
        heads = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1) @ v
        y = y + linear(at + "out", heads.transpose(0, 2, 1, 3).reshape(batch, tokens, -1))
        inner = jax.nn.gelu(linear(at + "up", norm(at + "second_norm", y)), approximate=False)
        y = y + linear(at + "down", inner)
    return linear("head", norm("norm", y))


_JAX_MODELS = {"MLP": _jax_mlp, "LeNet": _jax_lenet, "VGG11": _jax_vgg, "GPT": _jax_gpt}


@cache
def _jax_functions(name: str) -> tuple[Any, Any, Any]:
    """The gradient's square, and with it the curvature by jvp of grad and by jet, compiled."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.jet import jet

    model = _JAX_MODELS[name]

    def loss(params: Any, x: Any, y: Any) -> Any:
        logits = jax.nn.log_softmax(model(params, x).reshape(y.size, -1))
        return -jnp.take_along_axis(logits, y.reshape(-1, 1), 1).mean()

    def dot(a: Any, b: Any) -> Any:
        return sum(jnp.vdot(a[k], b[k]) for k in a)

    def gradient(params: Any, x: Any, y: Any) -> Any:
        g = jax.grad(loss)(params, x, y)
        return dot(g, g)

    def jvp_of_grad(params: Any, x: Any, y: Any) -> Any:
        g = jax.grad(loss)(params, x, y)
        _, h = jax.jvp(lambda p: jax.grad(loss)(p, x, y), (params,), (g,))
        return dot(h, g)

    def by_jet(params: Any, x: Any, y: Any) -> Any:
        g = jax.grad(loss)(params, x, y)
        along = lambda t: loss({k: p + t * g[k] for k, p in params.items()}, x, y)  # noqa: E731
        return jet(along, (0.0,), ((1.0, 0.0),))[1][1]

    return jax.jit(gradient), jax.jit(jvp_of_grad), jax.jit(by_jet)


def _jax(which: int) -> Callable[[Workload], Tensor]:
    def method(work: Workload) -> Tensor:
        import jax.numpy as jnp

        if work.name not in _JAX_MODELS:
            raise NotImplementedError("there is no transcription for JAX")
        params = {k: jnp.asarray(p.detach().numpy()) for k, p in work.params.items()}
        x, y = (jnp.asarray(t.numpy()) for t in (work.inputs, work.targets))
        return torch.tensor(float(_jax_functions(work.name)[which](params, x, y)))

    return method


_ALL: dict[str, tuple[str, Callable[[Workload], Tensor]]] = {
    "curvlinops": ("curvlinops", curvlinops),
    "PyHessian": ("pyhessian", pyhessian),
    "backpack": ("backpack", backpack),
    "JAX: gradient alone": ("jax", _jax(0)),
    "JAX: jvp of grad": ("jax", _jax(1)),
    "JAX: jet": ("jax", _jax(2)),
}
METHODS = {
    name: method for name, (module, method) in _ALL.items() if importlib.util.find_spec(module)
}
