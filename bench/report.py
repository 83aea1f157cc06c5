"""Tables and pictures of results: ``python bench/report.py bench/results/full.json``.

Prints, for every rule and number of threads, the medians of all peers, how many times longer each
takes than fusestep (the median of the ratios within the rounds), and fusestep's share of the limit;
what was measured of ``fusestep.torch``; then the goals. Beside the first file it writes what it
prints (``.txt``) and, of the steps over arrays, a picture for each number of threads
(``-1-thread.png``, ``-2-threads.png``).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from rich.console import Console
from rich.table import Table

import goals
import results
from results import three_digits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes

# In the order of the columns and the bars, with the bars' colours.
PEERS = {
    "fusestep": "#d62728",
    "deepspeed": "#9467bd",
    "torch fused": "#08519c",
    "torch foreach": "#4292c6",
    "torch": "#9ecae1",
    "optax": "#2ca02c",
    "numpy in-place": "#7f7f7f",
    "numpy": "#c7c7c7",
}
_STEPPERS = ("fusestep", "torch fused", "torch foreach", "torch", "no step")
_BARS = [peer for peer in PEERS if peer != "torch fused"]  # that one is the line at 1
_LIMIT_LINE: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}
_TITLES = {"adam": "Adam", "nag": "NAG", "adagrad": "Adagrad"}

# Below, the limit's own call from Python counts more than its bytes.
_LIMIT_FROM = 100_000  # elements


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("json", nargs="+", type=Path, help="written by --benchmark-json")
    parser.add_argument("--output", type=Path, help="in place of the first file, less its suffix")
    options = parser.parse_args(arguments)
    measured = results.load(options.json)
    output = options.output or options.json[0].with_suffix("")

    console = Console(record=True, width=132, highlight=False, markup=False)
    _print_machine(console, measured)
    for rule, threads in _panels(measured):
        console.print(_table(measured, rule, threads))
    for threads in sorted({threads for _, threads in measured.tasks}):
        console.print(_table_of_tasks(measured, threads))
    console.print(_goals(measured))
    output.with_suffix(".txt").write_text(console.export_text())
    for threads in sorted({threads for _, threads in _panels(measured)}):
        suffix = f"-{threads}-thread" + "s" * (threads > 1)
        _draw(measured, threads, output.with_name(output.name + suffix + ".png"))


def _panels(measured: results.Results) -> Iterator[tuple[str, int]]:
    """Yield each rule and number of threads that was measured."""
    yield from dict.fromkeys((rule, threads) for rule, _, threads in measured.groups)


def _workloads(measured: results.Results, rule: str, threads: int) -> list[str]:
    """Return the workloads of a panel: single tensors by size, then the lists, as measured."""
    return [key[1] for key in measured.groups if (key[0], key[2]) == (rule, threads)]


# ---- text ----------------------------------------------------------------------------------------


def _print_machine(console: Console, measured: results.Results) -> None:
    for content in measured.files:
        on = content["measured_on"]
        processor, versions = on["processor"], on["versions"]
        tier = on["fusestep"]["instruction sets"]["active"]
        console.print(f"command    {on['command']}")
        console.print(f"date       {content['datetime'][:16]}")
        console.print(
            f"machine    {processor['model']} (family {processor['family']}, model "
            f"{processor['model_number']}), {processor['cores']} cores, {tier} in use, "
            f"{on['memory_bytes'] / 1e9:.0f} GB"
        )
        console.print(f"versions   {', '.join(f'{name} {v}' for name, v in versions.items())}")
        console.print(f"others     {_others(content)}")
        if "wheel" in content:
            wheel = content["wheel"]
            console.print(f"wheel      {wheel['name']}: {wheel['bytes'] / 1e6:.2f} MB")
        console.print()


def _others(content: dict[str, Any]) -> str:
    company = content["company"]
    again = max(b["extra_info"]["rounds_discarded"] for b in content["benchmarks"])
    return (
        f"other processes used {company['processors_used_by_others']:.2f} processors, the "
        f"hypervisor took {company['processors_taken_by_the_hypervisor']:.2f}, over "
        f"{company['seconds']:.0f} s; disturbed rounds done again: at most {again} of a group"
    )


def _table(measured: results.Results, rule: str, threads: int) -> Table:
    plural = "s" * (threads > 1)
    table = Table(
        title=f"{_TITLES[rule]}, {threads} thread{plural}: median of a step, times fusestep's",
        title_justify="left",
    )
    for column in ("", *PEERS, "share of limit"):
        table.add_column(column, justify="left" if column == "" else "right")
    for workload in _workloads(measured, rule, threads):
        key = (rule, workload, threads)
        cells = [_cell(measured, key, peer) for peer in PEERS]
        table.add_row(workload, *cells, _share(measured, key))
    return table


def _table_of_tasks(measured: results.Results, threads: int) -> Table:
    plural = "s" * (threads > 1)
    table = Table(
        title=f"fusestep.torch, {threads} thread{plural}: median, times fusestep's",
        title_justify="left",
    )
    for column in ("", *_STEPPERS):
        table.add_column(column, justify="left" if column == "" else "right")
    for key in measured.tasks:
        if key[1] == threads:
            table.add_row(key[0], *(_cell(measured, key, stepper) for stepper in _STEPPERS))
    return table


def _cell(measured: results.Results, key: results.GroupKey | results.TaskKey, peer: str) -> str:
    entry = measured.peers(key).get(peer)
    if entry is None:
        return "-"
    ratio = measured.ratio(key, peer, "fusestep")
    if peer == "fusestep" or ratio is None:
        return f"{_time(entry.median)}\n "
    return f"{_time(entry.median)}\n{three_digits(ratio.value)}x"


def _share(measured: results.Results, key: results.GroupKey) -> str:
    ratio = measured.ratio(key, "limit", "fusestep")
    if ratio is None:
        return "-"
    if measured.groups[key]["limit"].elements < _LIMIT_FROM:
        return ""
    return f"{ratio.value:.2f}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{three_digits(seconds / size)} {unit}"
    return f"{three_digits(seconds / 1e-9)} ns"


def _goals(measured: results.Results) -> Table:
    table = Table(title="Goals (in brackets: quartiles over the rounds)", title_justify="left")
    for column in ("work", "goal", "measured", ""):
        table.add_column(column)
    for line in goals.outcomes(measured):
        table.add_row(line.work, line.goal, line.measured, line.verdict)
    return table


# ---- pictures ------------------------------------------------------------------------------------


def _draw(measured: results.Results, threads: int, path: Path) -> None:
    """Draw grouped bars of how many times faster than torch's fused optimizer everybody is."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rules = [rule for rule, count in _panels(measured) if count == threads]
    figure, axes = plt.subplots(
        len(rules), figsize=(14, 1.5 + 3.4 * len(rules)), squeeze=False, layout="constrained"
    )
    for axis, rule in zip(axes[:, 0], rules, strict=True):
        _draw_panel(axis, measured, rule, threads)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=8)
    plural = "s" * (threads > 1)
    figure.suptitle(f"A step, {threads} thread{plural}: times as fast as torch's fused optimizer")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bars: list[Any] = [Patch(color=PEERS[peer], label=peer) for peer in _BARS]
    return [*bars, Line2D([], [], **_LIMIT_LINE, label="limit of the memory")]


def _draw_panel(axis: Axes, measured: results.Results, rule: str, threads: int) -> None:
    workloads = _workloads(measured, rule, threads)
    width = 0.86 / len(_BARS)
    for i, peer in enumerate(_BARS):
        speeds = _speeds(measured, rule, threads, peer)
        at = [x + (i - (len(_BARS) - 1) / 2) * width for x in speeds]
        heights = [speed - 1 for speed in speeds.values()]  # bars start at 1: down is slower
        axis.bar(at, heights, width, bottom=1, color=PEERS[peer])
        if peer == "fusestep":
            for x, speed in zip(at, speeds.values(), strict=True):
                _label(axis, x, speed)
    _draw_limit(axis, measured, rule, threads)
    axis.set_yscale("log")
    axis.margins(x=0.01, y=0.15)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.grid(axis="y", alpha=0.3)
    axis.set_xticks(range(len(workloads)), workloads)
    axis.set_ylabel(_TITLES[rule])


def _draw_limit(axis: Axes, measured: results.Results, rule: str, threads: int) -> None:
    workloads = _workloads(measured, rule, threads)
    for x, speed in _speeds(measured, rule, threads, "limit").items():
        if measured.groups[rule, workloads[x], threads]["limit"].elements >= _LIMIT_FROM:
            axis.hlines(speed, x - 0.45, x + 0.45, **_LIMIT_LINE)


def _label(axis: Axes, x: float, speed: float) -> None:
    axis.annotate(
        f"{three_digits(speed)}x",
        (x, speed),
        xytext=(0, 2 if speed >= 1 else -2),
        textcoords="offset points",
        ha="center",
        va="bottom" if speed >= 1 else "top",
        fontsize=8,
    )


def _speeds(measured: results.Results, rule: str, threads: int, peer: str) -> dict[int, float]:
    """Return how many times faster a peer is, by the place of the workload in the panel."""
    ratios = {
        i: measured.ratio((rule, workload, threads), "torch fused", peer)
        for i, workload in enumerate(_workloads(measured, rule, threads))
    }
    return {i: ratio.value for i, ratio in ratios.items() if ratio is not None}


if __name__ == "__main__":
    main()
