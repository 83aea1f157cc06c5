"""How long a step takes."""

from __future__ import annotations

import statistics
import timeit
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .contenders import Contender

ROUNDS = 300
STEPS = 10
"""Steps timed together: one alone is too short for the clock."""


def median_step_times(contenders: Sequence[Contender]) -> dict[str, float]:
    """Measure contenders side by side.

    They take turns in one process, so whatever else the machine does hits all of them alike; the
    median leaves out the rounds it did hit.

    Parameters
    ----------
    contenders
        What to measure.

    Returns
    -------
    dict
        Seconds a step takes, by the contender's name.
    """
    timers = {contender.name: timeit.Timer(contender.step) for contender in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for timer in timers.values():
        timer.timeit(STEPS)  # the first steps create state and fill caches
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(STEPS) / STEPS)
    return {name: statistics.median(values) for name, values in seconds.items()}
