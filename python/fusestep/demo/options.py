"""The command line."""

from __future__ import annotations

import argparse
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .contenders import RULES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Options:
    """What the user chose.

    Attributes
    ----------
    optimizer
        Name of a rule in :data:`.contenders.RULES`.
    lr
        Learning rate.
    samples
        Length of the stream.
    seed
        Of the first parameters, of the order of the samples and of the sizes of the batches.
    threads
        Threads that fusestep and PyTorch may use; None leaves that to them.
    output
        File for the picture; None for no picture.
    """

    optimizer: str
    lr: float
    samples: int
    seed: int
    threads: int | None
    output: Path | None


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Parse the command line; on a mistake, say so and exit.

    Parameters
    ----------
    arguments
        In place of ``sys.argv[1:]``.

    Returns
    -------
    Options
        With a learning rate that suits the rule where the user gave none.
    """
    given = _parser().parse_args(arguments)
    return Options(
        optimizer=given.optimizer,
        lr=RULES[given.optimizer].lr if given.lr is None else given.lr,
        samples=given.samples,
        seed=given.seed,
        threads=given.threads,
        output=None if given.no_plot else given.output,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusestep.demo",
        description="A small network in plain NumPy learns handwritten digits as a stream; then "
        "the step of its optimizer is timed against plain NumPy and PyTorch.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    shown = " (default: %(default)s)"
    add("--optimizer", type=_rule, choices=list(RULES), default="Adam", help=f"the rule{shown}")
    add("--lr", type=_positive, help="learning rate (default: one that suits the rule)")
    add("--samples", type=_count, default=9000, help=f"length of the stream{shown}")
    add("--seed", type=_seed, default=0, help=f"of everything that is random{shown}")
    add("--threads", type=_threads, help="threads of fusestep and PyTorch (default: their own)")
    add("--output", type=_picture, default="demo.png", help=f"file for the picture{shown}")
    add("--no-plot", action="store_true", help="draw no picture")
    return parser


def _rule(text: str) -> str:
    """Take ``adam`` for ``Adam``; what is no rule is left for argparse to complain about."""
    return {name.lower(): name for name in RULES}.get(text.lower(), text)


def _number(
    kind: Callable[[str], _Number], allowed: Callable[[_Number], bool], expected: str
) -> Callable[[str], _Number]:
    """Make a converter whose complaint says what was expected."""

    def convert(text: str) -> _Number:
        with contextlib.suppress(ValueError):
            if allowed(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {expected}")

    return convert


_positive = _number(float, lambda value: 0 < value < math.inf, "a positive number")
_count = _number(int, lambda value: value >= 1, "a positive whole number")
_seed = _number(int, lambda value: value >= 0, "a whole number from 0")
_threads = _number(int, lambda value: 1 <= value <= 1024, "a whole number from 1 to 1024")


def _picture(text: str) -> Path:
    """Refuse now what could not be written after all the work is done."""
    path = Path(text)
    if path.suffix.lower() not in {".pdf", ".png", ".svg"}:
        raise argparse.ArgumentTypeError(f"{text} does not end in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    return path
