"""One number of threads for everybody."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import fusestep

_PROCESSORS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
_current = 1


def current() -> int:
    """Return the number of threads everybody has at present."""
    return _current


def possible(count: int) -> bool:
    """Return whether the machine has that many processors for us."""
    return count <= (len(_PROCESSORS) or os.cpu_count() or 1)


def limit_to(count: int) -> None:
    """Give every library `count` threads, and the process as many processors.

    fusestep and PyTorch (whose OpenMP runtime DeepSpeed shares) have a function for it. XLA has
    none: its pool is made once, as large as the machine. On Linux all threads of the process, XLA's
    included, are therefore bound to `count` processors, so that one thread means one core for every
    peer; elsewhere optax keeps all cores.
    """
    fusestep.set_num_threads(count)
    _limit_torch(count)
    bind_to(count)


def bind_to(count: int) -> None:
    """Give the process `count` processors, and leave to the libraries how many threads they use."""
    global _current
    _current = count
    _bind(_PROCESSORS[-count:])  # the last ones: interrupts tend to go to the first


def release() -> None:
    """Give the process all its processors back."""
    _bind(_PROCESSORS)


def _limit_torch(count: int) -> None:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(count)


def _bind(processors: list[int]) -> None:
    if not processors:
        return
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(int(thread.name), processors)
