"""The demo from beginning to end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import fusestep as fs

from . import network, stream
from .agreement import compare
from .contenders import RULES, contenders, copied
from .learning import test_then_train
from .report import Report
from .timing import median_step_times

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .learning import Accuracy, Optimizer
    from .network import Arrays
    from .options import Options
    from .stream import Digits


def run(options: Options) -> int:
    """Learn, measure, print and draw.

    Parameters
    ----------
    options
        What the user chose.

    Returns
    -------
    int
        0; or 1 if the learning rate was far too high, if fusestep and plain NumPy do not agree, or
        if the picture cannot be written.
    """
    if options.threads is not None:
        fs.set_num_threads(options.threads)
    rng = np.random.default_rng(options.seed)
    digits = stream.load_digits()
    parameters = network.initial_parameters(rng)
    plain_parameters = copied(parameters)
    report = Report(
        f"A network of {_count(parameters):,} parameters learns digits with "
        f"fusestep.{options.optimizer}(lr={options.lr:g})"
    )

    batches = stream.batches(digits, options.samples, rng)
    accuracy = _learn(options, report, batches, parameters, plain_parameters)
    report.accuracy(accuracy, first_pass=len(digits))
    if not all(np.isfinite(array).all() for array in parameters.values()):
        report.note("The parameters have overflowed: this learning rate is far too high.")
        return 1

    seconds = _measure(options, report, digits, parameters)
    report.step_times(options.optimizer, seconds)
    agreement = compare(parameters, plain_parameters)
    report.agreement(agreement, steps=len(accuracy.samples))
    drawn = options.output is None or _draw(
        options.output, report, options.optimizer, accuracy, len(digits), seconds
    )
    return 0 if agreement.same and drawn else 1


def _learn(
    options: Options,
    report: Report,
    batches: Iterator[Digits],
    parameters: Arrays,
    plain_parameters: Arrays,
) -> Accuracy:
    """Let fusestep move `parameters`, and plain NumPy, with the same gradients, the other ones."""
    rule = RULES[options.optimizer]
    optimizers: list[Optimizer] = [
        rule.fusestep(parameters, lr=options.lr),
        rule.plain(plain_parameters, lr=options.lr),
    ]
    # A learning rate that is far too high shall end in our sentence, not in NumPy's warnings.
    with np.errstate(over="ignore", invalid="ignore"):
        return report.follow(test_then_train(parameters, batches, optimizers), options.samples)


def _measure(
    options: Options, report: Report, digits: Digits, parameters: Arrays
) -> dict[str, float]:
    batch = digits[np.arange(stream.MAX_BATCH)]
    activations = network.forward(parameters, batch.images)
    gradients = network.backward(parameters, batch.images, batch.labels, activations)
    rule = RULES[options.optimizer]
    with report.working("measuring the time of a step"):
        return median_step_times(
            contenders(rule, parameters, gradients, options.lr, options.threads)
        )


def _draw(
    path: Path,
    report: Report,
    rule: str,
    accuracy: Accuracy,
    first_pass: int,
    seconds: dict[str, float],
) -> bool:
    from .picture import draw  # needs matplotlib, which --no-plot does not

    try:
        draw(path, rule, accuracy, first_pass, seconds)
    except OSError as error:
        report.note(f"The picture cannot be written: {error}")
        return False
    report.note(f"Picture: {path}")
    return True


def _count(parameters: Arrays) -> int:
    return sum(array.size for array in parameters.values())
