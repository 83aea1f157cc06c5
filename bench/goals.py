"""The numbers to beat, and whether they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from results import three_digits

if TYPE_CHECKING:
    from results import Ratio, Results


@dataclass(frozen=True)
class Outcome:
    """One line of the table of goals.

    Parameters
    ----------
    work, goal, measured
        What, how much it should be, how much it is.
    verdict
        "met", "NOT met", either of them "within noise" where the goal lies between the quartiles,
        or nothing where nothing was measured.
    """

    work: str
    goal: str
    measured: str
    verdict: str


# rule, workload, threads, peer, how many times faster
_RATIOS = (
    ("adam", "500x1k", 1, "torch fused", 10.0),
    ("adam", "500x1k", 2, "torch fused", 10.0),
    ("adam", "100k", 1, "torch fused", 3.5),
    ("adam", "1M", 1, "torch fused", 2.3),
    ("adam", "1M", 1, "numpy", 40.0),
    ("adam", "1M", 2, "numpy", 40.0),
)
_LIMIT = (("adam", "30M", 2), 0.97)

# task for fusestep.torch, threads, peer, how many times faster
_TASKS = (
    ("adam 1k", 1, "torch fused", 15.0),
    ("adam 1k", 2, "torch fused", 15.0),
    ("adam 500x1k", 2, "torch fused", 10.0),
    ("adam gpt2", 1, "torch fused", 1.0),
    ("adam gpt2", 2, "torch fused", 1.0),
    ("online mlp 64-32-10", 1, "torch fused", 1.6),
    ("online mlp 64-32-10", 2, "torch fused", 1.6),
    ("online mlp 64-32-10", 1, "torch", 2.5),
    ("online mlp 64-32-10", 2, "torch", 2.5),
)

# group, what it is, unit, its seconds, at most so many
_TIMES = (
    ("call", "opt.step([g]), Adam, 1 x 1,000", "µs", 1e-6, 1.5),
    ("import", "import fusestep, beyond NumPy's", "ms", 1e-3, 100.0),
)


def outcomes(results: Results) -> list[Outcome]:
    """Compare what was measured with what is asked.

    The first number of a ratio is the median over the rounds, those in brackets are the quartiles.
    """
    arrays = _of_arrays(results) if results.groups or results.others else []
    return arrays + (_of_torch(results) if results.tasks else [])


def _of_arrays(results: Results) -> list[Outcome]:
    lines = [_limit(results)]
    for rule, workload, threads, peer, goal in _RATIOS:
        ratio = results.ratio((rule, workload, threads), peer, "fusestep")
        work = f"{rule} {workload}, {_threads(threads)}"
        lines.append(_at_least(f"{work}: faster than {peer}", goal, "x", ratio))
    for group, work, unit, seconds, goal in _TIMES:
        entry = results.others.get(group)
        measured = entry.median / seconds if entry else None
        text = "not measured" if measured is None else f"{three_digits(measured)} {unit}"
        verdict = "" if measured is None else _verdict(measured < goal)
        lines.append(Outcome(work, f"< {goal:g} {unit}", text, verdict))
    return lines


def _of_torch(results: Results) -> list[Outcome]:
    lines = []
    for task, threads, peer, goal in _TASKS:
        ratio = results.ratio((task, threads), peer, "fusestep")
        work = f"{task}, {_threads(threads)}: faster than {peer}"
        lines.append(_at_least(f"fusestep.torch, {work}", goal, "x", ratio))
    return lines


def _threads(count: int) -> str:
    return f"{count} thread" + "s" * (count > 1)


def _limit(results: Results) -> Outcome:
    key, goal = _LIMIT
    ratio = results.ratio(key, "limit", "fusestep")
    return _at_least(f"{key[0]} {key[1]}, {key[2]} threads: share of the limit", goal, "", ratio)


def _at_least(work: str, goal: float, sign: str, ratio: Ratio | None) -> Outcome:
    if ratio is None:
        return Outcome(work, f"≥ {goal:g}{sign}", "not measured", "")
    spread = f"{three_digits(ratio.low)} to {three_digits(ratio.high)}"
    measured = f"{ratio.value:.4g}{sign} ({spread})"  # a digit more than the goal has
    verdict = _verdict(ratio.value >= goal, ratio.low < goal <= ratio.high)
    return Outcome(work, f"≥ {goal:g}{sign}", measured, verdict)


def _verdict(met: bool, noise: bool = False) -> str:
    return ("met" if met else "NOT met") + ", within noise" * noise
