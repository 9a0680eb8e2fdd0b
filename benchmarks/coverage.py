"""Which functions and modules of PyTorch the tangent pass serves, and how; every value is checked.

    python benchmarks/coverage.py [--out docs/coverage.md]

Runs the samples that PyTorch's own tests draw for its functions and modules, in float64, through
the tangent pass, the second-order jets and the Hessian-vector product, and compares them with
double backward through the whole graph; where that refuses, with finite differences. Exits with
an error if a value is wrong, or if something is refused that PyTorch can differentiate twice.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils import _pytree as pytree

from curvature import NonFiniteLoss, NotTwiceDifferentiable, Tape
from curvature.testing import finite_difference

F64 = torch.float64
SAMPLES = 8  # of each function, spread over those that there are

Function = Callable[[list[Tensor]], Tensor]


def as_loss(output: Any) -> Tensor | None:
    """A number with first and second derivatives in every real entry of the output."""
    total = None
    for part in pytree.tree_leaves(output):
        if not isinstance(part, Tensor) or not part.requires_grad:
            continue
        dense = part if part.layout == torch.strided else part.to_dense()
        real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
        if real.dtype != F64:
            continue
        flat = real.reshape(-1)
        number = (flat * torch.linspace(0.5, 1.5, flat.numel(), dtype=F64)).sum()
        number = number + flat.square().sum() / 3
        total = number if total is None else total + number
    return total


def bent(bases: list[Tensor], moves: list[Tensor]) -> list[Tensor]:
    """Inputs that are not the parameters themselves, so that second derivatives pass through."""
    return [base + p + p * p / 5 for base, p in zip(bases, moves, strict=True)]


def function_samples(op: Any) -> Iterator[tuple[Function, list[Tensor]]]:
    samples = list(op.sample_inputs("cpu", F64, requires_grad=True))
    for sample in samples[:: max(1, len(samples) // SAMPLES)][:SAMPLES]:
        leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dtype == F64]
        bases = [leaves[i].detach().clone() for i in places]

        def function(
            moves: list[Tensor],
            leaves: list[Any] = leaves,
            spec: Any = spec,
            places: list[int] = places,
            bases: list[Tensor] = bases,
            process: Any = sample.output_process_fn_grad,
        ) -> Tensor | None:
            arguments = list(leaves)
            for i, x in zip(places, bent(bases, moves), strict=True):
                arguments[i] = x
            first, args, kwargs = pytree.tree_unflatten(arguments, spec)
            torch.manual_seed(0)
            return as_loss(process(op(first, *args, **kwargs)))

        if places:
            yield function, [torch.zeros_like(x) for x in bases]


def module_samples(info: Any) -> Iterator[tuple[Function, list[Tensor]]]:
    for training in (True, False):
        inputs = info.module_inputs_func(
            info, device="cpu", dtype=F64, requires_grad=True, training=training
        )
        for sample in inputs[:SAMPLES]:
            if sample.forward_input is None:
                continue
            made = sample.constructor_input
            module = info.module_cls(*made.args, **made.kwargs).to(F64).train(training)
            names = [name for name, p in module.named_parameters() if p.dtype == F64]
            given = sample.forward_input.args, sample.forward_input.kwargs
            leaves, spec = pytree.tree_flatten(given)
            places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dtype == F64]
            bases = [module.get_parameter(n).detach().clone() for n in names]
            bases += [leaves[i].detach().clone() for i in places]

            def function(
                moves: list[Tensor],
                module: Any = module,
                names: list[str] = names,
                leaves: list[Any] = leaves,
                spec: Any = spec,
                places: list[int] = places,
                bases: list[Tensor] = bases,
            ) -> Tensor | None:
                moved, arguments = bent(bases, moves), list(leaves)
                for i, x in zip(places, moved[len(names) :], strict=True):
                    arguments[i] = x
                args, kwargs = pytree.tree_unflatten(arguments, spec)
                params = dict(zip(names, moved[: len(names)], strict=True))
                torch.manual_seed(0)
                return as_loss(torch.func.functional_call(module, params, args, kwargs))

            if bases:
                yield function, [torch.zeros_like(x) for x in bases]


class Wrong(Exception):
    """A value that is not the curvature, or a refusal that need not be."""


def numbers(function: Function, params: list[Tensor], v: list[Tensor], engine: str) -> Any:
    """The curvature by each pass, and the engine's name; or the refusal."""
    leaves = [p.clone().requires_grad_() for p in params]
    try:
        values = []
        for low_memory in (True, False) if engine == "auto" else (False,):
            with Tape(engine=engine, low_memory=low_memory) as tape:
                loss = function(leaves)
            tape.backward(loss, leaves)
            q = tape.directional(v)
            values.append(q.curvature.item())
            name = q.engine
        values.append(sum(float((a * b).sum()) for a, b in zip(tape.hvp(v), v, strict=True)))
        return values, name
    except NotTwiceDifferentiable as refusal:
        return str(refusal)


def examine(function: Function, params: list[Tensor]) -> str | None:
    """How a sample is served; None if there is nothing to differentiate."""
    try:
        loss = function([p.clone().requires_grad_() for p in params])
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
        return None  # a sample that PyTorch itself refuses
    if loss is None or not loss.requires_grad or not bool(torch.isfinite(loss)):
        return None
    torch.manual_seed(1)
    v = [torch.randn_like(p) for p in params]
    try:
        fast = numbers(function, params, v, "auto")
    except (NonFiniteLoss, ValueError):
        return None
    try:
        exact = numbers(function, params, v, "reference")
    except (RuntimeError, ValueError) as error:
        exact = str(error)
    if isinstance(fast, str):
        if not isinstance(exact, str):
            raise Wrong(f"refused: {fast}")
        return "refused: " + fast.partition("twice: ")[2].partition(". Replace")[0]
    values, name = fast
    if not isinstance(exact, str):
        truth, tolerance = exact[0][0], 1e-7
    else:
        estimate, error = finite_difference(function, params, v)
        truth, tolerance = estimate.curvature.item(), 1e-5
        if error.curvature.item() > tolerance * max(abs(truth), 1):
            return None
    if not all(_agree(value, truth, tolerance) for value in values):
        raise Wrong(f"{values} instead of {truth}, {name}")
    return (
        "double backward" + name.partition("double backward")[2].rstrip(")")
        if "(" in name
        else "rule"
    )


def _agree(value: float, truth: float, tolerance: float) -> bool:
    if math.isnan(truth):
        return True
    return abs(value - truth) <= tolerance * max(abs(truth), abs(value), 1e-2)


def survey() -> tuple[dict[str, set[str]], list[str]]:
    served: dict[str, set[str]] = {}
    wrong: list[str] = []
    entries: list[tuple[str, Callable[[Any], Any], Any]] = [
        (f"torch.{op.name}", function_samples, op)
        for op in op_db
        if op.supports_autograd and F64 in op.supported_dtypes("cpu")
    ]
    entries += [
        (f"torch.nn.{info.module_cls.__name__}", module_samples, info)
        for info in module_db
        if not issubclass(info.module_cls, LazyModuleMixin)
    ]
    for name, samples, entry in track(entries, "functions and modules"):
        for function, params in samples(entry):
            try:
                how = examine(function, params)
            except Wrong as error:
                wrong.append(f"{name}: {error}")
                continue
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {error}")
                continue
            if how is not None:
                served.setdefault(name, set()).add(how)
    return served, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/coverage.md"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    served, wrong = survey()
    lines = [
        "# Coverage",
        "",
        f"Printed by `python benchmarks/coverage.py` with torch {torch.__version__}. "
        "*rule*: every operation that the function consists of has a rule; *double backward*: "
        "the named operations were differentiated by their own double backward; *refused*: "
        "PyTorch has no second derivative, for the reason given. Every value was compared, in "
        "float64, with double backward or finite differences.",
        "",
        "| function | served by |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {'; '.join(sorted(how))} |" for name, how in sorted(served.items())]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    kinds = [min(how, key=len).partition(":")[0] for how in served.values()]
    for kind in ("rule", "double backward", "refused"):
        print(f"{kind}: {kinds.count(kind)}")
    for line in wrong:
        print("WRONG", line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
