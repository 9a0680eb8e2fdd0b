"""What the optimizers of this package share: the frame of a step, and its refusals."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optim.ranges import check_number, check_param_group

_NUMBERS = ("lr", "alpha", "beta", "sigma", "eps", "weight_decay")


class Checked(Optimizer):
    """A torch optimizer that refuses what it cannot step before it has moved anything."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what it does not name is taken from the defaults.

        Raises:
            ValueError: a hyperparameter is out of range, or there are no parameters.
            TypeError: one is no number, or a parameter is complex or integer.

        Example:
            >>> import torch
            >>> from optim import DINAdam
            >>> a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
            >>> optimizer = DINAdam([a])
            >>> optimizer.add_param_group({"params": [b], "beta": 0.2})
            >>> [group["beta"] for group in optimizer.param_groups]
            [0.9, 0.2]
        """
        check_param_group(param_group)
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                self.param_groups.pop()
                raise TypeError(f"{type(self).__name__} needs real parameters, got {p.dtype}")

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        """Take one step from the gradients in ``p.grad``.

        Raises:
            ValueError: a hyperparameter of a group is out of range by now.
            TypeError: a gradient is sparse, or a parameter has changed its dtype.

        Example:
            >>> import torch
            >>> from optim import DINAdam
            >>> x = torch.nn.Parameter(torch.tensor([1.0]))
            >>> x.grad = torch.tensor([2.0])
            >>> DINAdam([x], lr=0.01, betas=(0.9, 0.0)).step()  # lr (0.91 * 0.1 + 0.09) g / |g|
            >>> x.detach()
            tensor([0.9982])
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check(group)
        self._check_gradients()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _check(self, group: dict[str, Any]) -> None:
        for name in _NUMBERS:
            if name in group:
                check_number(name, group[name])
        if "betas" in group:
            betas = group["betas"]
            if not isinstance(betas, (tuple, list)) or len(betas) != 2:
                raise TypeError(f"betas is {betas!r}; give two numbers")
            for i, beta in enumerate(betas):
                check_number(f"betas[{i}]", beta)
        self._check_group(group)

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided:
                    raise TypeError(f"{type(self).__name__} does not support sparse gradients")
                for held in self.state.get(p, {}).values():
                    if isinstance(held, Tensor) and held.dtype != p.dtype:
                        raise TypeError(
                            f"a state has dtype {held.dtype} and its parameter {p.dtype}, as after "
                            "model.double(): load_state_dict(state_dict()) converts it"
                        )

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse hyperparameters for which the step is not defined."""

    @abstractmethod
    def _step_group(self, group: dict[str, Any]) -> None:
        """Advance the states of the parameters with a gradient, and move them."""
