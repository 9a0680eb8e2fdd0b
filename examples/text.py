"""What the language examples share: a text, a small GPT-2, and its losses.

The text is the manual that Python's ``pydoc`` carries, byte by byte; nothing is downloaded.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2Config, GPT2LMHeadModel

CONTEXT = 64


def load_text() -> tuple[Tensor, Tensor]:
    """Windows of CONTEXT bytes, one a row, of most topics, and of each tenth for validation."""
    names = sorted(topics)
    return (
        _windows([name for k, name in enumerate(names) if k % 10]),
        _windows(names[::10]),
    )


def _windows(names: list[str]) -> Tensor:
    text = "\n".join(topics[name] for name in names)
    data = torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).long()
    return data[: len(data) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def make_gpt2() -> nn.Module:
    """With random weights and 0.4 million parameters."""
    ends = {"bos_token_id": 0, "eos_token_id": 0}  # a byte that no text has
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=96, n_layer=3, n_head=4, **ends)
    )


def sequence_losses(model: nn.Module, x: Tensor) -> Tensor:
    """The mean loss of the next byte in nats, of each window."""
    logits = model(input_ids=x).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").mean(1)


@torch.no_grad()
def validate(model: nn.Module, windows: Tensor) -> float:
    """The mean loss in evaluation mode."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    losses = [sequence_losses(model, x.to(device)) for x in windows.split(64)]
    model.train(training)
    return torch.cat(losses).mean().item()
