"""The JSON of pytest-benchmark, read back."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

GroupKey = tuple[str, str, int]
"""Rule, workload, threads."""

TaskKey = tuple[str, int]
"""A task for torch's optimizers, threads."""


@dataclass(frozen=True)
class Entry:
    """What was measured of one peer in one group.

    Parameters
    ----------
    seconds
        Of a step, one number a round; number i of all peers of the group is from the same round.
        Slow peers have fewer numbers.
    elements
        Of all parameters together.
    """

    seconds: list[float]
    elements: int = 0

    @property
    def median(self) -> float:
        """The number that is quoted."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """How many times longer one peer takes than another, within the same rounds.

    What a virtual machine gets of the memory's bandwidth may double from one round to the next, for
    all peers: a ratio of medians would compare different rounds.

    Parameters
    ----------
    value
        Median over the rounds.
    low, high
        Quartiles: how sure the value is.
    """

    value: float
    low: float
    high: float


@dataclass
class Results:
    """All groups of one or several files."""

    groups: dict[GroupKey, dict[str, Entry]] = field(default_factory=dict)
    tasks: dict[TaskKey, dict[str, Entry]] = field(default_factory=dict)
    """What `fusestep.torch` was measured with."""
    others: dict[str, Entry] = field(default_factory=dict)
    """What is not an optimizer's step: "call", "import"."""
    files: list[dict[str, Any]] = field(default_factory=list)

    def peers(self, key: GroupKey | TaskKey) -> dict[str, Entry]:
        """Return what was measured of a group or a task; nothing where it was not."""
        return (self.tasks if len(key) == 2 else self.groups).get(key, {})

    def ratio(self, key: GroupKey | TaskKey, slower: str, faster: str) -> Ratio | None:
        """Return how many times longer `slower` takes, or None where one was not measured."""
        peers = self.peers(key)
        if slower not in peers or faster not in peers:
            return None
        both = zip(peers[slower].seconds, peers[faster].seconds, strict=False)
        rounds = [x / y for x, y in both]
        low, middle, high = statistics.quantiles(rounds, n=4) if len(rounds) > 1 else rounds * 3
        return Ratio(middle, low, high)


def three_digits(value: float) -> str:
    """Return a positive number with three digits, or two and more decimals below 1."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 0.1))))}f}"


def load(paths: Iterable[Path]) -> Results:
    """Return what the files hold; where two hold the same, the later one counts.

    Parameters
    ----------
    paths
        JSON files of ``pytest bench --benchmark-json=...``.
    """
    results = Results()
    for path in paths:
        content = json.loads(Path(path).read_text())
        results.files.append(content)
        for benchmark in content["benchmarks"]:
            _add(results, benchmark)
    return results


def _add(results: Results, benchmark: dict[str, Any]) -> None:
    params = benchmark["params"]
    entry = Entry(benchmark["stats"]["data"], benchmark["extra_info"].get("elements", 0))
    if params is None:
        results.others[benchmark["group"]] = entry
    elif "task" in params:
        task = (params["task"], params["threads_of_torch"])
        results.tasks.setdefault(task, {})[params["stepper"]] = entry
    else:
        key = (params["rule"], params["workload"], params["count"])
        results.groups.setdefault(key, {})[params["peer"]] = entry
