"""What the demo draws: accuracy over time, and the time of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter, StrMethodFormatter

from .learning import WINDOW

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from .learning import Accuracy

OURS, THEIRS, FAINT = "#0b7a75", "#a9b4c2", "#6b7785"


def draw(
    path: Path, rule: str, accuracy: Accuracy, first_pass: int, seconds: dict[str, float]
) -> None:
    """Draw the picture into a file.

    Parameters
    ----------
    path
        The file; its suffix decides the format.
    rule
        Name of the rule.
    accuracy
        Over time.
    first_pass
        The number of samples after which they come again.
    seconds
        Time of a step, by the optimizer's name.
    """
    # Without pyplot: no window, no display and no global state.
    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"fusestep.{rule} learns handwritten digits as a stream", weight="bold")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_accuracy(left, accuracy, first_pass)
    _draw_step_times(right, seconds)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.savefig(path)


def _draw_accuracy(axes: Axes, accuracy: Accuracy, first_pass: int) -> None:
    axes.set_title("Accuracy, test then train", loc="left")
    axes.plot(
        accuracy.samples,
        accuracy.rolling,
        color=OURS,
        lw=2,
        label=f"over the last {WINDOW} samples",
    )
    axes.plot(accuracy.samples, accuracy.overall, color=FAINT, lw=1.5, label="since the start")
    axes.set(xlabel="samples seen", ylabel="accuracy", xlim=(0, accuracy.seen), ylim=(0, 1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    if first_pass < accuracy.seen:
        axes.axvline(first_pass, color=FAINT, lw=1, ls=":", label="from here, digits come again")
    axes.legend(loc="lower right", frameon=False)


def _draw_step_times(axes: Axes, seconds: dict[str, float]) -> None:
    axes.set_title("Time of one optimizer step", loc="left")
    microseconds = [value * 1e6 for value in seconds.values()]
    colors = [OURS if name == "fusestep" else THEIRS for name in seconds]
    bars = axes.bar(list(seconds), microseconds, color=colors, width=0.62)
    axes.bar_label(bars, [f"{value:.1f} µs" for value in microseconds], padding=3)
    axes.set_yscale("log")
    # Bars on a log scale have no natural foot: theirs is a third of the shortest.
    axes.set_ylim(min(microseconds) / 3, max(microseconds) * 2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("median, µs (log scale)")
    axes.grid(axis="y", alpha=0.3)
