"""`fusestep.torch` beside the optimizers of torch: steps, and iterations with a step in them.

These come first in a session (`conftest.py`): the benchmarks over arrays tell fusestep how many
threads to use, and from then on its steps for torch would not run on torch's.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import threads
from replay import record, replayed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_benchmark.fixture import BenchmarkFixture

    from interleave import PatientBudget

torch = pytest.importorskip("torch")

from torch_laboratory import Contest, TorchLaboratory  # noqa: E402
from torch_tasks import NO_STEP, OURS, STEPPERS, TASKS  # noqa: E402


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "torch_laboratory" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("--full")
    names = [name for name, task in TASKS.items() if full or not task.full]
    counts = [count for count in (1, 2) if threads.possible(count)]
    # The steppers of a contest follow each other, and both contests of a task use the same tensors.
    cases = [
        (name, count, stepper)
        for name, count, stepper in product(names, counts, STEPPERS)
        if stepper != NO_STEP or TASKS[name].is_iteration
    ]
    metafunc.parametrize(
        ("task", "threads_of_torch", "stepper"),
        cases,
        ids=[f"{name}-{count}t-{stepper}" for name, count, stepper in cases],
    )


@pytest.fixture(scope="module")
def torch_laboratory(
    request: pytest.FixtureRequest, budget: PatientBudget
) -> Iterator[TorchLaboratory]:
    """Measures a contest with those of its steppers that were not deselected."""
    steppers: dict[Contest, list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and "torch_laboratory" in item.fixturenames:
            values: dict[str, Any] = item.callspec.params
            contest = Contest(values["task"], values["threads_of_torch"])
            steppers.setdefault(contest, []).append(values["stepper"])
    laboratory = TorchLaboratory(steppers, budget)
    yield laboratory
    laboratory.clear()


@pytest.mark.benchmark(timer=replayed)
def test_task(
    benchmark: BenchmarkFixture,
    torch_laboratory: TorchLaboratory,
    task: str,
    threads_of_torch: int,
    stepper: str,
) -> None:
    contest = Contest(task, threads_of_torch)
    samples = torch_laboratory.samples(contest, stepper)
    if isinstance(samples, str):
        pytest.skip(samples)
    what = TASKS[task]
    record(benchmark, str(contest), samples, elements=what.elements, tensors=what.tensors)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.full])
@pytest.mark.parametrize("stepper", [s for s in STEPPERS if s not in (OURS, NO_STEP)])
def test_steppers_compute_the_same(name: str, stepper: str) -> None:
    """A benchmark of something else would compare nothing."""
    task = TASKS[name]
    if reason := task.why_not(stepper):
        pytest.skip(reason)
    runs = [task.start(OURS), task.start(stepper)]
    start = _flat(runs[0])
    for _ in range(3):
        for run in runs:
            run.step()
    # Rounding may turn round the step of single elements whose gradients are next to nothing.
    ours, theirs = _flat(runs[0]), _flat(runs[1])
    assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(ours - start)


def _flat(run: Any) -> Any:
    return np.concatenate([values.reshape(-1) for values in run.params()], dtype=np.float64)
