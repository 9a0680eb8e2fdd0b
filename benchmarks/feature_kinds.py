"""What a feature of a training loop does to it; features.py lists them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

F64 = torch.float64


class Net(nn.Module):
    """Three layers, between which a feature may put something."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.between = nn.Identity() if between is None else between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.deep(self.between(self.first(x))))

    def deep(self, x: Tensor) -> Tensor:
        return self.middle(x.tanh()).tanh()


class Feature:
    """Something in a training loop; the defaults are those of a loop without any.

    Attributes:
        refused: the message by column, where it cannot be served.
        dtype: of the parameters.
        rtol: of the numbers, against those that float64 gives without the feature.
        eps: to which a loss is rounded.
    """

    dtype = F64
    rtol = 1e-6
    eps = torch.finfo(F64).eps

    def __init__(self, refused: dict[str, str] | None = None) -> None:
        self.refused = refused or {}

    def net(self) -> nn.Module:
        return Net()

    def called(self, net: nn.Module) -> Any:
        """What the closure calls, with the same outputs as the network."""
        return net

    def groups(self, net: nn.Module) -> list[Any]:
        return list(net.parameters())

    def base(self, groups: list[Any], default: Callable[[Any], Any]) -> torch.optim.Optimizer:
        return default(groups)

    def options(self) -> dict[str, Any]:
        return {}

    def parts(self) -> list[slice]:
        """The parts of the batch that a closure each evaluates."""
        return [slice(None)]

    def closure(self, losses: Callable[[], Tensor], optimizer: Any) -> Callable[[], Any]:
        return losses

    def attach(self, optimizer: Any) -> Callable[[], Any]:
        """What the loop calls after each step."""
        return lambda: None

    def clip(self, params: list[Tensor]) -> None:
        """What the loop does to the gradients before a step."""

    def penalty(self, params: dict[str, Tensor]) -> Any:
        """What coupled weight decay adds to the loss."""
        return 0.0


class Frozen(Feature):
    def net(self) -> nn.Module:
        net = Net()
        net.first.requires_grad_(False)
        return net


class Adapted(nn.Module):
    """A frozen layer and a product of low rank beside it, as in LoRA."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, layer.in_features) / 2)
        self.up = nn.Parameter(torch.zeros(layer.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(F.linear(x, self.down), self.up)


class Adapters(Feature):
    def net(self) -> nn.Module:
        net = Net().requires_grad_(False)
        net.first, net.last = Adapted(net.first), Adapted(net.last)  # type: ignore[assignment]
        return net

    def groups(self, net: nn.Module) -> list[Any]:
        return [p for p in net.parameters() if p.requires_grad]


class Between(Feature):
    def __init__(
        self, make: Callable[[], nn.Module], refused: dict[str, str] | None = None
    ) -> None:
        super().__init__(refused)
        self._make = make

    def net(self) -> nn.Module:
        return Net(self._make())


class Tied(Feature):
    def net(self) -> nn.Module:
        net = Net(nn.Linear(5, 5))
        net.between.weight = net.middle.weight
        return net


class Checkpointed(Feature):
    def __init__(self, reentrant: bool, refused: dict[str, str] | None = None) -> None:
        super().__init__(refused)
        self._reentrant = reentrant

    def called(self, net: nn.Module) -> Any:
        net.forward = lambda x: net.last(  # type: ignore[method-assign]
            checkpoint(net.deep, net.between(net.first(x)), use_reentrant=self._reentrant)
        )
        return net


class Compiled(Feature):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self._backend = backend

    def called(self, net: nn.Module) -> Any:
        return torch.compile(net, backend=self._backend)


class Clipped(Feature):
    def __init__(self, clip: Callable[[list[Tensor]], Any], *, inside: bool = False) -> None:
        super().__init__()
        self.clip, self._inside = clip, inside  # type: ignore[method-assign]

    def options(self) -> dict[str, Any]:
        return {} if self._inside else {"clip": self.clip}

    def closure(self, losses: Callable[[], Tensor], optimizer: Any) -> Callable[[], Any]:
        if not self._inside:
            return losses

        def backward() -> Tensor:
            optimizer.zero_grad()
            loss = losses().mean()
            loss.backward()
            self.clip([p for g in optimizer.param_groups for p in g["params"]])
            return loss

        return backward


class Parts(Feature):
    def parts(self) -> list[slice]:
        return [slice(0, 5), slice(5, 6), slice(6, 9)]


class Groups(Feature):
    def groups(self, net: nn.Module) -> list[Any]:
        first, *rest = net.parameters()
        return [{"params": [first], "lr": 0.02}, {"params": rest, "lr": 0.1}]


class Scheduled(Groups):
    def attach(self, optimizer: Any) -> Callable[[], Any]:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5).step


class Decay(Feature):
    def __init__(self, decay: float, make: Callable[..., Any], *, coupled: bool) -> None:
        super().__init__()
        self._decay, self._make, self._coupled = decay, make, coupled

    def base(self, groups: list[Any], default: Callable[[Any], Any]) -> torch.optim.Optimizer:
        return self._make(groups, lr=0.1, weight_decay=self._decay)

    def penalty(self, params: dict[str, Tensor]) -> Any:
        squares = sum(p.square().sum() for p in params.values())
        return self._decay / 2 * squares if self._coupled else 0.0


class Autocast(Feature):
    dtype = torch.float32

    def __init__(self, low: torch.dtype, rtol: float, *, scale: float | None = None) -> None:
        super().__init__()
        self._low, self.rtol, self._scale = low, rtol, scale
        self.eps = torch.finfo(low).eps

    def base(self, groups: list[Any], default: Callable[[Any], Any]) -> torch.optim.Optimizer:
        # Others make unit steps of gradients that are rounding alone.
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    def options(self) -> dict[str, Any]:
        if self._scale is None:
            return {}
        return {"scaler": torch.amp.GradScaler("cpu", init_scale=self._scale)}

    def called(self, net: nn.Module) -> Any:
        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", self._low):
                return type(net).forward(net, x)

        net.forward = call  # type: ignore[method-assign]
        return net


class Half(Feature):
    dtype = torch.bfloat16


class Devices(Feature):
    """Layers on other devices than the rest."""

    def __init__(self, names: Sequence[str], refused: dict[str, str]) -> None:
        super().__init__(refused)
        self._names = names

    def groups(self, net: nn.Module) -> list[Any]:
        for name in self._names:
            net.get_submodule(name).to("meta")
        return list(net.parameters())


class Table(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 5, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table((x[:, :1].sign() + 1).long().sum(1))
