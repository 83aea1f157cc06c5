"""The choice of the combinations that are tested."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from combinations import enough

VALUES = {"rule": "abcdefgh", "tier": "xyz", "dtype": "1234", "layout": "+-"}


def all_of(names: tuple[str, ...]) -> list[dict[str, Any]]:
    combinations = itertools.product(*(VALUES[name] for name in names))
    return [dict(zip(names, values, strict=True)) for values in combinations]


def chosen_of(tests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return enough(tests, lambda test: test)


@pytest.mark.parametrize("names", [(), ("rule",), ("rule", "tier")], ids=str)
def test_all_where_there_are_at_most_two_parameters(names: tuple[str, ...]) -> None:
    assert chosen_of(all_of(names)) == all_of(names)


def test_any_two_values_are_together_in_few() -> None:
    chosen = chosen_of(all_of(tuple(VALUES)))
    for one, other in itertools.combinations(VALUES, 2):
        found = {(test[one], test[other]) for test in chosen}
        assert found == set(itertools.product(VALUES[one], VALUES[other]))
    assert len(chosen) <= 8 * 4 + 4  # of 192; rules with dtypes alone are 32
    assert chosen == [test for test in all_of(tuple(VALUES)) if test in chosen]


def test_what_is_never_together_is_not_asked_for() -> None:
    tests = [
        t for t in all_of(("rule", "tier", "layout")) if (t["rule"] < "c") == (t["tier"] > "x")
    ]
    found = {(test["rule"], test["tier"]) for test in chosen_of(tests)}
    assert found == {(test["rule"], test["tier"]) for test in tests}
