"""What holds for every wrapper around every base optimizer."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from agreement import fast_only
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from wrapped import BASES, WRAPPERS, OwnSGD, Problem, assert_same, every_base, every_wrapper

from optim import GeN, Rescaled
from optim.rules import Lipschitz

F64 = torch.float64


@every_wrapper
@every_base
def test_equals_the_base_with_the_recorded_steps_as_its_rate(base: str, wrapper: str) -> None:
    """State advances once a step; all of it, buffers and random numbers too, is the base's."""
    problem = Problem()
    optimizer = WRAPPERS[wrapper](BASES[base](problem.groups()))
    optimizer.param_groups[1]["lr"] *= 0.25
    problem.train(optimizer, range(6))
    after = problem.snapshot(optimizer)
    assert optimizer.skipped == 0
    assert not (torch.cat([p.detach().flatten() for p in problem.params()]) == 0).all()

    twin = Problem()
    plain = BASES[base](twin.groups())
    for k, record in enumerate(optimizer.records):
        plain.param_groups[0]["lr"], plain.param_groups[1]["lr"] = record.step, record.step / 4
        plain.zero_grad()
        twin.losses(k).mean().backward()
        plain.step()
    params, buffers, state, rng = after
    torch.testing.assert_close(params, [p.data for p in twin.params()], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(buffers, list(twin.model.buffers()), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(state, plain.state_dict()["state"], rtol=1e-7, atol=1e-10)
    assert torch.equal(rng, torch.get_rng_state())
    assert twin.unused not in plain.state or base.startswith("Adagrad")
    assert twin.unused.grad is None


@every_wrapper
@every_base
def test_a_saved_run_continues_bit_for_bit(base: str, wrapper: str) -> None:
    # In float32, as torch itself casts NAdam's float32 state to the parameters' dtype on loading.
    problem = Problem(torch.float32)
    optimizer = WRAPPERS[wrapper](BASES[base](problem.groups()))
    problem.train(optimizer, range(3))
    saved = copy.deepcopy((problem.model.state_dict(), optimizer.state_dict()))
    rng = torch.get_rng_state()
    problem.train(optimizer, range(3, 6))

    other = Problem(torch.float32)
    resumed = WRAPPERS[wrapper](BASES[base](other.groups()))
    other.model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    torch.set_rng_state(rng)
    other.train(resumed, range(3, 6))
    assert_same([p.data for p in other.params()], [p.data for p in problem.params()])
    assert list(resumed.records) == list(optimizer.records)[3:]


@every_wrapper
def test_is_a_torch_optimizer(wrapper: str) -> None:
    problem = Problem()
    base = torch.optim.SGD(problem.groups(), lr=0.1)
    optimizer = WRAPPERS[wrapper](base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    ell = optimizer.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    losses = optimizer.step(lambda: problem.losses(0))
    scheduler.step()
    assert losses.shape == (8,)
    assert not losses.requires_grad
    assert optimizer.param_groups[0]["lr"] == ell / 2
    assert problem.model[0].weight.grad is not None
    optimizer.zero_grad()
    assert problem.model[0].weight.grad is None
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.step(lambda: problem.losses(1))
    assert calls == [1]
    assert wrapper in repr(optimizer)


@every_wrapper
def test_frozen_parameters_and_zero_rate(wrapper: str) -> None:
    a, b = (nn.Parameter(torch.ones(1, dtype=F64)) for _ in range(2))
    b.requires_grad_(False)
    optimizer = WRAPPERS[wrapper](torch.optim.SGD([a, b], momentum=0.9))
    optimizer.step(lambda: (a * b).square().sum())
    moved = a.item()
    assert moved != 1
    assert b.item() == 1
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(lambda: (a * b).square().sum())
    assert a.item() == moved


@every_wrapper
def test_a_parameter_frozen_between_steps_stays(wrapper: str) -> None:
    a, b = (nn.Parameter(torch.ones(1, dtype=F64)) for _ in range(2))
    optimizer = WRAPPERS[wrapper](torch.optim.SGD([a, b]))
    closure = lambda: (a * b).square().sum() + a.exp().sum()  # noqa: E731
    optimizer.step(closure)
    b.requires_grad_(False)
    before = a.item(), b.item()
    optimizer.step(closure)
    assert a.item() != before[0]
    assert b.item() == before[1]
    assert b.grad is None


@every_wrapper
def test_pickles(wrapper: str) -> None:
    problem = Problem()
    optimizer = WRAPPERS[wrapper](BASES["AdamW"](problem.groups()))
    problem.train(optimizer, range(2))
    copied = pickle.loads(pickle.dumps(optimizer))
    assert copied.iteration == 2
    assert_same(copied.state_dict()["state"], optimizer.state_dict()["state"])
    copied.register_step_post_hook(lambda *_: None)
    copied.load_state_dict(copied.state_dict())


def test_state_of_another_kind_is_refused() -> None:
    problem = Problem()
    rescaled = Rescaled(torch.optim.SGD(problem.groups()))
    gen = GeN(torch.optim.SGD(problem.groups()))
    with pytest.raises(ValueError, match="saved by GeN, this is Rescaled"):
        rescaled.load_state_dict(gen.state_dict())
    with pytest.raises(ValueError, match="saved by an optimizer that is not wrapped"):
        rescaled.load_state_dict(torch.optim.SGD(problem.groups()).state_dict())
    saved = rescaled.state_dict()
    saved["wrapper"] = {"kind": "Rescaled", "beta3": 0.5}
    saved["param_groups"][0]["lr"] = 7.0
    with pytest.raises(
        ValueError, match=r"lacks or adds \['base', 'beta3', 'checked', 'energy', 'estimator'"
    ):
        rescaled.load_state_dict(saved)
    assert rescaled.param_groups[0]["lr"] == 0.95
    published = Rescaled(torch.optim.SGD(problem.groups()), rule=Lipschitz(beta3=0.5))
    message = r"saved with rule Cautious\(\), this has Lipschitz\(beta3=0.5\)"
    with pytest.raises(ValueError, match=message):
        published.load_state_dict(rescaled.state_dict())


@fast_only
@every_wrapper
def test_the_callers_attention_kernels_serve_and_never_change(wrapper: str) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(1, 1, 3, 2))
    flash = torch.backends.cuda.flash_sdp_enabled
    seen = []

    def closure() -> Tensor:
        seen.append(flash())
        return F.scaled_dot_product_attention(p, p, p).square().sum()

    optimizer = WRAPPERS[wrapper](torch.optim.SGD([p]))
    for _ in range(2):
        optimizer.step(closure)
    assert len(seen) >= 4  # twice the step, twice a check or probes
    assert all(seen)
    assert flash()


@every_wrapper
def test_checkpointed_statistics_advance_as_in_plain_training(wrapper: str) -> None:
    def make() -> tuple[nn.Module, Callable[[], Tensor]]:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        x = torch.randn(8, 4)
        return block, lambda: checkpoint(block, x, use_reentrant=False).square().sum(1)

    block, closure = make()
    optimizer = WRAPPERS[wrapper](torch.optim.SGD(block.parameters()))
    for _ in range(2):
        optimizer.step(closure)
    twin, closure = make()
    for _ in range(2):
        closure().mean().backward()
    assert block[1].num_batches_tracked == twin[1].num_batches_tracked
    assert optimizer.skipped == 0


@pytest.mark.parametrize("size", [1e-8, 1e-12, 1e-14])
def test_small_gradients_keep_their_digits(size: float) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Rescaled(torch.optim.SGD([p]), ell=0.5)
    optimizer.step(lambda: size * (p - 3).square().sum())
    torch.testing.assert_close(p.detach(), torch.full((3,), 3.0))


@pytest.mark.parametrize("base", [torch.optim.SGD, OwnSGD])
def test_a_model_that_changes_its_dtype_goes_on(base: type) -> None:
    model = nn.Linear(3, 2)
    optimizer = Rescaled(base(model.parameters(), lr=0.1), ell=0.5)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, F64, torch.float32):
        model.to(dtype)
        before = model.weight.detach().clone()
        optimizer.step(lambda dtype=dtype: model(x.to(dtype)).square().sum(1))
        assert optimizer.skipped == 0
        assert (model.weight - before).norm() > 1e-3


@every_wrapper
def test_a_lazy_module_finds_its_place_at_the_first_step(wrapper: str) -> None:
    model, x = nn.LazyLinear(2), torch.ones(3, 4)
    optimizer = WRAPPERS[wrapper](torch.optim.SGD(model.parameters()))
    values = [optimizer.step(lambda: model(x).square().sum()).item() for _ in range(3)]
    assert values == sorted(values, reverse=True)
