"""The memory layer against a list of what it has seen, and inside a wrapper's step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from optim import GeN, Memory, Rescaled


@given(
    capacity=st.integers(1, 8),
    batches=st.lists(st.integers(0, 10), min_size=1, max_size=6),
    shape=st.sampled_from([(2,), (2, 3)]),
)
def test_the_last_samples_come_along(
    capacity: int, batches: list[int], shape: tuple[int, ...]
) -> None:
    memory, seen = Memory(capacity, shape), []
    for k, batch in enumerate(batches):
        x, y = torch.randn(batch, *shape), torch.arange(batch) + 100 * k
        new = list(zip(x, y, strict=True))
        expected = new + seen[: max(0, capacity - batch)]
        seen = expected[:capacity]
        joined, targets = memory(x, y)
        assert len(joined) == len(expected)
        for row, target, (value, label) in zip(joined, targets, expected, strict=True):
            assert torch.equal(row, value)
            assert target == label


def test_a_batch_of_the_capacity_is_the_plain_network() -> None:
    memory = Memory(4, 2)
    for _ in range(2):
        x, y = torch.randn(4, 2), torch.arange(4)
        joined, targets = memory(x, y)
        assert torch.equal(joined, x)
        assert torch.equal(targets, y)


def test_only_the_new_rows_pass_a_gradient_back() -> None:
    memory = Memory(5, 2)
    old = torch.randn(3, 2, requires_grad=True)
    memory(old, torch.zeros(3, dtype=torch.long))
    new = torch.randn(2, 2, requires_grad=True)
    joined, _ = memory(new, torch.zeros(2, dtype=torch.long))
    joined.sum().backward()
    assert torch.equal(new.grad, torch.ones(2, 2))
    assert old.grad is None


def test_evaluation_neither_adds_nor_remembers() -> None:
    memory = Memory(4, 2)
    memory(torch.ones(2, 2), torch.zeros(2, dtype=torch.long))
    before = {name: b.clone() for name, b in memory.named_buffers()}
    memory.eval()
    x, y = memory(torch.zeros(1, 2), torch.ones(1, dtype=torch.long))
    assert len(x) == len(y) == 1
    for name, b in memory.named_buffers():
        assert torch.equal(b, before[name])


@pytest.mark.parametrize("wrapper", [Rescaled, lambda base: GeN(base, phi=1)])
def test_a_step_remembers_its_batch_once(wrapper: type) -> None:
    torch.manual_seed(0)
    body, memory, head = nn.Linear(3, 4), Memory(6, 4), nn.Linear(4, 10)
    params = [*body.parameters(), *head.parameters()]
    optimizer = wrapper(torch.optim.SGD(params, lr=0.1))
    for k in range(1, 4):
        x, y = torch.randn(2, 3), torch.randint(10, (2,))

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            features, targets = memory(body(x).tanh(), y)
            return F.cross_entropy(head(features), targets, reduction="none")

        assert len(optimizer.step(closure)) == 2 * k
        assert memory.held == 2 * k
    assert optimizer.skipped == 0


def test_it_is_saved_and_moved_with_its_network() -> None:
    memory, twin = Memory(4, 2), Memory(4, 2)
    memory(torch.randn(3, 2), torch.arange(3))
    twin.load_state_dict(memory.state_dict())
    joined = [m(torch.ones(1, 2), torch.ones(1, dtype=torch.long))[0] for m in (memory, twin)]
    assert torch.equal(*joined)
