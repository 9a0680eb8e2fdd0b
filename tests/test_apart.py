"""Parameters that share memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from wrapped import WRAPPERS, assert_same, every_wrapper

F64 = torch.float64
OVERLAPS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "the same": lambda p: (p, p),
    "transposed": lambda p: (p, p.t()),
    "a row": lambda p: (p, p[2]),
    "columns": lambda p: (p[:, :2], p[:, 1:]),
    "of another type": lambda p: (p, p.view(torch.float32)[0]),
}


@pytest.mark.parametrize("overlap", OVERLAPS)
@every_wrapper
def test_parameters_that_share_memory_are_refused(wrapper: str, overlap: str) -> None:
    a, b = map(nn.Parameter, OVERLAPS[overlap](torch.ones(4, 3, dtype=F64)))
    message = "parameter . of group ., of shape .* shares memory with parameter . of group"
    with pytest.raises(ValueError, match=message):
        WRAPPERS[wrapper](torch.optim.SGD([{"params": [a]}, {"params": [b]}]))
    optimizer = WRAPPERS[wrapper](torch.optim.SGD([a]))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [b]})
    c, before = nn.Parameter(torch.ones(3, dtype=F64)), b.detach().clone()
    optimizer.add_param_group({"params": [c]})
    optimizer.step(lambda: a.square().sum() + c.square().sum())
    with torch.no_grad():
        a.fill_(1)
    c.data = b.data
    for call in (optimizer.step, optimizer.look_ahead):
        with pytest.raises(ValueError, match=message):
            call(lambda: a.square().sum() + c.square().sum())
    assert_same(b.detach(), before)


@every_wrapper
def test_views_of_one_buffer_that_are_apart_serve(wrapper: str) -> None:
    ends = []
    for own in (False, True):
        flat = torch.linspace(-1, 1, 24, dtype=F64)
        views = [flat[:12].view(4, 3)[:, :2], flat[:12].view(4, 3)[:, 2:], flat[12:], flat[:0]]
        params = [nn.Parameter(view.clone() if own else view) for view in views]
        optimizer = WRAPPERS[wrapper](torch.optim.SGD(params, momentum=0.9))
        for _ in range(3):
            optimizer.step(lambda ps=params: sum(p.cosh().sum() for p in ps))
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(*ends)


@every_wrapper
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_listed_twice_is_refused(wrapper: str) -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    message = "parameter 2 of group 0 is parameter 0 of group 0 again, .* list it once"
    with pytest.raises(ValueError, match=message):
        WRAPPERS[wrapper](torch.optim.SGD([a, b, a]))
    optimizer = WRAPPERS[wrapper](torch.optim.SGD([a]))
    with pytest.raises(ValueError, match="parameter 1 of group 1 is parameter 0 of group 1"):
        optimizer.add_param_group({"params": [b, b]})
    assert len(optimizer.param_groups) == 1
