"""How long partial updates take: rows of a table, anchored steps, selected blocks.

``python bench/partial.py [--json FILE]`` prints one table. Peers of a group take turns of a few
steps, so that whatever disturbs the machine disturbs all of them; ratios are medians of the ratios
within the rounds. Rows are drawn at random: others for every step, which are not in the caches, or
the same ones again and again, which are as far as they fit.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import fusestep as fs
from interleave import time_calls
from machine import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WIDTH, LISTED = 64, 4096
THREADS = 2
LISTS = 64  # of row numbers, in turn
SETTLE = 0.01  # seconds, in which the last peer's threads stop spinning
UNTIMED, TIMED = 3, 8  # steps of a turn

Steps = dict[str, "Callable[[], object]"]


def lists_of_rows(rows: int) -> list[np.ndarray[Any, Any]]:
    """Return lists of row numbers, unsorted and with the duplicates that chance gives."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, rows, LISTED) for _ in range(LISTS)]


def steps_of_rows(rows: int, lists: list[np.ndarray[Any, Any]], *, peers: bool) -> Steps:
    """Return one step of each way to move 4,096 rows of a table, by name."""
    values = np.random.default_rng(1).standard_normal((LISTED, WIDTH), dtype=np.float32)

    def own(**options: Any) -> Callable[[], object]:
        opt = fs.Adam(np.zeros((rows, WIDTH), np.float32), **options)
        turns = itertools.cycle(lists)
        return lambda: opt.step(fs.Rows(next(turns), values))

    steps: Steps = {"lazy": own(), "exact": own(rows="exact")}
    if peers:
        steps |= torch_steps(rows, lists, values)
    return steps


def torch_steps(
    rows: int, lists: list[np.ndarray[Any, Any]], values: np.ndarray[Any, Any]
) -> Steps:
    """Return torch's steps: SparseAdam as embeddings call it, and the dense fused Adam."""
    import torch

    torch.set_num_threads(THREADS)
    torch.sparse.check_sparse_tensor_invariants.disable()

    def gradients() -> Iterator[torch.Tensor]:
        for row_numbers in itertools.cycle(lists):
            index = torch.from_numpy(row_numbers)[None]
            yield torch.sparse_coo_tensor(index, torch.from_numpy(values), (rows, WIDTH))

    def sparse() -> Callable[[], object]:
        table = torch.zeros(rows, WIDTH, requires_grad=True)
        opt, turns = torch.optim.SparseAdam([table]), gradients()

        def step() -> None:
            table.grad = next(turns)
            opt.step()

        return step

    table = torch.zeros(rows, WIDTH, requires_grad=True)
    table.grad = torch.ones(rows, WIDTH)
    dense = torch.optim.Adam([table], fused=True)
    return {"torch SparseAdam": sparse(), "torch dense fused Adam": dense.step}


def anchored_steps(elements: int) -> Steps:
    """Return an Adam step without an anchor, with one, and with importance, by name."""
    gradient = np.ones(elements, np.float32)

    def own(**anchor: Any) -> Callable[[], object]:
        opt = fs.Adam(np.zeros(elements, np.float32))
        if anchor:
            opt.anchor(1.0, **anchor)
        return lambda: opt.step(gradient)

    return {
        "free": own(),
        "anchored": own(reference=np.zeros(elements, np.float32)),
        "anchored, importance": own(importance=np.ones(elements, np.float32)),
    }


def selected_steps(elements: int) -> Steps:
    """Return an Adam step of everything, and of a tenth of it, selected in several ways."""
    rng = np.random.default_rng(0)
    gradient = rng.standard_normal(elements, dtype=np.float32)

    def own(where: Any = None) -> Callable[[], object]:
        opt = fs.Adam(np.ones(elements, np.float32))
        return lambda: opt.step(gradient, where=where)

    return {
        "everything": own(),
        "RandomBlocks(0.1)": own(fs.RandomBlocks(0.1)),
        "RandomBlocks(0.1, 16384)": own(fs.RandomBlocks(0.1, block=16384)),
        "RandomBlocks(0.1), track": own(fs.RandomBlocks(0.1, frozen="track")),
        "CyclicBlocks(10)": own(fs.CyclicBlocks(10)),
        "mask: the first tenth": own(np.arange(elements) < elements // 10),
        "mask: a random tenth": own(rng.random(elements) < 0.1),
        "TopK(0.1)": own(fs.TopK(0.1)),
    }


def measure(steps: Steps, rounds: int) -> dict[str, list[float]]:
    """Return the mean seconds of each step in each round, in which every peer has a turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            time.sleep(SETTLE)
            time_calls(step, UNTIMED)
            seconds[name].append(time_calls(step, TIMED) / TIMED)
    return seconds


def table(title: str, seconds: dict[str, list[float]]) -> str:
    """Return the medians, and the ratios to the first."""
    first = next(iter(seconds.values()))
    lines = [title]
    for name, samples in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(samples, first, strict=True))
        lines.append(f"  {name:<28}{statistics.median(samples) * 1e6:>12,.0f} µs{ratio:>10.2f}x")
    return "\n".join(lines)


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write all samples there")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    fs.set_num_threads(THREADS)

    groups = {
        f"Adam, {LISTED:,} {which} rows of {WIDTH} of {rows:,}": (rows, lists)
        for rows in (100_000, 1_000_000, 10_000_000)
        for which, lists in (("other", LISTS), ("same", 1))
    }
    results: dict[str, dict[str, list[float]]] = {}
    machine = describe()
    print(f"{machine['processor']['model']}, {THREADS} threads, float32")
    for title, (rows, lists) in groups.items():
        results[title] = measure(
            steps_of_rows(rows, lists_of_rows(rows)[:lists], peers=rows == 1_000_000),
            options.rounds,
        )
        gc.collect()  # the tables of the largest take 15 GB
        print(table(title, results[title]), flush=True)
    for elements in (1_000_000, 30_000_000):
        for kind, steps in (("anchors", anchored_steps), ("selections", selected_steps)):
            title = f"Adam, {elements:,} elements: {kind}"
            results[title] = measure(steps(elements), options.rounds)
            print(table(title, results[title]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "seconds": results}, indent=1))


if __name__ == "__main__":
    main()
