"""Where records of steps go as they come: JSON lines, TensorBoard, Weights & Biases.

Give them to :class:`optim.Records`::

    optimizer.records = Records(JsonLines("run.jsonl"), TensorBoard("runs/first"))
"""

from __future__ import annotations

import os
import weakref
from dataclasses import asdict
from typing import Any

from optim.record import StepRecord, parsed

_LINES = 8192  # bytes, more than two records have
_START = b'{"iteration": '


class JsonLines:
    """Append each record to a file, one JSON object a line; :meth:`optim.Records.read` reads it.

    Nothing is lost when the process is killed but a line half written, which is cut off when the
    file is opened again.

    Raises:
        OSError: the file cannot be written.
        ValueError: it ends in something else than a record.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     JsonLines(file.name).write(StepRecord(iteration=1, value=2.5))
        ...     file.read()[:30]
        b'{"iteration": 1, "value": 2.5,'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # The process may go to another folder, and open would take a number for an open file.
        self._path = os.path.abspath(os.fspath(path))
        # A path that cannot be written must fail now, not after a step.
        with open(self._path, "ab+") as file:
            size = file.tell()
            file.seek(max(0, size - _LINES))
            *whole, rest = file.read().split(b"\n")
            if rest[: len(_START)] != _START[: len(rest)] or not all(map(_is_record, whole[-1:])):
                raise ValueError(
                    f"{self._path} ends in something else than records of steps; give a new file"
                )
            file.truncate(size - len(rest))

    def write(self, record: StepRecord) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")


def _is_record(line: bytes) -> bool:
    try:
        parsed(line, "")
    except ValueError:
        return False
    return True


class TensorBoard:
    """Write each number of a record as a scalar, and why a step was skipped as a text.

    Where a run goes on from a checkpoint, what it wrote after that is hidden.

    Args:
        log_dir: the folder of the run.
        prefix: of the names of scalars.

    Raises:
        ImportError: tensorboard is not installed.

    Example: ``optimizer.records = Records(TensorBoard("runs/first"))``, then
    ``tensorboard --logdir runs``.
    """

    def __init__(self, log_dir: str | os.PathLike[str], *, prefix: str = "optim/") -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ImportError(_missing("tensorboard")) from error
        self._log_dir, self._prefix = os.fspath(log_dir), prefix
        self._writer: Any = None

    def write(self, record: StepRecord) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._log_dir, purge_step=record.iteration)
            # At the end of the process it would leave unwritten what it holds.
            weakref.finalize(self, self._writer.close)
        for name, number in _numbers(record).items():
            self._writer.add_scalar(self._prefix + name, number, record.iteration)
        if record.skipped is not None:
            self._writer.add_text(self._prefix + "skipped", record.skipped, record.iteration)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_writer": None}


class WeightsAndBiases:
    """Log each record to a run of Weights & Biases, against its own count of iterations.

    Args:
        run: what ``wandb.init`` returned; the active run if None.
        prefix: of the names of what is logged.

    Raises:
        ImportError: wandb is not installed.
        TypeError, ValueError: no run, or none is active.

    Example: ``wandb.init(); optimizer.records = Records(WeightsAndBiases())``.
    """

    def __init__(self, run: Any = None, *, prefix: str = "optim/") -> None:
        self._run: Any = _active_run() if run is None else run
        if not callable(getattr(self._run, "define_metric", None)):
            raise TypeError(f"run is {run!r}; give what wandb.init returned")
        self._prefix = prefix
        # The caller's own calls of log count steps of their own.
        self._run.define_metric(f"{prefix}*", step_metric=f"{prefix}iteration")

    def write(self, record: StepRecord) -> None:
        entries: dict[str, Any] = {"iteration": record.iteration, **_numbers(record)}
        if record.skipped is not None:
            entries["skipped"] = record.skipped
        self._run.log({self._prefix + name: entry for name, entry in entries.items()})

    def __reduce__(self) -> Any:
        # A run belongs to its process; a copy elsewhere logs to the one that is active there.
        return _logging_to_the_active_run, (self._prefix,)


def _logging_to_the_active_run(prefix: str) -> WeightsAndBiases:
    return WeightsAndBiases(prefix=prefix)


def _active_run() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(_missing("wandb")) from error
    if wandb.run is None:
        raise ValueError("no run of wandb is active; call wandb.init first")
    return wandb.run


def _numbers(record: StepRecord) -> dict[str, float]:
    entries = asdict(record)
    del entries["iteration"], entries["skipped"]
    return {name: number for name, number in entries.items() if number is not None}


def _missing(name: str) -> str:
    return f"{name} is not installed: pip install {name} (this package's extra {name!r})"
