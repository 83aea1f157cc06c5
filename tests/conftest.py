"""Fixtures: every instruction set in turn, thread counts, and the switch for slow tests."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import fusestep as fs
from fusestep import _cpu

TIERS = [name for name, _ in _cpu.tiers()]
AVAILABLE = [name for name, runs_here in _cpu.tiers() if runs_here]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run tests marked slow")
    parser.addoption(
        "--every", type=int, default=1, help="of each test's parameters, run one of so many"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
