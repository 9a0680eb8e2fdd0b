"""The models that the benchmarks run, with a batch each; random data, since only cost is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


@dataclass
class Workload:
    """A model and a batch; the loss is cross entropy, one per sample or its mean."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    name: str = ""

    @property
    def params(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def losses(self, params: dict[str, Tensor] | None = None) -> Tensor:
        if params is None:
            logits = self.model(self.inputs)
        else:
            # Copies, since torch.func refuses writes to the buffers of batch norm.
            buffers = {name: b.clone() for name, b in self.model.named_buffers()}
            logits = torch.func.functional_call(self.model, (params, buffers), (self.inputs,))
        # Tokens of a sequence are one sample.
        each = F.cross_entropy(logits.flatten(0, -2), self.targets.flatten(), reduction="none")
        return each.view(len(self.targets), -1).mean(1)

    def loss(self, params: dict[str, Tensor] | None = None) -> Tensor:
        return self.losses(params).mean()

    def double(self) -> Workload:
        inputs = self.inputs.double() if self.inputs.is_floating_point() else self.inputs
        return Workload(self.model.double(), inputs, self.targets, self.name)


def _classification(model: nn.Module, *shape: int) -> Workload:
    return Workload(model, torch.randn(shape), torch.randint(10, shape[:1]))


def mlp() -> Workload:
    """784-1024-1024-10 with tanh, batch 256."""
    model = nn.Sequential(
        nn.Linear(784, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 10)
    )
    return _classification(model, 256, 784)


def lenet() -> Workload:
    """LeNet-5 with tanh and average pooling, batch 256 of 28x28."""
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.Tanh(),
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, 10),
    )
    return _classification(model, 256, 1, 28, 28)


def vgg() -> Workload:
    """VGG11 with softplus, batch 32 of 32x32."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        if width:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.Softplus()]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    return _classification(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)), 32, 3, 32, 32)


class _Residual(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.first_norm, self.second_norm = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            conv = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))


def resnet() -> Workload:
    """ResNet18 for 32x32 images, batch norm in training mode, batch 32."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    channels = 64
    for width in (64, 64, 128, 128, 256, 256, 512, 512):
        layers.append(_Residual(channels, width, 1 if width == channels else 2))
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    return _classification(nn.Sequential(*layers), 32, 3, 32, 32)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(self.first_norm(x)).view(batch, tokens, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.second_norm(x))))


class _Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = 192
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 65, width))
        self.blocks = nn.Sequential(*[_Block(width, 3, causal=False) for _ in range(6)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.first.expand(len(x), -1, -1), y], 1) + self.positions
        return self.head(self.norm(self.blocks(y))[:, 0])


def vit() -> Workload:
    """ViT-tiny: 6 blocks x 192, 4x4 patches of 32x32 images, batch 32."""
    return _classification(_Vit(), 32, 3, 32, 32)


class _Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(65, 128), nn.Embedding(128, 128)
        self.blocks = nn.Sequential(*[_Block(128, 4, causal=True) for _ in range(4)])
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 65)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(y)))


def gpt() -> Workload:
    """GPT: 4 blocks x 128, 65 characters, batch 16 x 128."""
    return Workload(_Gpt(), torch.randint(65, (16, 128)), torch.randint(65, (16, 128)))


class _Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10_000, 200)
        self.lstm = nn.LSTM(200, 200, 2, batch_first=True)
        self.head = nn.Linear(200, 10_000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


def lstm() -> Workload:
    """The word language model of PyTorch's examples: 2 LSTM layers x 200, 10,000 words, 20 x 35."""
    return Workload(_Lstm(), torch.randint(10_000, (20, 35)), torch.randint(10_000, (20, 35)))


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "MLP": mlp,
    "LeNet": lenet,
    "VGG11": vgg,
    "ResNet18": resnet,
    "ViT": vit,
    "GPT": gpt,
    "LSTM": lstm,
}


def build(name: str) -> Workload:
    """The workload of that name, its random numbers always the same."""
    torch.manual_seed(0)
    work = WORKLOADS[name]()
    work.name = name
    return work
