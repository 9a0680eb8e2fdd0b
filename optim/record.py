"""What a wrapper chose at each step: held for code and plots, and handed on as it comes."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Protocol, overload

from optim.ranges import check_count, check_kind


@dataclass(frozen=True)
class StepRecord:
    """One step of a wrapper; a number that was not computed is ``None``.

    Attributes:
        iteration: counts the calls of ``step``, from 1.
        value: the mean loss before the step, with the penalty that coupled weight decay is.
        slope: <d, g>, positive if the step descends.
        curvature: d^T H d of the mean loss, as estimated.
        magnitude: the mean over samples of abs(d^T H_b d), or abs(curvature) where they are not
            known one by one.
        energy: value and the kinetic energy of the base, where the rule asks for it.
        r: the step along d that the rule chose for ell = 1; eta under :class:`optim.rules.Newton`.
        step: the step that was taken along d: ``ell * r``, unless a bound of the base optimizer
            or a check of the loss is below it; 0 if the step was skipped.
        skipped: why the parameters did not move, or ``None``.

    Example:
        >>> record = StepRecord(iteration=1, value=2.5)
        >>> record.step, record.to_json()[:32]
        (0.0, '{"iteration": 1, "value": 2.5, "')
    """

    iteration: int
    value: float | None = None
    slope: float | None = None
    curvature: float | None = None
    magnitude: float | None = None
    energy: float | None = None
    r: float | None = None
    step: float = 0.0
    skipped: str | None = None

    def to_json(self) -> str:
        """One JSON object; NaN and infinity, which JSON lacks, become null.

        Example: see :class:`StepRecord`.
        """
        numbers = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }
        return json.dumps(numbers, allow_nan=False)


class Sink(Protocol):
    """What records are handed to as they come."""

    def write(self, record: StepRecord, /) -> None: ...


class Records(Sequence[StepRecord]):
    """The latest :class:`StepRecord` entries of a wrapper, oldest first.

    A wrapper starts with ``Records()``; assign another to its ``records`` for other arguments.

    Args:
        sinks: to which each record is handed as it comes, of :mod:`optim.sinks`: ``JsonLines``,
            ``TensorBoard``, ``WeightsAndBiases``, or anything with a ``write(record)``. What one
            raises ``step`` raises, after the step was taken.
        keep: how many to hold; older ones are dropped, so that a long run does not grow. None
            holds all.

    Example:
        >>> records = Records(keep=2)
        >>> for k in range(1, 4):
        ...     records.append(StepRecord(iteration=k, value=1 / k))
        >>> [record.iteration for record in records], records[-1].value
        ([2, 3], 0.3333333333333333)
    """

    def __init__(self, *sinks: Sink, keep: int | None = 10_000) -> None:
        for sink in sinks:
            if not callable(getattr(sink, "write", None)):
                raise TypeError(
                    f"a sink is {sink!r}; give one of optim.sinks, as JsonLines(path), or what has "
                    "a write(record)"
                )
        if keep is not None:
            check_count("keep", keep, 0)
        self._records: deque[StepRecord] = deque(maxlen=keep)
        self._sinks = sinks

    def append(self, record: StepRecord) -> None:
        """Hold one more record, and hand it to the sinks.

        Example: see :class:`Records`.
        """
        check_kind("record", record, StepRecord, "a StepRecord")
        self._records.append(record)
        for sink in self._sinks:
            sink.write(record)

    def descent_share(self, last: int | None = None) -> float:
        """The share of steps whose direction descends: q_n of *Adaptive scaling*, equation (26).

        ``q = |{k : <g_k, d_k> >= 0}| / |{k}|``, over the held steps that have a slope; with
        momentum it may fall below 1, and a low share tells of steps that are too long.

        Args:
            last: how many of the latest records count, as those of an epoch; all that are held if
                None.

        Returns:
            The share, or NaN if no step has a slope.

        Example:
            >>> records = Records()
            >>> for k, slope in enumerate((2.0, -1.0, 0.5, 3.0), start=1):
            ...     records.append(StepRecord(iteration=k, slope=slope))
            >>> records.descent_share(), records.descent_share(last=2)
            (0.75, 1.0)
        """
        held = list(self._records)
        if last is not None:
            check_count("last", last, 0)
            held = held[max(0, len(held) - last) :]
        slopes = [record.slope for record in held if record.slope is not None]
        return sum(slope >= 0 for slope in slopes) / len(slopes) if slopes else math.nan

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the held records to a file, one JSON object a line.

        Example:
            >>> import tempfile
            >>> records = Records()
            >>> records.append(StepRecord(iteration=1))
            >>> with tempfile.NamedTemporaryFile() as file:
            ...     records.write(file.name)
            ...     file.read()[:16]
            b'{"iteration": 1,'
        """
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(record.to_json() + "\n" for record in self._records)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Records:
        """All records of a file of JSON lines.

        Where iterations start over, as those of a run that goes on from a checkpoint, they take
        the place of the earlier ones. A last line that is half written is left out.

        Raises:
            ValueError: a line holds no record.

        Example:
            >>> import tempfile
            >>> from optim.sinks import JsonLines
            >>> with tempfile.NamedTemporaryFile() as file:
            ...     records = Records(JsonLines(file.name))
            ...     for k in (1, 2, 3, 2):
            ...         records.append(StepRecord(iteration=k))
            ...     [record.iteration for record in Records.read(file.name)]
            [1, 2]
        """
        records = cls(keep=None)
        held = records._records
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith("\n"):
                    break  # half written by a run that was killed, or is running
                record = parsed(line, f"{os.fspath(path)}, line {number}")
                while held and held[-1].iteration >= record.iteration:
                    held.pop()
                held.append(record)
        return records

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[StepRecord]: ...

    def __getitem__(self, index: int | slice) -> StepRecord | list[StepRecord]:
        if isinstance(index, slice):
            return list(self._records)[index]
        return self._records[index]


def parsed(line: str | bytes, where: str) -> StepRecord:
    """The record that a line of JSON holds.

    Raises:
        ValueError: it holds none; the message starts with ``where``.
    """
    try:
        entries = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON object") from error
    names = {field.name for field in fields(StepRecord)}
    if not isinstance(entries, dict) or not entries.keys() <= names or "iteration" not in entries:
        raise ValueError(f"{where}: no record of a step")
    return StepRecord(**entries)
