"""Fixtures: every instruction set in turn, thread counts, and the switch for slow tests."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import fusestep as fs
from combinations import enough
from fusestep import _cpu

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Idle threads of OpenMP, which torch has, sleep: where other processes want the cores, waiting for
# work in a loop takes most of the time of a test. Before torch is imported, and for processes, too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TIERS = [name for name, _ in _cpu.tiers()]
AVAILABLE = [name for name, runs_here in _cpu.tiers() if runs_here]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run tests marked slow")
    parser.addoption(
        "--thorough",
        action="store_true",
        help="run each test with all combinations of its parameters, not only with as many as have"
        " any two values of two parameters together, and examples with all of their seeds",
    )
    parser.addoption(
        "--every", type=int, default=1, help="of each test's parameters, run one of so many"
    )


def parameters(item: pytest.Item) -> dict[str, object]:
    """By name. The items of a test share their values."""
    return item.callspec.params if hasattr(item, "callspec") else {}


def alike(items: Iterable[pytest.Item]) -> Iterable[list[pytest.Item]]:
    """The items of each test, apart where some are skipped on a machine that runs others."""
    groups: defaultdict[tuple[object, ...], list[pytest.Item]] = defaultdict(list)
    for item in items:
        given = parameters(item)
        runs_here = given.get("tier", AVAILABLE[0]) in AVAILABLE
        test = item.nodeid.partition("[")[0]
        groups[test, given.get("lib"), given.get("machine"), runs_here].append(item)
    return groups.values()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--thorough"):
        chosen = {item for group in alike(items) for item in enough(group, parameters)}
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
    every = config.getoption("--every")
    if every > 1:  # where it is memory that is looked at, rather than numbers
        seen: Counter[str] = Counter()
        kept = []
        for item in items:
            function = item.nodeid.partition("[")[0]
            i = seen[function]
            seen[function] += 1
            if (i + i // every) % every == 0:  # not always the first of as many values
                kept.append(item)
        items[:] = kept
    if config.getoption("--run-slow"):
        return
    skip = pytest.mark.skip(reason="slow: takes minutes or many gigabytes; use --run-slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def restore_runtime():
    """Leave threads and instruction set as they were."""
    tier, threads = _cpu.active_tier(), fs.get_num_threads()
    yield
    _cpu.use_tier(tier)
    fs.set_num_threads(threads)


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    """Each compiled instruction set in turn, made the active one."""
    if request.param not in AVAILABLE:
        pytest.skip(f"this machine has no {request.param}")
    _cpu.use_tier(request.param)
    return request.param


@pytest.fixture(params=["table", "data_ptr"])
def pointers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of finding out where a torch tensor lies: the second is torch 2.4 to 2.9's."""
    tensors = pytest.importorskip("fusestep.torch._tensors")
    if request.param == "table" and not hasattr(tensors.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no exchange table")
    monkeypatch.setattr(tensors, "USE_EXCHANGE_TABLE", request.param == "table")
    return request.param


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One process, over which tensors may be distributed."""
    dist = pytest.importorskip("torch.distributed")
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch is built without torch.distributed or gloo")
    pytest.importorskip("torch.distributed.tensor")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether to take all the time it needs."""
    return request.config.getoption("--thorough")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
