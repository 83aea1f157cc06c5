"""Measures a group of peers once, whichever of its tests comes first."""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import threads
from company import Patience
from interleave import PatientBudget, Samples, measure
from memory import gradients, zeros
from peers import PEERS
from shapes import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memory import FloatArray
    from peers import Run

QUICK = PatientBudget(turn=0.002, min_rounds=3, max_rounds=15, group=0.2, patience=0)
FULL = PatientBudget(turn=0.01, min_rounds=5, max_rounds=30, group=3.0, patience=600)

_TEMPORARIES = 5  # arrays of the parameters' size that a step of some peer makes for a while


class Group(NamedTuple):
    """Peers that do the same work, to be compared."""

    rule: str
    workload: str
    threads: int

    def __str__(self) -> str:
        return f"{self.rule} {self.workload}, {self.threads} thread" + "s" * (self.threads > 1)


@dataclass
class _Bench:
    """What stands on the bench: the optimizers of one rule over one workload."""

    key: tuple[str, str]
    runs: dict[str, Run]
    missing: dict[str, str]


class Laboratory:
    """Keeps the arrays of one workload at a time.

    Parameters
    ----------
    peers
        Names of the peers each group is to be measured with.
    budget
        How long to measure a group.
    """

    def __init__(self, peers: dict[Group, list[str]], budget: PatientBudget) -> None:
        self._peers = peers
        self._budget = budget
        self._patience = Patience(budget.patience)
        self._gradients: tuple[str, list[FloatArray]] = ("", [])
        self._bench: _Bench | None = None
        self._samples: dict[Group, dict[str, Samples]] = {}

    def samples(self, group: Group, peer: str) -> Samples | str:
        """Return what was measured of a peer, or why nothing was."""
        if group not in self._samples:
            threads.limit_to(group.threads)
            bench = self._set_up(group)
            steps = {name: run.step for name, run in bench.runs.items()}
            self._samples[group] = measure(steps, self._budget, self._patience)
        bench = self._set_up(group)
        return bench.missing.get(peer) or self._samples[group][peer]

    def clear(self) -> None:
        """Give everything back."""
        self._bench = None
        self._gradients = ("", [])
        gc.collect()
        threads.release()

    def _set_up(self, group: Group) -> _Bench:
        key = (group.rule, group.workload)
        if self._bench is None or self._bench.key != key:
            self._bench = None
            gc.collect()  # gigabytes, before the next ones
            self._bench = self._start(key, self._peers[group])
        return self._bench

    def _start(self, key: tuple[str, str], names: Iterable[str]) -> _Bench:
        rule, workload = key
        grads = self._gradients_of(workload)
        bench = _Bench(key, {}, {})
        for name in names:
            reason = PEERS[name].why_not(rule) or _no_room(rule, workload, name)
            if reason:
                bench.missing[name] = reason
                continue
            # Own gradients are zeros: whatever is added to them at each step, they stay finite.
            spoiled = PEERS[name].changes_gradients(rule)
            bench.runs[name] = PEERS[name].start(rule, zeros(grads) if spoiled else grads)
            bench.runs[name].step()  # allocates the state, so that the next peer sees what is left
        return bench

    def _gradients_of(self, workload: str) -> list[FloatArray]:
        if self._gradients[0] != workload:
            self._gradients = ("", [])
            self._gradients = (workload, gradients(WORKLOADS[workload]))
        return self._gradients[1]


def _no_room(rule: str, workload: str, peer: str) -> str | None:
    """Return None if there is memory for one more peer, else the reason."""
    elements = WORKLOADS[workload].elements
    needed = PEERS[peer].nbytes(rule, elements) + _TEMPORARIES * 4 * elements
    available = _available()
    if available is None or needed < available:
        return None
    return f"not enough memory: needs {needed / 1e9:.1f} of {available / 1e9:.1f} GB"


def _available() -> int | None:
    """Return the bytes of memory that can be had, where the system tells."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
