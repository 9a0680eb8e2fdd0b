"""Adapt a small GPT-2 by LoRA, with nothing tuned: the wrapper gets the adapter's parameters alone.

The base is trained on one half of the text's topics; then its weights are frozen, and rank-4
adapters of the attention are trained on the other half. Frozen parameters have no gradient, no
direction, no state and no part in slope and curvature; they stay as they are to the last bit.

    python examples/lora_peft.py [--smoke]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable

import torch
from peft import LoraConfig, get_peft_model
from text import load_text, make_gpt2, sequence_losses, validate
from torch import Tensor, nn

from optim import Rescaled
from optim.schedules import cooldown

BATCH = 16


def train(name: str, model: nn.Module, text: Tensor, held_out: Tensor, steps: int) -> None:
    """All parameters that require a gradient; prints a line of the table."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = Rescaled(torch.optim.AdamW(params))
    scheduler = cooldown(optimizer, steps)
    before = validate(model, held_out)
    start = time.perf_counter()
    for x in batches(text, steps):
        optimizer.step(lambda x=x: sequence_losses(model, x))
        scheduler.step()
    seconds = (time.perf_counter() - start) / steps
    # What the base optimizer keeps, as numbers.
    kept = sum(v.numel() for state in optimizer.state.values() for v in state.values())
    print(
        f"{name:8}   {sum(p.numel() for p in params):10}   {kept:6}   "
        f"{optimizer.records[-1].value:13.2f}   "
        f"{before:6.2f} -> {validate(model, held_out):4.2f}   {seconds:16.3f}"
    )


def batches(text: Tensor, steps: int) -> Iterable[Tensor]:
    for _ in range(steps):
        yield text[torch.randint(len(text), (BATCH,))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, for CI")
    steps = 6 if parser.parse_args().smoke else 100

    torch.manual_seed(0)
    text, held_out = load_text()
    first, second = text.chunk(2)
    _, held_out = held_out.chunk(2)  # of the second half
    model = make_gpt2()
    print("trained    parameters    state   training loss   validation loss   seconds per step")
    train("all", model, first, held_out[:128], steps)

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = get_peft_model(model, config)
    adapted.zero_grad()  # what the first training left
    frozen = {n: p.detach().clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    train("adapters", adapted, second, held_out[:128], steps)
    now = dict(adapted.named_parameters())
    same = all(torch.equal(now[name], p) for name, p in frozen.items())
    untouched = all(now[name].grad is None for name in frozen)
    print(f"{len(frozen)} frozen tensors: unchanged {same}, without gradient {untouched}")


if __name__ == "__main__":
    main()
