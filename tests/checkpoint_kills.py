"""Kills examples/checkpoint.py at all kinds of moments, for test_checkpoints.

In a process of its own that evaluates no gradient, so that it can be forked.

python checkpoint_kills.py FOLDER
"""

import importlib.util
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from agreement import assert_identical

REACHES_THE_DISK = {"open", "write_record", "write_end_of_file", "flush", "fsync", "replace"}


def load_example() -> Any:
    """The example with a few rows of its own, which need no scikit-learn."""

    def load_digits(return_X_y: bool) -> tuple[Any, Any]:  # noqa: N803
        rng = np.random.default_rng(0)
        return rng.uniform(0.0, 16.0, (56, 64)), rng.integers(10, size=56)

    datasets = ModuleType("sklearn.datasets")
    vars(datasets)["load_digits"] = load_digits
    path = Path(__file__).parent.parent / "examples" / "checkpoint.py"
    spec = importlib.util.spec_from_file_location("checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {"sklearn": ModuleType("sklearn"), datasets.__name__: datasets}):
        spec.loader.exec_module(module)
    module.BATCH, module.TEST, module.EVERY = 8, 16, 2
    return module


def ends_by(run: Callable[[], None], delay: float | None = None) -> int | None:
    """The signal that ended a child that does this, None if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status <= 0, f"the child failed with {status}"
    return -status or None


def watched(run: Callable[[], None], see: Callable[[str], None]) -> None:
    """Tell ``see`` of each call that reaches the disk, before it and after it."""

    def profile(_: Any, event: str, function: Any) -> None:
        if event in ("c_call", "c_return") and function.__name__ in REACHES_THE_DISK:
            see(function.__name__)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)


def killed_at(run: Callable[[], None], moment: int, names: set[str]) -> int | None:
    """How a child ends that kills itself at such a moment of the calls of these names."""
    left = moment

    def see(name: str) -> None:
        nonlocal left
        if name in names:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    return ends_by(lambda: watched(run, see))


def state(k: int) -> dict[str, Any]:
    """Longer than the buffers of files."""
    return {"step": k, "values": torch.full((100, 100), float(k))}


def loaded(path: Path) -> int:
    found = torch.load(path, weights_only=True)
    assert bool((found["values"] == found["step"]).all())
    return int(found["step"])


def saving(save: Any, folder: Path) -> None:
    path = folder / "state.pt"
    save(state(0), path)  # the first one imports
    seen: list[str] = []
    watched(lambda: save(state(0), path), seen.append)
    # The content is on the disk before the name, and the name before save returns.
    order = [name for name in seen[::2] if name in ("fsync", "replace")]
    assert order == ["fsync", "replace", "fsync"], order

    found = []
    for moment in range(len(seen)):
        assert killed_at(lambda: save(state(1), path), moment, REACHES_THE_DISK) == signal.SIGKILL
        found.append(loaded(path))
        save(state(0), path)
        assert loaded(path) == 0
    assert found == sorted(found)
    replaced = len(seen) - 1 - seen[::-1].index("replace")
    assert found.index(1) == replaced, (found, replaced)
    print(f"killed at {len(seen)} moments of one save")


def saving_for_ever(save: Any, folder: Path) -> None:
    path, delays = folder / "loop.pt", random.Random(0)
    save(state(0), path)

    def loop() -> None:
        k = loaded(path)
        while True:
            k += 1
            save(state(k), path)

    last, rounds = 0, 25
    for _ in range(rounds):
        assert ends_by(loop, delays.uniform(0.0, 0.04)) == signal.SIGKILL
        assert loaded(path) >= last
        last = loaded(path)
    assert last > 0
    print(f"killed {rounds} times between saves 0 and {last}")


def training(example: Any, folder: Path) -> None:
    """A run that is killed over and over ends as one that never was."""
    whole, killed = folder / "whole.pt", folder / "killed.pt"
    torch.optim.SGD([torch.zeros(1)])  # imports much, once for all children
    assert ends_by(lambda: example.train(whole, 4)) is None
    moments = [(3, "open"), (2, "fsync"), (7, "fsync"), (2, "replace"), (5, "fsync"), (3, "flush")]
    for moment, name in moments:
        assert killed_at(lambda: example.train(killed, 4), moment, {name}) == signal.SIGKILL
    assert ends_by(lambda: example.train(killed, 4)) is None
    assert_identical(*(torch.load(path, weights_only=True) for path in (whole, killed)))
    print(f"trained on after {len(moments)} kills")


def main(folder: Path) -> None:
    example = load_example()
    saving(example.save, folder)
    saving_for_ever(example.save, folder)
    training(example, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
