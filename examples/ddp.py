"""Train on 8x8 digits on several processes, which take the step that one would.

Each process has a part of the batch, the model in DistributedDataParallel, and a wrapper with
``process_group``. Parts may differ in size: what counts is the mean over all samples. Slope,
curvature and step are the same to the last bit on all processes, and so are the parameters.

    torchrun --nproc-per-node 2 examples/ddp.py [--smoke]
"""

from __future__ import annotations

import argparse
import gc
import time

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from optim import Rescaled
from optim.schedules import cooldown

BATCH = 32  # on each process


def train(epochs: int) -> None:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images).float().div(16), torch.as_tensor(labels)
    held_out = torch.arange(len(x)) % 5 == 0
    data = TensorDataset(x[~held_out], y[~held_out])
    sampler = DistributedSampler(data)
    loader = DataLoader(data, BATCH, sampler=sampler)

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    model = DistributedDataParallel(network)
    optimizer = Rescaled(
        torch.optim.RMSprop(model.parameters()), process_group=distributed.group.WORLD
    )
    scheduler = cooldown(optimizer, epochs * len(loader))
    start = time.perf_counter()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        model.train()
        total = 0.0
        for inputs, targets in loader:
            optimizer.step(
                lambda inputs=inputs, targets=targets: F.cross_entropy(
                    model(inputs), targets, reduction="none"
                )
            )
            scheduler.step()
            total += optimizer.records[-1].value  # of all processes
        accuracy = (network(x[held_out]).argmax(1) == y[held_out]).float().mean().item()
        if rank == 0 and (epoch == 0 or epoch == epochs - 1 or epoch % 5 == 4):
            seconds = time.perf_counter() - start
            print(f"{epoch + 1:5}   {total / len(loader):8.4f}   {accuracy:8.1%}   {seconds:7.1f}")

    flat = torch.cat([p.detach().flatten() for p in network.parameters()])
    found = [torch.empty_like(flat) for _ in range(size)]
    distributed.all_gather(found, flat)
    if rank == 0:
        same = all(torch.equal(each, flat) for each in found)
        print(f"{size} processes, parameters the same to the last bit: {same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two epochs, for CI")
    epochs = 2 if parser.parse_args().smoke else 30
    distributed.init_process_group("gloo")
    if distributed.get_rank() == 0:
        print("epoch       loss   accuracy   seconds")
    train(epochs)
    # Else threads of gloo may still run when the interpreter ends, which now and then aborts; the
    # network, which holds the group, is part of a cycle.
    gc.collect()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
