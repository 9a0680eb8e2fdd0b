"""What evaluations of the user's model leave behind is taken back."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from curvature import Objective, SideEffects, directional, fit, hvp


def test_they_can_be_kept() -> None:
    norm = nn.BatchNorm1d(2)
    with SideEffects() as effects:
        norm(torch.randn(4, 2))
        after = torch.get_rng_state()
        effects.keep()
    assert norm.num_batches_tracked == 1
    assert torch.equal(torch.get_rng_state(), after)


def test_those_of_a_raising_block_are_taken_back_even_if_kept() -> None:
    norm = nn.BatchNorm1d(2)
    with pytest.raises(KeyError), SideEffects() as effects:  # noqa: PT012
        norm(torch.randn(4, 2))
        effects.keep()
        raise KeyError
    assert norm.num_batches_tracked == 0


def test_a_buffer_that_was_rebound_is_restored() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count = self.count + 1
            return x

    counter = Counter()
    own = counter.count
    with SideEffects():
        counter(torch.ones(1))
    assert counter.count is own
    assert counter.count == 0


def test_buffers_that_functional_call_swapped_out_stay() -> None:
    norm = nn.BatchNorm1d(2)
    own = dict(norm.named_buffers())
    given = {name: torch.full_like(b, 7) for name, b in own.items()}
    with SideEffects():
        torch.func.functional_call(norm, given, (torch.randn(4, 2),))
    for name, buffer in norm.named_buffers():
        assert buffer is own[name]
        assert (buffer == (1 if name == "running_var" else 0)).all()
        assert (given[name] == 7).all()


def test_a_module_is_seen_both_with_lent_and_with_its_own_buffers() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rebound", torch.zeros(()))
            self.register_buffer("written", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.rebound = self.rebound + 1
            self.written += 1
            return x

    counter, x = Counter(), torch.ones(1)
    own = dict(counter.named_buffers())
    lent = {"rebound": torch.tensor(7.0), "written": torch.tensor(7.0)}
    with SideEffects():
        counter(x)
        torch.func.functional_call(counter, dict(lent), x)
        counter(x)
        assert counter.rebound == counter.written == 2
    for name, buffer in counter.named_buffers():
        assert buffer is own[name]
        assert buffer == 0
        assert lent[name] == 7


def test_a_buffer_that_was_registered_in_the_block_is_removed() -> None:
    class Cache(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.register_buffer("cache", x.clone())
            return x

    model = nn.Sequential(Cache())
    with pytest.raises(KeyError), SideEffects():  # noqa: PT012
        model(torch.ones(1))
        model(torch.zeros(1))
        raise KeyError
    assert not hasattr(model[0], "cache")


def test_stacked_models_are_left_alone() -> None:
    models = [nn.BatchNorm1d(2).eval() for _ in range(3)]
    params, buffers = torch.func.stack_module_state(models)
    x = torch.randn(4, 2)

    def loss(p: dict, b: dict) -> torch.Tensor:
        return torch.func.functional_call(models[0], (p, b), (x,)).square().sum()

    q = fit(
        lambda p: torch.func.vmap(loss)(p, buffers),
        params,
        {name: torch.ones_like(p) for name, p in params.items()},
        [-1, 0, 1],
    )
    torch.testing.assert_close(q.curvature, 2 * ((x / (1 + 1e-5) ** 0.5 + 1) ** 2).sum())


def test_buffers_of_inference_mode_are_reached() -> None:
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.inference_mode():
                self.register_buffer("mean", torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                self.mean.lerp_(x.mean(0), 0.1)
            return x + torch.rand(())

    module, state = Seen(), torch.get_rng_state()
    with SideEffects():
        module(torch.ones(3, 2))
    assert module.mean.tolist() == [0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_graph_stays_valid() -> None:
    norm = nn.BatchNorm1d(2).eval()
    x = torch.randn(4, 2, requires_grad=True)
    output = norm(x).sum()
    with SideEffects():
        norm(x)
    output.backward()


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


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:ComplexHalf")
@pytest.mark.parametrize(
    "buffer",
    [
        lambda: torch.eye(4).to_sparse(),
        lambda: torch.eye(4).to_sparse_csr(),
        lambda: torch.eye(4).to_sparse_csc(),
        lambda: torch.eye(4).to_mkldnn(),
        lambda: torch.empty(4, device="meta"),
        lambda: torch.zeros(4, dtype=torch.complex32),
    ],
    ids=["COO", "CSR", "CSC", "mkldnn", "meta", "complex32"],
)
def test_buffers_that_torch_equal_cannot_read(buffer: Callable[[], Tensor]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    model.register_buffer("other", buffer())
    J = Objective(model, lambda y, _: y.square().mean(), (torch.randn(4, 3), None))
    for measure in (directional, hvp):
        measure(J, J.params, J.params)
        assert model[0].num_batches_tracked == 0


def test_a_sparse_buffer_that_is_written_to() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weights", torch.eye(2).to_sparse())

        def forward(self) -> None:
            self.weights.mul_(2)

    graph = Graph()
    with SideEffects():
        graph()
    assert graph.weights.to_dense().tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_a_buffer_that_is_bound_anew_before_an_interrupt(error: type[BaseException]) -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            raise error

    model = nn.Sequential(Counter())
    for _ in range(2):
        with pytest.raises(error), SideEffects():
            model(torch.ones(1))
        assert model[0].count == 0
