"""Train on 8x8 digits with Lightning: ``configure_optimizers`` returns a wrapper, no rate is tuned.

In automatic optimization Lightning gives ``step`` a closure that runs ``training_step``, calls
``zero_grad`` and ``backward`` and clips; the wrappers take it as it is. In manual optimization the
closure may return one loss per sample, which suits Rescaled. Gradients of other parts of a batch
(``accumulate_grad_batches``) are refused, and so is ``precision="16-mixed"``, whose scaler steps
without a closure; "bf16-mixed" is fine.

The loss is also evaluated where a step would end, so ``training_step`` may run more than once for
a batch: what it logs or counts is logged or counted each time. Log ``records[-1]`` afterwards.

    python examples/lightning_digits.py [--smoke] [--precision bf16-mixed]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset, random_split

from optim import GeN, Rescaled
from optim.schedules import cooldown


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 16, 10),
        )

    def configure_optimizers(self) -> Any:
        optimizer = GeN(torch.optim.AdamW(self.parameters()))
        scheduler = cooldown(optimizer, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def losses(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.network(x), y, reduction="none")

    def training_step(self, batch: list[Tensor], _: int) -> Tensor | None:
        return self.losses(batch).mean()

    def on_train_batch_end(self, *_: Any) -> None:
        record = self.optimizers().records[-1]
        self.log("loss", record.value, on_step=False, on_epoch=True)
        self.log("step", record.step, on_step=False, on_epoch=True)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        x, y = batch
        self.log("accuracy", (self.network(x).argmax(1) == y).float().mean())


class DigitsPerSample(Digits):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return Rescaled(
            torch.optim.RMSprop(self.parameters()),
            clip=lambda params: nn.utils.clip_grad_norm_(params, 1.0),
        )

    def training_step(self, batch: list[Tensor], _: int) -> None:
        self.optimizers().step(closure=lambda: self.losses(batch))


def load_data() -> tuple[DataLoader, DataLoader]:
    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images).float().div(16).view(-1, 1, 8, 8)
    data = TensorDataset(x, torch.as_tensor(labels))
    train, test = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    return DataLoader(train, 64, shuffle=True), DataLoader(test, len(test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two epochs, for CI")
    parser.add_argument("--precision", default="32-true")
    args = parser.parse_args()
    epochs = 2 if args.smoke else 20

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    train, test = load_data()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    print("module            epochs   steps   training loss   accuracy   seconds")
    for kind, clip in ((Digits, 1.0), (DigitsPerSample, None)):
        with tempfile.TemporaryDirectory() as folder:
            path = None
            # The second trainer goes on from the file of the first.
            for end in (epochs // 2, epochs):
                lightning.seed_everything(0, verbose=False)
                start = time.perf_counter()
                trainer = lightning.Trainer(
                    max_epochs=end,
                    precision=args.precision,
                    gradient_clip_val=clip,
                    enable_checkpointing=False,
                    **quiet,
                )
                module = kind()
                trainer.fit(module, train, test, ckpt_path=path)
                path = Path(folder) / "run.ckpt"
                trainer.save_checkpoint(path)
                found, seconds = trainer.callback_metrics, time.perf_counter() - start
                print(
                    f"{kind.__name__:15}   {trainer.current_epoch:6}   "
                    f"{trainer.optimizers[0].iteration:5}   {found['loss']:13.4f}   "
                    f"{found['accuracy']:8.1%}   {seconds:7.1f}"
                )


if __name__ == "__main__":
    main()
