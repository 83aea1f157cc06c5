"""The GPU that is measured, and the CPU in its place: for a rehearsal where there is none."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_WARM_UP = 3  # steps before a capture, as torch's documentation asks for
_ASKED = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit", "ecc.mode.current")


class Stopwatch(Protocol):
    """Tells how long a device has worked on what it was given meanwhile."""

    def start(self) -> None:
        """Begin here, in the order of what the device is given."""

    def stop(self) -> None:
        """End here."""

    def seconds(self) -> float:
        """Return the time between; the device must be done with it."""


class Device(ABC):
    """What the benchmark asks of a device."""

    name: str
    """As torch calls it."""
    is_rehearsal: bool
    """Whether times on it say nothing, and sizes are cut down."""

    @property
    def torch(self) -> torch.device:
        """The device for torch's functions."""
        return torch.device(self.name)

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done everything."""

    @abstractmethod
    def stopwatch(self) -> Stopwatch:
        """Return a stopwatch."""

    @abstractmethod
    def captured(self, function: Callable[[], object]) -> Callable[[], object]:
        """Return a function that repeats the work that `function` gives to the device."""

    @abstractmethod
    def available(self) -> int:
        """Return how many bytes of memory can be had."""

    @abstractmethod
    def release(self) -> None:
        """Give memory that nobody uses back."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what a reader of the results has to know."""


class Cuda(Device):
    """An NVIDIA GPU, the current one of torch."""

    name = "cuda"
    is_rehearsal = False

    def synchronize(self) -> None:
        """As the base class says."""
        torch.cuda.synchronize()

    def stopwatch(self) -> Stopwatch:
        """As the base class says."""
        return _Events()

    def captured(self, function: Callable[[], object]) -> Callable[[], object]:
        """As the base class says; `function` is called a few times before."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def available(self) -> int:
        """As the base class says."""
        free: int = torch.cuda.mem_get_info()[0]
        return free

    def release(self) -> None:
        """As the base class says."""
        torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """As the base class says."""
        properties = torch.cuda.get_device_properties(0)
        return {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "level_2_cache_bytes": getattr(properties, "L2_cache_size", None),
            "cuda_of_torch": torch.version.cuda,
            **_told_by_the_driver(),
        }


class Rehearsal(Device):
    """The CPU, which is always done at once."""

    name = "cpu"
    is_rehearsal = True

    def __init__(self) -> None:
        torch.set_num_threads(
            1
        )  # more of them wait for each other by spinning, at every little step

    def synchronize(self) -> None:
        """As the base class says."""

    def stopwatch(self) -> Stopwatch:
        """As the base class says."""
        return _Clock()

    def captured(self, function: Callable[[], object]) -> Callable[[], object]:
        """As the base class says; nothing can be captured, so that it is called each time."""
        for _ in range(_WARM_UP):
            function()
        return function

    def available(self) -> int:
        """As the base class says: enough for a rehearsal."""
        return 2**34

    def release(self) -> None:
        """As the base class says."""

    def describe(self) -> dict[str, Any]:
        """As the base class says."""
        return {"name": "none: a rehearsal on the CPU, whose times say nothing about a GPU"}


def device_called(name: str) -> Device:
    """Return the device of a name, "cuda" or "cpu"."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no NVIDIA GPU here: --device cpu is for rehearsals")
    return Cuda() if name == "cuda" else Rehearsal()


class _Events:
    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        self._begin.record()

    def stop(self) -> None:
        self._end.record()

    def seconds(self) -> float:
        milliseconds: float = self._begin.elapsed_time(self._end)
        return milliseconds / 1e3


class _Clock:
    def start(self) -> None:
        self._begin = time.perf_counter()

    def stop(self) -> None:
        self._end = time.perf_counter()

    def seconds(self) -> float:
        return self._end - self._begin


def _told_by_the_driver() -> dict[str, str]:
    """Return what nvidia-smi says of the first GPU, or nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = answer.stdout.partition("\n")[0].split(",")
    return {
        re.sub(r"\W", "_", name): value.strip() for name, value in zip(_ASKED, values, strict=False)
    }
