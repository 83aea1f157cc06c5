"""What state and parameters of low precision do to training: ``python bench/quality.py``.

Trains two small models with several seeds in each configuration of `training.py`, and prints the
final losses, mean ± standard deviation over the seeds, and how far they are from those of float32:
the mean of the differences, seed by seed, ± its standard error. A minute on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from machine import describe
from training import CONFIGURATIONS, TASKS, Comparison, compared, final_losses

if TYPE_CHECKING:
    from collections.abc import Sequence

Losses = dict[str, list[float]]
"""By configuration, one number a seed."""

WIDTH = 110
PACES = {
    group: next(iter(configurations.values())).pace
    for group, configurations in CONFIGURATIONS.items()
}


def table(task: str, group: str, losses: Losses) -> Table:
    """Return a row for each configuration."""
    pace = "" if PACES[group] == 1 else f", {PACES[group]:g} of the usual learning rate"
    result = Table(title=f"{task}: {group}{pace}", title_justify="left", box=SIMPLE_HEAD)
    result.add_column(group)
    for column in ("final loss", "difference", "standard deviations", "reached"):
        result.add_column(column, justify="right")
    reference, *_ = losses.values()
    for name, found in losses.items():
        loss = f"{statistics.fmean(found):.4f} ± {statistics.stdev(found):.4f}"
        if found is reference:
            result.add_row(name, loss, "", "", "")
        else:
            result.add_row(name, loss, *described(compared(found, reference)))
    return result


def described(comparison: Comparison) -> list[str]:
    """Return a comparison as the cells of a row."""
    return [
        f"{comparison.difference:+.5f} ± {comparison.error:.5f}",
        f"{comparison.difference / comparison.deviation:+.2f}",
        "yes" if comparison.is_reached else "no",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many; at least 2")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--json", type=Path, help="write all losses there, and the tables beside it"
    )
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds is how many there are; the deviation takes 2")

    console = Console(width=WIDTH, record=True, highlight=False)
    everything: dict[str, dict[str, Losses]] = {}
    for task in options.tasks:
        for group, configurations in CONFIGURATIONS.items():
            losses = {
                name: final_losses(task, configuration, range(options.seeds))
                for name, configuration in track(
                    configurations.items(), f"{task}, {group}", transient=True
                )
            }
            everything.setdefault(task, {})[group] = losses
            console.print(table(task, group, losses))
    if options.json:
        content = {"machine": describe(), "final losses": everything}
        options.json.write_text(json.dumps(content, indent=1))
        options.json.with_suffix(".txt").write_text(console.export_text())


if __name__ == "__main__":
    main()
