"""Who else is at work on this machine."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_Result = TypeVar("_Result")

_DISTURBING = 0.25  # processors; the clocks of the system are too coarse to tell less from nothing
_PAUSE = 0.5  # seconds between two looks


class _Spent(NamedTuple):
    """Processor seconds, from some time on."""

    own: float
    others: float
    hypervisor: float


class Watch:
    """Tells how much of the machine others have used since the watch was made."""

    def __init__(self) -> None:
        self._begin, self._before = time.perf_counter(), _spent()
        self._load = _load()

    @property
    def seconds(self) -> float:
        """How long that is."""
        return time.perf_counter() - self._begin

    def used(self) -> _Spent:
        """Return the processors used, on average."""
        seconds = self.seconds
        return _Spent(
            *(
                max(0.0, after - before) / seconds
                for before, after in zip(self._before, _spent(), strict=True)
            )
        )

    def disturbed(self) -> bool:
        """Return whether others used so much that nothing measured meanwhile is worth keeping."""
        used = self.used()
        return used.others + used.hypervisor > _DISTURBING

    def report(self) -> dict[str, Any]:
        """Return what there is to know, for the JSON."""
        used = self.used()
        return {
            "seconds": self.seconds,
            "load_average_before": self._load,
            "load_average_after": _load(),
            "processors_used_by_this_process": used.own,
            "processors_used_by_others": used.others,
            "processors_taken_by_the_hypervisor": used.hypervisor,
        }


class Patience:
    """Repeats what others have disturbed, until too much time was lost in all.

    Parameters
    ----------
    seconds
        How much that is.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def undisturbed(self, action: Callable[[], _Result]) -> tuple[_Result, int]:
        """Return what `action` returned, and how often it was done in vain before."""
        discarded = 0
        while True:
            watch = Watch()
            result = action()
            if self._left <= 0 or not watch.disturbed():
                return result, discarded
            discarded += 1
            self._wait_for_quiet()
            self._left -= watch.seconds

    def _wait_for_quiet(self) -> None:
        waiting = Watch()
        while waiting.seconds < self._left:
            watch = Watch()
            time.sleep(_PAUSE)
            if not watch.disturbed():
                return


def _spent() -> _Spent:
    own = time.process_time() + sum(os.times()[2:4])  # with the processes it has started
    found = re.match(r"cpu +(.*)", _statistics())
    if not found:
        return _Spent(own, 0, 0)
    user, nice, system, _, _, irq, softirq, steal = map(float, found[1].split()[:8])
    ticks = os.sysconf("SC_CLK_TCK")
    return _Spent(own, (user + nice + system + irq + softirq) / ticks - own, steal / ticks)


def _statistics() -> str:
    try:
        return Path("/proc/stat").read_text()
    except OSError:  # not Linux
        return ""


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
