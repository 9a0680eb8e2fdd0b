"""Several processes with a part of each batch take the step of one with all of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import curvature
from curvature.sweep import Sweep
from optim import GeN, INNAprop, Rescaled
from optim.estimators import Exact, GaussNewton, GradientDifferences, Probes, Secant

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.6
    fully_shard = None

F64 = torch.float64
ROWS = 12
PARTS = {2: [7, 5], 4: [2, 3, 4, 3]}
STEPS = 5


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=0.01)


def clip(params: list[Tensor]) -> None:
    clip_grad_norm_(params, 0.1)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "jet": lambda m, **k: Rescaled(sgd(m), **k),
    "tangent pass": lambda m, **k: Rescaled(sgd(m), estimator=Exact(per_sample=False), **k),
    "Gauss-Newton": lambda m, **k: Rescaled(sgd(m), estimator=GaussNewton(m), **k),
    "gradients": lambda m, **k: Rescaled(sgd(m), estimator=GradientDifferences(), **k),
    "losses": lambda m, **k: Rescaled(sgd(m), estimator=Probes(), **k),
    "one loss": lambda m, **k: Rescaled(sgd(m), estimator=Secant(), **k),
    "lazy": lambda m, **k: Rescaled(torch.optim.AdamW(m.parameters()), every=2, **k),
    "GeN": lambda m, **k: GeN(torch.optim.AdamW(m.parameters()), phi=2, **k),
    "INNAprop": lambda m, **k: Rescaled(INNAprop(m.parameters()), **k),
    "clipped": lambda m, **k: GeN(sgd(m), phi=2, clip=clip, **k),
    "GeN, INNAprop": lambda m, **k: GeN(INNAprop(m.parameters()), phi=1, **k),
}
SHARDED = ["gradients", "losses", "one loss", "GeN", "clipped", "GeN, INNAprop"]


class Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class Squash(nn.Module):
    """Its backward pass is a function of the user's, whose gradient is compared with the slope."""

    def forward(self, x: Tensor) -> Tensor:
        return Tanh.apply(x)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), Squash(), nn.Linear(6, 3)).to(F64)


def batch(k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(ROWS, 4, dtype=F64, generator=generator)
    return x, torch.randint(3, (ROWS,), generator=generator)


def far_losses(rank: int) -> dict[str, Any]:
    """Rounding counts as no curvature: on all ranks or on none."""
    x = nn.Parameter(torch.ones(1))
    group = distributed.group.WORLD
    optimizer = GeN(torch.optim.SGD([x]), phi=1, checked=0, process_group=group)
    optimizer.stepper.rule_state = {"trusted": 0.0265}
    # By the loss of the first rank alone what the loss falls is rounding, by the mean it is not.
    optimizer.step(lambda: x.square().sum() + (1e3 if rank == 0 else 0.0))
    assert optimizer.records[-1].curvature > 0
    return {"params": x.detach(), "records": list(optimizer.records)}


def train(model: nn.Module, optimizer: Any, rows: slice, how: str) -> dict[str, Any]:
    """The end of a run on these rows of each batch, and its records."""

    def losses(k: int, part: slice = slice(None)) -> Tensor:
        x, y = (t[rows][part] for t in batch(k))
        return F.cross_entropy(model(x), y, reduction="none")

    def backward(k: int) -> None:
        optimizer.zero_grad()
        losses(k).mean().backward()

    for k in range(STEPS):
        if how == "several":
            optimizer.step([lambda k=k: losses(k, slice(1)), lambda k=k: losses(k, slice(1, None))])
        elif how == "backward":
            optimizer.step(lambda k=k: backward(k))
        else:
            optimizer.step(lambda k=k: losses(k))
    params = torch.cat([whole(p.detach()).flatten() for p in model.parameters()])
    grads = torch.cat([whole(p.grad).flatten() for p in model.parameters()])
    return {"params": params, "grads": grads, "records": list(optimizer.records)}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard(model: nn.Module, nested: bool) -> nn.Module:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in (model[0], model[2]) if nested else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def refusals_of_sharded_parameters() -> None:
    model, group = shard(make_model(), nested=True), distributed.group.WORLD
    with pytest.raises(TypeError, match="Exact follows the graph of whole parameters, and these"):
        Rescaled(sgd(model), process_group=group)
    with pytest.raises(TypeError, match="GaussNewton follows the graph"):
        Rescaled(sgd(model), estimator=GaussNewton(model), process_group=group)
    optimizer = Rescaled(torch.optim.SGD([nn.Parameter(torch.ones(2))]), process_group=group)
    with pytest.raises(TypeError, match="Exact follows the graph"):
        optimizer.add_param_group({"params": list(model.parameters())})
    assert len(optimizer.param_groups) == 1


def worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    end = sum(PARTS[size][: rank + 1])
    rows = slice(end - PARTS[size][rank], end)
    with pytest.raises(ValueError, match=f"{size} processes run: give process_group"):
        GeN(sgd(make_model()))
    found = {}
    for name, make in OPTIMIZERS.items():
        if name == "Gauss-Newton" and not Sweep.available():
            continue
        for how in ("one", "several"):
            model = DistributedDataParallel(make_model(), gradient_as_bucket_view=True)
            optimizer = make(model, process_group=distributed.group.WORLD)
            found[name, how] = train(model, optimizer, rows, how)
    if fully_shard is not None:
        refusals_of_sharded_parameters()
        for name in SHARDED:
            for how in ("root", "nested"):
                model = shard(make_model(), how == "nested")
                optimizer = OPTIMIZERS[name](model, process_group=distributed.group.WORLD)
                found[name, how] = train(model, optimizer, rows, how)
    model = DistributedDataParallel(make_model())
    optimizer = OPTIMIZERS["jet"](model, process_group=distributed.group.WORLD)
    even = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    found["even", "backward"] = train(model, optimizer, even, "backward")
    found["fault", "one"] = after_a_fault(rank)
    found["far", "one"] = far_losses(rank)
    gathered: list[Any] = [None] * size
    distributed.all_gather_object(gathered, found)
    if rank == 0:
        torch.save(gathered, f"{folder}/found")
    distributed.destroy_process_group()


def after_a_fault(rank: int) -> dict[str, Any]:
    """All skip the step of which one has a NaN, and go on."""
    model = DistributedDataParallel(make_model())
    optimizer = OPTIMIZERS["jet"](model, process_group=distributed.group.WORLD)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    x, y = batch(0)

    def losses(factor: float) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none") * factor

    with pytest.warns(RuntimeWarning, match="a loss of rank 1 is NaN or infinite"):
        optimizer.step(lambda: losses(torch.nan if rank == 1 else 1.0))
    with pytest.raises(ValueError, match="rank 1 gave no loss: each rank needs a part"):
        optimizer.step(lambda: losses(1.0)[: 0 if rank == 1 else None])
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), before)
    optimizer.step(lambda: losses(1.0))
    params = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert not torch.equal(params, before)
    return {"params": params, "records": list(optimizer.records)}


@pytest.mark.parametrize("size", PARTS)
def test_all_ranks_take_the_step_of_the_joined_batch(size: int, tmp_path: Path) -> None:
    multiprocessing.spawn(worker, (size, str(tmp_path)), nprocs=size)
    gathered = torch.load(tmp_path / "found", weights_only=False)
    for (name, how), found in gathered[0].items():
        for other in gathered[1:]:
            assert torch.equal(other[name, how]["params"], found["params"]), (name, how)
            assert other[name, how]["records"] == found["records"]
        if name in ("fault", "far"):
            continue
        model = make_model()
        optimizer = OPTIMIZERS["jet" if name == "even" else name](model)
        expected = train(model, optimizer, slice(None), "backward" if name == "even" else "one")
        for a, b in zip(found["records"], expected["records"], strict=True):
            assert (a.curvature is None) == (b.curvature is None), (name, how)
            for field in ("value", "slope", "curvature", "magnitude", "step"):
                if getattr(a, field) is not None:
                    value = pytest.approx(getattr(b, field), rel=1e-6)
                    assert getattr(a, field) == value, (name, how, field)
        for what in ("params", "grads"):
            torch.testing.assert_close(found[what], expected[what], rtol=1e-6, atol=1e-9)


class Named(nn.Module):
    """Gives what is no tensor, and tensors that do not move, among its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"name": "x", "x": x, "scores": self.model(x), "weight": self.model[0].weight}


def kinds_worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    refusals_of_flattened_parameters()
    if fully_shard is not None:
        continued_shards(folder)
    end = sum(PARTS[size][: rank + 1])
    rows = slice(end - PARTS[size][rank], end)
    found = {}
    for how in ("plain", "static_graph", "find_unused_parameters"):
        options = {} if how == "plain" else {how: True}
        for name in ("jet", "tangent pass"):
            model = DistributedDataParallel(make_model(), **options)
            optimizer = OPTIMIZERS[name](model, process_group=distributed.group.WORLD)
            found[name, how] = train(model, optimizer, rows, "one")
        model = DistributedDataParallel(Named(), **options)
        with curvature.Tape() as tape:
            loss = model(batch(0)[0])["scores"].square().sum()
        found["product", how] = tape.hvp(tape.backward(loss, list(model.parameters())))
    if rank == 0:
        torch.save(found, f"{folder}/found")
    distributed.destroy_process_group()


def continued_shards(folder: str) -> None:
    """A run that goes on from torch's distributed checkpoint is another that forgot the trail."""
    ends = []
    for stopped in (False, True):
        model = shard(make_model(), nested=True)
        make = lambda m: OPTIMIZERS["GeN"](m, process_group=distributed.group.WORLD)  # noqa: E731
        optimizer = make(model)
        train(model, optimizer, slice(None), "one")
        optimizer.stepper.trail._way = {}
        if stopped:
            model_state, state = get_state_dict(model, optimizer)
            saved = {"model": model_state, "optimizer": state}
            checkpoint.save(saved, checkpoint_id=f"{folder}/checkpoint")
            model = shard(make_model(), nested=True)
            optimizer = make(model)
            saved["model"], saved["optimizer"] = get_state_dict(model, optimizer)
            checkpoint.load(saved, checkpoint_id=f"{folder}/checkpoint")
            model_state, state = saved["model"], saved["optimizer"]
            set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state)
        ends.append(train(model, optimizer, slice(None), "one")["params"])
    assert torch.equal(*ends)


def refusals_of_flattened_parameters() -> None:
    for original in (False, True):
        model = FullyShardedDataParallel(
            make_model(), use_orig_params=original, device_id=torch.device("cpu")
        )
        for wrap in (Rescaled, GeN):
            base = torch.optim.SGD(model.parameters(), lr=0.125)
            with pytest.raises(TypeError, match="a FullyShardedDataParallel, which keeps"):
                wrap(base, process_group=distributed.group.WORLD)
            assert base.param_groups[0]["lr"] == 0.125


def test_kinds_of_parallel_modules(tmp_path: Path) -> None:
    """All of DistributedDataParallel's work alike, shards go on, flat parameters are refused."""
    multiprocessing.spawn(kinds_worker, (2, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "found", weights_only=False)
    for (name, how), got in found.items():
        plain = found[name, "plain"]
        if name == "product":
            torch.testing.assert_close(got, plain)
            continue
        assert [r.step for r in got["records"]] == pytest.approx(
            [r.step for r in plain["records"]], rel=1e-9
        ), (name, how)
        torch.testing.assert_close(got["params"], plain["params"])
