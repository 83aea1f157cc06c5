"""What a call costs before any arithmetic, and what `import fusestep` costs before any call."""

from __future__ import annotations

import os
import subprocess
import sys
import timeit
from typing import TYPE_CHECKING

import numpy as np
import pytest

import fusestep
import threads
from interleave import Samples
from replay import record, replayed

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

    from interleave import Budget

# NumPy is a dependency, and paid for by whoever has arrays to step.
_IMPORT = """
import numpy, time
begin = time.perf_counter()
import fusestep
print(time.perf_counter() - begin)
"""


@pytest.mark.benchmark(timer=replayed)
def test_call(benchmark: BenchmarkFixture, budget: Budget) -> None:
    """``opt.step([g])`` as written, the list included."""
    calls = 10_000
    threads.limit_to(1)
    random = np.random.default_rng(0)
    p, g = random.standard_normal((2, 1000), dtype=np.float32)
    timer = timeit.Timer("opt.step([g])", globals={"opt": fusestep.Adam([p]), "g": g})
    seconds = timer.repeat(budget.max_rounds, calls)
    threads.release()
    record(benchmark, "call", Samples([each / calls for each in seconds], calls), elements=1000)


@pytest.mark.benchmark(timer=replayed)
def test_import(benchmark: BenchmarkFixture, budget: Budget, tmp_path: Path) -> None:
    # With bytecode files, like everybody's second import, but none of them in the source tree.
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def seconds() -> float:
        command = [sys.executable, "-c", _IMPORT]
        answer = subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        )
        return float(answer.stdout)

    seconds()  # writes the bytecode
    record(benchmark, "import", Samples([seconds() for _ in range(budget.max_rounds)], 1))
