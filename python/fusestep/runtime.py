"""Threads, instruction sets, and what this build is made of."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from typing import Any, Literal, overload

import numpy as np

from . import _cpu
from ._version import __version__

# Names in the environment that are wrong are errors now rather than at the first step.
_cpu.active_tier()
_cpu.num_threads()


def set_num_threads(n: int) -> None:
    """Set how many threads a step may use, the calling one included.

    At the start it is FUSESTEP_NUM_THREADS, else OMP_NUM_THREADS, else the number of processors
    this process may run on. Small steps use one thread whatever the number. The result of a step
    does not depend on it.

    Parameters
    ----------
    n
        From 1 to 1024.

    Raises
    ------
    TypeError, ValueError
        `n` is not a whole number, or out of range.
    """
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise TypeError(f"num_threads is {n!r} ({type(n).__name__}); expected a whole number")
    _cpu.set_num_threads(int(n))


def get_num_threads() -> int:
    """Return how many threads a step may use."""
    return _cpu.num_threads()


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, Any] | None:
    """Print what this build of fusestep has and uses.

    Parameters
    ----------
    mode
        "stdout" prints; "dicts" returns a dictionary instead.

    Returns
    -------
    dict or None
        Version, Python, NumPy and platform; the instruction sets that are compiled in, that this
        machine can run, and the one in use (FUSESTEP_CPU forces another); threads; CUDA, or why
        there is none.
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode is {mode!r}; expected 'stdout' or 'dicts'")
    tiers = _cpu.tiers()
    config: dict[str, Any] = {
        "fusestep": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "instruction sets": {
            "compiled": [name for name, _ in tiers],
            "available": [name for name, runs_here in tiers if runs_here],
            "active": _cpu.active_tier(),
            "forced": bool(os.environ.get("FUSESTEP_CPU")),
        },
        "threads": _cpu.num_threads(),
        "cuda": _cuda(),
    }
    if mode == "dicts":
        return config
    _print(config)
    return None


def _cuda() -> str:
    if importlib.util.find_spec("fusestep._cuda") is None:
        return "not available: this build has no CUDA kernels"
    from . import _cuda as kernels

    if kernels.is_simulated:
        return "simulated in the host's memory, for tests"
    toolkit = _version(kernels.toolkit_version)
    what = f"kernels for CUDA {toolkit}, compute capability {_capabilities(kernels.architectures)}"
    try:
        count = kernels.device_count()
    except RuntimeError as error:
        return f"not usable here ({what}): {error}"
    return f"{what}; driver for CUDA {_version(kernels.driver_version())}; GPUs: {count}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _capabilities(architectures: str) -> str:
    """Spell CMake's list ("75-real 120") as NVIDIA does, and say that the last one is PTX, too."""
    numbers = [entry.partition("-")[0] for entry in architectures.split()]
    names = [f"{n[:-1]}.{n[-1]}" if n.isdigit() else n for n in numbers]
    is_open = bool(architectures) and not architectures.endswith("-real")
    return ", ".join(names) + (" and later" if is_open else "")


def _print(config: dict[str, Any]) -> None:
    sets = config["instruction sets"]
    rows = {
        "fusestep": config["fusestep"],
        "python": config["python"],
        "numpy": config["numpy"],
        "platform": config["platform"],
        "instruction sets": ", ".join(
            name + ("" if name in sets["available"] else " (not on this machine)")
            for name in sets["compiled"]
        ),
        "active": sets["active"] + (" (FUSESTEP_CPU)" if sets["forced"] else ""),
        "threads": config["threads"],
        "cuda": config["cuda"],
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        sys.stdout.write(f"{name:<{width}}  {value}\n")
