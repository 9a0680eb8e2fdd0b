"""Train a small GPT-2 by a loop of Hugging Face Accelerate, with nothing tuned.

``prepare`` takes the wrapper like any optimizer, and its ``step`` a closure. Inside ``accumulate``
the parts of a batch are collected: until the last has come, ``step`` of a prepared optimizer does
nothing. Losses are one per sequence, so that the curvature is known per sequence too.

In float16, Accelerate's own scaler has no place for a step that evaluates the loss: leave the
optimizer out of ``prepare`` then and give it ``scaler=accelerator.scaler``.

    python examples/accelerate_gpt2.py [--smoke] [--precision bf16]
    torchrun --nproc-per-node 2 examples/accelerate_gpt2.py
"""

from __future__ import annotations

import argparse
import time

import torch
from accelerate import Accelerator
from text import load_text, make_gpt2, sequence_losses, validate
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from optim import GeN
from optim.schedules import cooldown

BATCH, PARTS = 8, 2  # sequences at once, and parts of a batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, for CI")
    parser.add_argument("--precision", default="no", help="bf16 is slow on most CPUs")
    args = parser.parse_args()
    steps = 6 if args.smoke else 150

    torch.manual_seed(0)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=args.precision,
        gradient_accumulation_steps=PARTS,
    )
    several = accelerator.num_processes > 1
    text, held_out = load_text()
    held_out = held_out[:64] if args.smoke else held_out[:256]
    model = make_gpt2()
    optimizer = GeN(
        torch.optim.AdamW(model.parameters()),
        clip=lambda params: clip_grad_norm_(params, 1.0),
        process_group=torch.distributed.group.WORLD if several else None,
    )
    loader = DataLoader(text, BATCH, shuffle=True, drop_last=True)
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    scheduler = cooldown(optimizer, steps)

    accelerator.print(f"processes: {accelerator.num_processes}")
    accelerator.print("step   loss   validation   seconds")
    start, parts = time.perf_counter(), []
    while optimizer.iteration < steps:
        for x in loader:
            with accelerator.accumulate(model):
                parts.append(lambda x=x: sequence_losses(model, x))
                prepared.step(parts)
                if not accelerator.sync_gradients:
                    continue
                parts = []
                scheduler.step()
            done = optimizer.iteration
            if done % (steps // 6) == 0:
                loss, seconds = optimizer.records[-1].value, time.perf_counter() - start
                ahead = validate(model, held_out.to(accelerator.device))
                accelerator.print(f"{done:4}   {loss:.2f}   {ahead:10.2f}   {seconds:7.1f}")
            if done == steps:
                break
    accelerator.print(f"steps skipped: {optimizer.skipped}")
    accelerator.end_training()  # takes down the process group: see ddp.py


if __name__ == "__main__":
    main()
