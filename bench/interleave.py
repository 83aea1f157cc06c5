"""Timing several functions side by side.

pytest-benchmark finishes one benchmark before it begins the next. On a shared machine that is not a
comparison: the neighbours' load changes from one second to the next, and whoever runs in a quiet
one wins. Here the peers of a group take turns, in rounds, each round in another order, so that
whatever disturbs the machine disturbs all of them; the samples are then handed to pytest-benchmark
(see `replay.py`), which computes its statistics and writes its JSON from them.

A turn is many calls, of which the first are not timed: a peer finds its data in the caches as far
as they fit there, as it does when it is used by itself, rather than its predecessor's.
"""

from __future__ import annotations

import gc
import random
import time
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SETTLE = 0.005  # seconds in which the spinning threads of the last peer's pool go to sleep
_LONG = 0.05  # seconds; a call that takes longer needs no other one to warm up


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Parameters
    ----------
    turn
        Seconds a turn should take; a call that takes longer is a turn by itself.
    group
        Seconds all rounds of a group should take.
    min_rounds, max_rounds
        Bounds on the number of rounds, whatever the seconds.
    """

    turn: float
    group: float
    min_rounds: int
    max_rounds: int


@dataclass(frozen=True)
class Samples:
    """What was measured of one peer.

    Parameters
    ----------
    seconds
        Seconds a call took, one number a round; number i of every peer is from the same round.
    calls
        Calls each number is the mean of.
    """

    seconds: list[float]
    calls: int


def measure(functions: Mapping[str, Callable[[], object]], budget: Budget) -> dict[str, Samples]:
    """Time all functions in interleaved rounds.

    Parameters
    ----------
    functions
        What to call, by name.
    budget
        How long.

    Returns
    -------
    dict
        By name.
    """
    turns = {name: _plan(function, budget) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    shuffled = random.Random(0)
    order = list(functions)
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        rounds = 0
        while _goes_on(rounds, time.perf_counter() - begin, budget):
            shuffled.shuffle(order)
            for name in order:
                samples[name].append(turns[name].take(functions[name]))
            rounds += 1
    finally:
        gc.enable()
    return {name: Samples(samples[name], turns[name].calls) for name in functions}


def _goes_on(rounds: int, seconds: float, budget: Budget) -> bool:
    if rounds < budget.min_rounds:
        return True
    return rounds < budget.max_rounds and seconds < budget.group


@dataclass(frozen=True)
class _Turn:
    untimed: int
    calls: int

    def take(self, function: Callable[[], object]) -> float:
        """Return the seconds a call takes."""
        time.sleep(_SETTLE)
        _time(function, self.untimed)
        return _time(function, self.calls) / self.calls


def _plan(function: Callable[[], object], budget: Budget) -> _Turn:
    """Return how many calls fill a turn; the first call may compile and is not counted."""
    function()
    calls, seconds = 1, _time(function, 1)
    while seconds < budget.turn / 4:  # few calls tell little of a fast function
        calls *= 4
        seconds = _time(function, calls)
    if seconds > _LONG:
        return _Turn(untimed=0, calls=1)
    timed = max(1, round(calls * budget.turn / seconds))
    return _Turn(untimed=max(1, timed // 4), calls=timed)


def _time(function: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in repeat(None, calls):
        function()
    return time.perf_counter() - begin
