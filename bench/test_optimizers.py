"""One step of every peer, over every list of shapes, with every rule, on one and two threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from laboratory import Group
from memory import gradients
from peers import PEERS, RULES
from replay import record, replayed
from shapes import WORKLOADS, Workload

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from laboratory import Laboratory
    from memory import FloatArray


@pytest.mark.benchmark(timer=replayed)
def test_step(
    benchmark: BenchmarkFixture,
    laboratory: Laboratory,
    rule: str,
    workload: str,
    count: int,
    peer: str,
) -> None:
    group = Group(rule, workload, count)
    samples = laboratory.samples(group, peer)
    if isinstance(samples, str):
        pytest.skip(samples)
    shapes = WORKLOADS[workload]
    record(benchmark, str(group), samples, elements=shapes.elements, tensors=len(shapes.shapes))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [name for name in PEERS if name not in ("fusestep", "limit")])
def test_peers_compute_the_same(rule: str, name: str) -> None:
    """A benchmark of something else would compare nothing."""
    peer = PEERS[name]
    if reason := peer.why_not(rule):
        pytest.skip(reason)
    workload = Workload("small", ((1000,), (7, 11)))
    ours, theirs = gradients(workload), gradients(workload)
    runs = [PEERS["fusestep"].start(rule, ours), peer.start(rule, theirs)]
    for _ in range(3):
        for run in runs:
            run.step()
        if peer.changes_gradients(rule):
            _restore(theirs, ours)
    for a, b in zip(runs[0].params() + ours, runs[1].params() + theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def _restore(changed: list[FloatArray], original: list[FloatArray]) -> None:
    for to, source in zip(changed, original, strict=True):
        np.copyto(to, source)
