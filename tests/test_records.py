"""What records say of a run."""

import json
import math
import warnings
from pathlib import Path

import torch
from torch import nn
from wrapped import WRAPPERS, Problem, every_wrapper

from optim import Records, Rescaled
from optim.rules import Lipschitz


@every_wrapper
def test_records_as_json_lines(wrapper: str, tmp_path: Path) -> None:
    problem = Problem()
    optimizer = WRAPPERS[wrapper](torch.optim.SGD(problem.groups()))
    problem.train(optimizer, range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        optimizer.step(lambda: problem.losses(3) * torch.nan)
    path = tmp_path / "records.jsonl"
    optimizer.records.write(path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    assert {"value", "slope", "curvature", "r", "step", "skipped"} <= set(lines[0])
    assert lines[1]["slope"] == optimizer.records[1].slope
    assert lines[2]["skipped"] is None
    assert "NaN or infinite" in lines[3]["skipped"]
    assert len(optimizer.records) == 4
    assert [record.iteration for record in optimizer.records[1:3]] == [2, 3]


def test_the_share_of_descent_directions() -> None:
    """Equation (26), of a heavy ball that climbs every now and then."""
    x = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Rescaled(
        torch.optim.SGD([x], lr=0.1, momentum=0.9), rule=Lipschitz(), ell=1.0, checked=0
    )
    for _ in range(20):
        optimizer.step(lambda: (x.square() * torch.tensor([1.0, 5.0])).sum())
    slopes = [r.slope for r in optimizer.records if r.slope is not None]
    climbing = sum(slope < 0 for slope in slopes)
    assert 0 < climbing < 20
    assert optimizer.records.descent_share() == 1 - climbing / 20
    assert optimizer.records.descent_share(last=5) == sum(s >= 0 for s in slopes[-5:]) / 5
    assert math.isnan(Records().descent_share())
