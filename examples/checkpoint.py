"""Train a small network on 8x8 digits in a run that may be killed at any moment and goes on.

Everything that the run depends on is saved together: model, optimizer, scheduler, random state,
and how far it is. Started again, it goes on from there, bit for bit as if it had not been killed.

    python examples/checkpoint.py [--smoke] [--path FILE]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from optim import GeN
from optim.schedules import cooldown

BATCH, TEST = 64, 297
EVERY = 10  # steps between two checkpoints


def save(state: dict[str, Any], path: Path) -> None:
    """Replace the file by a whole new one: a kill at any moment leaves the old one or the new."""
    part = path.with_name(path.name + ".part")  # in the same folder, or it cannot be moved at once
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # before it gets its name, also if the power fails
    os.replace(part, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the name itself
        os.close(folder)


def train(path: Path, epochs: int) -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images).float() / 16, torch.as_tensor(labels)
    model = nn.Sequential(
        nn.Linear(64, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(64, 10),
    )
    batches = (len(x) - TEST) // BATCH
    optimizer = GeN(torch.optim.AdamW(model.parameters()))
    scheduler = cooldown(optimizer, epochs * batches)
    step = 0

    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["epochs"] != epochs:
            raise SystemExit(f"{path} is of a run of {saved['epochs']} epochs, this has {epochs}")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        step = saved["step"]
        torch.set_rng_state(saved["random"])  # last: making a model draws numbers
        print(f"goes on after step {step} of {path}")

    while step < epochs * batches:
        epoch, batch = divmod(step, batches)
        # Of the epoch's own numbers, so that its order need not be saved.
        order = torch.randperm(len(x) - TEST, generator=torch.Generator().manual_seed(epoch))
        rows = order[batch * BATCH : (batch + 1) * BATCH]
        optimizer.step(lambda rows=rows: cross_entropy(model(x[rows]), y[rows], reduction="none"))
        scheduler.step()
        step += 1
        if step % EVERY == 0 or step == epochs * batches:
            state = {
                "epochs": epochs,
                "step": step,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "random": torch.get_rng_state(),
            }
            save(state, path)
        if step % batches == 0:
            print(f"epoch {epoch + 1}: loss {optimizer.records[-1].value:.1e}")

    model.eval()
    with torch.no_grad():
        accuracy = (model(x[-TEST:]).argmax(1) == y[-TEST:]).float().mean().item()
    print(f"accuracy {accuracy:.1%}; delete {path} to start anew")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two epochs, for CI")
    parser.add_argument(
        "--path", type=Path, default=Path("out/checkpoint.pt"), help="the checkpoint"
    )
    args = parser.parse_args()
    args.path.parent.mkdir(parents=True, exist_ok=True)
    train(args.path, epochs=2 if args.smoke else 20)


if __name__ == "__main__":
    main()
