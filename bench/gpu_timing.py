"""Timing work on a GPU, side by side: `interleave.py` for what the host does not wait for.

Here, too, peers take turns in rounds, each round in another order, and a turn is an untimed stretch
and a timed one. What differs is the clock. Of each turn three times are kept, all per call:

device
    Between two events in the stream, which the GPU itself reports. Where the host is slower than
    the GPU, the GPU's waiting is in it.
wall
    On the host, from the first call until the GPU has done the last one.
host
    On the host, until the last call has returned, whether or not the GPU has begun: what a program
    that has other things to do loses. Measured over a few calls apart, which fit into the queue
    between host and GPU; once that is full, each call waits for the GPU.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from interleave import fast, time_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gpu_devices import Device
    from interleave import Budget

CLOCKS = ("device", "wall", "host")

_BURST = 3  # calls that the host's time is measured over
_MOST_CALLS = 5_000  # in a turn


@dataclass
class Samples:
    """What was measured of one peer: seconds a call, by clock, one number a round.

    Number i of every peer is from the same round; slow peers have fewer.
    """

    calls: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {c: [] for c in CLOCKS})

    def median(self, clock: str) -> float:
        """Return the number that is quoted."""
        return statistics.median(self.seconds[clock])


def measure(
    device: Device, functions: Mapping[str, Callable[[], object]], budget: Budget
) -> dict[str, Samples]:
    """Time all functions in interleaved rounds; each must have been called before.

    Parameters
    ----------
    device
        Where they work.
    functions
        What to call, by name.
    budget
        How long.

    Returns
    -------
    dict
        By name.
    """
    gc.collect()
    gc.disable()
    try:
        turns = {
            name: _Turn(device, function, _calls_in_a_turn(device, function, budget.turn))
            for name, function in functions.items()
        }
        return _rounds(turns, budget)
    finally:
        gc.enable()


def _rounds(turns: dict[str, _Turn], budget: Budget) -> dict[str, Samples]:
    samples = {name: Samples(turn.calls) for name, turn in turns.items()}
    shuffled = random.Random(0)
    names, begin = sorted(turns), time.perf_counter()
    for i in range(budget.max_rounds):
        if i >= budget.min_rounds and time.perf_counter() - begin > budget.group:
            break
        if i == budget.min_rounds:
            names = _fast(samples, budget.turn)
        for name in shuffled.sample(names, len(names)):
            for clock, seconds in turns[name].take().items():
                samples[name].seconds[clock].append(seconds)
    return samples


def _fast(samples: Mapping[str, Samples], turn: float) -> list[str]:
    took = {name: sample.calls * sample.median("wall") for name, sample in samples.items()}
    return sorted(fast(took, turn))


@dataclass(frozen=True)
class _Turn:
    device: Device
    function: Callable[[], object]
    calls: int

    def take(self) -> dict[str, float]:
        """Return the seconds a call takes, by clock."""
        time_calls(self.function, max(1, self.calls // 4))
        self.device.synchronize()
        host = time_calls(self.function, _BURST)
        self.device.synchronize()
        stopwatch = self.device.stopwatch()
        begin = time.perf_counter()
        stopwatch.start()
        time_calls(self.function, self.calls)
        stopwatch.stop()
        self.device.synchronize()
        wall = time.perf_counter() - begin
        return {
            "device": stopwatch.seconds() / self.calls,
            "wall": wall / self.calls,
            "host": host / _BURST,
        }


def _calls_in_a_turn(device: Device, function: Callable[[], object], turn: float) -> int:
    """Return how many calls fill a turn; few calls tell little of a fast function."""
    calls = 1
    while True:
        device.synchronize()
        begin = time.perf_counter()
        time_calls(function, calls)
        device.synchronize()
        seconds = time.perf_counter() - begin
        if seconds > turn / 4 or calls >= _MOST_CALLS:
            return max(1, min(_MOST_CALLS, round(calls * turn / seconds)))
        calls *= 4
