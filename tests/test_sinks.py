"""Where records go as they come, and how they come back."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from optim import GeN, Records, Rescaled, StepRecord
from optim.sinks import JsonLines, TensorBoard, WeightsAndBiases


def train(optimizer: Any, x: nn.Parameter, steps: int) -> None:
    for _ in range(steps):
        optimizer.step(lambda: x.cosh().sum())


def iterations(path: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("wrap", [Rescaled, GeN])
def test_each_record_is_written_at_once(wrap: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    x = nn.Parameter(torch.tensor([1.0, -0.5]))
    optimizer = wrap(torch.optim.SGD([x]))
    optimizer.records = Records(JsonLines(path), keep=1)
    train(optimizer, x, 3)
    assert iterations(path) == [1, 2, 3]
    assert [record.iteration for record in optimizer.records] == [3]
    again = pickle.loads(pickle.dumps(optimizer))
    train(again, again.param_groups[0]["params"][0], 1)
    assert iterations(path) == [1, 2, 3, 4]
    read = Records.read(path)
    assert len(read) == 4
    assert read[2] == optimizer.records[-1]


def test_skipped_steps_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    records = Records(JsonLines(path))
    records.append(StepRecord(1, 2.5, slope=0.1 + 0.2, step=1e-300))
    records.append(StepRecord(2, skipped="a loss is NaN"))
    assert list(Records.read(path)) == list(records)


def test_a_line_half_written_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    JsonLines(path).write(StepRecord(1, 2.5))
    with path.open("a") as file:
        file.write('{"iteration": 2, "val')
    assert [record.value for record in Records.read(path)] == [2.5]
    JsonLines(path).write(StepRecord(2, 2.25))
    assert [record.value for record in Records.read(path)] == [2.5, 2.25]


def test_a_run_that_goes_on_from_a_checkpoint_takes_the_place_of_what_followed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "records.jsonl"
    x = nn.Parameter(torch.tensor([1.0, -0.5]))
    optimizer = GeN(torch.optim.SGD([x]))
    optimizer.records = Records(JsonLines(path))
    train(optimizer, x, 2)
    saved, at = optimizer.state_dict(), x.detach().clone()
    train(optimizer, x, 3)
    y = nn.Parameter(at)
    other = GeN(torch.optim.SGD([y]))
    other.load_state_dict(saved)
    other.records = Records(JsonLines(path))
    train(other, y, 1)
    read = Records.read(path)
    assert [record.iteration for record in read] == [1, 2, 3]
    assert read[-1] == optimizer.records[2] == other.records[0]


@pytest.mark.parametrize(
    "content",
    [
        '{"important": 1}',
        "x" * 9000,
        "x" * 9000 + "\n",
        "1\n2",
        "my notes\n",
        "\n",
        "\xe9\n",
        '{"epoch": 1}\n',
        StepRecord(1).to_json() + "\nmy notes\n",
        'my notes\n{"iteration": ',
    ],
)
def test_a_file_of_something_else_is_left_as_it_was(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match="ends in something else than records"):
        JsonLines(path)
    assert path.read_text() == content


def test_the_file_stays_where_it_was_when_the_process_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sink = JsonLines("records.jsonl")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    sink.write(StepRecord(1, 2.5))
    assert iterations(tmp_path / "records.jsonl") == [1]


def test_a_sink_that_fails_loses_no_count() -> None:
    class Full:
        def write(self, record: StepRecord) -> None:
            raise OSError("no space left")

    x = nn.Parameter(torch.tensor([1.0]))
    optimizer = GeN(torch.optim.SGD([x]))
    optimizer.records = Records(Full())
    with pytest.raises(OSError, match="no space left"):
        optimizer.step(lambda: x.sum() * torch.nan)
    assert (optimizer.iteration, optimizer.skipped, len(optimizer.records)) == (1, 1, 1)


@pytest.mark.parametrize("line", ["[1]", "{1", '{"value": 1.0}', '{"iteration": 1, "loss": 1.0}'])
def test_other_lines_are_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"line 1: no (record of a step|JSON object)"):
        Records.read(path)


def test_a_path_that_cannot_be_written_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        JsonLines(tmp_path / "missing" / "records.jsonl")


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path)
    assert not list(tmp_path.iterdir())  # nothing where no step is taken
    records = Records(sink)
    records.append(StepRecord(1, 2.5, slope=1.0, step=0.25))
    records.append(StepRecord(2, 1.5, step=0.5))
    records.append(StepRecord(3, skipped="a loss is NaN"))
    copy = pickle.loads(pickle.dumps(records))
    sink._writer.flush()
    assert scalars(tmp_path, "optim/value") == [(1, 2.5), (2, 1.5)]
    assert scalars(tmp_path, "optim/slope") == [(1, 1.0)]
    assert scalars(tmp_path, "optim/step") == [(1, 0.25), (2, 0.5), (3, 0.0)]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (text,) = events.Tensors("optim/skipped/text_summary")
    assert (text.step, text.tensor_proto.string_val) == (3, [b"a loss is NaN"])

    copy.append(StepRecord(2, 1.25))
    copy._sinks[0]._writer.flush()
    assert scalars(tmp_path, "optim/value") == [(1, 2.5), (2, 1.25)]


def test_weights_and_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        def __init__(self) -> None:
            self.logged: list[dict[str, Any]] = []
            self.axes: dict[str, str] = {}

        def define_metric(self, name: str, step_metric: str) -> None:
            self.axes[name] = step_metric

        def log(self, entries: dict[str, Any]) -> None:
            self.logged.append(entries)

    active = Run()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=active))
    records = Records(WeightsAndBiases())
    records.append(StepRecord(1, 2.5, slope=1.0, step=0.25))
    records.append(StepRecord(2, skipped="a loss is NaN"))
    assert active.axes == {"optim/*": "optim/iteration"}
    assert active.logged == [
        {"optim/iteration": 1, "optim/value": 2.5, "optim/slope": 1.0, "optim/step": 0.25},
        {"optim/iteration": 2, "optim/step": 0.0, "optim/skipped": "a loss is NaN"},
    ]
    copy = pickle.loads(pickle.dumps(records))
    copy.append(StepRecord(3, 1.5))
    assert active.logged[-1] == {"optim/iteration": 3, "optim/value": 1.5, "optim/step": 0.0}
    other = Run()
    WeightsAndBiases(other, prefix="").write(StepRecord(1, 2.5))
    assert other.logged == [{"iteration": 1, "value": 2.5, "step": 0.0}]
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))
    with pytest.raises(ValueError, match=r"call wandb\.init first"):
        WeightsAndBiases()


@pytest.mark.parametrize(
    ("module", "make", "name"),
    [
        ("torch.utils.tensorboard", lambda: TensorBoard("runs"), "tensorboard"),
        ("wandb", WeightsAndBiases, "wandb"),
    ],
)
def test_what_is_not_installed_is_named(
    module: str, make: Callable[[], Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install {name} \(this package's extra '{name}'"):
        make()
