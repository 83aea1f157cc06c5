"""rows='exact': steps with Rows mean what dense ones would, with zeros for all other rows."""

from __future__ import annotations

import copy
import functools
import hashlib
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
from concurrency import in_threads
from conftest import AVAILABLE
from fusestep import _cpu
from rules import PLAIN, ROWWISE, RULES, Rule
from test_bits import LAYOUTS
from test_rows import everything
from test_state import _edit as edited

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

f32, f64 = np.float32, np.float64

BLOCK = 256  # steps; see csrc/rules/row_history.h
MOST_STEPS = BLOCK**2

# Rules that must make up for steps one by one, with weight decay among the gradients.
REPLAYED = [
    rule
    for rule in RULES
    if rule.options.get("weight_decay") and rule.cls in (fs.Adam, fs.NAdam, fs.Adagrad)
    if not rule.options.get("decoupled_weight_decay")
]


# ---- an optimizer, and another that is given the zeros ------------------------------------------


def assert_close(
    exact: np.ndarray,
    dense: np.ndarray,
    truth: np.ndarray | None = None,
    *,
    relative: float = 1e-6,
    floor: float = 0.0,
) -> None:
    """In float64 as the dense run; in others as far from the truth as that, give or take.

    Relative to the largest value there, or to `floor` if that is larger.
    """
    finite = np.isfinite(dense.astype(f64))
    np.testing.assert_array_equal(exact[~finite], dense[~finite])
    exact, dense = exact[finite].astype(f64), dense[finite].astype(f64)
    truth = dense if truth is None else truth[finite]
    largest = max(np.abs(truth).max(initial=0), floor)
    allowed = relative * largest + 2 * np.abs(dense - truth).max(initial=0)
    error = np.abs(exact - truth).max(initial=0)
    assert error <= allowed, f"{error} from the truth, {allowed} allowed, of {largest}"


class Twins:
    """One table, and a copy of it that a dense optimizer moves; in float64 for the truth, too."""

    def __init__(self, cls: type[fs.Optimizer], start: np.ndarray, **options: Any) -> None:
        self.w, self.dense_w, self.true_w = start.copy(), start.copy(), start.astype(f64)
        self.opt = cls([self.w], rows="exact", **options)
        self.dense = cls([self.dense_w], **options)
        self.truth = cls([self.true_w], **options) if start.dtype != f64 else None

    @property
    def optimizers(self) -> list[fs.Optimizer]:
        return [opt for opt in (self.opt, self.dense, self.truth) if opt]

    def _densely(self, gradient: np.ndarray, arguments: dict[str, Any]) -> None:
        self.dense.step([gradient], **arguments)
        if self.truth:
            self.truth.step([gradient.astype(f64)], **arguments)

    def step(
        self, indices: Any, values: np.ndarray, full: np.ndarray | None = None, **arguments: Any
    ) -> None:
        """A step of some rows; `full` is the whole gradient, if it is at hand."""
        self.opt.step([fs.Rows(indices, values)], **arguments)
        self._densely(scattered(self.w, indices, values) if full is None else full, arguments)

    def dense_step(self, gradient: np.ndarray, **arguments: Any) -> None:
        self.opt.step([gradient], **arguments)
        self._densely(gradient, arguments)

    def none_step(self) -> None:
        for opt in self.optimizers:
            opt.step([None])

    def idle(self, steps: int, **arguments: Any) -> None:
        """Steps that list no row."""
        nothing = np.zeros((0, *self.w.shape[1:]), self.w.dtype)
        zeros = np.zeros_like(self.w)
        for _ in range(steps):
            self.step(np.zeros(0, np.int64), nothing, zeros, **arguments)

    def assign(self, **hyperparameters: Any) -> None:
        for opt in self.optimizers:
            for name, value in hyperparameters.items():
                setattr(opt, name, value)

    def check(self, rows: Any = slice(None), **tolerance: float) -> None:
        """Compare rows that are up to date."""
        truth = self.true_w[rows] if self.truth else None
        assert_close(self.w[rows], self.dense_w[rows], truth, **with_dtype(self.w, tolerance))

    def check_state(self, relative: float = 1e-9, floor: float = 0.0) -> None:
        for name, exact in arrays_of(self.opt).items():
            dense = self.dense.state[0][name]
            largest = np.abs(dense).max(initial=floor)
            np.testing.assert_allclose(exact, dense, rtol=relative, atol=relative * largest)
        for name in ("step", "mu_product"):
            assert self.opt.state[0].get(name) == self.dense.state[0].get(name)
        assert self.opt.steps == self.dense.steps
        assert self.opt.skipped_steps == self.dense.skipped_steps


def with_dtype(array: np.ndarray, tolerance: dict[str, float]) -> dict[str, float]:
    """Of float32, 2e-6 beside the dense run's own error, whatever is asked of float64."""
    return {**tolerance, "relative": 2e-6} if array.dtype != f64 else tolerance


def scattered(like: np.ndarray, indices: Any, values: np.ndarray) -> np.ndarray:
    """The same gradient as an array."""
    full = np.zeros(like.shape, values.dtype)
    np.add.at(full, np.asarray(indices, np.int64), values)
    return full


def arrays_of(opt: fs.Optimizer, key: Any = 0) -> dict[str, np.ndarray]:
    return {name: value for name, value in opt.state[key].items() if np.ndim(value)}


def is_behind(opt: fs.Optimizer, key: Any = 0) -> bool:
    entry = opt.state_dict()["state"][key]
    assert ("missed_steps" in entry) == ("recent_steps" in entry)
    return "missed_steps" in entry


def often_and_rarely(rng: np.random.Generator, rows: int, steps: int) -> Iterator[np.ndarray]:
    """The rows of each step: the first in most, others in few, the last in none; some twice."""
    share = 0.8 * 10.0 ** -np.linspace(0, 3.5, rows)
    share[-1] = 0
    for _ in range(steps):
        [listed] = np.nonzero(rng.random(rows) < share)
        yield np.append(listed, listed[:1]) if rng.random() < 0.2 else listed


def schedule(peak: float) -> Callable[[int], float]:
    """Nothing, then more and more, then less and less."""
    return lambda step: peak * min(1.0, step / 20) * 0.998**step


# ---- every rule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [f64, f32])
def test_a_thousand_steps(rule: Rule, dtype: type, rng: np.random.Generator) -> None:
    """As the paper's formulas do with the zeros; and rows that are caught up can be read."""
    peak = rule.options["lr"]
    lr = schedule(peak)
    start = rng.standard_normal((40, 3)).astype(dtype)
    twins = Twins(rule.cls, start, **{**rule.options, "lr": lr})
    w, state = start.astype(f64), {}
    for step, rows in enumerate(often_and_rarely(rng, len(start), 1000)):
        values = rng.standard_normal((len(rows), 3)).astype(dtype)
        full = scattered(start, rows, values)
        if step % 40 == 39:
            twins.opt.catch_up([rows])
            truth = w[rows] if dtype == f32 else None
            assert_close(twins.w[rows], twins.dense_w[rows], truth, relative=1e-5, floor=1)
        rate = {"lr": peak / 3} if step % 7 == 3 else {}
        twins.step(rows, values, full, **rate)
        options = {**rule.options, "lr": rate.get("lr", lr(step))}
        w = rule.reference(w, full.astype(f64), state, **options)

    assert is_behind(twins.opt)
    twins.opt.flush()
    assert not is_behind(twins.opt)
    twins.check(relative=1e-8)
    assert_close(twins.w, twins.dense_w, w, **with_dtype(start, {"relative": 1e-8}))
    twins.check_state(1e-9 if dtype == f64 else 2e-4)
    assert twins.opt.state[0]["step"] == twins.opt.steps == 1000


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [f64, f32])
def test_rows_that_miss_nothing_are_a_dense_run(
    rule: Rule, dtype: type, rng: np.random.Generator
) -> None:
    """Bit for bit, where all rows are listed in every step."""
    twins = Twins(rule.cls, rng.standard_normal((5, 3)).astype(dtype), **rule.options)
    for _ in range(50):
        twins.step(rng.permutation(5), rng.standard_normal((5, 3)).astype(dtype))
        assert not is_behind(twins.opt)
    before = everything(twins.opt)
    twins.opt.flush()
    assert everything(twins.opt) == before == everything(twins.dense)


@pytest.mark.parametrize("rule", REPLAYED, ids=str)
@pytest.mark.parametrize("dtype", [f64, f32])
@pytest.mark.parametrize("maximize", [False, True])
def test_steps_made_up_for_one_by_one_are_a_dense_run(
    rule: Rule, dtype: type, maximize: bool, rng: np.random.Generator
) -> None:
    """Bit for bit, where the rule itself takes the missed steps."""
    start = rng.standard_normal((20, 3)).astype(dtype)
    options = {**rule.options, "lr": schedule(rule.options["lr"])}
    twins = Twins(rule.cls, start, maximize=maximize, **options)
    for rows in often_and_rarely(rng, len(start), 600):
        twins.step(rows, rng.standard_normal((len(rows), 3)).astype(dtype))
    twins.opt.flush()
    assert everything(twins.opt) == everything(twins.dense)


GAPS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 3000)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("listed", [True, False])
def test_gaps_around_blocks(rule: Rule, listed: bool, rng: np.random.Generator) -> None:
    """A row that has missed so many steps, wherever they begin, has missed nothing in the end."""
    begin = [*rng.integers(0, 600, len(GAPS)), *range(BLOCK - 4, BLOCK + 4)]
    gaps = [*GAPS, *GAPS]
    due = [int(at) + gap for at, gap in zip(begin, gaps, strict=True)]
    twins = Twins(rule.cls, rng.standard_normal((len(gaps) + 1, 2)), **rule.options)
    for step in range(max(due) + 1):
        rows = [row for row, at in enumerate(begin) if at == step]
        ready = [row for row, at in enumerate(due) if at == step]
        rate = rule.options["lr"] * rng.random()
        if listed:  # the step that lists it makes up for the others first
            rows = sorted({*rows, *ready})
        elif ready:
            twins.opt.catch_up([ready])
            twins.check(ready, relative=1e-9, floor=1)
        twins.step(np.array(rows, np.int64), rng.standard_normal((len(rows), 2)), lr=rate)
        if listed and ready:
            twins.check(ready, relative=1e-9, floor=1)
    twins.opt.flush()
    twins.check(relative=1e-9)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_steps_of_every_kind(rule: Rule, rng: np.random.Generator) -> None:
    """Dense, of rows, of no rows, without this parameter; scaled, clipped, clearing gradients."""
    start = rng.standard_normal((12, 3))
    twins = Twins(rule.cls, start, max_norm=2.0, maximize=True, **rule.options)
    for _ in range(400):
        kind = rng.choice(["rows", "idle", "dense", "none"], p=[0.6, 0.3, 0.03, 0.07])
        arguments = {"grad_scale": float(rng.choice([1.0, -1.0, 1 / 128, 3.0]))}
        if kind == "rows":
            rows = rng.integers(0, 11, rng.integers(1, 5))
            values = rng.standard_normal((len(rows), 3))
            full = scattered(twins.w, rows, values)
            twins.step(rows, values, full, zero_grad=True, **arguments)
            assert not values.any()
        elif kind == "idle":
            twins.idle(int(rng.integers(1, 20)), **arguments)
        elif kind == "dense":
            twins.dense_step(rng.standard_normal(twins.w.shape), **arguments)
            assert not is_behind(twins.opt)
            twins.check(relative=1e-8)
        else:
            before = twins.opt.state[0]["step"]
            twins.none_step()
            assert twins.opt.state[0]["step"] == before
    twins.opt.flush()
    twins.check(relative=1e-8)
    twins.check_state()


ASSIGNED: dict[str, list[Any]] = {
    "lr": [0.0, 1e-3, 0.02, 0.3],
    "weight_decay": [0.0, 0.0, 0.01, 1.0, 4.0],
    "betas": [(0.9, 0.999), (0.0, 0.9), (0.5, 0.5), (0.99, 0.9), (0.9, 0.99999)],
    "eps": [1e-8, 1e-3],
    "momentum": [0.5, 0.9, 0.99],
    "dampening": [0.0, 0.3, 1.0],
    "nesterov": [True, False],
    "momentum_decay": [0.0, 4e-3, 0.5],
    "lr_decay": [0.0, 0.01],
    "decoupled_weight_decay": [True, False],
    "maximize": [True, False],
    "max_norm": [None, 0.5, 10.0],
}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_hyperparameters_that_are_assigned(rule: Rule, seed: int) -> None:
    """A missed step is made up for with what held when it was taken."""
    rng = np.random.default_rng(seed)
    twins = Twins(rule.cls, rng.standard_normal((16, 2)), **rule.options)
    names = [name for name in ASSIGNED if hasattr(type(twins.opt), name)]
    for step, rows in enumerate(often_and_rarely(rng, len(twins.w), 1000)):
        if step % 31 == 0:
            name = names[rng.integers(len(names))]
            change = {name: ASSIGNED[name][rng.integers(len(ASSIGNED[name]))]}
            try:
                twins.assign(**change)
            except ValueError:  # not together with the others, or not for this optimizer
                continue
        twins.step(rows, rng.standard_normal((len(rows), 2)))
    twins.opt.flush()
    for row in range(len(twins.w)):
        twins.check([row], relative=1e-6, floor=1)


# ---- Adam's moments: scales, eps, betas, weight decay -------------------------------------------

SCALES = (1.0, 1e-6, 1e-9, 0.0, 1e4)
STEPS = 1000
GROUP = 6  # rows of a scale that start from zero, or from 1
GROUPS = [(scale, start) for scale in SCALES for start in (0.0, 1.0)]


@functools.cache
def steps_of_all_scales(dtype: type) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows, values and whole gradients: of each group some are hot, some rare, one is never met."""
    rng = np.random.default_rng(7)
    share = np.tile([0.4, 0.05, 0.01, 0.003, 0.0, 0.0], len(GROUPS))
    scale = np.repeat([scale for scale, _ in GROUPS], GROUP)
    like = np.zeros((len(share), 2), dtype)
    steps = []
    for step in range(STEPS):
        listed = rng.random(len(share)) < share
        listed[4::GROUP] = step == 0  # once, and never again
        [rows] = np.nonzero(listed)
        values = (scale[rows, None] * rng.standard_normal((len(rows), 2))).astype(dtype)
        steps.append((rows, values, scattered(like, rows, values)))
    return steps


def go_through_all_scales(cls: type[fs.Optimizer], dtype: type, **options: Any) -> None:
    """A thousand steps of it, and every group is as precise as if it were a table by itself."""
    start = np.repeat([start for _, start in GROUPS], GROUP).astype(dtype)
    twins = Twins(cls, np.stack([start, -start], axis=1), **options)
    without_eps = options.get("eps") == 0
    if without_eps:  # 0 / 0 where there has been no gradient at all
        first = np.repeat([scale or 1.0 for scale, _ in GROUPS], GROUP)
        twins.dense_step(np.stack([first, -first], axis=1).astype(dtype))
    most = np.abs(twins.true_w)
    for rows, values, full in steps_of_all_scales(dtype):
        twins.step(rows, values, full)
        np.maximum(most, np.abs(twins.true_w if twins.truth else twins.dense_w), out=most)
    twins.opt.flush()
    for i, (scale, _) in enumerate(GROUPS):
        if without_eps and scale == 0:  # 0 / 0 again, once v has underflowed
            continue
        group = slice(i * GROUP, (i + 1) * GROUP)
        twins.check(group, floor=most[group].max())  # what decays leaves errors of what it was


BETAS = [(0.9, 0.999), (0.0, 0.9), (0.9, 0.0), (0.5, 0.5), (0.99, 0.9), (0.9, 0.99999), (0.3, 0.9)]
WITH_MOMENTS: list[tuple[type[fs.Optimizer], dict[str, Any]]] = [
    (fs.Adam, {}),
    (fs.Adam, {"amsgrad": True}),
    (fs.Adam, {"weight_decay": 0.1}),
    (fs.AdamW, {"weight_decay": 30.0}),  # with lr: 0.3
    (fs.AdamW, {"weight_decay": 150.0}),  # with lr: 1.5
    (fs.AdamW, {"weight_decay": 150.0, "amsgrad": True}),
    (fs.NAdam, {}),
    (fs.NAdam, {"weight_decay": 100.0, "decoupled_weight_decay": True}),
]


@pytest.mark.parametrize(
    ("cls", "options"), WITH_MOMENTS, ids=[f"{c.__name__}-{o}" for c, o in WITH_MOMENTS]
)
@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("eps", [1e-8, 1e-3, 0.0, 1e-15])
@pytest.mark.parametrize("dtype", [f64, f32])
def test_scales_eps_and_betas(
    cls: type[fs.Optimizer],
    options: dict[str, Any],
    betas: tuple[float, float],
    eps: float,
    dtype: type,
) -> None:
    """In closed form or step by step: nobody can tell."""
    go_through_all_scales(cls, dtype, lr=0.01, betas=betas, eps=eps, **options)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("dampening", [0.0, 0.3, 1.0, "nesterov"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1, 10.0, 12.0])
@pytest.mark.parametrize("dtype", [f64, f32])
def test_sgd_with_everything(
    momentum: float, dampening: float | str, weight_decay: float, dtype: type
) -> None:
    """Up to a decay of 1.2 times the weight, where it changes its sign in every step."""
    nesterov = dampening == "nesterov"
    if nesterov and not momentum:
        pytest.skip("needs momentum")
    options = {"nesterov": True} if nesterov else {"dampening": dampening}
    go_through_all_scales(
        fs.SGD, dtype, lr=0.1, momentum=momentum, weight_decay=weight_decay, **options
    )


@pytest.mark.parametrize("decay", [0.5, 1.0, 1.2, 1.5, 1.9])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.5), (0.1, 0.9), (0.6, 0.9)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 100])
def test_decay_of_more_than_the_weight(
    decay: float, betas: tuple[float, float], steps: int
) -> None:
    """lr * weight_decay above 1 turns what has been added so far around, step after step."""
    scales = 10.0 ** np.arange(-10, 1.1, 0.25)[:, None]
    twins = Twins(
        fs.AdamW, np.zeros_like(scales), lr=0.1, weight_decay=decay / 0.1, betas=betas, eps=1e-3
    )
    twins.dense_step(scales)
    twins.idle(steps)
    twins.opt.flush()
    for row in range(len(scales)):
        assert_close(twins.w[row], twins.dense_w[row], floor=1e-9)


RATES: dict[str, list[float]] = {
    "few": [0.01] * 7,
    "constant": [0.01] * 200,
    "growing": [1e-6 * 1.2**i for i in range(60)],
    "falling": [0.9**i for i in range(100)],
    "by turns": [0.01, 0.0] * 50,
    "all at the end": [0.0] * 40 + [0.01],
}


@pytest.mark.parametrize("betas", [*BETAS, (0.95, 0.95), (0.7, 0.7), (0.2, 0.3)], ids=str)
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize(
    ("cls", "options"), [(fs.Adam, {}), (fs.Adam, {"amsgrad": True}), (fs.NAdam, {})]
)
def test_closed_form_where_it_just_suits(
    cls: type[fs.Optimizer], options: dict[str, Any], betas: tuple[float, float], rates: str
) -> None:
    """Gradients of all sizes beside eps, so that some rows are on the border of closed form."""
    scales = 10.0 ** np.arange(-9, 4.1, 0.05)[:, None]
    twins = Twins(cls, np.zeros_like(scales), betas=betas, eps=1e-6, lr=0.01, **options)
    twins.dense_step(scales)
    for lr in RATES[rates]:
        twins.idle(1, lr=lr)
    twins.opt.flush()
    np.testing.assert_allclose(twins.w, twins.dense_w, rtol=1e-6)


def test_eps_that_is_assigned_meanwhile() -> None:
    """The last missed steps have a denominator that is far from that of the first."""
    scales = 10.0 ** np.arange(-9, 4.1, 0.05)[:, None]
    for steps in (5, 50, 150, 250):
        twins = Twins(fs.Adam, np.zeros_like(scales))
        twins.dense_step(scales)
        twins.idle(steps)
        twins.assign(eps=1e-3)
        twins.idle(100)
        twins.opt.flush()
        np.testing.assert_allclose(twins.w, twins.dense_w, rtol=1e-6)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.9, 0.0)], ids=str)
@pytest.mark.parametrize("cls", [fs.Adam, fs.NAdam])
def test_without_eps_rows_that_have_had_no_gradient_rest(
    cls: type[fs.Optimizer], betas: tuple[float, float]
) -> None:
    """A dense step would divide their 0 by 0."""
    w = np.ones((3, 2))
    opt = cls([w], eps=0.0, betas=betas, rows="exact")
    for _ in range(300):
        opt.step([fs.Rows([1], np.ones((1, 2)))])
    opt.flush()
    np.testing.assert_array_equal(w[[0, 2]], 1)


# ---- numbers at the ends of their range ---------------------------------------------------------


@pytest.mark.parametrize("rule", [r for r in RULES if r not in REPLAYED], ids=str)
@pytest.mark.parametrize("dtype", [f64, f32])
def test_infinite_weights_stay_what_they_would(rule: Rule, dtype: type) -> None:
    """A masked logit, say: without decay it is at rest, and 0 * inf must not appear."""
    start = np.ones((6, 2), dtype)
    start[1], start[2, 0], start[3, 1] = -np.inf, np.inf, np.nan
    twins = Twins(rule.cls, start, **rule.options)
    twins.step([1, 2, 4], np.ones((3, 2), dtype))
    for _ in range(300):
        twins.step([5], np.ones((1, 2), dtype))
    twins.opt.flush()
    for exact, dense in ((twins.w, twins.dense_w), *pairs_of_state(twins)):
        np.testing.assert_allclose(exact, dense, rtol=1e-3)


def pairs_of_state(twins: Twins) -> list[tuple[np.ndarray, np.ndarray]]:
    dense = arrays_of(twins.dense)
    return [(exact, dense[name]) for name, exact in arrays_of(twins.opt).items()]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite(rule: Rule, bad: float) -> None:
    """It spoils its own row as in a dense run, and no other."""
    twins = Twins(rule.cls, np.ones((6, 2)), **rule.options)
    values = np.ones((3, 2))
    values[1, 0] = bad
    with np.errstate(all="ignore"):
        twins.step([1, 2, 4], values)
        for row in [*[5] * 300, 2, *[5] * 300]:
            twins.step([row], np.ones((1, 2)))
        twins.opt.flush()
    np.testing.assert_allclose(twins.w, twins.dense_w, rtol=1e-8, atol=1e-12)
    assert not np.isfinite(twins.w[2, 0])
    assert np.isfinite(np.delete(twins.w.ravel(), 4)).all()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_state_that_is_not_finite(rule: Rule, bad: float) -> None:
    """Whatever the state holds, the weights become what they would in a dense run."""
    for name in rule.states:
        twins = Twins(rule.cls, np.ones((6, 2)), **rule.options)
        twins.dense_step(np.ones((6, 2)))
        spoilt = {name, "max_exp_avg_sq"} if name == "exp_avg_sq" else {name}
        for opt in twins.optimizers:
            for state in spoilt.intersection(rule.states):
                opt.state[0][state][2, 0] = bad
        for row in [*[5] * 20, 2, *[5] * 300]:
            twins.step([row], np.ones((1, 2)))
        twins.opt.flush()
        np.testing.assert_allclose(twins.w, twins.dense_w, rtol=1e-8, atol=1e-12, err_msg=name)
        for exact, dense in pairs_of_state(twins):
            np.testing.assert_array_equal(np.isfinite(exact), np.isfinite(dense))


@pytest.mark.parametrize(("dtype", "huge"), [(f32, 1e22), (f64, 1e200)])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.5), (0.9, 0.0)], ids=str)
@pytest.mark.parametrize("cls", [fs.Adam, fs.AdamW, fs.NAdam])
def test_squares_that_overflow(
    cls: type[fs.Optimizer], betas: tuple[float, float], dtype: type, huge: float
) -> None:
    """v is infinite then, and stays so, and the weight stands still; NaN never comes up."""
    twins = Twins(cls, np.ones((3, 2), dtype), lr=0.01, betas=betas)
    twins.step([0, 1], np.array([[huge, -huge], [1, 1]], dtype))
    twins.idle(1200)  # 0.5 to this power is 0
    twins.step([0], np.ones((1, 2), dtype))
    twins.opt.flush()
    for exact, dense in ((twins.w, twins.dense_w), *pairs_of_state(twins)):
        np.testing.assert_allclose(exact, dense, rtol=1e-3, atol=1e-30)
    assert np.isfinite(twins.w).all()


@pytest.mark.parametrize(("dtype", "tiny"), [(f32, 1e-30), (f64, 1e-200)])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.9, 0.0), (0.99, 0.9)], ids=str)
@pytest.mark.parametrize("eps", [1e-8, 1e-30])
@pytest.mark.parametrize("lr", [0.01, 0.0])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_squares_that_underflow(
    dtype: type, tiny: float, betas: tuple[float, float], eps: float, lr: float, amsgrad: bool
) -> None:
    """v is 0 where m is not: only eps is left to divide by."""
    start = np.zeros((3, 2), dtype)
    twins = Twins(fs.Adam, start, lr=lr, betas=betas, eps=eps, amsgrad=amsgrad)
    twins.step([0, 1], np.array([[tiny, -tiny], [1, 1]], dtype))
    twins.idle(300)
    twins.opt.flush()
    np.testing.assert_allclose(twins.w, twins.dense_w, rtol=1e-3, atol=1e-30)


def test_denormal_gradients_and_weights() -> None:
    for cls, dtype in ((fs.Adam, f32), (fs.SGD, f32), (fs.Adam, f64)):
        tiny = float(np.finfo(dtype).smallest_subnormal)
        twins = Twins(cls, np.full((3, 2), 5 * tiny, dtype))
        twins.step([0], np.full((1, 2), 7 * tiny, dtype))
        twins.idle(600)
        twins.opt.flush()
        np.testing.assert_allclose(twins.w, twins.dense_w, rtol=1e-3, atol=1e-30)


# ---- steps that do not count --------------------------------------------------------------------


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("dense", [True, False])
def test_steps_that_are_left_out_are_not_missed(
    rule: Rule, dense: bool, rng: np.random.Generator
) -> None:
    """skip_nonfinite: no row ages."""
    twins = Twins(rule.cls, rng.standard_normal((6, 2)), skip_nonfinite=True, **rule.options)
    for step in range(300):
        rows = rng.integers(0, 5, 2)
        values = rng.standard_normal((2, 2))
        if step % 3 == 2:
            values[rng.integers(2), 0] = rng.choice([np.nan, np.inf, -np.inf])
            missed = missed_steps(twins.opt)
            if dense:
                twins.dense_step(scattered(twins.w, rows, values))
            else:
                before = everything(twins.opt)
                twins.step(rows, values)
                before["skipped_steps"] += 1
                assert everything(twins.opt) == before
                assert missed_steps(twins.opt) == missed
        else:
            twins.step(rows, values)
    assert twins.opt.skipped_steps == 100
    twins.opt.flush()
    twins.check(relative=1e-9)
    twins.check_state()


def missed_steps(opt: fs.Optimizer, key: Any = 0) -> list[int]:
    entry = opt.state_dict()["state"][key]
    return entry["missed_steps"].tolist() if "missed_steps" in entry else []


def test_which_steps_rows_have_missed() -> None:
    """Only those of their own table since they were last listed or brought up to date."""
    params = {"a": np.ones((3, 2)), "b": np.ones((2, 1))}
    opt = fs.Adam(params, rows="exact")

    def missed() -> tuple[list[int], list[int]]:
        return missed_steps(opt, "a"), missed_steps(opt, "b")

    assert missed() == ([], [])
    opt.step({"a": fs.Rows([0], np.ones((1, 2)))})
    assert missed() == ([0, 1, 1], [])
    opt.step({"a": fs.Rows([], np.ones((0, 2))), "b": fs.Rows([1, 1], np.ones((2, 1)))})
    assert missed() == ([1, 2, 2], [1, 0])
    opt.step({"a": None, "b": fs.Rows([0], np.ones((1, 1)))})
    assert missed() == ([1, 2, 2], [0, 1])
    opt.step({})
    assert missed() == ([1, 2, 2], [0, 1])
    opt.catch_up({"a": [2]})
    assert missed() == ([1, 2, 0], [0, 1])
    opt.step({"b": np.ones((2, 1))})
    assert missed() == ([1, 2, 0], [])
    opt.step({"b": fs.Rows([0, 1], np.ones((2, 1)))})
    assert missed() == ([1, 2, 0], [])
    opt.flush()
    assert missed() == ([], [])


@pytest.mark.parametrize(
    "bad",
    [
        fs.Rows([0, 4], np.ones((2, 2))),
        fs.Rows([-1], np.ones((1, 2))),
        fs.Rows([0], np.ones((1, 3))),
        fs.Rows([0], np.ones((2, 2))),
        np.ones((4, 3)),
    ],
)
def test_a_step_that_raises_has_changed_nothing(bad: Any) -> None:
    """Not even brought rows up to date."""
    opt = fs.Adam([np.ones((4, 2)), np.ones((4, 2))], rows="exact")
    opt.step([fs.Rows([0], np.ones((1, 2))), fs.Rows([1], np.ones((1, 2)))])
    before, state = everything(opt), opt.state_dict()
    with pytest.raises((IndexError, ValueError)):
        opt.step([np.ones((4, 2)), bad])
    assert everything(opt) == before
    np.testing.assert_equal(opt.state_dict(), state)


# ---- very many steps ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [r for i, r in enumerate(RULES) if i in (4, 7, 8, 10)], ids=str)
def test_a_history_that_is_full_is_made_up_for(rule: Rule) -> None:
    """After 65,536 steps all rows are brought up to date by themselves, and it goes on."""
    twins = Twins(rule.cls, np.array([[1.0], [-2.0], [3.0]]), **rule.options)
    value, none = np.array([[0.5]]), np.zeros((0, 1))
    full, zeros = np.array([[0.0], [0.5], [0.0]]), np.zeros((3, 1))
    one, nothing = np.array([1]), np.zeros(0, np.int64)
    twins.step([0, 1], np.ones((2, 1)))

    def go(steps: int) -> None:
        for step in range(steps):
            if step % 1000 == 500:
                twins.step(one, value, full)
            else:
                twins.step(nothing, none, zeros)

    go(MOST_STEPS - 2)
    entry = twins.opt.state_dict()["state"][0]
    assert len(entry["recent_steps"]) == MOST_STEPS - 1
    assert entry["missed_steps"][[0, 2]].tolist() == [MOST_STEPS - 2, MOST_STEPS - 1]
    other = copy.deepcopy(twins.opt)

    go(1)
    assert not is_behind(twins.opt)
    twins.check(relative=1e-9)
    go(700)
    assert missed_steps(twins.opt)[2] == 700
    twins.opt.flush()
    twins.check(relative=1e-9)
    twins.check_state()

    for step in [*[0] * 1, *range(700)]:
        indices, values = (one, value) if step % 1000 == 500 else (nothing, none)
        other.step([fs.Rows(indices, values)])
    other.flush()
    assert everything(other) == everything(twins.opt)


# ---- catch_up and flush -------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*RULES, *ROWWISE], ids=str)
@pytest.mark.parametrize("dtype", [f64, f32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("width", [5, 1500])
def test_it_does_not_matter_whether_rows_are_asked_for(
    rule: Rule, dtype: type, width: int, rng: np.random.Generator
) -> None:
    """Right before a step. To the bit, also where it is rounded; whatever scales gradients."""
    start = rng.standard_normal((9, width)).astype(dtype)
    start[0, 0] = -0.0
    opts = [rule.cls([start.copy()], rows="exact", **rule.options) for _ in range(2)]
    for _ in range(12):
        rows = rng.integers(0, 9, 3)
        values = rng.standard_normal((3, width)).astype(dtype)
        opts[0].catch_up([rows])
        for opt in opts:
            opt.step([fs.Rows(rows, values)], grad_scale=-0.5)
    for opt in opts:
        opt.flush()
    assert everything(opts[0]) == everything(opts[1])


def behind(cls: type[fs.Optimizer] = fs.Adam, form: str = "list", **options: Any) -> fs.Optimizer:
    """Two tables of 5 rows, of which each has missed other steps."""
    rng = np.random.default_rng(3)
    tables = {"a": rng.standard_normal((5, 2)), "b": rng.standard_normal((5, 3))}
    opt = cls(tables if form == "dict" else list(tables.values()), rows="exact", **options)
    for step in range(300):
        rows = {
            key: fs.Rows([step % 4], rng.standard_normal((1, table.shape[1])))
            for key, table in tables.items()
        }
        opt.step(rows if form == "dict" else list(rows.values()))
    return opt


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_second_time_changes_nothing(rule: Rule) -> None:
    opt = behind(rule.cls, **rule.options)
    opt.catch_up([[1, 4, 1, 4], None])
    once = everything(opt)
    assert missed_steps(opt, 0)[1] == missed_steps(opt, 0)[4] == 0
    opt.catch_up([np.array([4, 1]), []])
    opt.catch_up([[4], None])
    assert everything(opt) == once
    opt.flush()
    once = everything(opt)
    opt.flush()
    opt.catch_up([np.arange(5), np.arange(5)])
    assert everything(opt) == once
    assert not is_behind(opt)


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_rows_are_brought_up_to_date_alone_or_together(rule: Rule) -> None:
    """The same bits; and no other row, and no other table, is touched."""
    one, all_at_once = (behind(rule.cls, **rule.options) for _ in range(2))
    before = [w.copy() for w in one.params]
    for row in (3, 0, 4):
        one.catch_up([[row], None])
    for w, start, rows in zip(one.params, before, ([1, 2], range(5)), strict=True):
        np.testing.assert_array_equal(w[list(rows)], start[list(rows)])
    one.catch_up(([1, 2], [4, 3, 2, 1, 0, 0, 0]))
    all_at_once.flush()
    assert everything(one) == everything(all_at_once)


@pytest.mark.parametrize(
    "indices",
    [
        [2, 0, 2],
        (2, 0, 2),
        np.array([2, 0, 2]),
        np.array([2, 0, 2], np.int32),
        np.array([0, 7, 2, 7])[::2],
        np.array([2, 7, 0, 7])[-2::-2],
    ],
)
def test_forms_of_indices(indices: Any) -> None:
    """A list, a tuple, an array of either integer, with any stride; read-only, too."""
    if isinstance(indices, np.ndarray):
        indices.setflags(write=False)
    w = np.ones((4, 2))
    opt = fs.Adam(w, rows="exact")
    opt.step(fs.Rows([0, 1, 2, 3], np.ones((4, 2))))
    for _ in range(5):
        opt.step(fs.Rows([3], np.ones((1, 2))))
    opt.catch_up(indices)
    assert missed_steps(opt) == [0, 5, 0, 0]


def test_indices_of_another_library() -> None:
    torch = pytest.importorskip("torch")
    opt = behind()
    opt.catch_up([torch.tensor([0, 1]), torch.tensor([4], dtype=torch.int32)])
    assert missed_steps(opt, 0)[:2] == [0, 0]
    assert missed_steps(opt, 1)[4] == 0


def test_indices_for_named_tables() -> None:
    """Any subset of the names."""
    opt = behind(form="dict")
    opt.catch_up({"b": [4]})
    assert missed_steps(opt, "a")[4] == 300
    assert missed_steps(opt, "b")[4] == 0
    opt.catch_up({"a": [4], "b": None})
    assert missed_steps(opt, "a")[4] == 0
    opt.catch_up({})


BAD_INDICES: list[tuple[Any, type[Exception]]] = [
    ([[0, 1], [5]], IndexError),
    ([[0, 1], [-1]], IndexError),
    ([[0, 1], [2**62, 0]], IndexError),
    ([[0, 1], np.array([0.0])], TypeError),
    ([[0, 1], np.array([0], np.uint8)], TypeError),
    ([[0, 1], np.array([0], np.uint64)], TypeError),
    ([[0, 1], np.array([0], np.int16)], TypeError),
    ([[0, 1], np.array([True])], TypeError),
    ([[0, 1], [0.5]], TypeError),
    ([[0, 1], ["a"]], TypeError),
    ([[0, 1], [True]], TypeError),
    ([[0, 1], np.array([[0]])], ValueError),
    ([[0, 1], np.array(0)], ValueError),
    ([[0, 1], 3], TypeError),
    ([[0, 1]], ValueError),
    ([[0, 1], [0], [0]], ValueError),
    ([], ValueError),
    ({"a": [0]}, TypeError),
    ([0, 1], TypeError),
    (None, TypeError),
    (3, TypeError),
]


@pytest.mark.parametrize(("indices", "error"), BAD_INDICES, ids=[str(b[0]) for b in BAD_INDICES])
def test_bad_indices_change_nothing(indices: Any, error: type[Exception]) -> None:
    """Checked for all tables before any is touched."""
    opt = behind()
    before, state = everything(opt), opt.state_dict()
    with pytest.raises(error):
        opt.catch_up(indices)
    assert everything(opt) == before
    np.testing.assert_equal(opt.state_dict(), state)


def test_bad_names_of_tables() -> None:
    opt = behind(form="dict")
    before = everything(opt)
    with pytest.raises(ValueError, match="'c'"):
        opt.catch_up({"a": [0], "c": [0]})
    with pytest.raises(TypeError, match="dict"):
        opt.catch_up([[0], [0]])
    assert everything(opt) == before


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_lazy_rows_have_nothing_to_make_up_for(rule: Rule, rng: np.random.Generator) -> None:
    opt = rule.cls([rng.standard_normal((5, 2))], **rule.options)
    for _ in range(5):
        opt.step([fs.Rows([1, 3], rng.standard_normal((2, 2)))])
    before = everything(opt)
    opt.catch_up([[0, 1, 2]])
    opt.flush()
    assert everything(opt) == before
    assert opt.rows == "lazy"
    assert not is_behind(opt)


def test_the_choice_is_seen_and_kept() -> None:
    w = np.ones((3, 2))
    opt = fs.Adam(w, rows="exact")
    assert opt.rows == "exact"
    assert "rows='exact'" in repr(opt)
    assert "rows" not in repr(fs.Adam(w))
    with pytest.raises(AttributeError):
        opt.rows = "lazy"
    for wrong in ("wrong", "Exact", "", None, True, 1):
        with pytest.raises(ValueError, match="rows"):
            fs.Adam(w, rows=wrong)
    for again in (copy.copy(opt), copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert again.rows == "exact"


# ---- tables of every shape, dtype and layout ----------------------------------------------------


@pytest.mark.parametrize("rule", PLAIN + REPLAYED, ids=str)
@pytest.mark.parametrize(
    "shape", [(7,), (7, 1), (5, 3, 4), (3, 1, 1, 2), (4, 2500), (0, 3), (4, 0)]
)
def test_shapes(rule: Rule, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    """Of one axis or several, of rows longer than a tile, without rows, without elements."""
    twins = Twins(rule.cls, rng.standard_normal(shape), **rule.options)
    for step in range(60):
        rows = rng.integers(0, shape[0], min(1 + step % 2, shape[0]))
        twins.step(rows, rng.standard_normal((len(rows), *shape[1:])))
    twins.opt.catch_up([np.arange(shape[0])[-2:]])
    twins.check(np.arange(shape[0])[-2:], relative=1e-9, floor=1)
    twins.opt.flush()
    twins.check(relative=1e-9)
    twins.check_state()


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_scalars_beside_tables(rule: Rule, rng: np.random.Generator) -> None:
    """A parameter without axes has no rows, and takes dense steps only."""
    params = {"scalar": np.array(1.0), "table": rng.standard_normal((4, 2)), "bias": np.ones(3)}
    opt = rule.cls(params, rows="exact", **rule.options)
    twin = rule.cls({k: p.copy() for k, p in params.items()}, **rule.options)
    for step in range(100):
        values = rng.standard_normal((1, 2))
        grads = {"scalar": np.array(rng.standard_normal()), "bias": rng.standard_normal(3)}
        if step % 9 == 8:
            grads = {}
        opt.step({**grads, "table": fs.Rows([step % 3], values)})
        twin.step({**grads, "table": scattered(params["table"], [step % 3], values)})
    with pytest.raises(ValueError, match="'scalar' has no dimensions"):
        opt.step({"scalar": fs.Rows([0], np.ones(1))})
    opt.catch_up({"table": [3], "bias": [0]})
    opt.flush()
    for key, p in params.items():
        np.testing.assert_allclose(p, twin.params[key], rtol=1e-9, atol=1e-12)


def test_state_of_scalars_beside_tables() -> None:
    """Loading, copying and pickling; in another process, which may crash."""
    program = """
import copy, pickle, numpy as np, fusestep as fs
opt = fs.Adam([np.array(1.0), np.ones((3, 2))], rows="exact")
opt.step([np.array(1.0), fs.Rows([0], np.ones((1, 2)))])
others = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
opt.load_state_dict(opt.state_dict())
for other in [opt, *others]:
    other.step([np.array(1.0), fs.Rows([1], np.ones((1, 2)))])
    other.flush()
    np.testing.assert_equal(other.params, opt.params)
print("done")
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bits(rule: Rule, dtype: type, rng: np.random.Generator) -> None:
    """Steps made up for are rounded once: no further from the truth than a dense run."""
    twins = Twins(rule.cls, rng.standard_normal((20, 2)).astype(dtype), **rule.options)
    for rows in often_and_rarely(rng, 20, 300):
        twins.step(rows, rng.standard_normal((len(rows), 2)).astype(dtype))
    twins.opt.flush()
    assert all(array.dtype == f32 for array in arrays_of(twins.opt).values())
    largest = np.abs(twins.true_w).max()
    error, dense = (np.abs(w.astype(f64) - twins.true_w).max() for w in (twins.w, twins.dense_w))
    assert error <= 2 * dense + float(ml_dtypes.finfo(dtype).eps) * largest


@pytest.mark.parametrize("state", ["float32", "float64"])
@pytest.mark.parametrize("parameter", [f64, f32, np.float16])
def test_dtypes_of_the_state(state: str, parameter: type, rng: np.random.Generator) -> None:
    """Computed in the wider of the two, also when steps are made up for."""
    start = rng.standard_normal((20, 2)).astype(parameter)
    twins, wide = Twins(fs.AdamW, start, state_dtype=state), Twins(fs.AdamW, start.astype(f64))
    for rows in often_and_rarely(rng, 20, 300):
        values = rng.standard_normal((len(rows), 2)).astype(parameter)
        twins.step(rows, values)
        wide.step(rows, values.astype(f64))
    twins.opt.flush()
    assert arrays_of(twins.opt)["exp_avg"].dtype == state
    error, dense = (np.abs(w.astype(f64) - wide.dense_w).max() for w in (twins.w, twins.dense_w))
    assert error <= 2 * dense + 10 * max(float(np.finfo(kind).eps) for kind in (parameter, state))


SHAPES = [(9, 7), (9, 5, 3), (5, 2500), (5, 50, 60)]


@pytest.mark.parametrize("rule", PLAIN + REPLAYED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("uneven", [False, True])
def test_layouts(rule: Rule, shape: tuple[int, ...], uneven: bool) -> None:
    """Strided, in Fortran's order, reversed, packed: the same bits, whatever lies side by side."""
    found = set()
    for layout in LAYOUTS.values():
        rng = np.random.default_rng(5)
        w = layout(rng.standard_normal(shape))
        gradient = rng.uniform(1, 2, shape)
        if uneven:  # an element that is too small, beside eps, for closed form
            gradient.reshape(shape[0], -1)[:, 3] *= 1e-4
        opt = rule.cls([w], rows="exact", **with_eps(rule, 1e-5))
        opt.step([gradient])
        for step in range(40):
            values = gradient[:1] * rng.choice([-1, 1])
            opt.step([fs.Rows([step % 3], values if step % 2 else layout(values))])
        opt.catch_up([[1, 4]])
        opt.flush()
        arrays = [w, *arrays_of(opt).values()]
        found.add(hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest())
    assert len(found) == 1


def with_eps(rule: Rule, eps: float) -> dict[str, Any]:
    """A rule's options, with another eps if it has one."""
    return {**rule.options, "eps": eps} if hasattr(rule.cls, "eps") else rule.options


# ---- tiers and threads --------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_tiers_and_threads(rule: Rule) -> None:
    """The same bits, also where some rows have a closed form and others have none."""
    rng = np.random.default_rng(11)
    start = rng.standard_normal((3000, 64)).astype(f32)  # several threads share 131,072 elements
    gradient = (start * 10.0 ** rng.uniform(-9, 0, (3000, 1))).astype(f32)
    lists = [np.sort(rng.choice(3000, n, replace=False)) for n in (2500, 3, 3, 3, 2600)]
    found = set()
    for tier in AVAILABLE:
        for threads in (1, 2, 3):
            _cpu.use_tier(tier)
            fs.set_num_threads(threads)
            w = start.copy()
            opt = rule.cls([w], rows="exact", **with_eps(rule, 1e-3))
            for rows in lists:
                opt.step([fs.Rows(rows, gradient[rows])])
            opt.catch_up([lists[0]])
            opt.step([fs.Rows(lists[1], gradient[lists[1]])])
            opt.flush()
            arrays = [w, *arrays_of(opt).values()]
            found.add(hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest())
    assert len(found) == 1


@pytest.mark.parametrize("rule", PLAIN + REPLAYED, ids=str)
def test_every_tier_means_the_same(rule: Rule, tier: str, rng: np.random.Generator) -> None:
    """Rows of lengths around those of vectors."""
    for width in (1, 3, 8, 17, 64, 1025):
        twins = Twins(rule.cls, rng.standard_normal((5, width)), **rule.options)
        twins.step([0, 1, 2], rng.standard_normal((3, width)))
        for _ in range(20):
            twins.step([1], rng.standard_normal((1, width)))
        twins.opt.flush()
        twins.check(relative=1e-9)


def test_steps_and_readers_at_the_same_time() -> None:
    """Rows may be brought up to date, and state dicts be taken, while others step."""
    rng = np.random.default_rng(4)
    twins = Twins(fs.AdamW, rng.standard_normal((50, 3)))
    steps = [(rng.integers(0, 49, 3), rng.standard_normal((3, 3))) for _ in range(600)]

    def work(thread: int) -> None:
        for rows, values in steps:
            if thread == 0:
                twins.step(rows, values)
            elif thread == 1:
                twins.opt.catch_up([rows])
            else:
                twins.opt.state_dict()
                twins.opt.flush()

    in_threads(3, work)
    twins.opt.flush()
    twins.check(relative=1e-9)
    twins.check_state()


# ---- state --------------------------------------------------------------------------------------


def again(opt: fs.Optimizer, through: str, path: Path, **options: Any) -> fs.Optimizer:
    """Another optimizer at the same point, with another table."""
    if through == "deepcopy":
        return copy.deepcopy(opt)
    if through == "pickle":
        return pickle.loads(pickle.dumps(opt))
    other = type(opt)([w.copy() for w in opt.params], rows="exact", **options)
    if through == "file":
        opt.save(path)
        other.load(path)
    else:
        other.load_state_dict(opt.state_dict())
    return other


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("through", ["dict", "file", "pickle", "deepcopy"])
@pytest.mark.parametrize("dtype", [f64, f32])
def test_interrupted_is_uninterrupted(
    rule: Rule, through: str, dtype: type, tmp_path: Path, rng: np.random.Generator
) -> None:
    """In the middle of a block, with rows behind: bit for bit the same."""
    steps = [
        (rows, rng.standard_normal((len(rows), 3)).astype(dtype))
        for rows in often_and_rarely(rng, 12, 700)
    ]
    opt = rule.cls([rng.standard_normal((12, 3)).astype(dtype)], rows="exact", **rule.options)
    for i, step in enumerate(steps):
        opt.lr = rule.options["lr"] * (1 + i % 5) / 5
        opt.step([fs.Rows(*step)])
        if i == 99:
            opt.flush()
        if i == 455:
            assert is_behind(opt)
            before = everything(opt)
            other = again(opt, through, tmp_path / "opt.safetensors", **rule.options)
            assert everything(opt) == before  # to look at the state is not to change it
            assert everything(other) == before
            np.testing.assert_equal(other.state_dict(), opt.state_dict())
        if i > 455:
            other.lr = opt.lr
            other.step([fs.Rows(*step)])
    np.testing.assert_equal(other.state_dict(), opt.state_dict())
    opt.flush()
    other.flush()
    assert everything(opt) == everything(other)


@pytest.mark.parametrize("rule", [r for r in RULES if r.cls is not fs.Adagrad], ids=str)
def test_interrupted_when_no_row_is_behind(rule: Rule, rng: np.random.Generator) -> None:
    """Also where all rows are up to date one by one, after steps that are still remembered."""
    for length in range(100, 110):
        opt = rule.cls([rng.standard_normal((4, 3))], rows="exact", **rule.options)
        for row in rng.integers(0, 4, length):
            opt.step([fs.Rows([row], rng.standard_normal((1, 3)))])
        opt.catch_up([[0, 1, 2, 3]])
        assert not is_behind(opt)
        other = copy.deepcopy(opt)
        for row in rng.integers(0, 200, 600):
            rows, values = (
                ([row], rng.standard_normal((1, 3))) if row < 4 else ([], np.ones((0, 3)))
            )
            opt.step([fs.Rows(rows, values)])
            other.step([fs.Rows(rows, values)])
        opt.flush()
        other.flush()
        assert everything(opt) == everything(other)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_what_a_state_dict_says(rule: Rule) -> None:
    """How many of the last steps each row has missed, and everything that made these steps."""
    opt = rule.cls([np.ones((4, 2))], rows="exact", **rule.options)
    for step, row in enumerate([0, 1, 2, 0, 0]):
        opt.lr = 0.125 * step
        opt.step([fs.Rows([row], np.ones((1, 2)))])
    entry = opt.state_dict()["state"][0]
    missed, recent = entry["missed_steps"], entry["recent_steps"]
    assert missed.dtype == np.int64
    assert missed.tolist() == [0, 3, 2, 5]
    assert recent.dtype == f64
    options = type(opt)._native_options(opt._hyperparameters)
    assert recent.shape == (5, 3 + len(options))
    assert recent[:, 0].tolist() == [0.0, 0.125, 0.25, 0.375, 0.5]
    assert recent[:, 1].tolist() == [1, 2, 3, 4, 5]
    assert ((recent[:, 2] <= 1) & (recent[:, 2] > 0)).all()
    missed[:] = 0
    recent[:] = np.nan
    assert missed_steps(opt) == [0, 3, 2, 5]  # what was given away is a copy
    opt.flush()
    assert set(opt.state_dict()["state"][0]) == {
        *set(rule.states),
        *set(opt._scalar_names),
        "step",
    }


def test_state_that_was_loaded_replaces_what_was_missed() -> None:
    """A history of before does not live on, whether or not the new state has one."""
    opt, fresh = behind(), behind()
    fresh.flush()
    opt.load_state_dict(fresh.state_dict())
    assert missed_steps(opt, 0) == missed_steps(opt, 1) == []
    before = everything(opt)
    opt.flush()
    assert everything(opt) == before
    opt.load_state_dict(behind().state_dict())
    np.testing.assert_equal(opt.state_dict(), behind().state_dict())
    opt.load_state_dict(fs.Adam([np.ones((5, 2)), np.ones((5, 3))]).state_dict())
    assert missed_steps(opt, 0) == []
    before = [w.copy() for w in opt.params]
    opt.flush()
    np.testing.assert_equal(opt.params, before)


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_lazy_optimizers_refuse_rows_that_are_behind(rule: Rule, tmp_path: Path) -> None:
    """They would never make up for it. After flush() there is nothing to make up for."""
    opt = behind(rule.cls, **rule.options)
    lazy = rule.cls([np.ones((5, 2)), np.ones((5, 3))], **rule.options)
    before, state = everything(lazy), lazy.state_dict()
    with pytest.raises(ValueError, match=r"rows='exact'.*flush\(\)"):
        lazy.load_state_dict(opt.state_dict())
    opt.save(tmp_path / "x")
    with pytest.raises(ValueError, match="rows='exact'"):
        lazy.load(tmp_path / "x")
    assert everything(lazy) == before
    np.testing.assert_equal(lazy.state_dict(), state)
    opt.flush()
    lazy.load_state_dict(opt.state_dict())
    opt.save(tmp_path / "x")
    lazy.load(tmp_path / "x")


def _recent(**changes: float) -> Callable[[dict[Any, Any]], dict[Any, Any]]:
    """Set one column of the steps of table 1, by name."""
    column = {"lr": 0, "step": 1, "mu_product": 2, "option": 5}

    def edit(d: dict[Any, Any]) -> dict[Any, Any]:
        for name, value in changes.items():
            d["state"][1]["recent_steps"][7, column[name]] = value
        return d

    return edit


_MISSED, _RECENT = "state__1__missed_steps", "state__1__recent_steps"

DAMAGED: list[tuple[str, Callable[[dict[Any, Any]], Any]]] = [
    ("no missed", edited(**{_MISSED: ...})),
    ("no recent", edited(**{_RECENT: ...})),
    ("missed is None", edited(**{_MISSED: None})),
    ("recent is None", edited(**{_RECENT: None})),
    ("too few rows", edited(**{_MISSED: np.zeros(4, np.int64)})),
    ("too many rows", edited(**{_MISSED: np.zeros(6, np.int64)})),
    ("two axes", edited(**{_MISSED: np.zeros((5, 1), np.int64)})),
    ("a scalar", edited(**{_MISSED: np.int64(0)})),
    ("negative", edited(**{_MISSED: np.array([0, 0, -1, 0, 0])})),
    ("more than there are", edited(**{_MISSED: np.array([0, 0, 301, 0, 0])})),
    ("far more", edited(**{_MISSED: np.full(5, 2**62)})),
    ("floats", edited(**{_MISSED: np.zeros(5)})),
    ("unsigned", edited(**{_MISSED: np.zeros(5, np.uint64)})),
    ("text", edited(**{_MISSED: "many"})),
    ("objects", edited(**{_MISSED: np.array([None] * 5)})),
    ("recent text", edited(**{_RECENT: "many"})),
    ("recent complex", edited(**{_RECENT: np.zeros((300, 10), complex)})),
    ("recent flat", edited(**{_RECENT: np.zeros(3000)})),
    ("recent too narrow", edited(**{_RECENT: np.zeros((300, 9))})),
    ("recent too wide", edited(**{_RECENT: np.zeros((300, 11))})),
    ("recent too short", edited(**{_RECENT: np.zeros((3, 10))})),
    ("recent ragged", edited(**{_RECENT: [[1.0], [1.0, 2.0]]})),
    ("NaN rate", _recent(lr=np.nan)),
    ("infinite rate", _recent(lr=np.inf)),
    ("NaN option", _recent(option=np.nan)),
    ("negative rate", _recent(lr=-0.1)),
    ("NaN step", _recent(step=np.nan)),
    ("step 0", _recent(step=0)),
    ("negative step", _recent(step=-3)),
    ("half a step", _recent(step=1.5)),
    ("step too large", _recent(step=1e300)),
    ("mu_product", _recent(mu_product=2.0)),
    ("beta", _recent(option=1.5)),
]


@pytest.mark.parametrize("edit", [d[1] for d in DAMAGED], ids=[d[0] for d in DAMAGED])
def test_damaged_histories_change_nothing(edit: Callable[[dict[Any, Any]], Any]) -> None:
    """Found out before the other table is loaded."""
    opt, other = behind(), behind()
    other.step([np.ones((5, 2)), fs.Rows([0], np.ones((1, 3)))], lr=0.5)
    before, state = everything(other), other.state_dict()
    with pytest.raises((TypeError, ValueError)):
        other.load_state_dict(edit(opt.state_dict()))
    assert everything(other) == before
    np.testing.assert_equal(other.state_dict(), state)
    other.flush()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_torchs_state_goes_on_here(rule: Rule, rng: np.random.Generator) -> None:
    """From dense steps of torch's on, with rows; and after flush() what torch would have."""
    torch = pytest.importorskip("torch")
    tensor = torch.nn.Parameter(torch.tensor(rng.standard_normal((6, 5))))
    options = {**rule.options, **rule.torch_options}
    theirs = getattr(torch.optim, rule.torch)([tensor], **options)
    for _ in range(10):
        tensor.grad = torch.tensor(rng.standard_normal((6, 5)))
        theirs.step()
    w = tensor.detach().numpy().copy()
    opt = rule.cls([w], rows="exact", **{**rule.options, "lr": 123.0})
    opt.load_state_dict(theirs.state_dict())
    for row in rng.integers(0, 4, 40):
        values = rng.standard_normal((1, 5))
        tensor.grad = torch.tensor(scattered(w, [row], values))
        theirs.step()
        opt.step([fs.Rows([row], values)])
    opt.flush()
    np.testing.assert_allclose(w, tensor.detach().numpy(), rtol=0, atol=1e-8)
    for name, array in arrays_of(opt).items():
        expected = theirs.state_dict()["state"][0][name].numpy()
        np.testing.assert_allclose(array, expected, rtol=1e-8, atol=1e-12)


# ---- anything, in any order ---------------------------------------------------------------------

ROWS = st.lists(st.integers(0, 5), max_size=4)
OPERATIONS = st.one_of(
    st.tuples(st.just("rows"), ROWS, st.sampled_from([1.0, 1e-6, 1e-9, 0.0, 1e4])),
    st.tuples(st.just("idle"), st.sampled_from([1, 2, 30, BLOCK - 1, BLOCK, 400])),
    st.tuples(st.just("dense"), st.sampled_from([1.0, 1e-6])),
    st.tuples(st.just("none")),
    st.tuples(st.just("catch_up"), ROWS),
    st.tuples(st.just("flush")),
    st.tuples(st.just("lr"), st.sampled_from([0.0, 1e-3, 0.05, 0.5])),
    st.tuples(st.just("weight_decay"), st.sampled_from([0.0, 0.01, 1.0, 2.5])),
    st.tuples(st.just("round trip")),
)


@settings(max_examples=300, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    start=st.sampled_from([0.0, 1.0]),
    operations=st.lists(OPERATIONS, min_size=1, max_size=25),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_sequence_of_operations(
    rule: Rule, start: float, operations: Sequence[tuple[Any, ...]], seed: int
) -> None:
    """After each, the rows that are up to date are those of a dense optimizer."""
    rng = np.random.default_rng(seed)
    twins = Twins(rule.cls, start * rng.standard_normal((6, 2)), **rule.options)
    most = start
    for name, *arguments in [*operations, ("flush",)]:
        if name == "rows":
            rows, scale = arguments
            twins.step(rows, scale * rng.standard_normal((len(rows), 2)))
        elif name == "idle":
            twins.idle(*arguments)
        elif name == "dense":
            twins.dense_step(arguments[0] * rng.standard_normal((6, 2)))
        elif name == "none":
            twins.none_step()
        elif name == "catch_up":
            twins.opt.catch_up(arguments)
        elif name == "flush":
            twins.opt.flush()
        elif name == "round trip":
            twins.w = twins.w.copy()
            other = rule.cls([twins.w], rows="exact", **rule.options)
            other.load_state_dict(twins.opt.state_dict())
            twins.opt = other
        else:
            twins.assign(**{name: arguments[0]})
        missed = np.array(missed_steps(twins.opt) or [0] * 6)
        most = max(most, np.abs(twins.dense_w).max())
        twins.check(missed == 0, relative=1e-7, floor=most)
    twins.check_state(1e-7, floor=1e-5)  # which may have faded away
