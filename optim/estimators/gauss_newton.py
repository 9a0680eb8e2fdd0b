"""The curvature of the loss alone, with the model's outputs moving linearly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvature import Tape
from optim.estimators.estimator import Estimator
from optim.line import Estimate, Line
from optim.ranges import check_kind
from optim.trial import Trial


class _Watching(Tape):
    """A tape that notes what a module returns while it records."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self.outputs: list[GradientEdge] = []

    def __enter__(self) -> _Watching:
        self._hook = self._model.register_forward_hook(self._note)
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._hook.remove()
        super().__exit__(kind, error, trace)

    def _note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # Their edges, since the loss may write to the tensors in place.
        self.outputs += [get_gradient_edge(y) for y in _tensors(output) if y.requires_grad]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
    elif is_dataclass(value):
        yield from _tensors(vars(value))


@dataclass(frozen=True)
class GaussNewton(Estimator):
    """d^T G d with the generalised Gauss-Newton matrix G, by :meth:`curvature.Tape.gauss_newton`.

    Never negative where the loss is convex in the model's outputs, and cheaper than d^T H d.

    Args:
        model: the module whose outputs the closure's loss is computed from.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: at the first estimate, the closure does not call the model, or this PyTorch is
            older than 2.5.

    Example:
        >>> import torch
        >>> from optim import Rescaled
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = Rescaled(torch.optim.SGD(model.parameters()), estimator=GaussNewton(model))
        >>> _ = optimizer.step(lambda: model(torch.eye(2)).square().mean())
        >>> optimizer.records[-1].curvature > 0
        True
    """

    model: nn.Module = field(repr=False)

    def __post_init__(self) -> None:
        check_kind("model", self.model, nn.Module, "the module that the closure calls")

    @property
    def needs_graph(self) -> bool:
        return True

    def recorder(self) -> _Watching:
        return _Watching(self.model)

    def estimate(self, trial: Trial, line: Line, reach: float) -> Estimate | str:
        unit, length = trial.unit(line.squared_norm)

        def measure(tape: _Watching, weight: float) -> list[float]:
            if not tape.outputs:
                raise ValueError(
                    "the closure did not call the model that GaussNewton was given, or this "
                    "returned no tensor with a graph in lists, dictionaries or dataclasses: the "
                    "outputs between which and the loss the curvature is taken are not known"
                )
            curvature = tape.gauss_newton(unit, tape.outputs).curvature.double().item()
            return [curvature * length * length / weight]

        (curvature,) = trial.measured(self.recorder, measure)
        curvature += trial.penalty.curvature(trial.direction)
        return Estimate(line.slope, curvature, abs(curvature))
