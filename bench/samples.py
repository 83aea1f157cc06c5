"""How long weighted sample updates take: gradients of samples, and outer products.

``python bench/samples.py [--json FILE]`` prints one table for each workload. Peers take turns, as
in partial.py; ratios are medians of the ratios within the rounds. One thread.

Networks: a step of training, with torch's fused Adam, with ours, and with ours and fuse_linear.

Outer products: torch makes the gradient (``error.T @ x``, into new memory, as backward does, or
into the same) and takes a fused Adam step. Samples: Opacus' DPOptimizer clips and adds up, and
takes the step of torch's fused Adam; the limit reads the same gradients once, and no more.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import threadpoolctl
import torch

import fusestep as fs
import fusestep.torch
import limit
import threads
from machine import describe
from partial import measure, table

if TYPE_CHECKING:
    from partial import Steps

LAYERS = [
    *[(10, 784, n) for n in (1, 8, 64)],
    *[(1024, 1024, 2**k) for k in range(11)],
    *[(4096, 4096, n) for n in (1, 8, 64)],
    (50_000, 128, 32),
]
NETWORKS = [(64, 3, 1), (1024, 4, 1), (1024, 4, 32), (1024, 4, 256)]
SAMPLES, ELEMENTS = 64, 1_000_000


def outer_steps(rows: int, columns: int, count: int) -> Steps:
    """Return an Adam step by outer products, and what it takes with a gradient, by name."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, columns), dtype=np.float32)
    error = rng.standard_normal((count, rows), dtype=np.float32)
    start = rng.standard_normal((rows, columns), dtype=np.float32)

    own = fs.Adam(start.copy())
    outer = fs.Outer(x, error, reduction="sum")
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    fused = torch.optim.Adam([weight], fused=True)
    x_there, error_there = torch.from_numpy(x), torch.from_numpy(error)
    gradient = torch.empty_like(weight)
    dense, made = fs.Adam(start.copy()), np.empty_like(start)

    def in_new_memory() -> None:
        weight.grad = error_there.T @ x_there
        fused.step()

    def in_the_same_memory() -> None:
        weight.grad = torch.mm(error_there.T, x_there, out=gradient)
        fused.step()

    def with_numpy() -> None:
        dense.step(np.matmul(error.T, x, out=made))

    return {
        "fusestep": lambda: own.step(outer),
        "torch": in_new_memory,
        "torch, out=": in_the_same_memory,
        "NumPy, then a dense step": with_numpy,
    }


def training_steps(width: int, layers: int, batch: int) -> Steps:
    """Return forward, loss, backward, step and zero_grad of linear layers, by name."""

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        pairs = [(torch.nn.Linear(width, width), torch.nn.ReLU()) for _ in range(layers)]
        return torch.nn.Sequential(*[layer for pair in pairs for layer in pair])

    x = torch.randn(batch, width, generator=torch.Generator().manual_seed(0))

    def training(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        def step() -> None:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    fused = fusestep.torch.fuse_linear(network())
    models = [network() for _ in range(2)]
    return {
        "fuse_linear": training(fused, fusestep.torch.Adam(fused.parameters())),
        "torch": training(models[0], torch.optim.Adam(models[0].parameters(), fused=True)),
        "fusestep.torch": training(models[1], fusestep.torch.Adam(models[1].parameters())),
    }


def sample_steps(*, bounded: bool) -> Steps:
    """Return an Adam step by the gradients of many samples, by name."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((SAMPLES, ELEMENTS), dtype=np.float32)
    options: dict[str, Any] = {"max_norm": 1.0} if bounded else {}
    own = fs.Adam(np.zeros(ELEMENTS, np.float32))
    samples = fs.Samples(values, **options)
    steps: Steps = {"fusestep": lambda: own.step(samples)}
    if limit.why_not() is None:
        reads = limit.Reading(values)
        steps["the limit: reading once"] = reads
        if bounded:
            steps["the limit: reading twice"] = lambda: (reads(), reads())
    there = torch.from_numpy(values)
    steps["torch by hand"] = torch_samples(there, bounded=bounded)
    if bounded:
        steps |= opacus_steps(there)
    return steps


def torch_samples(values: torch.Tensor, *, bounded: bool) -> Any:
    """Return what one would write by hand."""
    weight = torch.nn.Parameter(torch.zeros(ELEMENTS))
    fused = torch.optim.Adam([weight], fused=True)

    def step() -> None:
        times = torch.full((SAMPLES,), 1 / SAMPLES)
        if bounded:
            times *= (1.0 / (values.norm(dim=1) + 1e-6)).clamp(max=1.0)
        weight.grad = times @ values
        fused.step()

    return step


def opacus_steps(values: torch.Tensor) -> Steps:
    """Return Opacus' step without noise, if it is installed."""
    try:
        from opacus.optimizers import DPOptimizer
    except ImportError as error:
        print(f"without Opacus: {error}")
        return {}
    weight = torch.nn.Parameter(torch.zeros(ELEMENTS))
    optimizer = DPOptimizer(
        torch.optim.Adam([weight], fused=True),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=SAMPLES,
    )

    def step() -> None:
        weight.grad_sample = values[:]  # type: ignore[attr-defined]
        weight.summed_grad = None  # type: ignore[attr-defined]
        optimizer.step()

    return {"Opacus": step}


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write all samples there")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    threads.limit_to(1)
    threadpoolctl.threadpool_limits(1)

    machine = describe()
    results: dict[str, dict[str, list[float]]] = {}
    print(f"{machine['processor']['model']}, 1 thread, float32, Adam")
    for rows, columns, count in LAYERS:
        title = f"outer products, {rows} x {columns}, N = {count}"
        results[title] = measure(outer_steps(rows, columns, count), options.rounds)
        print(table(title, results[title]), flush=True)
    for width, layers, batch in NETWORKS:
        title = f"training, {layers} linear layers of {width} x {width}, batch {batch}"
        results[title] = measure(training_steps(width, layers, batch), options.rounds)
        print(table(title, results[title]), flush=True)
    for bounded in (False, True):
        title = f"samples, {SAMPLES} x {ELEMENTS:,}" + (", max_norm" if bounded else "")
        results[title] = measure(sample_steps(bounded=bounded), options.rounds)
        print(table(title, results[title]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "seconds": results}, indent=1))


if __name__ == "__main__":
    main()
