"""The low-memory tape: what it frees, when, and what it says afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agreement import fast_only, shows_what_it_packed
from dispatched import Dispatched
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from curvature import Tape, allocation, saved


def layers() -> nn.Module:
    parts: list[nn.Module] = []
    for _ in range(4):
        parts += [nn.Linear(6, 6), nn.Tanh()]
    return nn.Sequential(*parts)


def record(net: nn.Module, **options: Any) -> tuple[Tape, list[Tensor]]:
    torch.manual_seed(0)
    params = list(net.parameters())
    with Tape(**options) as tape:
        losses = net(torch.randn(3, 6)).square().mean(1)
    return tape, list(tape.backward(losses, params))


packed_only = pytest.mark.skipif(
    not shows_what_it_packed, reason="an older PyTorch frees what it has saved with the graph"
)


@fast_only
@packed_only
def test_it_frees_what_it_has_used_and_then_says_so() -> None:
    net = layers()
    tape, g = record(net, low_memory=True)
    expected = record(net)[0].directional(g).curvature
    torch.testing.assert_close(tape.directional(g).curvature, expected)
    with pytest.raises(RuntimeError, match=r"record the loss again, or use Tape\(\) for several"):
        tape.directional(g)


def test_a_direction_that_does_not_fit_frees_nothing() -> None:
    tape, g = record(layers(), low_memory=True)
    with pytest.raises(ValueError, match="missing"):
        tape.directional(g[:-1])
    assert tape.directional(g).curvature.isfinite()


@fast_only
@packed_only
def test_saved_tensors_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    free = saved.Saved.free

    def counting(self: saved.Saved, node: Any) -> None:
        free(self, node)
        left.append(len(self.addresses()))

    monkeypatch.setattr(saved.Saved, "free", counting)
    tape, g = record(layers(), low_memory=True)
    tape.directional(g)
    assert left == sorted(left, reverse=True)
    assert left[0] > 4
    assert left[-1] == 0


@fast_only
def test_checkpointed_regions_are_evaluated_from_what_is_still_there() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)])
    params = list(net.parameters())
    x = torch.randn(3, 6)

    def curvature(**options: Any) -> Tensor:
        with Tape(**options) as tape:
            y = x
            for block in net:
                y = checkpoint(lambda z, block=block: block(z).sin().exp(), y, use_reentrant=False)
            losses = y.square().mean(1)
        gradient = tape.backward(losses, params)
        return tape.directional(gradient).curvature

    torch.testing.assert_close(curvature(low_memory=True), curvature())


def test_writing_to_a_saved_tensor_is_refused_as_by_autograd() -> None:
    w = torch.ones(3, requires_grad=True)
    for low_memory in (False, True):
        with Tape(low_memory=low_memory) as tape:
            y = w.exp()
            loss = y.sum()
        with torch.no_grad():
            y += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            tape.backward(loss, [w])


class Library:
    """Stands for the C library."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def mallopt(self, parameter: int, value: int) -> None:
        self.calls.append((parameter, value))


def test_thresholds_are_set_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(allocation, "_glibc", lambda: library)
    with pytest.raises(ZeroDivisionError), Tape(low_memory=True):
        raise ZeroDivisionError
    assert library.calls == [(-3, 2**18), (-3, 2**25)]


@fast_only
def test_transforms_that_allow_no_holding_are_named() -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"torch\.func inside the loss"), Tape(low_memory=True):
        torch.func.grad(lambda x: x.sin().sum())(x)


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert allocation._glibc.__wrapped__() is None


def memory_of(x: Tensor) -> StorageWeakRef:
    """Its ``expired()`` tells whether nobody holds it any more."""
    return StorageWeakRef(x.untyped_storage())


@fast_only
def test_products_that_autograd_does_not_hold_are_not_kept() -> None:
    # ReLU holds its result, not what the convolution gave; batch norm holds that.
    for after, held in ((nn.BatchNorm2d(64), True), (nn.ReLU(), False)):
        convolution = nn.Conv2d(64, 64, 3, padding=1)
        x = torch.randn(4, 64, 32, 32, requires_grad=True)
        for low_memory in (False, True):
            with Tape(low_memory=low_memory) as tape:
                y = convolution(x)
                loss = F.softplus(after(y)).mean()
            product = memory_of(y)
            del y
            tape.backward(loss, [x, *convolution.parameters()])
            assert product.expired() == (low_memory and not held)


@fast_only
def test_a_cotangent_that_a_light_operation_tells_is_not_kept() -> None:
    linear, target, cotangents = nn.Linear(6, 6), torch.randn(2, 3, 6), {}
    params, net = list(linear.parameters()), (linear, lambda y: target - y, nn.GELU())

    def losses() -> Tensor:
        torch.manual_seed(0)
        y = torch.randn(2, 3, 6)
        for i, function in enumerate(net):
            y = function(y)
            y.register_hook(lambda g, i=i: cotangents.update({i: memory_of(g)}))
        return y.pow(3).sum()

    with Tape() as tape:
        loss = losses()
    g = tape.backward(loss, params)
    # The linear layer's follows from that of the difference.
    assert [i for i in range(3) if not cotangents[i].expired()] == [1, 2]
    with Tape(engine="reference") as reference:
        loss = losses()
    reference.backward(loss, params)
    found, expected = (t.directional(g).curvature for t in (tape, reference))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@fast_only
def test_nothing_is_freed_before_an_operation_that_may_refuse() -> None:
    # The absolute square of eigenvectors refuses its own double backward, the whole graph does not.
    rows = [[0.0, 1.0, 0.0], [-1.0, 0.0, 0.5], [0.2, 0.0, 1.0]]
    x = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    quadratics = []
    for options in ({"low_memory": True}, {"engine": "reference"}):
        with Tape(**options) as tape:  # type: ignore[arg-type]
            loss = sum(t.abs().square().sum() for t in torch.linalg.eig(x.sin()))
        (g,) = tape.backward(loss, [x])
        quadratics.append(tape.directional([torch.ones_like(g)]))
    assert [q.engine for q in quadratics] == ["reference", "reference"]
    numbers = [q.curvature for q in quadratics]
    torch.testing.assert_close(*numbers)


@fast_only
def test_the_cotangent_of_cross_entropy_is_not_made_again() -> None:
    """Log-softmax needs its sum over the classes alone, one number a sample."""
    net = nn.Linear(6, 50)
    with Tape() as tape:
        loss = F.cross_entropy(net(torch.randn(4, 6)), torch.randint(50, (4,)))
    g = tape.backward(loss, list(net.parameters()))
    with Dispatched() as dispatched:
        tape.directional(g)
    assert "aten::nll_loss_forward" in dispatched.names
    assert "aten::nll_loss_backward" not in dispatched.names
