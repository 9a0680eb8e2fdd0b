"""The common case of a module, a loss and a batch, as a function of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from curvature.arguments import check_callable


class Objective:
    """``J(params) = loss(model(inputs), target)``: a function that the verbs of this package take.

    Args:
        model: any module. Its mode (train or eval), buffers and frozen parameters are used as
            they are at each call.
        loss: ``loss(output, target)``, a scalar or one loss per sample (``reduction="none"``).
        batch: ``(inputs, target)``. ``inputs`` is one tensor, a tuple of positional arguments,
            or a mapping of keyword arguments of the model.

    Attributes:
        params: the model's trainable parameters by name, as :func:`dict`; read at each access.

    Raises:
        TypeError: ``model`` is no module or a scripted one, ``loss`` no function, ``batch`` no
            pair, or ``params`` no mapping.
        ValueError: the batch is empty, or ``params`` has a name that the model has not.

    Example:
        >>> import torch, curvature
        >>> model = torch.nn.Linear(3, 1)
        >>> batch = torch.ones(4, 3), torch.zeros(4, 1)
        >>> J = Objective(model, torch.nn.functional.mse_loss, batch)
        >>> ones = {name: torch.ones_like(p) for name, p in J.params.items()}
        >>> curvature.directional(J, J.params, ones).curvature  # 2 (3 + 1)^2
        tensor(32.)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        batch: tuple[Any, Any],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                "model is a scripted module, whose parameters cannot be exchanged for others; "
                "pass torch.nn.Sequential(model)"
            )
        check_callable("loss", loss)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError("batch must be a pair (inputs, target)")
        tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)]
        if tensors and not any(t.numel() for t in tensors):
            raise ValueError("the batch is empty: none of its tensors has an entry")
        self.model = model
        self.loss = loss
        self.inputs, self.target = batch

    @property
    def params(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        if not isinstance(params, Mapping):
            raise TypeError(
                f"params is a {type(params).__name__}; pass the model's parameters by name, as "
                "J.params or dict(model.named_parameters())"
            )
        known = {n for n, _ in [*self.model.named_parameters(), *self.model.named_buffers()]}
        known |= {n for n, _ in self.model.named_parameters(remove_duplicate=False)}
        if unknown := sorted(params.keys() - known):
            raise ValueError(
                f"params names {', '.join(map(repr, unknown))}, which the model does not have"
            )
        args, kwargs = (), {}
        if isinstance(self.inputs, Mapping):
            kwargs = dict(self.inputs)
        else:
            args = self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)
        output = functional_call(self.model, dict(params), args, kwargs)
        return self.loss(output, self.target)
