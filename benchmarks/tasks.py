"""Small training tasks, on which step sizes are judged by the training loss in the end."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from optim import GeN, Rescaled
from optim.schedules import cooldown


@dataclass
class Task:
    """A network, its data, and how long it is trained.

    Attributes:
        batches: one epoch of (inputs, targets), drawn by the global generator.
        sample: a fixed part of the training data, or where none repeats others like it, on which
            the loss is taken in the end.
    """

    model: nn.Module
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    sample: list[tuple[Tensor, Tensor]]
    epochs: int
    steps: int

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """One loss per sample; of a sequence, its mean."""
        logits = self.model(x)
        if y.ndim == 1:
            return F.cross_entropy(logits, y, reduction="none")
        return (
            F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y).mean(1)
        )

    def train(self, base: Optimizer) -> float:
        """The training loss in the end under a cosine schedule."""
        cosine = CosineAnnealingLR(base, self.steps)
        for _ in range(self.epochs):
            for x, y in self.batches():
                base.zero_grad()
                self.losses(x, y).mean().backward()
                base.step()
                cosine.step()
        return self.training_loss()

    def train_wrapped(self, optimizer: Rescaled | GeN) -> float:
        """The same under the wrapper's own schedule, with nothing set."""
        scheduler = cooldown(optimizer, self.steps)
        for _ in range(self.epochs):
            for x, y in self.batches():
                optimizer.step(partial(self.losses, x, y))
                scheduler.step()
        return self.training_loss()

    @torch.no_grad()
    def training_loss(self) -> float:
        """With the statistics of each batch where they enter, as in training; never NaN."""
        before = {name: b.clone() for name, b in self.model.named_buffers()}
        loss = torch.cat([self.losses(x, y) for x, y in self.sample]).mean().item()
        for name, b in self.model.named_buffers():
            b.copy_(before[name])
        return loss if math.isfinite(loss) else math.inf


def _epoch(x: Tensor, y: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
        yield x[rows], y[rows]


def _classification(
    model: nn.Module, x: Tensor, y: Tensor, batch: int, epochs: int, sample: int
) -> Task:
    parts = list(zip(x[:sample].split(500), y[:sample].split(500), strict=True))
    steps = epochs * (len(x) // batch)
    return Task(model, lambda: _epoch(x, y, batch), parts, epochs, steps)


ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


def digits(activation: str, batch: int, epochs: int = 20) -> Task:
    """MLP 64-128-128-10 on the training part of scikit-learn's 8x8 digits."""
    images, labels = load_digits(return_X_y=True)
    x, _, y, _ = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    f = ACTIVATIONS[activation]
    model = nn.Sequential(nn.Linear(64, 128), f(), nn.Linear(128, 128), f(), nn.Linear(128, 10))
    inputs = torch.as_tensor(x).float() / 16
    return _classification(model, inputs, torch.as_tensor(y), batch, epochs, len(inputs))


def stream(steps: int = 400, batch: int = 128) -> Task:
    """The same MLP on samples that never repeat: normal inputs that a linear map labels."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 10, generator=generator)

    def labelled(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, (x @ teacher).argmax(1)

    f = nn.Tanh
    model = nn.Sequential(nn.Linear(64, 128), f(), nn.Linear(128, 128), f(), nn.Linear(128, 10))
    sample = [labelled(torch.randn(4000, 64, generator=generator))]
    return Task(
        model, lambda: (labelled(torch.randn(batch, 64)) for _ in range(steps)), sample, 1, steps
    )


def _images(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    arrays = []
    for name, header in (("train-images-idx3-ubyte.gz", 16), ("train-labels-idx1-ubyte.gz", 8)):
        raw = gzip.decompress((folder / name).read_bytes())
        arrays.append(torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).copy()))
    images, labels = arrays
    return images.view(-1, 1, 28, 28)[:count].float() / 255, labels[:count].long()


def lenet(data: Path) -> Task:
    """LeNet with tanh on MNIST."""
    x, y = _images(data / "mnist", 60_000)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip
    return _classification(model, x, y, batch=256, epochs=3, sample=10_000)


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.short = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.short(x)).relu()


def resnet(data: Path) -> Task:
    """A small residual network with batch norm and ReLU on part of Fashion-MNIST."""
    x, y = _images(data / "fashion-mnist", 12_800)
    model = nn.Sequential(
        _Block(1, 16, 2), _Block(16, 32, 2), _Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return _classification(model, x, y, batch=64, epochs=3, sample=5_000)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Gpt(nn.Module):
    def __init__(self, symbols: int, length: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(_Layer(width, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        h = self.symbols(x) + self.places.weight[: x.shape[1]]
        return self.head(self.norm(self.layers(h)))


def gpt(data: Path, length: int = 64, batch: int = 32, steps: int = 600) -> Task:
    """A two-layer character model on the first nine tenths of tiny Shakespeare."""
    text = (data / "tiny-shakespeare" / "input.txt").read_text(encoding="utf-8")
    symbols = sorted(set(text))
    codes = torch.tensor([symbols.index(c) for c in text[: len(text) * 9 // 10]])
    windows = codes.unfold(0, length + 1, 1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            rows = windows[torch.randint(len(windows), (batch,))]
            yield rows[:, :-1], rows[:, 1:]

    fixed = windows[:: len(windows) // 500][:500]
    sample = [(part[:, :-1], part[:, 1:]) for part in fixed.split(100)]
    return Task(_Gpt(len(symbols), length), batches, sample, epochs=1, steps=steps)
