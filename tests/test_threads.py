"""Threads that train at the same time."""

import threading

import pytest
import torch
from closures import OPTIMIZERS
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from optim import GeN
from optim.intercept import intercepted


def test_other_threads_keep_their_backward() -> None:
    x = torch.ones(1, requires_grad=True)
    found: list[Tensor] = []
    with intercepted(found.append):
        thread = threading.Thread(target=lambda: (3 * x).sum().backward())
        thread.start()
        thread.join()
        (5 * x).sum().backward()
    assert x.grad == 3
    assert found == [torch.tensor(5.0)]
    x.sum().backward()
    assert x.grad == 4


def test_threads_may_train_at_once() -> None:
    """Of which the one that began first ends first."""
    original = torch.autograd.backward
    begun = [threading.Event(), threading.Event()]
    ended = threading.Event()
    slopes = []

    def train(second: bool) -> None:
        x = nn.Parameter(torch.tensor([1.0]))
        optimizer = GeN(torch.optim.SGD([x]), checked=0)

        def closure() -> Tensor:
            begun[second].set()
            assert (ended if second else begun[1]).wait(10)
            loss = (x - 3).square().sum()
            optimizer.zero_grad()
            loss.backward()
            return loss

        assert not second or begun[0].wait(10)
        optimizer.step(closure)
        slopes.append(optimizer.records[-1].slope)
        if not second:
            ended.set()

    threads = [threading.Thread(target=train, args=(second,)) for second in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slopes == [16.0, 16.0]
    assert torch.autograd.backward is original


@pytest.mark.parametrize("optimizer", ["tangent pass", "gradients", "GeN"])
def test_threads_train_each_their_own_modules(optimizer: str) -> None:
    """With buffers of batch norm, which a step would take back if they were its own."""

    def train(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        for p in model.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 2
        wrapped = OPTIMIZERS[optimizer](model, torch.optim.SGD(model.parameters()))
        x, y = torch.randn(8, 4, generator=generator), torch.arange(8) % 3
        for _ in range(15):
            wrapped.step(lambda: F.cross_entropy(model(x), y))
        return list(model.state_dict().values())

    alone = [train(seed) for seed in range(2)]
    together: dict[int, list[Tensor]] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: together.update({seed: train(seed)}))
        for seed in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        torch.testing.assert_close(together[seed], alone[seed], rtol=0, atol=0)
