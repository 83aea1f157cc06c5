"""Options, the list of what is measured, and what is written beside the numbers."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import company
import machine
import threads
from interleave import PatientBudget
from laboratory import FULL, QUICK, Group, Laboratory
from peers import PEERS, RULES
from shapes import QUICK as QUICK_WORKLOADS
from shapes import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Iterator


_WATCH = pytest.StashKey[company.Watch]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusestep's benchmarks")
    group.addoption("--quick", action="store_true", help="small workloads, short (the default)")
    group.addoption("--full", action="store_true", help="all workloads; fifteen minutes, 20 GB")
    group.addoption("--wheel", type=Path, help="a built wheel, whose size is to be reported")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick") and config.getoption("--full"):
        raise pytest.UsageError("--quick and --full exclude each other")
    config.stash[_WATCH] = company.Watch()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "peer" not in metafunc.fixturenames:
        return
    names = WORKLOADS if metafunc.config.getoption("--full") else QUICK_WORKLOADS
    counts = [count for count in (1, 2) if threads.possible(count)]
    # Strings and numbers, so that they are readable in the JSON. The peers of a group follow each
    # other, and both groups of a rule and workload use the same arrays.
    cases = list(product(names, RULES, counts, PEERS))
    metafunc.parametrize(
        ("workload", "rule", "count", "peer"),
        cases,
        ids=[f"{rule}-{name}-{count}t-{peer}" for name, rule, count, peer in cases],
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Before anybody calls fusestep.set_num_threads, which cannot be taken back; see there.
    items.sort(key=lambda item: item.path.name != "test_torch.py")


@pytest.fixture(scope="session")
def budget(request: pytest.FixtureRequest) -> PatientBudget:
    """How long to measure; with --benchmark-disable, as short as can be."""
    if request.config.getoption("benchmark_disable"):
        return PatientBudget(turn=0, min_rounds=1, max_rounds=1, group=0, patience=0)
    return FULL if request.config.getoption("--full") else QUICK


@pytest.fixture(scope="session")
def laboratory(request: pytest.FixtureRequest, budget: PatientBudget) -> Iterator[Laboratory]:
    """Measures a group with those of its peers that were not deselected."""
    peers: dict[Group, list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and "laboratory" in item.fixturenames:
            values: dict[str, Any] = item.callspec.params
            group = Group(values["rule"], values["workload"], values["count"])
            peers.setdefault(group, []).append(values["peer"])
    laboratory = Laboratory(peers, budget)
    yield laboratory
    laboratory.clear()


# ---- the JSON ------------------------------------------------------------------------------------


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.pop("node")  # the name of the machine is nobody's business
    machine_info["cpu"] = {
        name: value for name, value in machine_info["cpu"].items() if name != "flags"
    }


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["measured_on"] = machine.describe()
    output_json["company"] = config.stash[_WATCH].report()
    wheel = config.getoption("--wheel")
    if wheel is not None:
        output_json["wheel"] = {"name": wheel.name, "bytes": wheel.stat().st_size}
