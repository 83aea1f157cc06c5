"""Timing several functions side by side.

pytest-benchmark finishes one benchmark before it begins the next. On a shared machine that is not a
comparison: the neighbours' load changes from one second to the next, and whoever runs in a quiet
one wins. Here the peers of a group take turns, in rounds, each round in another order, so that
whatever disturbs the machine disturbs all of them; the samples are then handed to pytest-benchmark
(see `replay.py`), which computes its statistics and writes its JSON from them.

A turn is many calls, of which the first are not timed: a peer finds its data in the caches as far
as they fit there, as it does when it is used by itself, rather than its predecessor's. A round that
others on the machine have disturbed is done again, for all peers: with one processor too few,
OpenMP's spinning threads can take a thousand times longer.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from company import Patience

_SETTLE = 0.005  # seconds in which the spinning threads of the last peer's pool go to sleep
_LONG = 0.05  # seconds; a call that takes longer needs no other one to warm up
_SLOW = 4  # times the shortest turn; who takes longer would take up most of the time


@dataclass(frozen=True)
class Budget:
    """How long to measure a group of peers.

    Parameters
    ----------
    turn
        Seconds a turn should take; a call that takes longer is a turn by itself.
    min_rounds
        Rounds that all peers take part in.
    max_rounds
        Rounds altogether, at most.
    group
        Seconds after which no round follows but the first `min_rounds`.
    """

    turn: float
    min_rounds: int
    max_rounds: int
    group: float


@dataclass(frozen=True)
class PatientBudget(Budget):
    """How long to measure each group of a session.

    Parameters
    ----------
    patience
        Seconds that may be lost, in the session, on rounds that others have disturbed and on
        waiting for them.
    """

    patience: float


@dataclass(frozen=True)
class Samples:
    """What was measured of one peer.

    Parameters
    ----------
    seconds
        Seconds a call took, one number a round; number i of every peer is from the same round.
        Slow peers have fewer numbers: they left after the first rounds.
    calls
        Calls each number is the mean of.
    discarded
        Rounds that were done again.
    """

    seconds: list[float]
    calls: int
    discarded: int = 0


def measure(
    functions: Mapping[str, Callable[[], object]], budget: Budget, patience: Patience
) -> dict[str, Samples]:
    """Time all functions in interleaved rounds.

    Parameters
    ----------
    functions
        What to call, by name.
    budget
        How long.
    patience
        What is left of the session's.

    Returns
    -------
    dict
        By name.
    """
    gc.collect()
    gc.disable()
    try:
        turns, _ = patience.undisturbed(
            lambda: {name: _plan(function, budget) for name, function in functions.items()}
        )
        rounds = _Rounds(turns, patience)
        rounds.add(budget.min_rounds, set(turns))
        rounds.add(budget.max_rounds - budget.min_rounds, rounds.fast(budget.turn), budget.group)
        return rounds.samples()
    finally:
        gc.enable()


@dataclass(frozen=True)
class _Turn:
    function: Callable[[], object]
    untimed: int
    calls: int

    def take(self) -> float:
        """Return the seconds a call takes."""
        time.sleep(_SETTLE)
        time_calls(self.function, self.untimed)
        return time_calls(self.function, self.calls) / self.calls


def _plan(function: Callable[[], object], budget: Budget) -> _Turn:
    """Return how many calls fill a turn; the first call may compile and is not counted."""
    time.sleep(_SETTLE)
    function()
    calls, seconds = 1, _shortest(function, 1)
    while seconds < budget.turn / 4:  # few calls tell little of a fast function
        calls *= 4
        seconds = _shortest(function, calls)
    if seconds > _LONG:
        return _Turn(function, untimed=0, calls=1)
    timed = max(1, round(calls * budget.turn / seconds))
    return _Turn(function, untimed=max(1, timed // 4), calls=timed)


def _shortest(function: Callable[[], object], calls: int) -> float:
    """Return the shortest of some times: an accident must not decide on the number of calls."""
    first = time_calls(function, calls)
    return first if first > _LONG else min(first, *(time_calls(function, calls) for _ in range(4)))


def time_calls(function: Callable[[], object], calls: int) -> float:
    """Return the seconds until the last call has returned."""
    begin = time.perf_counter()
    for _ in repeat(None, calls):
        function()
    return time.perf_counter() - begin


def fast(took: Mapping[str, float], turn: float) -> set[str]:
    """Return those whose turn takes not many times as long as the shortest, or as planned.

    Parameters
    ----------
    took
        Seconds that a turn has taken, by name.
    turn
        Seconds that were planned for it.
    """
    shortest = max(turn, min(took.values()))
    return {name for name in took if took[name] < _SLOW * shortest}


class _Rounds:
    """What has been measured so far."""

    def __init__(self, turns: Mapping[str, _Turn], patience: Patience) -> None:
        self._turns, self._patience = turns, patience
        self._random = random.Random(0)
        self._seconds: dict[str, list[float]] = {name: [] for name in turns}
        self._discarded = 0

    def add(self, count: int, names: set[str], seconds: float = math.inf) -> None:
        """Do `count` more rounds with the named peers, fewer where they take too long."""
        took = 0.0
        for _ in range(count):
            if took >= seconds:
                break
            (samples, duration), discarded = self._patience.undisturbed(lambda: self._one(names))
            for name in names:
                self._seconds[name].append(samples[name])
            self._discarded += discarded
            took += duration

    def fast(self, turn: float) -> set[str]:
        """Return those whose turn does not take much longer than others', or than planned."""
        took = {
            name: statistics.median(samples) * self._turns[name].calls
            for name, samples in self._seconds.items()
        }
        return fast(took, turn)

    def samples(self) -> dict[str, Samples]:
        """Return everything."""
        return {
            name: Samples(seconds, self._turns[name].calls, self._discarded)
            for name, seconds in self._seconds.items()
        }

    def _one(self, names: set[str]) -> tuple[dict[str, float], float]:
        """Let everybody have a turn, in any order; return the samples and how long it took."""
        begin = time.perf_counter()
        order = self._random.sample(sorted(names), len(names))
        samples = {name: self._turns[name].take() for name in order}
        return samples, time.perf_counter() - begin
