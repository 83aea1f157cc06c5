"""How long the whole step takes, unscale, clip, Adam, average and zero; and with smaller state.

``python bench/whole_step.py [--json FILE] [--only TEXT]`` prints one table for each contest. Peers
take turns, as in `torch_laboratory.py`; ratios are medians of the ratios within the rounds.

The whole step: ours is one call, of ``fusestep.torch`` or with NumPy arrays; torch's are
``_foreach_mul_``, ``clip_grad_norm_``, the fused Adam, ``AveragedModel`` and ``zero_grad``.
Everybody has the same gradients in the same memory; they are written anew, which is not timed,
before each call. That parameters and averages become the same is checked before anything is timed.

Smaller state: a step of our Adam with state of float32, bfloat16 and int8, on each instruction set;
the 8-bit Adams of bitsandbytes and torchao, where they are installed and work on the CPU.

Each part of this runs in a process of its own, whose environment says on how many threads and with
which instruction set.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusestep as fs
import fusestep.torch
import limit
import threads
from company import Patience
from interleave import Budget, measure
from laboratory import _available
from machine import describe
from memory import copies, gradients, zeros
from shapes import WORKLOADS
from torch_laboratory import measure_after

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from interleave import Samples
    from memory import FloatArray
    from shapes import Workload

LR, MAX_NORM, LOSS_SCALE, DECAY = 1e-3, 1.0, 1024.0, 0.999
STEPPED = ("1k", "500x1k", "30M", "gpt2")
WITH_SMALLER_STATE = "30M"
THREADS = (1, 2)
LIMIT = "the limit"
LOOPS = {"float32": "adam", "bfloat16": "adam, bfloat16", "int8": "adam, int8"}  # by state
LARGE = 10**7  # elements; with fewer, calls count more than bytes

# Bytes a parameter, where all are float32. Ours: the gradient is read for the norm; then gradient,
# parameter, two moments and the average are read and written. torch's: gradients unscaled (8), read
# for the norm (4), scaled (8), the step (28), the average (12), gradients cleared (4).
OUR_BYTES, THEIR_BYTES, BYTES_OF_AVERAGE = 44.0, 64.0, {"ours": 8.0, "theirs": 12.0}

TOLERANCE = 1e-3  # of how far parameters and averages have come
LOW_PRECISION_TOLERANCE = 0.1
ARRAYS = 22  # of the parameters' size, that the contenders for a whole step need together

BUDGET = Budget(turn=0.02, min_rounds=7, max_rounds=31, group=10)
PATIENCE = 60  # seconds, in each process, for what others on the machine disturb


# ---- who steps -----------------------------------------------------------------------------------


class Contender(NamedTuple):
    """Somebody who steps.

    Parameters
    ----------
    step
        What is timed.
    nbytes
        Bytes a parameter that it reads and writes; None where that is not known.
    values
        Returns what has moved: parameters and, where there are any, averages. None for a limit.
    limit
        Who reads and writes the same bytes, by name.
    """

    step: Callable[[], object]
    nbytes: float | None = None
    values: Callable[[], list[Any]] | None = None
    limit: str | None = None


Contenders = dict[str, Contender]


def whole_steps(grads: list[FloatArray], decay: float | None) -> Contenders:
    """Return who takes the whole step, by name.

    Parameters
    ----------
    grads
        The gradients, times the loss scale, when a step begins; a step clears them.
    decay
        Of the average; None: no average.
    """
    contenders = {
        "fusestep.torch": our_torch(grads, decay),
        "fusestep, NumPy": our_arrays(grads, decay),
        "torch": their_sequence(grads, decay),
    }
    is_large = sum(grad.size for grad in grads) >= LARGE
    if decay is None or not is_large or limit.why_not():
        return contenders
    limited = {name: contender._replace(limit=LIMIT) for name, contender in contenders.items()}
    return {**limited, LIMIT: whole_limit(grads)}


def our_torch(grads: list[FloatArray], decay: float | None) -> Contender:
    """Return our optimizer for torch."""
    params = parameters(grads)
    optimizer = fusestep.torch.Adam(params, lr=LR, max_norm=MAX_NORM, **average(decay))
    step = partial(optimizer.step, grad_scale=1 / LOSS_SCALE, zero_grad=True)
    return Contender(step, our_bytes(decay), lambda: [*params, *averages_of(optimizer, decay)])


def our_arrays(grads: list[FloatArray], decay: float | None) -> Contender:
    """Return our optimizer over NumPy arrays."""
    params = zeros(grads)
    optimizer = fs.Adam(params, lr=LR, max_norm=MAX_NORM, **average(decay))
    step = partial(optimizer.step, grads, grad_scale=1 / LOSS_SCALE, zero_grad=True)
    return Contender(step, our_bytes(decay), lambda: [*params, *averages_of(optimizer, decay)])


def our_bytes(decay: float | None) -> float:
    """Return the bytes a parameter of our whole step."""
    return OUR_BYTES - (BYTES_OF_AVERAGE["ours"] if decay is None else 0)


def average(decay: float | None) -> dict[str, Any]:
    """Return the option that asks for an average, if one is wanted."""
    return {} if decay is None else {"ema_decay": decay}


def averages_of(optimizer: Any, decay: float | None) -> list[Any]:
    """Return the averages that an optimizer keeps, in the order of its parameters."""
    return [] if decay is None else list(optimizer.averages)


def their_sequence(grads: list[FloatArray], decay: float | None) -> Contender:
    """Return torch's calls, one after the other."""
    params = parameters(grads)
    model = torch.nn.ParameterList(params)
    there = [param.grad for param in params]
    optimizer = torch.optim.Adam(params, lr=LR, fused=True)

    def unscale_clip_step_and_clear() -> None:
        torch._foreach_mul_(there, 1 / LOSS_SCALE)
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    if decay is None:
        nbytes = THEIR_BYTES - BYTES_OF_AVERAGE["theirs"]
        return Contender(unscale_clip_step_and_clear, nbytes, lambda: params)

    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    averaged.update_parameters(model)  # the first call copies; the average begins at the start

    def step() -> None:
        unscale_clip_step_and_clear()
        averaged.update_parameters(model)

    return Contender(step, THEIR_BYTES, lambda: [*params, *averaged.parameters()])


def parameters(grads: Sequence[FloatArray]) -> list[torch.nn.Parameter]:
    """Return parameters of zero, with these gradients."""
    params = [torch.nn.Parameter(torch.from_numpy(array)) for array in zeros(grads)]
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.from_numpy(grad)
    return params


def whole_limit(grads: list[FloatArray]) -> Contender:
    """Return a loop that reads and writes the bytes of a whole step."""
    loop = limit.Loop("whole step", grads)
    norm = limit.Reading(loop.gradient)

    def step() -> None:
        norm()
        loop()

    return Contender(step, OUR_BYTES)


# ---- smaller state -------------------------------------------------------------------------------


def steps_with_state(grads: list[FloatArray]) -> Contenders:
    """Return Adam steps with state of float32 and smaller, ours and others', by name."""
    contenders = {f"fusestep, {dtype}": our_state(grads, dtype) for dtype in LOOPS}
    for name, make in (("bitsandbytes", bitsandbytes_adam), ("torchao", torchao_adam)):
        if reason := why_not(make):
            print(f"  {name} is left out: {reason}")
        else:
            contenders[f"{name} Adam8bit"] = of_torch(make, grads)
    if limit.why_not() is None:
        for dtype, loop in LOOPS.items():
            contenders[f"{LIMIT}, {dtype}"] = Contender(limit.Loop(loop, grads))
    return contenders


def our_state(grads: list[FloatArray], dtype: str) -> Contender:
    """Return our optimizer over NumPy arrays with state of a dtype."""
    params = zeros(grads)
    optimizer = fs.Adam(params, lr=LR, state_dtype=dtype)
    state = sum(value.nbytes for entry in optimizer.state.values() for value in arrays_in(entry))
    elements = sum(param.size for param in params)
    nbytes = 12 + 2 * state / elements  # gradient read, parameter and state read and written
    step = partial(optimizer.step, grads)
    return Contender(step, nbytes, lambda: params, f"{LIMIT}, {dtype}")


def arrays_in(entry: dict[str, Any]) -> Iterator[Any]:
    """Yield the arrays that the state of a parameter has, besides its count of steps."""
    return (value for value in entry.values() if isinstance(value, np.ndarray))


def bitsandbytes_adam(params: Sequence[torch.Tensor]) -> Any:
    """Return the 8-bit Adam of bitsandbytes."""
    import bitsandbytes

    return bitsandbytes.optim.Adam8bit(params, lr=LR)


def torchao_adam(params: Sequence[torch.Tensor]) -> Any:
    """Return the 8-bit Adam of torchao, which compiles its step."""
    import torchao.optim

    return torchao.optim.Adam8bit(params, lr=LR)


def of_torch(make: Callable[[Sequence[torch.Tensor]], Any], grads: list[FloatArray]) -> Contender:
    """Return somebody's optimizer over tensors."""
    params = parameters(grads)
    return Contender(make(params).step, values=lambda: params)


def why_not(make: Callable[[Sequence[torch.Tensor]], Any]) -> str | None:
    """Return None if somebody's optimizer is installed and steps on the CPU, else the reason."""
    small = zeros([np.empty(65_536, np.float32)])
    try:
        of_torch(make, small).step()
    except Exception as error:  # whatever keeps it from working here
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


# ---- how it is measured --------------------------------------------------------------------------


class Contest(NamedTuple):
    """What is compared.

    Parameters
    ----------
    title
        Of its table.
    workload
        What is stepped.
    decay
        Of the average; None: no average.
    """

    title: str
    workload: Workload
    decay: float | None = None


@dataclass(frozen=True)
class Part:
    """What is measured in one process.

    Parameters
    ----------
    is_whole_step
        Whether it is the whole step, or steps with smaller state.
    threads
        For everybody.
    tier
        The instruction set; None: the best one.
    """

    is_whole_step: bool
    threads: int
    tier: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What the process is told."""
        # Unlike FUSESTEP_NUM_THREADS, this leaves steps for torch on torch's threads.
        told = {"OMP_NUM_THREADS": str(self.threads)}
        return told if self.tier is None else {**told, "FUSESTEP_CPU": self.tier}

    def contests(self) -> list[Contest]:
        """Return everything that is compared."""
        where = f"{self.threads} thread" + "s" * (self.threads > 1)
        if not self.is_whole_step:
            title = f"state, {WITH_SMALLER_STATE}, {where}, {self.tier}"
            return [Contest(title, WORKLOADS[WITH_SMALLER_STATE])]
        return [
            Contest(f"{what}, {name}, {where}", WORKLOADS[name], decay)
            for name in STEPPED
            for what, decay in (("whole step", DECAY), ("without average", None))
        ]


class Outcome(NamedTuple):
    """What was measured of one contest.

    Parameters
    ----------
    title
        Of the contest.
    elements
        Of all parameters.
    seconds
        Of a step, by contender, one number a round.
    nbytes
        Bytes a parameter, by contender, where that is known.
    limits
        The name of the limit of each contender that has one.
    """

    title: str
    elements: int
    seconds: dict[str, list[float]]
    nbytes: dict[str, float]
    limits: dict[str, str]

    def ratio(self, name: str, other: str) -> float:
        """Return how many times longer one contender takes than another, within the rounds."""
        both = zip(self.seconds[name], self.seconds[other], strict=False)
        return statistics.median(a / b for a, b in both)


def in_a_process(part: Part, only: str) -> list[Outcome]:
    """Return what a new process has measured of those contests whose titles contain `only`."""
    before = dict(os.environ)
    os.environ.update(part.environment)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return process.submit(measured, part, only).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def measured(part: Part, only: str) -> list[Outcome]:
    """Return what was measured of those contests of a part whose titles contain `only`."""
    threads.bind_to(part.threads)
    patience = Patience(PATIENCE)
    measure_contest = measure_whole_steps if part.is_whole_step else measure_smaller_state
    outcomes = []
    for contest in part.contests():
        if only not in contest.title:
            continue
        if reason := no_room(contest.workload):
            print(f"{contest.title}\n  left out: {reason}", flush=True)
            continue
        outcomes.append(measure_contest(contest, patience))
        print(table(outcomes[-1]), flush=True)
        gc.collect()  # gigabytes, before the next ones
    return outcomes


def no_room(workload: Workload) -> str | None:
    """Return None if there is memory for everybody, else the reason."""
    needed, available = 4 * ARRAYS * workload.elements, _available()
    if available is None or needed < available:
        return None
    return f"not enough memory: needs {needed / 1e9:.1f} of {available / 1e9:.1f} GB"


def measure_whole_steps(contest: Contest, patience: Patience) -> Outcome:
    """Measure the whole step, each time right after the gradients were written."""
    source = gradients(contest.workload)
    for gradient in source:
        gradient *= np.float32(LOSS_SCALE)
    grads = copies(source)

    def write_gradients() -> None:
        for grad, values in zip(grads, source, strict=True):
            np.copyto(grad, values)

    contenders = whole_steps(grads, contest.decay)
    check(contenders, write_gradients)
    calls = max(5, min(200, 2_000_000 // contest.workload.elements))
    steps = {name: contender.step for name, contender in contenders.items()}
    samples = measure_after(write_gradients, steps, BUDGET, patience, calls)
    return outcome_of(contest, contenders, samples)


def measure_smaller_state(contest: Contest, patience: Patience) -> Outcome:
    """Measure steps with state of several dtypes; gradients stay."""
    contenders = steps_with_state(gradients(contest.workload))
    check(contenders, lambda: None, LOW_PRECISION_TOLERANCE)
    steps = {name: contender.step for name, contender in contenders.items()}
    return outcome_of(contest, contenders, measure(steps, BUDGET, patience))


def outcome_of(contest: Contest, contenders: Contenders, samples: dict[str, Samples]) -> Outcome:
    """Return what was measured, without what it was measured of."""
    return Outcome(
        contest.title,
        contest.workload.elements,
        {name: samples[name].seconds for name in contenders},
        {name: c.nbytes for name, c in contenders.items() if c.nbytes is not None},
        {name: c.limit for name, c in contenders.items() if c.limit in contenders},
    )


def check(contenders: Contenders, before: Callable[[], None], tolerance: float = TOLERANCE) -> None:
    """Raise where three steps, from zero, do not lead everybody to the same numbers."""
    for _ in range(3):
        for contender in contenders.values():
            before()
            contender.step()
    found = {name: contender.values() for name, contender in contenders.items() if contender.values}
    first, *_ = found.values()
    for name, values in found.items():
        for a, b in zip(first, values, strict=True):
            expected, given = as_array(a), as_array(b)
            difference = distance(expected, given) / distance(expected, np.zeros_like(expected))
            if not difference < tolerance:
                raise AssertionError(f"{name} computes something else: it is {difference:.1e} off")


def as_array(value: Any) -> FloatArray:
    """Return an array of NumPy's over the memory of an array or a tensor."""
    return value.detach().numpy() if isinstance(value, torch.Tensor) else value


def distance(a: FloatArray, b: FloatArray) -> float:
    """Return the L2 norm of the difference."""
    return math.sqrt(float(np.square(a - b).sum(dtype=np.float64)))


# ---- what came out -------------------------------------------------------------------------------


def table(outcome: Outcome) -> str:
    """Return medians, ratios to the first and, of large steps, bytes a parameter and speed."""
    first = next(iter(outcome.seconds))
    lines = [
        f"{outcome.title:<40}{'median':>13}{'ratio':>9}{'bytes':>9}{'GB/s':>8}{'of limit':>10}"
    ]
    for name, samples in outcome.seconds.items():
        median = statistics.median(samples)
        line = f"  {name:<36}{median * 1e6:>12,.1f} µs{outcome.ratio(name, first):>8.2f}x"
        if outcome.elements >= LARGE and name in outcome.nbytes:
            nbytes = outcome.nbytes[name]
            line += f"{nbytes:>9.1f}{nbytes * outcome.elements / median / 1e9:>8.1f}"
            if name in outcome.limits:
                line += f"{outcome.ratio(outcome.limits[name], name):>10.2f}"
        lines.append(line)
    return "\n".join(lines)


def parts() -> list[Part]:
    """Return everything that is measured."""
    counts = [count for count in THREADS if threads.possible(count)]
    tiers = fs.show_config("dicts")["instruction sets"]["available"]
    whole = [Part(True, count) for count in counts]
    state = [Part(False, count, tier) for tier in tiers if tier != "base" for count in counts]
    return whole + state


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write all samples there")
    parser.add_argument("--only", default="", help="contests whose titles contain this")
    options = parser.parse_args()

    machine = describe()
    print(f"{machine['processor']['model']}, float32, Adam")
    outcomes = [outcome for part in parts() for outcome in in_a_process(part, options.only)]
    if options.json:
        contests = [outcome._asdict() for outcome in outcomes]
        options.json.write_text(json.dumps({"machine": machine, "contests": contests}, indent=1))


if __name__ == "__main__":
    main()
