"""Pictures of a run and of a step, by matplotlib, which the extra ``plots`` installs."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from optim.ahead import Ahead
from optim.ranges import check_kind
from optim.record import Records, StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WINDOWS = 50  # of the share of descent directions, over a whole run


def run(records: Sequence[StepRecord] | str | os.PathLike[str]) -> Figure:
    """Loss, step, curvature and share of descent directions of a run, against its iterations.

    A steady fall of ``r`` with a rising curvature, or a share of descent directions well below 1
    with momentum, tell of steps that are too long; skipped steps are marked on the loss.

    Args:
        records: ``optimizer.records``, or the file to which they were written.

    Returns:
        A figure; ``figure.savefig("run.png")`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: no records.

    Example:
        >>> import torch
        >>> from optim import GeN, plots
        >>> x = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = GeN(torch.optim.SGD([x]))
        >>> for _ in range(20):
        ...     _ = optimizer.step(lambda: x.cosh().sum())
        >>> figure = plots.run(optimizer.records)
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['loss', 'step along d', 'curvature along d', 'descent directions']
    """
    if isinstance(records, (str, os.PathLike)):
        records = Records.read(records)
    check_kind("records", records, Sequence, "the records of a wrapper, or their file")
    for record in records:
        if not isinstance(record, StepRecord):
            raise TypeError(f"records holds a {type(record).__name__}; give optimizer.records")
    records = list(records)
    if not records:
        raise ValueError("there are no records to draw")
    figure = _figure(9, 6)
    (loss, step), (curvature, descent) = figure.subplots(2, 2, sharex=True)

    _curves(loss, records, value=None)
    skipped = [r.iteration for r in records if r.skipped is not None]
    for k in skipped:
        loss.axvline(k, color="C3", linewidth=0.8, label="skipped" if k == skipped[0] else None)
    _curves(step, records, r="r, at ell = 1", step="taken")
    if all(r.magnitude is None or r.magnitude == r.curvature for r in records):
        _curves(curvature, records, curvature=None)
    else:
        names = {"magnitude": r"mean of $|d^T H_b d|$", "curvature": r"$d^T H d$"}
        _curves(curvature, records, **names)
    _shares(descent, records)

    for axes, name in (
        (loss, "loss"),
        (step, "step along d"),
        (curvature, "curvature along d"),
        (descent, "descent directions"),
    ):
        axes.set_ylabel(name)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    for axes in (curvature, descent):
        axes.set_xlabel("iteration")
    return figure


def ahead(seen: Ahead) -> Figure:
    """The loss along a step and the parabola fitted to it: figure 2 of *GeN*.

    Args:
        seen: what ``optimizer.look_ahead(closure)`` returned.

    Returns:
        A figure; ``figure.savefig("ahead.png")`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: it is something else.

    Example:
        >>> import torch
        >>> from optim import GeN, plots
        >>> x = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = GeN(torch.optim.SGD([x]))
        >>> figure = plots.ahead(optimizer.look_ahead(lambda: x.cosh().sum()))
        >>> figure.axes[0].get_xlabel()
        'step along d'
    """
    check_kind("seen", seen, Ahead, "what look_ahead returned")
    figure = _figure(6, 4)
    axes = figure.subplots()
    axes.plot(seen.steps, seen.losses, "C0", label="loss")
    axes.plot(seen.steps, seen.parabola, "C1--", label="parabola")
    axes.axvline(seen.step, color="C7", linewidth=0.8, label=f"step, {seen.step:.2g}")
    axes.plot(0, seen.value, "ko", markersize=4, label="here")
    finite = [loss for loss in [*seen.losses, *seen.parabola] if math.isfinite(loss)]
    low, high = min(finite), max(finite)
    # A loss that explodes beyond the step must not flatten all the rest.
    high = min(high, low + 3 * (max(seen.parabola) - low))
    if high > low:  # at a minimum all may be the same to rounding
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set(xlabel="step along d", ylabel="loss")
    axes.locator_params(axis="x", nbins=6)
    axes.legend(fontsize="small")
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ImportError(
            "matplotlib is not installed: pip install matplotlib (this package's extra 'plots')"
        ) from error
    # Not pyplot's: no window, no backend to choose, nothing to close.
    return Canvas(figsize=(width, height), layout="constrained")


def _curves(axes: Axes, records: Sequence[StepRecord], **labels: str | None) -> None:
    """Draw fields of the records, on a logarithmic scale as far as they are positive."""
    sizes = []
    scale = "log"
    for name, label in labels.items():
        # A step that was skipped has no length.
        known = [(r.iteration, getattr(r, name)) for r in records if r.skipped is None]
        known = [(k, y) for k, y in known if y is not None and math.isfinite(y)]
        if not known:
            continue
        axes.plot(*zip(*known, strict=True), linewidth=1, label=label)
        sizes += [abs(y) for _, y in known if y != 0]
        if any(y <= 0 for _, y in known):
            scale = "symlog"
    if scale == "symlog" and sizes:
        # Linear up to where a tenth of the numbers lie.
        axes.set_yscale("symlog", linthresh=sorted(sizes)[len(sizes) // 10])
    elif sizes:
        axes.set_yscale("log")


def _shares(axes: Axes, records: Sequence[StepRecord]) -> None:
    """Draw q_n of *Adaptive scaling*, (26): the share of descent directions in a moving window."""
    slopes = [(r.iteration, r.slope >= 0) for r in records if r.slope is not None]
    window = max(1, len(slopes) // _WINDOWS)
    iterations = [k for k, _ in slopes[window - 1 :]]
    descents = [d for _, d in slopes]
    shares = [sum(descents[i : i + window]) / window for i in range(len(iterations))]
    label = f"share in {window} steps" if window > 1 else None
    axes.plot(iterations, shares, linewidth=1, label=label)
    axes.set_ylim(-0.05, 1.05)
