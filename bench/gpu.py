"""The benchmark on a GPU: ``python bench/gpu.py --out FOLDER``; two and a half minutes.

Needs fusestep with its CUDA kernels, and torch; with CuPy it measures CuPy arrays, too. Leaves
``gpu.json`` (all rounds of everybody, medians, the command, the machine) and ``gpu.txt`` (tables,
and whether the goals are met). ``--quick`` takes 40 seconds; ``--device cpu`` rehearses without a
GPU, with small arrays.

`gpu_timing.py` says how it is measured, `gpu_cases.py` what. The exit status is 1 where a peer has
failed or computes something else than fusestep: whether goals are met is for the reader.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import company
import gpu_report
import machine
from gpu_cases import OURS, all_cases, difference, forget
from gpu_devices import device_called
from gpu_shapes import BILLION, fitting, workloads
from gpu_timing import CLOCKS, measure
from interleave import Budget

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpu_cases import Case, Run
    from gpu_devices import Device
    from gpu_timing import Samples

_FULL = Budget(turn=0.02, min_rounds=5, max_rounds=60, group=5.0)
_QUICK = Budget(turn=0.005, min_rounds=3, max_rounds=20, group=1.2)
_REHEARSAL = Budget(turn=0.001, min_rounds=3, max_rounds=5, group=0.1)

_SECONDS = 240.0  # after which no case begins, if nobody says otherwise
_WARM_UP = 3  # steps
_BYTES_OF_LARGE = 44  # an element of the largest tensor: two peers, gradients, a copy, a comparison


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = device_called(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    watch = company.Watch()
    results = _description(device, options.commit)
    for case in _chosen(device, options.only):
        is_late = watch.seconds > options.seconds
        results["cases"].append(_left_out(case) if is_late else _measured(device, case, options))
        _say(results["cases"][-1], watch.seconds)
        _write(options.out / "gpu.json", results, watch)  # after each: the next one may crash
    _write(options.out / "gpu.json", results, watch)
    text = gpu_report.text(results)
    (options.out / "gpu.txt").write_text(text)
    sys.stdout.write(text)
    return 1 if any(case["failures"] for case in results["cases"]) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.txt")
    parser.add_argument("--quick", action="store_true", help="40 seconds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS, help="begin no case after so many"
    )
    parser.add_argument("--commit", default=None, help="of the sources, where git does not know")
    return parser.parse_args(arguments)


def _chosen(device: Device, wanted: str) -> list[Case]:
    largest = fitting(BILLION, _BYTES_OF_LARGE, device.available())
    cases = all_cases(workloads(device.is_rehearsal, largest), is_rehearsal=device.is_rehearsal)
    return [case for case in cases if wanted in case.key]


def _budget(device: Device, is_quick: bool) -> Budget:
    if device.is_rehearsal:
        return _REHEARSAL
    return _QUICK if is_quick else _FULL


# ---- one case ------------------------------------------------------------------------------------


def _measured(device: Device, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Return all there is to know of a case; nothing that goes wrong in it ends the benchmark."""
    result = _outline(case)
    if reason := case.why_not(device):
        result["missing"] = dict.fromkeys(case.peers, reason)
        return result
    runs = _started(device, case, result["failures"])
    differences = _compared(device, case, runs, result["failures"])
    try:
        samples = measure(
            device,
            {name: run.step for name, run in runs.items()},
            _budget(device, options.quick),
        )
    except Exception as error:  # whoever it was
        result["failures"]["measuring"] = _in_a_line(error)
        samples = {}
    for name, run in runs.items():
        if name in samples:
            result["peers"][name] = _peer(run, samples[name], differences.get(name))
    runs.clear()
    forget()
    device.release()
    return result


def _outline(case: Case) -> dict[str, Any]:
    workload = case.workload
    return {
        "key": case.key,
        "tensors": len(workload.shapes),
        "elements": workload.elements,
        "dtype": str(case.dtype).partition(".")[2],
        "clock": case.clock,
        "peers": {},
        "missing": {},
        "failures": {},
    }


def _left_out(case: Case) -> dict[str, Any]:
    return _outline(case) | {"missing": dict.fromkeys(case.peers, "there was no time left")}


def _started(device: Device, case: Case, failures: dict[str, str]) -> dict[str, Run]:
    """Return the peers that can do it, each after a few steps."""
    runs = {name: _start(device, case, name, failures) for name in case.peers}
    return {name: run for name, run in runs.items() if run is not None}


def _start(device: Device, case: Case, name: str, failures: dict[str, str]) -> Run | None:
    try:
        run = case.start(name, device)
        for _ in range(_WARM_UP):
            run.step()
        device.synchronize()
    except Exception as error:  # whatever it is, the others can go on
        failures[name] = _in_a_line(error)
        return None
    return run


def _compared(
    device: Device, case: Case, runs: dict[str, Run], failures: dict[str, str]
) -> dict[str, float | None]:
    """Return how far all are from ours; a benchmark of something else would compare nothing."""
    names = [name for name in runs if OURS in runs and name != OURS]
    found = {name: _difference(device, case, runs, name, failures) for name in names}
    for name, value in found.items():
        if value is not None and not value < case.tolerance:
            failures[f"{name}, compared"] = (
                f"computes something else: off by {value:.2g} of the way, "
                f"more than {case.tolerance:g}"
            )
    return found


def _difference(
    device: Device, case: Case, runs: dict[str, Run], name: str, failures: dict[str, str]
) -> float | None:
    try:
        return difference(device, case, runs[OURS], runs[name])
    except Exception as error:  # too little memory, say
        failures[f"{name}, compared"] = _in_a_line(error)
        return None


def _peer(run: Run, samples: Samples, difference_to_ours: float | None) -> dict[str, Any]:
    return {
        "nbytes": run.nbytes,
        "calls_per_sample": samples.calls,
        "difference_to_fusestep": difference_to_ours,
        "median": {clock: samples.median(clock) for clock in CLOCKS},
        "seconds": {
            clock: [float(f"{value:.5g}") for value in samples.seconds[clock]] for clock in CLOCKS
        },
    }


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ---- the files -----------------------------------------------------------------------------------


def _description(device: Device, commit: str | None) -> dict[str, Any]:
    measured_on = machine.describe()
    versions = {
        name: version
        for name, version in (measured_on["versions"] | {"cupy": _cupy()}).items()
        if version != "not installed"
    }
    return {
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "commit": commit or os.environ.get("FUSESTEP_COMMIT") or _commit(),
        "is_rehearsal": device.is_rehearsal,
        "device": device.describe(),
        "versions": versions | {"torch": torch.__version__},
        "measured_on": measured_on,
        "cases": [],
    }


def _cupy() -> str:
    try:
        import cupy
    except ImportError:
        return "not installed"
    version: str = cupy.__version__
    return version


def _commit() -> str | None:
    """Return what git says the sources are, or None where they are not in git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.decode().strip() + ", with changes" * bool(changes.stdout.strip())


def _write(path: Path, results: dict[str, Any], watch: company.Watch) -> None:
    results["company"] = watch.report()
    results["goals"] = gpu_report.as_dicts(gpu_report.outcomes(results))
    path.write_text(json.dumps(results, indent=1) + "\n")


def _say(case: dict[str, Any], seconds: float) -> None:
    clock = case["clock"]
    times = [
        f"{name} {gpu_report.as_time(peer['median'][clock])}"
        for name, peer in case["peers"].items()
    ]
    troubles = [f"{name}: {why}" for name, why in (case["failures"] | case["missing"]).items()]
    what = "; ".join([*times, *troubles])
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {seconds:5.0f} s  {case['key']}: {what}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
