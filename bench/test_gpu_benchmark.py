"""Of `gpu.py` and its companions: what can be tested without a GPU."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")

import gpu  # noqa: E402
import gpu_checksums  # noqa: E402
import gpu_report  # noqa: E402
import gpu_tests  # noqa: E402
from gpu_cases import COPY, FUSED, OURS, all_cases, difference, forget  # noqa: E402
from gpu_devices import Rehearsal  # noqa: E402
from gpu_shapes import BILLION, fitting, workloads  # noqa: E402
from gpu_timing import CLOCKS, measure  # noqa: E402
from interleave import Budget  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gpu_cases import Case

WORKLOADS = workloads(is_rehearsal=True, largest=0)
CASES = {case.key: case for case in all_cases(WORKLOADS, is_rehearsal=True)}
SHORT = Budget(turn=1e-4, min_rounds=3, max_rounds=6, group=10.0)


@pytest.fixture
def device() -> Iterator[Rehearsal]:
    threads = torch.get_num_threads()
    yield Rehearsal()
    torch.set_num_threads(threads)
    forget()


# ---- what is measured ----------------------------------------------------------------------------


def test_real_shapes() -> None:
    real = workloads(is_rehearsal=False, largest=BILLION)
    assert real["large"].elements == BILLION
    assert real["1000 x 1k"].elements == 10**6
    assert len(real["gpt2"].shapes) == 148
    assert len(real["resnet50"].shapes) == 161
    assert real.keys() == WORKLOADS.keys()


def test_fitting() -> None:
    assert fitting(BILLION, 44, 150 * 10**9) == BILLION
    assert fitting(BILLION, 44, 24 * 10**9) == BILLION // 2
    assert fitting(BILLION, 44, 0) < 10**6


def test_a_goal_has_its_case() -> None:
    keys = {key for key, _ in gpu_report._RATIOS} | {gpu_report._SHARE_OF_COPY[0]}
    assert keys | {*gpu_report._HOST} <= CASES.keys()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_peers_compute_the_same(case: Case, device: Rehearsal) -> None:
    """A benchmark of something else would compare nothing."""
    runs = {name: case.start(name, device) for name in case.peers}
    for _ in range(3):
        for run in runs.values():
            run.step()
    for name in runs:
        if OURS in runs and name != OURS:
            found = difference(device, case, runs[OURS], runs[name])
            assert found is None if name == COPY else found < case.tolerance


# ---- how it is timed -----------------------------------------------------------------------------


def test_slow_peers_leave_after_the_first_rounds(device: Rehearsal) -> None:
    fast, slow = (lambda n=n: sum(range(n)) for n in (100, 1_000_000))
    samples = measure(device, {"fast": fast, "slow": slow}, SHORT)
    assert {len(samples["fast"].seconds[clock]) for clock in CLOCKS} == {SHORT.max_rounds}
    assert {len(samples["slow"].seconds[clock]) for clock in CLOCKS} == {SHORT.min_rounds}
    assert samples["fast"].median("wall") < samples["slow"].median("wall")
    assert samples["slow"].calls == 1 < samples["fast"].calls


# ---- what comes out ------------------------------------------------------------------------------


def result(**peers: tuple[int, list[float]]) -> dict[str, Any]:
    """Return a case as the JSON has it, from bytes and seconds of each peer."""
    names = {"ours": OURS, "fused": FUSED, "copy": COPY}
    return {
        "key": "adam large",
        "tensors": 1,
        "elements": BILLION,
        "clock": "device",
        "missing": {},
        "failures": {},
        "peers": {
            names[name]: {
                "nbytes": nbytes,
                "seconds": dict.fromkeys(CLOCKS, seconds),
                "median": dict.fromkeys(CLOCKS, seconds[len(seconds) // 2]),
            }
            for name, (nbytes, seconds) in peers.items()
        },
    }


def test_goals_of_the_large_step() -> None:
    case = result(
        ours=(28 * 10**9, [0.007, 0.007, 0.008]),
        fused=(28 * 10**9, [0.007, 0.0077, 0.008]),
        copy=(8 * 10**9, [0.0019, 0.0019, 0.0022]),
    )
    share, ratio, *rest = gpu_report.outcomes({"cases": [case]})
    assert share.measured.startswith("0.95 ")  # 28 GB in 7 ms, beside 8 GB in 1.9 ms
    assert share.verdict.startswith("met")
    assert ratio.measured.startswith("1x")
    assert {line.measured for line in rest} == {"not measured"}


def test_what_is_slower_is_not_met() -> None:
    case = result(ours=(1, [2.0, 2.0]), fused=(1, [1.0, 1.0]))
    assert gpu_report.outcomes({"cases": [case]})[1].verdict == "NOT met"


@pytest.mark.usefixtures("device")
def test_the_whole_program(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--only", "1 x 1k"]
    assert gpu.main(arguments) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert [case["key"] for case in results["cases"]] == [key for key in CASES if "1 x 1k" in key]
    assert all(case["peers"] and not case["failures"] for case in results["cases"])
    text = (tmp_path / "gpu.txt").read_text()
    assert text == gpu_report.text(results)
    assert "REHEARSAL" in text


@pytest.mark.usefixtures("device")
def test_a_peer_that_fails_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(torch.optim, "Adam", refuse)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--only", "adam 1 x 1k"]
    assert gpu.main(arguments) == 1
    text = (tmp_path / "gpu.txt").read_text()
    assert f"FAILED    adam 1 x 1k, {FUSED}: RuntimeError: no such kernel" in text
    (case,) = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    assert [*case["peers"]] == [OURS]


@pytest.mark.usefixtures("device")
def test_no_time_left(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--seconds", "-1"]
    assert gpu.main(arguments) == 0
    assert "left out  adam gpt2, fusestep: there was no time" in (tmp_path / "gpu.txt").read_text()


# ---- checksums, and tests that need what is not there --------------------------------------------


def test_checksums_tell_one_bit() -> None:
    arrays = {"parameter 0": torch.tensor([1.0, float("nan")]), "step": torch.tensor(3.0)}
    same = {name: array.clone() for name, array in arrays.items()}
    assert gpu_checksums.differing(arrays, same) == []
    assert gpu_checksums.checksum(arrays) == gpu_checksums.checksum(same)
    same["parameter 0"][0] += 2**-23
    assert gpu_checksums.differing(arrays, same) == ["parameter 0: 1 of 2 elements"]
    assert gpu_checksums.checksum(arrays) != gpu_checksums.checksum(same)


def test_signed_zeros_differ() -> None:
    zeros = [{"x": torch.tensor([0.0])}, {"x": torch.tensor([-0.0])}]
    assert gpu_checksums.differing(*zeros) == ["x: 1 of 1 elements"]


@pytest.mark.parametrize("setting", [*gpu_checksums.settings()], ids=str)
def test_settings_do_something(setting: Any) -> None:
    after = gpu_checksums.after_steps(setting, torch.float32, "cpu")
    steps = {float(value) for name, value in after.items() if name.startswith("step")}
    skips = bool(setting.options.get("skip_nonfinite"))
    assert steps <= {gpu_checksums._STEPS - skips}
    assert all(bool(torch.isfinite(value).all()) for value in after.values())


def test_missing_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rules.py").write_text("import optax.losses\nimport nowhere\n")
    test = tmp_path / "test_it.py"
    test.write_text("import rules\nfrom jax import numpy\n\ndef f():\n    import cupy\n")
    monkeypatch.setattr(gpu_tests, "_is_missing", lambda _: True)
    assert gpu_tests.missing_modules(test) == ["jax", "optax"]
    monkeypatch.setattr(gpu_tests, "_is_missing", lambda name: name == "jax")
    assert gpu_tests.missing_modules(test) == ["jax"]
