"""Models that torch.compile has made: the numbers of the plain ones, and compiled once."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import every_engine
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import curvature
from curvature import NotTwiceDifferentiable, module_calls
from curvature.compilations import something_compiled
from curvature.pushforward import Pushforward
from optim import GeN, Rescaled
from optim.estimators import Exact, GaussNewton, GradientDifferences, Probes, Secant

pytestmark = pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="needs PyTorch 2.6"
)

F64 = torch.float64
OPTIMIZERS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "jet": lambda model, base: Rescaled(base),
    "tangent pass": lambda model, base: Rescaled(base, estimator=Exact(per_sample=False)),
    "lazy": lambda model, base: Rescaled(base, every=3),
    "Gauss-Newton": lambda model, base: Rescaled(base, estimator=GaussNewton(model)),
    "gradients": lambda model, base: Rescaled(base, estimator=GradientDifferences()),
    "losses": lambda model, base: Rescaled(base, estimator=Probes()),
    "one loss": lambda model, base: Rescaled(base, estimator=Secant()),
    "GeN": lambda model, base: GeN(base, phi=2),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.norm(self.first(x)).tanh(), 0.2, self.training))


class Problem:
    def __init__(self, optimizer: str, how: str) -> None:
        torch.manual_seed(0)
        self.net = Net().to(F64)
        self.x, self.y = torch.randn(8, 4, dtype=F64), torch.randint(3, (8,))
        self.model: Any = self.net
        if how == "in place":
            self.net.compile(backend="aot_eager")
        elif how != "plain":
            self.model = torch.compile(self.net, backend=how)
        base = torch.optim.SGD(self.net.parameters(), momentum=0.9)
        self.optimizer = OPTIMIZERS[optimizer](self.model, base)

    def losses(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y, reduction="none")

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.step(self.losses)


@pytest.mark.parametrize(
    ("optimizer", "how"),
    [
        *((optimizer, "aot_eager") for optimizer in OPTIMIZERS),
        *(
            (optimizer, how)
            for optimizer in ("jet", "lazy", "GeN")
            for how in ("eager", "in place")
        ),
    ],
)
def test_steps_are_those_of_the_plain_model_and_compile_once(optimizer: str, how: str) -> None:
    """After the checked steps nothing new is compiled, and buffers advance once a step."""
    plain, compiled = Problem(optimizer, "plain"), Problem(optimizer, how)
    torch.manual_seed(0)
    plain.train(14)
    torch.manual_seed(0)
    compiled.train(4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled.train(10)
    for a, b in zip(plain.optimizer.records, compiled.optimizer.records, strict=True):
        assert a.skipped is b.skipped is None
        assert a.step == pytest.approx(b.step, rel=1e-9)
    torch.testing.assert_close(compiled.net.state_dict(), plain.net.state_dict())
    assert compiled.net.norm.num_batches_tracked == 14


@pytest.mark.parametrize("how", ["aot_eager", "in place"])
@every_engine
def test_curvature_of_a_compiled_model(engine: str, how: str) -> None:
    problem, plain = Problem("jet", how), Problem("jet", "plain")
    problem.losses()  # compiled by now
    torch.manual_seed(0)
    found = []
    for each in (plain, problem):
        params = list(each.net.parameters())
        torch.manual_seed(0)
        with curvature.Tape(engine=engine) as tape:
            losses = each.losses()
        gradient = tape.backward(losses, params)
        found += [(tape.directional(gradient).curvature, *tape.hvp(gradient))]
    torch.testing.assert_close(found[1], found[0])


def test_checkpointed_parts_of_a_compiled_model_are_evaluated_again_uncompiled() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64)
    model, x = torch.compile(net, backend="aot_eager"), torch.randn(8, 4, dtype=F64)
    params = list(net.parameters())
    found = []
    for run in (net, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)):
        with curvature.Tape() as tape:
            loss = run(x).square().sum()
        found.append(tape.hvp(tape.backward(loss, params)))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("optimizer", ["jet", "losses", "GeN"])
def test_a_compiled_function_hides_no_buffers(optimizer: str, warm: bool) -> None:
    """Also where it was compiled before the wrapper saw it."""
    plain, compiled = Problem(optimizer, "plain"), Problem(optimizer, "plain")
    losses = torch.compile(compiled.losses, backend="aot_eager")
    for problem, closure in ((plain, plain.losses), (compiled, losses)):
        if warm:
            closure()
        torch.manual_seed(0)
        for _ in range(4):
            problem.optimizer.step(closure)
    torch.testing.assert_close(compiled.net.state_dict(), plain.net.state_dict())
    assert compiled.net.norm.num_batches_tracked == 4 + warm


@pytest.mark.parametrize("optimizer", ["jet", "GeN"])
def test_a_skipped_step_takes_back_what_a_compiled_function_did(optimizer: str) -> None:
    problem = Problem(optimizer, "plain")
    losses = torch.compile(lambda scale: problem.losses() * scale, backend="aot_eager")
    problem.optimizer.step(lambda: losses(torch.ones(())))
    problem.optimizer.step(lambda: losses(torch.ones(())))
    before = copy.deepcopy(problem.net.state_dict())
    with pytest.warns(RuntimeWarning, match="nothing changed"):
        problem.optimizer.step(lambda: losses(torch.tensor(torch.nan)))
    torch.testing.assert_close(problem.net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["jet", "GeN"])
def test_a_step_inside_a_compiled_function_is_left_out_of_it(optimizer: str) -> None:
    plain, compiled = Problem(optimizer, "plain"), Problem(optimizer, "plain")
    torch.manual_seed(0)
    plain.train(3)
    torch.manual_seed(0)
    step = torch.compile(lambda: compiled.train(1), backend="aot_eager")
    for _ in range(3):
        step()
    assert list(compiled.optimizer.records) == list(plain.optimizer.records)


# Torch sees that hooks are on when it is first asked to compile.
@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
def test_a_model_compiled_inside_a_step_works_after_it() -> None:
    problem = Problem("GeN", "plain")

    def losses() -> Tensor:
        if problem.model is problem.net:
            problem.model = torch.compile(problem.net, backend="aot_eager")
        return problem.losses()

    problem.optimizer.step(losses)
    assert problem.model(problem.x).shape == (8, 3)
    with torch.compiler.set_stance("force_eager"):
        assert problem.model(problem.x).shape == (8, 3)
    problem.optimizer.step(losses)
    assert problem.optimizer.skipped == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_calls_are_heard_and_what_is_heard_changes_nothing(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hooks, which could replace inputs and outputs by what they return, and without."""
    module = sys.modules["curvature.module_calls"]
    monkeypatch.setattr(module, "something_compiled", lambda: compiled)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    x, heard = torch.ones(1, 2), []
    plain = net(x)
    with (
        module_calls(lambda m: heard.append(f"+{type(m).__name__}") or False),
        module_calls(after=lambda m: heard.append(f"-{type(m).__name__}") or x),
    ):
        assert torch.equal(net(x), plain)
        with pytest.raises(RuntimeError):
            net(torch.ones(1, 3))
    names = ["+Sequential", "+Linear", "-Linear", "+Tanh", "-Tanh", "-Sequential"]
    assert heard == [*names, "+Sequential", "+Linear", "-Linear", "-Sequential"]
    net(x)
    assert len(heard) == 10


def test_hooks_serve_until_something_is_compiled() -> None:
    problem = Problem("GeN", "plain")
    problem.optimizer.step(problem.losses)  # which is itself kept from being compiled
    assert not something_compiled()
    torch.compile(nn.Linear(2, 2), backend="eager")
    assert something_compiled()


def test_tangent_passes_run_in_a_mode_only_where_something_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch._dynamo")
    modes, run = [], Pushforward.run

    def noted(self: Pushforward, *args: Any, **options: Any) -> Tensor | None:
        modes.append(torch._C._len_torch_function_stack())
        return run(self, *args, **options)

    monkeypatch.setattr(Pushforward, "run", noted)
    problem = Problem("jet", "plain")
    problem.train(3)
    assert [mode > 0 for mode in modes] == [True, False, False]
    Problem("jet", "eager").train(2)
    problem.train(1)
    assert all(modes[3:])


def conditional(w: Tensor) -> Tensor:
    return torch.cond(X.sum() > 1e9, lambda a: (a @ w).cos(), lambda a: (a @ w).sin(), (X,))


def conditional_with_operands(w: Tensor) -> Tensor:
    return torch.cond(X.sum() > 1e9, torch.cos, torch.sin, (X @ w,))


X = torch.linspace(-1, 1, 12, dtype=F64).view(3, 4)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("function", [conditional, conditional_with_operands])
def test_control_flow_keeps_its_gradient_and_has_no_second(
    function: Callable[[Tensor], Tensor],
) -> None:
    w = torch.randn(4, 2, dtype=F64, requires_grad=True)
    expected = 2 * X.T @ ((X @ w).sin() * (X @ w).cos()).detach()

    def loss(w: Tensor) -> Tensor:
        return function(w).square().sum()

    GeN(torch.optim.SGD([w], lr=0.1)).step(lambda: loss(w))
    torch.testing.assert_close(w.grad, expected)
    for engine in ("auto", "reference"):
        with pytest.raises(NotTwiceDifferentiable, match="no right second derivative"):
            curvature.directional(loss, w, w.detach(), engine=engine)


@pytest.mark.parametrize("optimizer", ["losses", "GeN"])
def test_a_compiled_function_that_is_called_later_hides_no_buffers(optimizer: str) -> None:
    problem, other = Problem(optimizer, "plain"), Net().to(F64)
    first = torch.compile(problem.losses, backend="aot_eager")
    later = torch.compile(lambda: other(problem.x).square().mean(), backend="aot_eager")
    for _ in range(3):
        problem.optimizer.step(first)
    for k in range(3):
        problem.optimizer.step(lambda: first() + later())
        assert other.norm.num_batches_tracked == k + 1
    assert problem.net.norm.num_batches_tracked == 6


def test_a_first_step_that_is_skipped_takes_back_what_a_compiled_function_did() -> None:
    problem = Problem("GeN", "plain")
    losses = torch.compile(lambda: problem.losses() * torch.nan, backend="aot_eager")
    before = copy.deepcopy(problem.net.state_dict())
    with pytest.warns(RuntimeWarning, match="nothing changed"):
        problem.optimizer.step(losses)
    torch.testing.assert_close(problem.net.state_dict(), before, rtol=0, atol=0)


def rounding(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    """A compiler whose code rounds otherwise than what it was made of, and visibly so."""
    return lambda *args: [out * 1.001 for out in module(*args)]


@pytest.mark.parametrize("optimizer", ["gradients", "lazy", "GeN"])
def test_a_compiled_run_goes_on_bit_for_bit(optimizer: str) -> None:
    runs = [Problem(optimizer, "plain") for _ in range(2)]
    for run in runs:
        run.net.norm.eval()
        run.model = torch.compile(run.net, backend=rounding)
    torch.manual_seed(0)
    runs[0].train(5)
    saved = copy.deepcopy((runs[0].net.state_dict(), runs[0].optimizer.state_dict()))
    runs[1].net.load_state_dict(saved[0])
    runs[1].optimizer.load_state_dict(saved[1])
    for run in runs:
        torch.manual_seed(1)
        run.train(3)
    torch.testing.assert_close(runs[1].net.state_dict(), runs[0].net.state_dict(), rtol=0, atol=0)


def clipped(problem: Problem, losses: Callable[[], Tensor]) -> Tensor:
    problem.optimizer.zero_grad()
    loss = losses().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(problem.net.parameters(), 0.1)
    return loss


def test_closures_that_call_backward_may_use_compiled_functions() -> None:
    plain, compiled = Problem("GeN", "plain"), Problem("GeN", "plain")
    losses = torch.compile(compiled.losses, backend="aot_eager")
    for problem, function in ((plain, plain.losses), (compiled, losses)):
        torch.manual_seed(0)
        for _ in range(4):
            problem.optimizer.step(lambda p=problem, f=function: clipped(p, f))
    torch.testing.assert_close(compiled.net.state_dict(), plain.net.state_dict())
