"""Of all combinations of a test's parameters, enough to have any two values together."""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Test = TypeVar("Test")


def pairs(parameters: dict[str, Any]) -> set[Any]:
    """Any two parameters with their values, or the only one: values are told apart by identity."""
    values = [(name, id(value)) for name, value in parameters.items()]
    return set(itertools.combinations(values, min(2, len(values))))


def enough(tests: Sequence[Test], parameters: Callable[[Test], dict[str, Any]]) -> list[Test]:
    """Choose tests that have each pair of values which two parameters have in any of them.

    What goes wrong does so for one value, or for two that meet, far more often than for three
    (Kuhn, Wallace and Gallo, 2004, "Software fault interactions and implications for software
    testing"). Greedy: always a test that has the most pairs which none before it has. The same
    tests give the same choice, in their order.
    """
    of_test = [pairs(parameters(test)) for test in tests]
    missing = set[Any]().union(*of_test)
    best = [(-len(new), i) for i, new in enumerate(of_test)]
    heapq.heapify(best)
    chosen = []
    while missing:
        bound, i = heapq.heappop(best)
        new = len(of_test[i] & missing)
        if new == -bound:  # nobody has more: what they had can only have become fewer
            chosen.append(i)
            missing -= of_test[i]
        elif new:
            heapq.heappush(best, (-new, i))
    return [tests[i] for i in sorted(chosen)]
