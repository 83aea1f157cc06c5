"""What the demo prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from .learning import WINDOW, Accuracy

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    import numpy.typing as npt

    from .agreement import Agreement

CHECKPOINTS = 10


class Report:
    """The demo's output on the terminal.

    Parameters
    ----------
    title
        Printed at once.
    """

    def __init__(self, title: str) -> None:
        # No highlighting: colour is for what matters, not for every number.
        self.console = Console(highlight=False)
        self.console.print(title, style="bold")
        self.microseconds = "µs" if "utf" in self.console.encoding else "us"

    def follow(self, predictions: Iterable[npt.NDArray[np.bool_]], samples: int) -> Accuracy:
        """Keep a progress line while a network learns.

        Parameters
        ----------
        predictions
            For each batch, which predictions were right.
        samples
            How many there will be.

        Returns
        -------
        Accuracy
            Of all predictions.
        """
        accuracy = Accuracy()
        with self._progress() as progress:
            task = progress.add_task("learning", total=samples, accuracy=0.0)
            for right in predictions:
                accuracy.add(right)
                progress.update(task, completed=accuracy.seen, accuracy=accuracy.rolling[-1])
        return accuracy

    def accuracy(self, accuracy: Accuracy, first_pass: int) -> None:
        """Print accuracy over time; after `first_pass` samples, they come again."""
        table = _table("samples seen", f"last {WINDOW}", "since the start")
        for i in _evenly_spaced(len(accuracy.samples)):
            table.add_row(
                f"{accuracy.samples[i]:,}",
                f"{accuracy.rolling[i]:.1%}",
                f"{accuracy.overall[i]:.1%}",
            )
        self.console.print("\nAccuracy of predictions, each made before its sample is learned from")
        self.console.print(table)
        self.console.print()
        if first_pass < accuracy.seen:
            self.console.print(f"After {first_pass:,} samples they come again, in another order.")
        self.console.print(
            f"Final accuracy: [bold]{accuracy.rolling[-1]:.1%}[/] of the last "
            f"{min(WINDOW, accuracy.seen)} samples.\n"
        )

    def step_times(self, rule: str, seconds: dict[str, float]) -> None:
        """Print how long a step takes, and how much longer than fusestep's."""
        table = _table("optimizer", "step", "against fusestep")
        table.columns[0].justify = "left"
        for name, time in seconds.items():
            ratio = time / seconds["fusestep"]
            style = "bold green" if name == "fusestep" else None
            table.add_row(
                name, f"{time * 1e6:.1f} {self.microseconds}", f"{ratio:.1f} x", style=style
            )
        self.console.print(f"Median time of one {rule} step on this network")
        self.console.print(table)

    def agreement(self, agreement: Agreement, steps: int) -> None:
        """Print whether fusestep and plain NumPy came to the same parameters."""
        difference = agreement.largest_difference
        if difference == 0:
            verdict = "are identical, bit for bit"
        elif agreement.same:
            verdict = f"are the same (largest difference {difference:.1e})"
        else:
            verdict = f"[bold red]differ[/] by up to {difference:.1e}"
        self.console.print(
            f"\nAfter {steps:,} steps with the same gradients, the parameters of fusestep and of "
            f"plain NumPy {verdict}."
        )

    def working(self, what: str) -> AbstractContextManager[object]:
        """Show, while the context lasts, that something is going on."""
        return self.console.status(what)

    def note(self, text: str) -> None:
        """Print a line as it is, however long: a path must not be broken, nor read as markup."""
        self.console.print(text, markup=False, soft_wrap=True)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples, {task.fields[accuracy]:.1%} right"),
            console=self.console,
        )


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _evenly_spaced(size: int) -> list[int]:
    """Return up to 10 positions, the last one among them."""
    positions = np.linspace(0, size - 1, min(CHECKPOINTS, size) + 1)[1:]
    return sorted({round(position) for position in positions})
