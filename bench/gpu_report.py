"""Tables of what `gpu.py` has measured: ``python bench/gpu_report.py gpu.json``.

In plain text, by nothing but Python: a machine with a GPU need not have more.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import goals
from results import Entry, Ratio, Results, three_digits

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from goals import Outcome

_OURS, _FUSED, _COPY = "fusestep", "torch fused", "copy"

_SHARE_OF_COPY = ("adam large", 0.92)

# case, how many times faster than torch's fused step (and what goes before it)
_RATIOS = (
    ("adam large", 1.0),
    ("adam 1 x 1k", 2.0),
    ("adam 500 x 1k", 2.0),
    ("adam 1000 x 1k", 2.0),
    ("adam gpt2", 2.0),
    ("adam resnet50", 2.0),
    ("clip gpt2", 2.0),
    ("clip 1000 x 1k", 2.0),
    ("scaler gpt2", 2.0),
    ("scaler 1000 x 1k", 2.0),
)

_HOST = ("adam 1 x 1k", "adam 100 x 1k", "adam 1000 x 1k")

_LEGEND = (
    "time  median over the rounds, by the clock in the last column: device, between two events in",
    "      the stream; wall, on the host until the GPU is done. Many calls in a row",
    "x     times fusestep's: median of the ratios within the rounds",
    "GB/s  bytes that the work has to read and write",
    "host  until a call has returned",
)


def outcomes(results: dict[str, Any]) -> list[Outcome]:
    """Compare what was measured with what is asked."""
    lines = [_share_of_copy(results)]
    for key, goal in _RATIOS:
        ratio = _ratio(results, key, _FUSED)
        lines.append(goals._at_least(f"{_name(results, key)}: faster than torch", goal, "x", ratio))
    return lines


def text(results: dict[str, Any]) -> str:
    """Return everything that a reader wants to see."""
    parts = [_heading(results), _bandwidths(results), _steps(results), _host_times(results)]
    if troubles := list(_troubles(results)):
        parts.append(["", "Failures, and what was left out", *troubles])
    parts.append(["", "Goals (in brackets: quartiles over the rounds)", *_goals(results)])
    return "\n".join(line.rstrip() for part in parts for line in part) + "\n"


def table(rows: Iterable[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Return rows of cells as lines, the columns in `left` aligned there, the others right."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def as_time(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{three_digits(seconds / size)} {unit}"
    return f"{three_digits(seconds / 1e-9)} ns"


# ---- parts ---------------------------------------------------------------------------------------


def _heading(results: dict[str, Any]) -> list[str]:
    device, on = results["device"], results["measured_on"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"command    {on['command']}",
        f"date       {results['datetime']}, commit {results['commit'] or 'unknown'}",
        f"device     {_described(device)}",
        f"host       {on['processor']['model']}, {on['processor']['cores']} cores",
        f"versions   {versions}",
        f"cuda       {on['fusestep'].get('cuda', 'not in this version of fusestep')}",
        f"others     other processes used {results['company']['processors_used_by_others']:.2f} "
        f"processors; the benchmark took {results['company']['seconds']:.0f} s",
    ]
    if results["is_rehearsal"]:
        warning = "A REHEARSAL ON THE CPU: sizes are cut down, no time here says anything of a GPU."
        lines = [warning, "", *lines]
    return lines


def _described(device: dict[str, Any]) -> str:
    rest = {name: value for name, value in device.items() if name != "name" and value is not None}
    return ", ".join([device["name"], *(f"{name} {value}" for name, value in rest.items())])


def _bandwidths(results: dict[str, Any]) -> list[str]:
    case = _case(results, "bandwidth")
    if case is None:
        return []
    rows = [
        (name, f"{_rate(peer, case['clock']):.0f} GB/s", as_time(peer["median"][case["clock"]]))
        for name, peer in case["peers"].items()
    ]
    return ["", "Memory, bytes read and bytes written", *table(rows, left=(0,))]


def _steps(results: dict[str, Any]) -> list[str]:
    rows = [("work", "tensors", "elements", "", "time", "x", "GB/s", "host", "clock")]
    for case in results["cases"]:
        if case["key"] != "bandwidth":
            rows += _rows(results, case)
    return ["", *_LEGEND, "", *table(rows, left=(0, 3, 8))] if len(rows) > 1 else []


def _rows(results: dict[str, Any], case: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    clock = case["clock"]
    first = (case["key"], f"{case['tensors']:,}", f"{case['elements']:,}")
    for name, peer in case["peers"].items():
        ratio = None if name in (_OURS, _COPY) else _ratio(results, case["key"], name)
        yield (
            *first,
            name,
            as_time(peer["median"][clock]),
            f"{three_digits(ratio.value)}x" if ratio else "",
            f"{_rate(peer, clock):.0f}" if peer["nbytes"] else "",
            as_time(peer["median"]["host"]),
            clock,
        )
        first = ("", "", "")


def _host_times(results: dict[str, Any]) -> list[str]:
    cases = [case for key in _HOST if (case := _case(results, key)) and case["peers"]]
    if not cases:
        return []
    names = list(dict.fromkeys(name for case in cases for name in case["peers"]))
    rows = [("tensors of 1,000", *names)]
    for case in cases:
        times = (_host(case, name) for name in names)
        rows.append((f"{case['tensors']:,}", *times))
    return ["", "Host time of a step, until the call has returned", *table(rows, left=())]


def _host(case: dict[str, Any], name: str) -> str:
    return as_time(case["peers"][name]["median"]["host"]) if name in case["peers"] else "-"


def _troubles(results: dict[str, Any]) -> Iterator[str]:
    for case in results["cases"]:
        for name, why in case["failures"].items():
            yield f"FAILED    {case['key']}, {name}: {why}"
        for name, why in case["missing"].items():
            yield f"left out  {case['key']}, {name}: {why}"


def _goals(results: dict[str, Any]) -> list[str]:
    rows = [(line.work, line.goal, line.measured, line.verdict) for line in outcomes(results)]
    lines = table(rows, left=(0, 1, 2, 3))
    met = sum(verdict.startswith("met") for *_, verdict in rows)
    summary = f"{met} of {len(rows)} goals met"
    return [*lines, summary + " (in a rehearsal, which says nothing)" * results["is_rehearsal"]]


# ---- numbers -------------------------------------------------------------------------------------


def _case(results: dict[str, Any], key: str) -> dict[str, Any] | None:
    return next((case for case in results["cases"] if case["key"] == key), None)


def _name(results: dict[str, Any], key: str) -> str:
    case = _case(results, key)
    return f"{key} ({case['elements']:,} elements)" if case else key


def _rate(peer: dict[str, Any], clock: str) -> float:
    """Return gigabytes a second."""
    rate: float = peer["nbytes"] / peer["median"][clock] / 1e9
    return rate


def _ratio(results: dict[str, Any], key: str, slower: str) -> Ratio | None:
    """Return how many times longer than ours a peer takes, by the clock of the case."""
    case = _case(results, key)
    if case is None:
        return None
    entries = {
        name: Entry(peer["seconds"][case["clock"]], case["elements"])
        for name, peer in case["peers"].items()
    }
    return Results(tasks={(key, 1): entries}).ratio((key, 1), slower, _OURS)


def _share_of_copy(results: dict[str, Any]) -> Outcome:
    """Compare bytes a second of our large step with those of a copy in the same rounds."""
    key, goal = _SHARE_OF_COPY
    ratio = _ratio(results, key, _COPY)
    if ratio is not None:
        peers = _case(results, key)["peers"]  # type: ignore[index]
        factor = peers[_OURS]["nbytes"] / peers[_COPY]["nbytes"]
        ratio = Ratio(*(factor * value for value in (ratio.value, ratio.low, ratio.high)))
    return goals._at_least(f"{_name(results, key)}: share of the copy's bandwidth", goal, "", ratio)


def as_dicts(lines: Iterable[Outcome]) -> list[dict[str, str]]:
    """Return outcomes for the JSON."""
    return [asdict(line) for line in lines]


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python bench/gpu_report.py gpu.json")
    sys.stdout.write(text(json.loads(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()
