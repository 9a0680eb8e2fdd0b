"""Every public class, function and method says what it does and shows it in an example."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

import curvature
import optim

PACKAGES = [curvature, curvature.testing, optim]


def public() -> Iterator[tuple[str, Any]]:
    exported = [getattr(package, name) for package in PACKAGES for name in package.__all__]
    for thing in exported:
        if inspect.ismodule(thing):
            continue
        yield thing.__qualname__, thing
        if inspect.isclass(thing):
            for name, method in inspect.getmembers(thing, inspect.isfunction):
                if not name.startswith("_") and method.__module__.split(".")[0] in (
                    "curvature",
                    "optim",
                ):
                    yield method.__qualname__, method


@pytest.mark.parametrize("thing", [pytest.param(thing, id=name) for name, thing in public()])
def test_has_an_example(thing: Any) -> None:
    assert thing.__doc__
    assert ">>>" in thing.__doc__ or "Example: see" in thing.__doc__
