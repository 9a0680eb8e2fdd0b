"""One small model of each architecture, with a loss."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from curvature import Objective

F64 = torch.float64


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts.unbind(0), is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 2, causal=causal)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class Gpt(nn.Module):
    """With the embedding's weight tied to the output's."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 8), nn.Embedding(5, 8)
        self.blocks = nn.Sequential(Block(8, causal=True), Block(8, causal=True))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        return self.norm(self.blocks(y)) @ self.tokens.weight.t()


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.first = nn.Parameter(torch.randn(1, 1, 8))
        self.block = Block(8, causal=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.first.expand(len(x), -1, -1), y], 1)
        return self.head(self.block(y)[:, 0])


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y += x
        return F.relu(y, inplace=True)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(4, 3, 2, 2), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        across = F.softplus(self.down(x))
        deep = F.silu(self.deep(F.max_pool2d(across, 2)))
        return self.out(torch.cat([across, self.up(deep)], 1))


class Languages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(5, 7)
        self.lstm = nn.LSTM(4, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 7)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = self.transformer.generate_square_subsequent_mask(target.shape[1], dtype=F64)
        return self.head(self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True))


def images(channels: int, size: int = 6) -> Tensor:
    return torch.randn(4, channels, size, size, dtype=F64)


def tokens() -> Tensor:
    return torch.randint(7, (3, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], object]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh()),
        lambda: torch.randn(4, 3, dtype=F64),
    ),
    "lenet": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)
        ),
        lambda: images(1),
    ),
    "vgg": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.Softplus(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)
        ),
        lambda: images(3),
    ),
    "resnet": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), Residual(3), nn.AdaptiveAvgPool2d(1)),
        lambda: images(1),
    ),
    "gpt": (Gpt, tokens),
    "vit": (Vit, lambda: images(3)),
    "lstm": (Languages, tokens),
    "u-net": (UNet, lambda: images(1)),
    "transformer": (
        Translator,
        lambda: (torch.randn(2, 4, 8, dtype=F64), torch.randn(2, 3, 8, dtype=F64)),
    ),
}


def objective(name: str) -> tuple[Objective, dict[str, Tensor]]:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = make().to(F64)

    def loss(output: Tensor, _: object) -> Tensor:
        logits = output.flatten(2).mean(2) if output.ndim == 4 else output
        classes = torch.arange(len(logits)) % logits.shape[-1]
        if logits.ndim == 3:
            logits = logits.mean(1)
        return F.cross_entropy(logits, classes, reduction="none", label_smoothing=0.1)

    J = Objective(model, loss, (inputs(), None))
    return J, {name: torch.randn_like(p) / 3 for name, p in J.params.items()}
