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
import random
import time
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from company import Patience

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
    patience
        Seconds that may be lost, in a session, on rounds that others have disturbed and on waiting
        for them.
    """

    turn: float
    group: float
    min_rounds: int
    max_rounds: int
    patience: float


@dataclass(frozen=True)
class Samples:
    """What was measured of one peer.

    Parameters
    ----------
    seconds
        Seconds a call took, one number a round; number i of every peer is from the same round.
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
    rounds: list[_Round] = []
    discarded = 0
    shuffle = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        turns, _ = patience.undisturbed(lambda: _plan_all(functions, budget))
        while _goes_on(rounds, budget):
            latest, in_vain = patience.undisturbed(lambda: _round(functions, turns, shuffle))
            rounds.append(latest)
            discarded += in_vain
    finally:
        gc.enable()
    return {
        name: Samples([one.seconds[name] for one in rounds], turn.calls, discarded)
        for name, turn in turns.items()
    }


def _goes_on(rounds: list[_Round], budget: Budget) -> bool:
    if len(rounds) < budget.min_rounds:
        return True
    return len(rounds) < budget.max_rounds and sum(one.took for one in rounds) < budget.group


@dataclass(frozen=True)
class _Turn:
    untimed: int
    calls: int

    def take(self, function: Callable[[], object]) -> float:
        """Return the seconds a call takes."""
        time.sleep(_SETTLE)
        _time(function, self.untimed)
        return _time(function, self.calls) / self.calls


@dataclass(frozen=True)
class _Round:
    seconds: dict[str, float]
    took: float


def _round(
    functions: Mapping[str, Callable[[], object]],
    turns: Mapping[str, _Turn],
    shuffle: random.Random,
) -> _Round:
    """Let everybody have a turn, in any order."""
    begin = time.perf_counter()
    order = shuffle.sample(list(functions), len(functions))
    seconds = {name: turns[name].take(functions[name]) for name in order}
    return _Round(seconds, time.perf_counter() - begin)


def _plan_all(functions: Mapping[str, Callable[[], object]], budget: Budget) -> dict[str, _Turn]:
    return {name: _plan(function, budget) for name, function in functions.items()}


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
