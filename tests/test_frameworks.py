"""Training by Lightning, Accelerate and the Trainer of transformers is training by a loop.

Runs where the extras ``lightning`` and ``huggingface`` are installed.
"""

import importlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, TensorDataset

from optim import GeN, INNAprop, Rescaled
from optim.schedules import cooldown

# What the frameworks warn of is theirs; a skipped step or a scheduler out of turn is ours.
pytestmark = pytest.mark.filterwarnings(
    "ignore", "error::RuntimeWarning", "error:.*lr_scheduler.step"
)

EXAMPLES = Path(__file__).parent.parent / "examples"
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "Rescaled": lambda p, **k: Rescaled(torch.optim.RMSprop(p), **k),
    "Rescaled, INNAprop": lambda p, **k: Rescaled(INNAprop(p), every=2, **k),
    "GeN": lambda p, **k: GeN(torch.optim.AdamW(p), phi=2, **k),
    "GeN, momentum": lambda p, **k: GeN(torch.optim.SGD(p, momentum=0.9), phi=1, **k),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
BATCH, BATCHES, EPOCHS = 16, 4, 2


def clip(params: list[Tensor]) -> None:
    clip_grad_norm_(params, 0.1)


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)
    )


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    rows = BATCH * BATCHES
    x = torch.randn(rows, 6, generator=generator)
    return TensorDataset(x, torch.randint(3, (rows,), generator=generator))


def loader(batch: int = BATCH) -> DataLoader[Any]:
    """Without random numbers of the default generator."""
    return DataLoader(make_data(), batch, generator=torch.Generator())


def by_loop(
    optimizer: str, *, bf16: bool = False, mean: bool = False, schedule: bool = True, parts: int = 1
) -> tuple[Any, nn.Module]:
    """The run that all others must make."""
    network = make_network()
    wrapper = OPTIMIZERS[optimizer](network.parameters(), clip=clip)
    scheduler = cooldown(wrapper, EPOCHS * BATCHES) if schedule else None

    def losses(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = network(x)
        found = F.cross_entropy(out.float(), y, reduction="none")
        return found.mean() if mean else found

    torch.manual_seed(1)
    for _ in range(EPOCHS):
        for batch in zip(*(t.split(BATCH) for t in make_data().tensors), strict=True):
            pairs = zip(*(t.split(BATCH // parts) for t in batch), strict=True)
            closures = [lambda x=x, y=y: losses(x, y) for x, y in pairs]
            wrapper.step(closures if parts > 1 else closures[0])
            if scheduler is not None:
                scheduler.step()
    return wrapper, network


def assert_same(found: tuple[Any, nn.Module], expected: tuple[Any, nn.Module]) -> None:
    (wrapper, network), (twin, other) = found, expected
    assert len(twin.records) == EPOCHS * BATCHES
    assert list(wrapper.records) == list(twin.records)[-len(wrapper.records) :]
    torch.testing.assert_close(network.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert wrapper.skipped == twin.skipped == 0


class TestLightning:
    @pytest.fixture(autouse=True)
    def _quiet(self) -> None:
        self.lightning = pytest.importorskip("lightning")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def module(self, optimizer: str, network: nn.Module, *, manual: bool = False) -> Any:
        class Module(self.lightning.LightningModule):  # type: ignore[name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.network = network
                self.automatic_optimization = not manual
                self.runs = 0

            def losses(self, batch: Any) -> Tensor:
                self.runs += 1
                return F.cross_entropy(self.network(batch[0]), batch[1], reduction="none")

            def training_step(self, batch: Any, _: int) -> Tensor | None:
                if manual:
                    self.optimizers().step(closure=lambda: self.losses(batch))
                    return None
                return self.losses(batch).mean()

            def configure_optimizers(self) -> Any:
                if manual:
                    return OPTIMIZERS[optimizer](self.parameters(), clip=clip)
                wrapper = OPTIMIZERS[optimizer](self.parameters())
                scheduler = cooldown(wrapper, EPOCHS * BATCHES)
                return [wrapper], [{"scheduler": scheduler, "interval": "step"}]

            def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["random"] = torch.get_rng_state()

            def on_train_start(self) -> None:
                if self.trainer.global_step == 0:
                    torch.manual_seed(1)
                else:
                    torch.set_rng_state(self.random)

            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                self.random = checkpoint["random"]

        return Module()

    def trainer(self, **options: Any) -> Any:
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        options = {
            "max_epochs": EPOCHS,
            "accelerator": "cpu",
            **dict.fromkeys(quiet, False),
            **options,
        }
        return self.lightning.Trainer(**options)

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    @every_optimizer
    def test_automatic_optimization(self, optimizer: str, precision: str) -> None:
        """Whose closure calls zero_grad and backward, and clips."""
        network = make_network()
        trainer = self.trainer(precision=precision, gradient_clip_val=0.1)
        module = self.module(optimizer, network)
        trainer.fit(module, loader())
        expected = by_loop(optimizer, bf16=precision != "32-true", mean=True)
        assert_same((trainer.optimizers[0], network), expected)
        assert module.runs > EPOCHS * BATCHES  # what training_step logs is logged again

    @every_optimizer
    def test_manual_optimization(self, optimizer: str) -> None:
        """Whose closure may return a loss per sample."""
        network = make_network()
        trainer = self.trainer(precision="bf16-mixed")
        trainer.fit(self.module(optimizer, network, manual=True), loader())
        expected = by_loop(optimizer, bf16=True, schedule=False)
        assert_same((trainer.optimizers[0], network), expected)

    @every_optimizer
    def test_a_checkpoint_continues_bit_for_bit(self, optimizer: str, tmp_path: Path) -> None:
        first = self.trainer(max_epochs=1, gradient_clip_val=0.1)
        first.fit(self.module(optimizer, make_network()), loader())
        first.save_checkpoint(tmp_path / "run.ckpt")
        second, network = self.trainer(gradient_clip_val=0.1), make_network()
        module = self.module(optimizer, network)
        second.fit(module, loader(), ckpt_path=tmp_path / "run.ckpt")
        assert len(second.optimizers[0].records) == (EPOCHS - 1) * BATCHES
        assert_same((second.optimizers[0], network), by_loop(optimizer, mean=True))

    @every_optimizer
    def test_gradients_of_other_batches_are_refused(self, optimizer: str) -> None:
        network = make_network()
        before = [p.detach().clone() for p in network.parameters()]
        trainer = self.trainer(accumulate_grad_batches=2)
        with pytest.raises(ValueError, match="give step a list of closures"):
            trainer.fit(self.module(optimizer, network), loader())
        assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


class TestAccelerate:
    @pytest.fixture(autouse=True)
    def _fresh(self) -> Iterator[None]:
        self.accelerate = pytest.importorskip("accelerate")
        yield
        self.accelerate.state.AcceleratorState._reset_state(True)

    def train(
        self, optimizer: str, precision: str, epochs: int, folder: Path, *, load: bool = False
    ) -> tuple[Any, nn.Module]:
        """In two parts for each batch; saved afterwards."""
        accelerator = self.accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
        )
        network = make_network()
        wrapper = OPTIMIZERS[optimizer](network.parameters(), clip=clip)
        scheduler = cooldown(wrapper, EPOCHS * BATCHES)
        model, prepared, batches = accelerator.prepare(network, wrapper, loader(BATCH // 2))
        accelerator.register_for_checkpointing(scheduler)
        torch.manual_seed(1)
        if load:
            accelerator.load_state(str(folder))
        parts: list[Callable[[], Tensor]] = []
        for _ in range(epochs):
            for x, y in batches:
                with accelerator.accumulate(model):
                    parts.append(lambda x=x, y=y: F.cross_entropy(model(x), y, reduction="none"))
                    prepared.step(parts)
                    if accelerator.sync_gradients:
                        parts = []
                        scheduler.step()
        accelerator.save_state(str(folder))
        return wrapper, network

    @pytest.mark.parametrize("precision", ["no", "bf16"])
    @every_optimizer
    def test_a_prepared_optimizer(self, optimizer: str, precision: str, tmp_path: Path) -> None:
        """Steps once the last part of a batch has come, and goes on from what was saved."""
        self.train(optimizer, precision, 1, tmp_path)
        found = self.train(optimizer, precision, EPOCHS - 1, tmp_path, load=True)
        assert len(found[0].records) == (EPOCHS - 1) * BATCHES
        assert_same(found, by_loop(optimizer, bf16=precision == "bf16", parts=2))


class TestTrainer:
    @pytest.fixture(autouse=True)
    def _example(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("transformers").logging.set_verbosity_error()
        monkeypatch.syspath_prepend(str(EXAMPLES))
        self.example = importlib.import_module("trainer_gpt2")

    @pytest.mark.parametrize("precision", [{}, {"bf16": True}])
    def test_the_example_goes_on_and_is_a_loop(self, precision: Any, tmp_path: Path) -> None:
        """Saved after two of four steps of two parts each."""
        options = {"save_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, **precision}
        first = self.example.make_trainer(str(tmp_path), 4, **options)
        losses, seen, random = first.losses, [], []

        def noted(model: nn.Module, inputs: Any) -> Tensor:
            random.append(torch.get_rng_state())
            if not any(torch.equal(x, inputs["input_ids"]) for x in seen):
                seen.append(inputs["input_ids"])
            return losses(model, inputs)

        first.losses = noted
        loss = first.train().training_loss
        second = self.example.make_trainer(str(tmp_path), 4, **options)
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

        torch.manual_seed(0)
        network = self.example.make_gpt2().train()
        wrapper = GeN(
            torch.optim.AdamW(network.parameters()),
            clip=lambda params: clip_grad_norm_(params, 1.0),
        )
        scheduler = cooldown(wrapper, 4)

        def again(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(precision)):
                return self.example.sequence_losses(network, x)

        torch.set_rng_state(random[0])
        for x, y in zip(seen[::2], seen[1::2], strict=True):
            wrapper.step([lambda x=x: again(x), lambda y=y: again(y)])
            scheduler.step()
        assert len(wrapper.records) == 4
        assert loss == pytest.approx(sum(r.value for r in wrapper.records) / 4, rel=1e-6)
        for trainer in (first, second):
            records = list(trainer.optimizer.optimizer.records)
            assert records == list(wrapper.records)[-len(records) :]
            for p, q in zip(trainer.model.parameters(), network.parameters(), strict=True):
                assert torch.equal(p, q)
        assert len(records) == 2
