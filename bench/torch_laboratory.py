"""Measures the steppers of a task once, whichever of its tests comes first.

Unlike `laboratory.py`, this leaves fusestep's own number of threads alone: as long as nobody has
chosen one, a step for torch runs on torch's threads.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

import threads
from company import Patience
from interleave import Samples, measure
from torch_tasks import TASKS, gradients_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from interleave import Budget, PatientBudget
    from peers import Run

_SETTLE = 0.005  # seconds in which the spinning threads of the last turn go to sleep
_CALLS = 5  # timed in a turn, each after something untimed


class Contest(NamedTuple):
    """Steppers that do the same task, to be compared."""

    task: str
    threads: int

    def __str__(self) -> str:
        return f"torch: {self.task}, {self.threads} thread" + "s" * (self.threads > 1)


@dataclass
class _Bench:
    """What stands on the bench: everybody's optimizer for one task."""

    task: str
    runs: dict[str, Run]
    missing: dict[str, str]


class TorchLaboratory:
    """Keeps the tensors of one task at a time.

    Parameters
    ----------
    steppers
        Names of the steppers each contest is to be measured with.
    budget
        How long to measure a contest.
    """

    def __init__(self, steppers: dict[Contest, list[str]], budget: PatientBudget) -> None:
        self._steppers = steppers
        self._budget = budget
        self._patience = Patience(budget.patience)
        self._bench: _Bench | None = None
        self._samples: dict[Contest, dict[str, Samples]] = {}
        self._threads_before = torch.get_num_threads()

    def samples(self, contest: Contest, stepper: str) -> Samples | str:
        """Return what was measured of a stepper, or why nothing was."""
        bench = self._set_up(contest)
        if contest not in self._samples:
            _limit_to(contest.threads)
            self._samples[contest] = self._measure(bench)
        return bench.missing.get(stepper) or self._samples[contest][stepper]

    def clear(self) -> None:
        """Give everything back."""
        self._bench = None
        gradients_of.cache_clear()
        gc.collect()
        torch.set_num_threads(self._threads_before)
        threads.release()

    def _set_up(self, contest: Contest) -> _Bench:
        if self._bench is None or self._bench.task != contest.task:
            self._bench = None
            gradients_of.cache_clear()
            gc.collect()  # gigabytes, before the next ones
            self._bench = self._start(contest)
        return self._bench

    def _start(self, contest: Contest) -> _Bench:
        task = TASKS[contest.task]
        bench = _Bench(contest.task, {}, {})
        for name in self._steppers[contest]:
            if reason := task.why_not(name):
                bench.missing[name] = reason
                continue
            bench.runs[name] = task.start(name)
            bench.runs[name].step()  # allocates the state, so that the next one sees what is left
        return bench

    def _measure(self, bench: _Bench) -> dict[str, Samples]:
        functions = {name: run.step for name, run in bench.runs.items()}
        before = TASKS[bench.task].before()
        if before is None:
            return measure(functions, self._budget, self._patience)
        return measure_after(before, functions, self._budget, self._patience)


def _limit_to(count: int) -> None:
    """Give torch `count` threads and the process as many processors, and fusestep no orders."""
    torch.set_num_threads(count)
    threads.bind_to(count)


def measure_after(
    before: Callable[[], object],
    functions: Mapping[str, Callable[[], object]],
    budget: Budget,
    patience: Patience,
    calls: int = _CALLS,
) -> dict[str, Samples]:
    """Time all functions in interleaved rounds, each call directly after one of `before`.

    As :func:`interleave.measure` does, which times many calls at once and so cannot leave out
    what is between them. A turn is as many `calls`, and an untimed one before them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    shuffled = random.Random(0)
    discarded, took = 0, 0.0

    def turn(function: Callable[[], object]) -> float:
        time.sleep(_SETTLE)
        return statistics.mean([_time_after(before, function) for _ in range(calls + 1)][1:])

    def one_round() -> tuple[dict[str, float], float]:
        begin = time.perf_counter()
        order = shuffled.sample(sorted(functions), len(functions))
        samples = {name: turn(functions[name]) for name in order}
        return samples, time.perf_counter() - begin

    gc.collect()
    gc.disable()
    try:
        for i in range(budget.max_rounds):
            if i >= budget.min_rounds and took >= budget.group:
                break
            (samples, duration), again = patience.undisturbed(one_round)
            took += duration
            discarded += again
            for name, sample in samples.items():
                seconds[name].append(sample)
    finally:
        gc.enable()
    return {name: Samples(values, calls, discarded) for name, values in seconds.items()}


def _time_after(before: Callable[[], object], function: Callable[[], object]) -> float:
    before()
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin
