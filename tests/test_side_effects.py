"""What evaluations of the user's model leave behind is taken back."""

import threading

import torch
from torch import Tensor, nn

from curvature import SideEffects


def test_a_module_that_another_thread_is_in_does_not_matter() -> None:
    norm = nn.BatchNorm1d(2)
    inside, done = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            assert done.wait(10)
            return x

    thread = threading.Thread(target=Slow(), args=(torch.ones(1),))
    with SideEffects():
        thread.start()
        assert inside.wait(10)
        with SideEffects():
            done.set()
            thread.join()
            norm(torch.randn(4, 2))
        assert norm.num_batches_tracked == 0
    assert list(norm.state_dict()) == list(nn.BatchNorm1d(2).state_dict())
