"""On what was measured: processor, compiler, versions, the command, and who else was at work."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import fusestep
import limit

_PACKAGES = (
    "numpy", "torch", "jax", "jaxlib", "optax", "deepspeed", "pytest-benchmark",
    "scikit-learn", "vowpalwabbit", "river",
)  # fmt: skip
_FLAGS = re.compile(r"^(sse4_2|avx.*|fma|bmi2|f16c|neon|asimd.*|sve.*)$")


def describe() -> dict[str, Any]:
    """Return what a reader of the results has to know, without names or paths of this machine."""
    return {
        "command": _command(),
        "processor": _processor(),
        "memory_bytes": _memory(),
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled").strip(),
        "compiler_of_the_limit": {"version": _compiler(), "flags": limit.flags()},
        "versions": _versions(),
        "fusestep": fusestep.show_config("dicts"),
        "environment": {
            name: value
            for name, value in os.environ.items()
            if re.match(r"(OMP|GOMP|KMP|MKL|OPENBLAS|FUSESTEP|XLA|JAX)_", name)
            and not Path(value).is_absolute()
        },
    }


def _command() -> str:
    """Return the command line, with the last part of every path that starts at the root."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *(_shortened(argument) for argument in sys.argv[1:])])


def _shortened(argument: str) -> str:
    option, equals, value = argument.rpartition("=")
    return option + equals + (Path(value).name if Path(value).is_absolute() else value)


def _processor() -> dict[str, Any]:
    information: dict[str, str] = dict(
        re.findall(r"^([^\t:]+)\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    )
    flags = (information.get("flags") or information.get("Features") or "").split()
    return {
        "model": information.get("model name", "unknown"),
        "family": information.get("cpu family"),
        "model_number": information.get("model"),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "flags": [flag for flag in flags if _FLAGS.match(flag)],
    }


def _caches() -> dict[str, str]:
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    return {
        f"L{_read(folder / 'level').strip()} {_read(folder / 'type').strip()}": _read(
            folder / "size"
        ).strip()
        for folder in folders
    }


def _memory() -> int | None:
    found = re.search(r"^MemTotal:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _compiler() -> str | None:
    command = [*limit.compiler(), "--version"]
    try:
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.partition("\n")[0]


def _versions() -> dict[str, str]:
    own = {"python": sys.version.partition(" ")[0], "fusestep": fusestep.__version__}
    return own | {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
