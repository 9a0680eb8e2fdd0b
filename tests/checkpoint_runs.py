"""Runs to be saved in one process and continued in another, for test_checkpoints.

python checkpoint_runs.py {save,load} FOLDER
"""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from optim import GeN, INNAprop, Rescaled
from optim.estimators import Exact, GradientDifferences, Probes
from optim.rules import Edge, Lipschitz, Lyapunov
from optim.schedules import cooldown, warmup_cosine

SAVED, STEPS = 4, 10  # with estimates every third step, the first one after loading has none


def one_cycle(optimizer: Any) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.95, total_steps=STEPS)


def warm_up(optimizer: Any) -> Any:
    first = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    second = lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 3)
    return lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[3])


def chained(optimizer: Any) -> Any:
    return lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.ExponentialLR(optimizer, 0.9),
            lr_scheduler.StepLR(optimizer, 3, gamma=0.5),
        ]
    )


def plateau(optimizer: Any) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.1)


def heavy_ball(params: Any) -> Optimizer:
    return SGD(params, momentum=0.9, weight_decay=1e-3)


WRAPPERS: dict[str, Callable[..., Any]] = {
    "Rescaled": Rescaled,
    "Rescaled, every 3": lambda base, **k: Rescaled(base, every=3, **k),
    "GeN": lambda base, **k: GeN(base, phi=3, **k),
    "Lyapunov": lambda base, **k: Rescaled(base, rule=Lyapunov(), **k),
    "Lyapunov, every 3": lambda base, **k: Rescaled(base, rule=Lyapunov(), every=3, **k),
    "Lipschitz": lambda base, **k: Rescaled(base, rule=Lipschitz(), every=3, **k),
    "Edge": lambda base, **k: Rescaled(base, rule=Edge(), estimator=Probes(), every=3, **k),
    "gradients": lambda base, **k: Rescaled(base, estimator=GradientDifferences(), **k),
    "tangent pass": lambda base, **k: Rescaled(base, estimator=Exact(per_sample=False), **k),
}
Make = Callable[[Any], Any]
RUNS: dict[str, tuple[str, Make, Make]] = {
    "Rescaled, SGD": ("Rescaled", heavy_ball, one_cycle),
    "Rescaled, AdamW": ("Rescaled, every 3", AdamW, warm_up),
    "Rescaled, INNAprop": ("Rescaled, every 3", INNAprop, chained),
    "GeN, SGD": ("GeN", heavy_ball, warm_up),
    "GeN, AdamW": ("GeN", AdamW, one_cycle),
    "GeN, INNAprop": ("GeN", INNAprop, plateau),
    "Lyapunov, SGD": ("Lyapunov, every 3", lambda p: SGD(p, momentum=0.9), plateau),
    "Lyapunov, INNAprop": ("Lyapunov", lambda p: INNAprop(p, weight_decay=0.0), warm_up),
    "Lipschitz, AdamW": ("Lipschitz", AdamW, lambda o: cooldown(o, STEPS)),
    "Edge, SGD": ("Edge", heavy_ball, lambda o: warmup_cosine(o, 2, STEPS)),
    "gradients, AdamW": ("gradients", AdamW, chained),
    "autocast, GeN, AdamW": ("GeN", AdamW, warm_up),
    "autocast, tangent pass, SGD": ("tangent pass", heavy_ball, one_cycle),
}


class Run:
    """A small network with dropout and batch norm, and all that its training depends on."""

    def __init__(self, name: str) -> None:
        wrapper, base, schedule = RUNS[name]
        self.autocast = name.startswith("autocast")
        self.scaler = GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
        torch.manual_seed(1)
        self.model = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)
        )
        first, *rest = self.model.parameters()
        options = {"scaler": self.scaler} if self.autocast else {}
        groups = [{"params": [first], "lr": 1e-3}, {"params": rest}]
        self.optimizer = WRAPPERS[wrapper](base(groups), **options)
        self.scheduler = schedule(self.optimizer)

    def losses(self, k: int) -> Tensor:
        generator = torch.Generator().manual_seed(k)
        x = torch.randn(16, 4, generator=generator)
        y = torch.randint(3, (16,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return cross_entropy(self.model(x), y, reduction="none")

    def train(self, steps: range) -> None:
        for k in steps:
            losses = self.optimizer.step(lambda k=k: self.losses(k))
            by_loss = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)
            with warnings.catch_warnings():
                # The SequentialLR of torch 2.4 warns of what it does itself.
                warnings.filterwarnings("ignore", "The epoch parameter", UserWarning)
                self.scheduler.step(*([losses.mean().item()] if by_loss else []))

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["random"])

    def end(self) -> dict[str, Any]:
        records = [record.to_json() for record in self.optimizer.records]
        return {**self.state(), "records": records[-(STEPS - SAVED) :]}


def main(mode: str, folder: Path) -> None:
    if mode == "save":
        saved, ends = {}, {}
        for name in RUNS:
            run = Run(name)
            run.train(range(SAVED))
            torch.save(run.state(), folder / "one.pt")
            saved[name] = torch.load(folder / "one.pt", weights_only=True)
            run.train(range(SAVED, STEPS))
            ends[name] = run.end()
        torch.save(saved, folder / "saved.pt")
        torch.save(ends, folder / "uninterrupted.pt")
    else:
        saved, ends = torch.load(folder / "saved.pt", weights_only=True), {}
        for name in RUNS:
            run = Run(name)
            run.load(saved[name])
            run.train(range(SAVED, STEPS))
            ends[name] = run.end()
        torch.save(ends, folder / "continued.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
