"""Handing samples that were measured elsewhere to pytest-benchmark.

pytest-benchmark lets a test choose the timer. This one stands still but for :func:`tick`, which
moves it on by the next sample; a benchmark of `tick` with this timer therefore has exactly the
given samples, and all of the plugin (groups, statistics, comparison, JSON) works on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_benchmark.fixture import BenchmarkFixture

    from interleave import Samples

_now = 0.0
_pending: Iterator[float] = iter(())


def replayed() -> float:
    """Return the time of a clock that only :func:`tick` moves."""
    return _now


def tick() -> None:
    """Let the next sample's time go by."""
    global _now
    _now += next(_pending)


def record(benchmark: BenchmarkFixture, group: str, samples: Samples, **info: object) -> None:
    """Make `samples` the result of a test marked ``benchmark(timer=replayed)``.

    Parameters
    ----------
    benchmark
        The test's fixture.
    group
        Name of those to be compared.
    samples
        What was measured.
    **info
        What else belongs in the JSON.
    """
    global _now, _pending
    _now, _pending = 0.0, iter(samples.seconds)  # from zero: small numbers lose no digits
    benchmark.group = group
    info |= {"calls_per_sample": samples.calls, "rounds_discarded": samples.discarded}
    benchmark.extra_info.update(info)
    benchmark.pedantic(tick, rounds=len(samples.seconds))
