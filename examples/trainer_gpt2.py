"""Train a small GPT-2 by the Trainer of Hugging Face, with nothing tuned.

Trainer calls ``backward`` for each part of a batch and then ``step`` without a closure. Here
``training_step`` collects the parts, and takes the step with the last of them: the optimizer does
forward and backward itself. The ``step`` that Trainer calls afterwards finds it taken. Clipping is
the wrapper's; gradient accumulation, evaluation, schedules, ``bf16=True``, saving and resuming are
Trainer's own. ``fp16=True`` is refused, since its scaler has no place for such a step.

    python examples/trainer_gpt2.py [--smoke]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import transformers
from text import load_text, make_gpt2, sequence_losses
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import PrinterCallback, Trainer, TrainingArguments

from optim import GeN
from optim.schedules import cooldown


class StepByClosures(GeN):
    def step(self, closure: Any = None) -> Any:
        return None if closure is None else super().step(closure)


class ClosureTrainer(Trainer):
    """A Trainer around a StepByClosures."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.fp16:
            raise ValueError("a scaler cannot step by closures; use bf16=True")
        self.parts: list[Callable[[], Tensor]] = []

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()
        inputs = self._prepare_inputs(inputs)
        self.parts.append(lambda: self.losses(model, inputs))
        if not self.accelerator.sync_gradients:  # there are more parts
            return torch.zeros((), device=self.args.device)
        parts, self.parts = self.parts, []
        wrapper = self.optimizer.optimizer  # inside that of Accelerate, which returns no losses
        return wrapper.step(parts).mean()

    def losses(self, model: nn.Module, inputs: Any) -> Tensor:
        """One per sequence; ``self.compute_loss(model, inputs)``, a scalar, will do too."""
        with self.compute_loss_context_manager():
            return sequence_losses(model, inputs["input_ids"])


def make_trainer(folder: str, steps: int, **options: Any) -> ClosureTrainer:
    """GPT-2 and the text; the schedule is for that many steps."""
    torch.manual_seed(0)
    model = make_gpt2()
    optimizer = StepByClosures(
        torch.optim.AdamW(model.parameters()),
        clip=lambda params: clip_grad_norm_(params, 1.0),
    )
    arguments = {
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0,  # the wrapper clips
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }
    text, held_out = ([{"input_ids": x, "labels": x} for x in part] for part in load_text())
    trainer = ClosureTrainer(
        model,
        TrainingArguments(folder, **arguments),
        train_dataset=text,
        eval_dataset=held_out[:256],
        optimizers=(optimizer, cooldown(optimizer, steps)),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, for CI")
    steps = 8 if parser.parse_args().smoke else 160
    every = steps // 4
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            folder,
            steps,
            logging_steps=every,
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="no",
        )
        before = trainer.evaluate()["eval_loss"]
        found = trainer.train()
    print("step   training loss   validation loss")
    print(f"   0   {'':13}   {before:15.2f}")
    history = trainer.state.log_history
    for step in range(every, steps + 1, every):
        row = {
            key: value for entry in history if entry["step"] == step for key, value in entry.items()
        }
        print(f"{step:4}   {row['loss']:13.2f}   {row['eval_loss']:15.2f}")
    wrapper = trainer.optimizer.optimizer
    seconds = found.metrics["train_runtime"]
    print(f"{seconds:.1f} seconds, {wrapper.skipped} of {wrapper.iteration} steps skipped")


if __name__ == "__main__":
    main()
