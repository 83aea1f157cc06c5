"""Tables: one accumulator for each row, and rows that come later."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
import simulated_cupy
from concurrency import in_threads
from conftest import AVAILABLE
from devices import library
from fusestep import _cpu
from rules import PLAIN, ROWWISE, RULES, Rule
from strategies import GRAD_SCALES, MAX_NORMS
from test_anchors import DTYPES, Penalty, anchor, bits, pulled, scattered, snapshot, some_penalty
from test_bits import LAYOUTS
from test_rows import Lazy, checked_step, everything

if TYPE_CHECKING:
    from pathlib import Path

f32, f64 = np.float32, np.float64

EVERY = [*RULES, *ROWWISE]
SOME = [*PLAIN, ROWWISE[0]]
TOLERANCE = {"float64": 1e-12, "float32": 1e-4}

SHAPES = [(37, 3), (50,), (4, 5, 6), (3, 1500), (2, 3, 700), (0, 4), (4, 0), (5, 1), (1, 1025)]


# ---- RowwiseAdagrad -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize("rule", ROWWISE, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fifty_steps(
    rule: Rule, dtype: str, shape: tuple[int, ...], tier: str, rng: np.random.Generator
) -> None:
    w = rng.standard_normal(shape).astype(dtype)
    expected, state = w.astype(f64), {}
    opt = fs.RowwiseAdagrad([w], **rule.options)
    assert opt.state[0]["sum"].shape == shape[:1]
    with np.errstate(invalid="ignore"):  # the mean of no elements
        for _ in range(50):
            g = rng.standard_normal(shape).astype(dtype)
            expected = rule.reference(expected, g.astype(f64), state, **rule.options)
            opt.step([g])
    np.testing.assert_allclose(w, expected, rtol=0, atol=TOLERANCE[dtype])
    sums = opt.state[0]["sum"]
    if w.size:
        tolerance = {"float64": 1e-12, "float32": 2e-5}[dtype]
        np.testing.assert_allclose(sums, state["sum"].reshape(sums.shape), rtol=tolerance)
    else:
        np.testing.assert_array_equal(sums, 0)
    assert opt.state[0]["step"] == 50


@pytest.mark.parametrize("width", [0, 1, 7])
def test_rows_of_any_width(width: int) -> None:
    """Without elements there is no mean, and no NaN."""
    w = np.ones((3, width))
    opt = fs.RowwiseAdagrad([w], weight_decay=0.1)
    for g in (np.ones((3, width)), fs.Rows([2, 0, 2], np.ones((3, width)))):
        opt.step([g], zero_grad=True)
    assert np.isfinite(opt.state[0]["sum"]).all()
    assert opt.state[0]["sum"].any() == (width > 0)


@pytest.mark.parametrize("rule", ROWWISE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_sixteen_bit_parameters_round_once_a_step(
    rule: Rule, dtype: np.dtype, tier: str, rng: np.random.Generator
) -> None:
    w = rng.standard_normal((7, 43)).astype(dtype)
    opt = fs.RowwiseAdagrad([w], **rule.options)
    assert opt.state[0]["sum"].dtype == f32
    state: dict = {}
    for _ in range(30):
        g = rng.standard_normal(w.shape).astype(dtype)
        exact = rule.reference(w.astype(f64), g.astype(f64), state, **rule.options)
        opt.step([g])
        low, high = (exact - 1e-4).astype(dtype), (exact + 1e-4).astype(dtype)
        assert np.all((w >= low) & (w <= high))


def test_one_element_to_a_row_is_adagrad(rng: np.random.Generator) -> None:
    for shape in ((40,), (40, 1), (40, 1, 1)):
        start = rng.standard_normal(shape)
        ours, theirs = start.copy(), start.copy()
        rowwise, adagrad = fs.RowwiseAdagrad([ours], lr=0.1), fs.Adagrad([theirs], lr=0.1)
        for _ in range(20):
            g = rng.standard_normal(shape)
            rowwise.step([g])
            adagrad.step([g])
        np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(
            rowwise.state[0]["sum"], adagrad.state[0]["sum"].ravel(), rtol=1e-14
        )


def test_the_mean_of_a_very_long_row_is_taken_in_float64(rng: np.random.Generator) -> None:
    w = np.zeros((2, 300_001), f32)
    g = rng.standard_normal(w.shape).astype(f32)
    g[1] *= 1e-3
    opt = fs.RowwiseAdagrad([w], lr=1.0)
    opt.step([g])
    np.testing.assert_allclose(
        opt.state[0]["sum"], np.mean(g.astype(f64) ** 2, axis=1), rtol=1.2e-7
    )


@pytest.mark.parametrize("state_dtype", [None, "float32", "float64"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_state(state_dtype: str | None, dtype: np.dtype, layout: str) -> None:
    """One element for each row, whatever the layout of the table."""
    w = LAYOUTS[layout](np.ones((5, 3, 2), dtype))
    opt = fs.RowwiseAdagrad({"w": w}, state_dtype=state_dtype)
    assert set(opt.state["w"]) == {"step", "sum"}
    sums = opt.state["w"]["sum"]
    assert sums.shape == (5,)
    assert sums.dtype == (state_dtype or ("float64" if dtype == f64 else "float32"))
    opt.step({"w": fs.Rows([3], np.full((1, 3, 2), 2.0))})
    np.testing.assert_array_equal(sums, [0, 0, 0, 4, 0])


@settings(max_examples=150, deadline=None)
@given(
    rule=st.sampled_from(ROWWISE),
    tier=st.sampled_from(AVAILABLE),
    threads=st.integers(1, 3),
    shape=st.one_of(
        st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
        st.tuples(st.integers(30, 70), st.integers(30, 70)),
        st.sampled_from([(270, 260), (3, 4097), (2, 5, 64, 30), (900, 80)]),
    ),
    parameter=st.sampled_from(sorted(LAYOUTS)),
    gradient=st.sampled_from(sorted(LAYOUTS)),
    kind=st.sampled_from(["dense", "rows"]),
    dtype=st.sampled_from(DTYPES[:3]),
    max_norm=st.sampled_from([None, *MAX_NORMS]),
    grad_scale=st.sampled_from(GRAD_SCALES),
    maximize=st.booleans(),
)
def test_layout_tier_and_threads_change_nothing(
    rule: Rule,
    tier: str,
    threads: int,
    shape: tuple[int, ...],
    parameter: str,
    gradient: str,
    kind: str,
    dtype: np.dtype,
    max_norm: float | None,
    grad_scale: float,
    maximize: bool,
) -> None:
    """Nor does it matter whether the gradient of all rows is an array or Rows.

    Of sums (the norm, the mean of a row) the order of memory decides the last bit.
    """
    rng = np.random.default_rng(3)
    start = rng.standard_normal(shape).astype(dtype)
    options = {**rule.options, "max_norm": max_norm, "maximize": maximize}
    plain = fs.RowwiseAdagrad([start.copy()], **options)
    odd = fs.RowwiseAdagrad([LAYOUTS[parameter](start.copy())], **options)
    before = _cpu.active_tier()
    for _ in range(2):
        g = rng.standard_normal(shape).astype(dtype)
        _cpu.use_tier(before)
        fs.set_num_threads(1)
        plain.step([g], grad_scale=grad_scale)
        _cpu.use_tier(tier)
        fs.set_num_threads(threads)
        strided = LAYOUTS[gradient](g.copy())
        rows = fs.Rows(np.arange(shape[0]), strided)
        odd.step([strided if kind == "dense" else rows], grad_scale=grad_scale, zero_grad=True)
        assert not strided.any()
    if parameter == gradient == "c" and (max_norm is None or kind == "dense"):
        assert everything(plain) == everything(odd)
    exact, found = (opt.params[0].astype(f64) for opt in (plain, odd))
    tolerance = {"float64": 1e-14, "float32": 1e-6, "float16": 2e-3}[str(dtype)]
    np.testing.assert_allclose(found, exact, rtol=tolerance, atol=tolerance)
    sums = plain.state[0]["sum"], odd.state[0]["sum"]
    np.testing.assert_allclose(*sums, rtol=max(1e-14, 2.0**-21 * (dtype != f64)))


@pytest.mark.parametrize("rule", ROWWISE, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", [(30,), (30, 4), (30, 2, 3), (30, 1030)], ids=str)
def test_lazy_rows(
    rule: Rule, dtype: str, shape: tuple[int, ...], tier: str, rng: np.random.Generator
) -> None:
    """Duplicates are added up before they are squared; rows not listed stay as they are."""
    start = rng.standard_normal(shape).astype(dtype)
    opt, lazy = fs.RowwiseAdagrad([start.copy()], **rule.options), Lazy(rule, start)
    for _ in range(20):
        indices = rng.integers(0, 20, rng.integers(0, 9))
        values = rng.standard_normal((len(indices), *shape[1:])).astype(dtype)
        opt.step([fs.Rows(indices, values)])
        lazy.step(indices, values.astype(f64))
    np.testing.assert_allclose(opt.params[0], lazy.w, rtol=0, atol=TOLERANCE[dtype])
    sums = lazy.states["sum"].reshape(30, -1)[:, 0]
    np.testing.assert_allclose(opt.state[0]["sum"], sums, rtol=1e-5)
    np.testing.assert_array_equal(opt.params[0][20:], start[20:])
    assert not opt.state[0]["sum"][20:].any()


@settings(max_examples=100, deadline=None)
@given(
    rule=st.sampled_from(ROWWISE),
    rest=st.sampled_from([(), (1,), (3,), (0,), (1025,), (2, 600)]),
    count=st.integers(0, 40),
    rows=st.integers(1, 30),
    dtype=st.sampled_from(DTYPES[:2]),
    tier=st.sampled_from(AVAILABLE),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_are_the_dense_step_of_a_smaller_table(
    rule: Rule,
    rest: tuple[int, ...],
    count: int,
    rows: int,
    dtype: np.dtype,
    tier: str,
    threads: int,
    seed: int,
) -> None:
    """Bit for bit."""
    _cpu.use_tier(tier)
    fs.set_num_threads(threads)
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, *rest)).astype(dtype)
    opt = fs.RowwiseAdagrad([w], **rule.options)
    for _ in range(3):
        indices = rng.integers(0, rows, count)
        values = rng.standard_normal((count, *rest)).astype(dtype)
        checked_step(opt, fs.Rows(indices, values))


@pytest.mark.parametrize("rule", ROWWISE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("width", [3, 1100])
@pytest.mark.parametrize("threads", [1, 3])
def test_exact_rows_are_a_dense_run(
    rule: Rule, dtype: np.dtype, width: int, threads: int, rng: np.random.Generator
) -> None:
    """Bit for bit: a row either rests or takes its missed steps one by one."""
    fs.set_num_threads(threads)
    start = rng.standard_normal((12, width)).astype(dtype)
    lr = [0.1 / (1 + 0.1 * step) for step in range(100)]
    exact, dense = (
        fs.RowwiseAdagrad([start.copy()], **{**rule.options, "lr": lr.__getitem__, "rows": rows})
        for rows in ("exact", "lazy")
    )
    for step in range(100):
        indices = rng.integers(0, 10, rng.integers(0, 4))
        values = rng.standard_normal((len(indices), width)).astype(dtype)
        exact.step([fs.Rows(indices, values)])
        dense.step([scattered(start.shape, indices, values)])
        if step == 40:
            exact.load_state_dict(exact.state_dict())
        if step == 60:
            exact.catch_up([np.arange(4)])
    exact.flush()
    assert everything(exact) == everything(dense)


def test_clipping_is_by_all_gradients_together(rng: np.random.Generator) -> None:
    tables = rng.standard_normal((2, 5, 3))
    [rule] = ROWWISE[:1]
    opt = fs.RowwiseAdagrad([*tables.copy()], max_norm=0.7, lr=0.1)
    values = rng.standard_normal((3, 3))
    indices = np.array([4, 0, 4])
    dense = rng.standard_normal((5, 3))
    norm = np.sqrt((scattered((5, 3), indices, values) ** 2).sum() + (dense**2).sum())
    opt.step([fs.Rows(indices, values), dense])
    factor = 0.7 / (norm + 1e-6)
    for i, g in enumerate([scattered((5, 3), indices, values), dense]):
        expected = rule.reference(tables[i], factor * g, {}, lr=0.1)
        np.testing.assert_allclose(opt.params[i], expected, rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_left_out(bad: float) -> None:
    w = np.ones((4, 3))
    opt = fs.RowwiseAdagrad([w], skip_nonfinite=True, weight_decay=0.1)
    before = everything(opt)
    g = np.ones((4, 3))
    g[2, 1] = bad
    opt.step([g])
    opt.step([fs.Rows(np.arange(4), g)])
    assert everything(opt) == {**before, "skipped_steps": 2}
    opt.step([None])
    assert everything(opt) == {**before, "skipped_steps": 2}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-300, 1e-45, 1e20, 1e38, 1e200])
def test_gradients_of_extreme_sizes(dtype: np.dtype, value: float, tier: str) -> None:
    """Squares that vanish or overflow make no NaN; a row without a gradient does not move."""
    if value > ml_max(dtype):
        pytest.skip("infinite in this dtype")
    w = np.ones((3, 4), dtype)
    g = np.full((3, 4), value).astype(dtype)
    g[1] = 0
    opt = fs.RowwiseAdagrad([w], lr=0.1)
    for _ in range(3):
        opt.step([g])
    assert np.isfinite(w).all()
    assert (w[1] == 1).all()
    assert not np.isnan(opt.state[0]["sum"]).any()


def ml_max(dtype: np.dtype) -> float:
    return float(np.finfo(dtype).max)


def test_parameters_without_rows() -> None:
    with pytest.raises(ValueError, match="parameter 1 has no dimensions"):
        fs.RowwiseAdagrad([np.ones(3), np.array(1.0)])


def test_parameters_on_a_gpu() -> None:
    lib = library("simulated")
    with simulated_cupy.installed():
        opt = fs.RowwiseAdagrad([lib.put(np.ones((3, 4), f32))])
        accumulators = opt.state[0]["sum"]
        assert lib.is_own(accumulators)
        assert accumulators.shape == (3,)


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"eps": -1e-9}, {"weight_decay": -0.1}, {"eps": np.nan}]
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        fs.RowwiseAdagrad([np.ones((2, 2))], **options)
    opt = fs.RowwiseAdagrad([np.ones((2, 2))])
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=name):
        setattr(opt, name, value)


def test_options_that_are_assigned(rng: np.random.Generator) -> None:
    w = rng.standard_normal((4, 3))
    opt = fs.RowwiseAdagrad([w])
    expected, state = w.copy(), {}
    for options in ({"lr": 0.1}, {"eps": 0.5}, {"weight_decay": 0.3}):
        for name, value in options.items():
            setattr(opt, name, value)
        g = rng.standard_normal((4, 3))
        opt.step([g])
        present = {"lr": opt.lr, "eps": opt.eps, "weight_decay": opt.weight_decay}
        expected = ROWWISE[0].reference(expected, g, state, **present)
    np.testing.assert_allclose(w, expected, rtol=0, atol=1e-13)


def test_state_of_adagrad_is_not_ours() -> None:
    adagrad, rowwise = fs.Adagrad([np.ones((3, 2))]), fs.RowwiseAdagrad([np.ones((3, 2))])
    before = snapshot(rowwise)
    saved = adagrad.state_dict()
    with pytest.raises(ValueError, match="of Adagrad; this optimizer is RowwiseAdagrad"):
        rowwise.load_state_dict(saved)
    del saved["fusestep"]
    with pytest.raises(ValueError, match=r"shape \(3, 2\); expected \(3,\)"):
        rowwise.load_state_dict(saved)
    np.testing.assert_equal(snapshot(rowwise), before)
    saved = rowwise.state_dict()
    del saved["fusestep"]
    with pytest.raises(ValueError, match="shape"):
        adagrad.load_state_dict(saved)


# ---- more rows ----------------------------------------------------------------------------------


def gradients(opt: fs.Optimizer, rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.standard_normal(w.shape).astype(w.dtype) for w in opt.params]


def enlarged(opt: fs.Optimizer, table: np.ndarray) -> fs.Optimizer:
    """An optimizer that always had this table, and came as far with its first rows."""
    saved = opt.__getstate__()
    entry = saved["state_dict"]["state"][0]
    initial = saved["hyperparameters"].get("initial_accumulator_value", 0.0)
    for name in opt._state_names:
        old = entry[name]
        more = np.full((len(table) - len(old), *old.shape[1:]), initial, old.dtype)
        entry[name] = np.concatenate([old, more])
    twin = type(opt).__new__(type(opt))
    twin.__setstate__({**saved, "params": [table]})
    return twin


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (7,), (2, 3, 4), (0, 3), (4, 0), (3, 1030)], ids=str)
def test_as_if_it_always_had_been_larger(
    rule: Rule, dtype: np.dtype, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    """With the bias correction of the parameter's step count: new rows begin late."""
    w = rng.standard_normal(shape).astype(dtype)
    opt = rule.cls([w], **rule.options)
    for _ in range(3):
        opt.step(gradients(opt, rng))
    before = w.copy()
    more = rng.standard_normal((4, *shape[1:])).astype(dtype)
    whole = np.concatenate([w, more])
    twin = enlarged(opt, whole)

    table = opt.resize(0, len(w) + 4, init=more)
    assert table is opt.params[0]
    assert table.dtype == dtype
    assert table.flags.writeable
    assert opt.steps == opt.state[0]["step"] == 3
    np.testing.assert_array_equal(bits(table[: len(w)]), bits(before))
    assert everything(opt) == everything(twin)
    for _ in range(3):
        g = gradients(opt, rng)
        opt.step(g)
        twin.step(g)
    indices = np.array([len(w) + 3, 0, len(w) + 3])
    values = rng.standard_normal((3, *shape[1:])).astype(dtype)
    for each in (opt, twin):
        each.step([fs.Rows(indices, values)])
    assert everything(opt) == everything(twin)
    np.testing.assert_array_equal(bits(w), bits(before))  # the one before is left behind


@pytest.mark.parametrize("rule", EVERY, ids=str)
def test_new_state_is_the_initial_value(rule: Rule, rng: np.random.Generator) -> None:
    opt = rule.cls([rng.standard_normal((3, 2))], **rule.options)
    opt.step([rng.standard_normal((3, 2))])
    before = opt.state_dict()["state"][0]
    opt.resize(0, 5)
    for name in rule.states:
        state = opt.state[0][name]
        assert len(state) == 5
        np.testing.assert_array_equal(state[:3], before[name])
        np.testing.assert_array_equal(state[3:], rule.options.get("initial_accumulator_value", 0.0))


INITS: dict[str, tuple[Any, Any]] = {
    "a number": (0.5, 0.5),
    "an int": (2, 2.0),
    "NumPy's number": (np.float32(0.5), 0.5),
    "no dimensions": (np.array(0.5), 0.5),
    "an array": (np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(2, 3)),
    "of other strides": (np.arange(6.0).reshape(3, 2).T, np.arange(6.0).reshape(3, 2).T),
    "of ints": (np.arange(6).reshape(2, 3), np.arange(6.0).reshape(2, 3)),
    "of float16": (np.ones((2, 3), "f2"), 1.0),
    "read-only": (np.broadcast_to(np.arange(3.0), (2, 3)), np.tile(np.arange(3.0), (2, 1))),
    "a list": ([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]),
    "a callable": (lambda shape: np.full(shape, 7.0), 7.0),
    "a callable for a number": (lambda shape: float(shape[0] * 10 + shape[1]), 23.0),
    "a NumPy function": (np.ones, 1.0),
}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_new_rows_are_filled_with(init: str, dtype: np.dtype) -> None:
    given_init, expected = INITS[init]
    opt = fs.Adam(np.full((3, 3), -1, dtype))
    table = opt.resize(0, 5, init=given_init)
    np.testing.assert_array_equal(table[3:].astype(f64), np.broadcast_to(expected, (2, 3)))
    assert (table[:3].astype(f64) == -1).all()


def test_by_default_they_are_zero() -> None:
    assert not fs.SGD(np.ones((3, 2))).resize(0, 30)[3:].any()


def test_what_it_is_filled_with_is_a_copy() -> None:
    init = np.ones((2, 3))
    opt = fs.SGD(np.ones((3, 3)), lr=1.0)
    table = opt.resize(0, 5, init=init)
    opt.step(np.ones((5, 3)))
    assert init.all()
    assert not table.any()
    opt.step(init_as_gradient := np.ones((5, 3)), zero_grad=True)
    assert not init_as_gradient.any()


@pytest.mark.parametrize("form", ["one", "list", "tuple", "dict"])
def test_forms(form: str, rng: np.random.Generator) -> None:
    users, items = rng.standard_normal((2, 4, 3))
    given_params: Any = {
        "one": users,
        "list": [items, users],
        "tuple": (items, users),
        "dict": {"items": items, "users": users},
    }[form]
    key = {"one": 0, "list": 1, "tuple": 1, "dict": "users"}[form]
    opt = fs.Adam(given_params)
    table = opt.resize(key, 6)
    params = opt.params
    assert (params if form == "one" else params[key]) is table
    if form != "one":
        other = params["items" if form == "dict" else 0]
        assert other is items
        assert list(opt.state) == (["items", "users"] if form == "dict" else [0, 1])
    if form in ("list", "dict"):
        assert given_params[key] is users  # what the user has is the user's
    g = np.ones((6, 3))
    opt.step({"one": g, "dict": {"users": g}}.get(form, [None, g]))
    assert (table[4:] < 0).all()
    assert repr(opt).startswith(
        "Adam(1 parameter, 18" if form == "one" else "Adam(2 parameters, 30"
    )


@pytest.mark.parametrize("rule", SOME, ids=str)
def test_one_row_at_a_time(rule: Rule, rng: np.random.Generator) -> None:
    """A thousand times: with a step in between, and few moves to other memory."""
    start = rng.standard_normal((1, 3))
    opt = rule.cls({"w": start.copy()}, **rule.options)
    whole = np.concatenate([start, np.arange(1.0, 1000)[:, None] * np.ones(3)])
    places, twin_rows = set(), 1
    twin = rule.cls({"w": start.copy()}, **rule.options)
    for n in range(2, 1001):
        table = opt.resize("w", n, init=float(n - 1))
        places.add(table.__array_interface__["data"][0])
        if n in (17, 400, 1000):
            twin_table = twin.resize("w", n, init=whole[twin_rows:n])
            twin_rows = n
            np.testing.assert_array_equal(table, twin_table)
            g = {"w": rng.standard_normal((n, 3))}
            opt.step(g)
            twin.step(g)
            assert everything(opt) == everything(twin)
            whole[:n] = table
    assert len(places) < 25


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", SOME, ids=str)
def test_tables_of_any_layout(layout: str, rule: Rule, rng: np.random.Generator) -> None:
    start = rng.standard_normal((4, 3))
    plain, odd = (rule.cls([LAYOUTS[name](start.copy())], **rule.options) for name in ("c", layout))
    for opt in (plain, odd):
        steps = np.random.default_rng(1)
        for n in (6, 7, 30):
            opt.step(gradients(opt, steps))
            opt.resize(0, n, init=0.25)
        opt.step(gradients(opt, steps))
    assert everything(plain) == everything(odd)


def test_to_the_size_that_it_has(rng: np.random.Generator) -> None:
    opt = fs.Adam([rng.standard_normal((4, 3))])
    opt.step(gradients(opt, rng))
    before = everything(opt)
    shapes = []
    opt.resize(0, 4, init=lambda shape: shapes.append(shape) or np.zeros(shape))
    opt.resize(0, 4, init=5.0)
    opt.resize(np.int64(0), np.int32(4), init=np.zeros((0, 3)))
    assert shapes == [(0, 3)]
    assert everything(opt) == before


def test_views_of_the_table_before(rng: np.random.Generator) -> None:
    """Keep their values, and no step crashes on them, also when the table itself is gone."""
    start = rng.standard_normal((4, 3))
    opt = fs.Adam([start.copy()])
    view, state = opt.params[0][1:3], opt.state[0]["exp_avg"]
    first = opt.resize(0, 5)
    row = first[2]
    second = opt.resize(0, 6)
    third = opt.resize(0, 5000)
    gc.collect()
    for _ in range(3):
        opt.step(gradients(opt, rng))
    np.testing.assert_array_equal(view, start[1:3])
    assert not state.any()
    assert first.shape == (5, 3)
    assert second.shape == (6, 3)
    assert opt.params[0] is third
    assert np.isfinite(row).all()
    assert opt.state[0]["exp_avg"].any()


def test_the_live_state_is_live() -> None:
    opt = fs.Adam([np.ones((4, 3))])
    opt.resize(0, 6)
    live = opt.state[0]["exp_avg"]
    opt.step([np.ones((6, 3))])
    assert live.all()


def test_an_optimizer_of_a_resized_table(rng: np.random.Generator) -> None:
    """The table may be resized by its own optimizer and by another, and neither sees the other."""
    first = fs.SGD(np.zeros((2, 2)), lr=1.0)
    shared = first.resize(0, 4)
    second = fs.SGD(shared, lr=1.0)
    mine = first.resize(0, 5, init=1.0)
    theirs = second.resize(0, 6, init=2.0)
    np.testing.assert_array_equal(mine[4:], 1)
    np.testing.assert_array_equal(theirs[4:], 2)
    second.step(np.ones((6, 2)))
    first.step(3 * np.ones((5, 2)))
    np.testing.assert_array_equal(theirs[:4], -1)
    np.testing.assert_array_equal(mine[4:], -2)


@pytest.mark.parametrize("where", ["the table", "its room", "its state"])
def test_gradients_that_share_memory(where: str) -> None:
    """Also with what a table has grown into after the gradient was known."""
    other = np.zeros((1, 3))
    opt = fs.Adam([np.zeros((4, 3)), other])
    table = opt.resize(0, 10)
    source = opt.state[0]["exp_avg"] if where == "its state" else table
    if where == "its room":
        g = opt.resize(0, 11).base[12:13]
        assert g.shape == (1, 3)
        g[...] = 0
        opt.step([None, g])
        opt.step([None, g])
        grown = opt.resize(0, 13)
        assert np.shares_memory(grown, g)
    else:
        g = source[2:3]
    before = everything(opt)
    for _ in range(2):
        with pytest.raises(ValueError, match="shares memory"):
            opt.step([None, g])
    assert everything(opt) == before


def test_a_gradient_of_the_old_shape() -> None:
    opt = fs.Adam([np.zeros((4, 3))])
    g = np.ones((4, 3))
    opt.step([g])
    opt.resize(0, 5)
    with pytest.raises(ValueError, match=r"shape \(4, 3\)"):
        opt.step([g])
    with pytest.raises(IndexError):
        opt.step([fs.Rows([5], np.ones((1, 3)))])
    opt.step([fs.Rows([4], np.ones((1, 3)))])
    assert opt.params[0][4].all()


# ---- what is refused ----------------------------------------------------------------------------


def _raise(shape: Any) -> None:
    raise ZeroDivisionError


BAD: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception] | tuple, str]] = [
    ("unknown name", ("c", 9), {}, KeyError, "'c' is not a parameter"),
    ("a position", (0, 9), {}, KeyError, "0 is not a parameter"),
    ("None", (None, 9), {}, KeyError, "None"),
    ("fewer rows", ("a", 3), {}, ValueError, "has 4 rows; it cannot be resized to 3"),
    ("no rows", ("a", 0), {}, ValueError, "4 rows"),
    ("negative", ("a", -1), {}, ValueError, "4 rows"),
    ("a float", ("a", 9.0), {}, TypeError, "float"),
    ("text", ("a", "9"), {}, TypeError, "str"),
    ("None rows", ("a", None), {}, TypeError, "NoneType"),
    ("a shape", ("a", (9, 3)), {}, TypeError, "tuple"),
    ("no dimensions", ("scalar", 9), {}, ValueError, "no dimensions"),
    ("init of all rows", ("a", 6), {"init": np.ones((6, 3))}, ValueError, "shape (6, 3)"),
    ("init that would broadcast", ("a", 6), {"init": np.ones((1, 3))}, ValueError, "shape (1, 3)"),
    ("init of one row", ("a", 6), {"init": np.ones(3)}, ValueError, "shape (3,)"),
    ("callable of a wrong shape", ("a", 6), {"init": lambda s: np.ones(3)}, ValueError, "(3,)"),
    ("callable that raises", ("a", 6), {"init": _raise}, ZeroDivisionError, ""),
    ("init of text", ("a", 6), {"init": "x"}, TypeError, ""),
    ("init None", ("a", 6), {"init": None}, TypeError, ""),
    ("init a dict", ("a", 6), {"init": {}}, TypeError, ""),
    ("ragged", ("a", 6), {"init": [[1, 2, 3], [4]]}, ValueError, ""),
    ("more than there is memory for", ("a", 2**55), {}, MemoryError, ""),
    ("more than there can be", ("a", 2**62), {}, (MemoryError, ValueError), ""),
]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
@pytest.mark.parametrize("resized", [False, True])
def test_bad_arguments_change_nothing(
    arguments: tuple[Any, ...], options: dict[str, Any], error: Any, message: str, resized: bool
) -> None:
    params = {"a": np.ones((2, 3)), "b": np.ones(5), "scalar": np.array(1.0)}
    opt = fs.Adam(params, rows="exact")
    opt.anchor(1.0, {"a": np.zeros((2, 3))})
    opt.resize("a", 4, init=1.0)
    if resized:
        opt.resize("b", 6)
    opt.step({k: np.ones(p.shape) for k, p in opt.params.items()})
    opt.step({"a": fs.Rows([1], np.ones((1, 3)))})
    if error not in (KeyError, TypeError, ValueError):
        opt.flush()  # only that may have been done before memory turns out to be short
    before, arrays = snapshot(opt), list(opt.params.values())
    with pytest.raises(error) as caught:
        opt.resize(*arguments, **options)
    assert message in str(caught.value)
    np.testing.assert_equal(snapshot(opt), before)
    assert all(x is y for x, y in zip(opt.params.values(), arrays, strict=True))
    opt.step({"a": np.ones((4, 3))})


class Foreign:
    """An array of a library that nobody knows."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **arguments: Any) -> Any:
        return self._array.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


@pytest.mark.parametrize("rule", SOME, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensors_grow_as_arrays_do(
    rule: Rule, requires_grad: bool, rng: np.random.Generator
) -> None:
    torch = pytest.importorskip("torch")
    start = rng.standard_normal((3, 2))
    tensor = torch.tensor(start, requires_grad=requires_grad)
    opts = [rule.cls([w], **rule.options) for w in (start, tensor)]
    for count in (3, 4, 5, 9):
        g, new = rng.standard_normal((count, 2)), rng.standard_normal((count, 2))
        new = new[len(opts[0].params[0]) :]
        opts[0].resize(0, count, init=new)
        table = opts[1].resize(0, count, init=torch.from_numpy(new))
        assert isinstance(table, torch.Tensor)
        assert table is opts[1].params[0]
        opts[0].step([g])
        opts[1].step([torch.from_numpy(g)])
        np.testing.assert_array_equal(table.detach().numpy(), opts[0].params[0])


def test_what_cannot_be_resized() -> None:
    torch = pytest.importorskip("torch")
    opt = fs.SGD([Foreign(torch.ones(3, 2))])
    with pytest.raises(TypeError, match="a Foreign; only arrays of NumPy, CuPy and PyTorch"):
        opt.resize(0, 5)
    with pytest.raises(KeyError):
        opt.resize(1, 5)
    with pytest.raises(KeyError):
        opt.resize(-1, 5)
    with pytest.raises(KeyError):
        opt.resize("0", 5)
    with pytest.raises(KeyError):
        opt.resize(False, 5)


def test_init_that_uses_the_optimizer() -> None:
    opt = fs.SGD([np.ones((3, 2))], lr=1.0)
    before = snapshot(opt)

    def init(shape: tuple[int, ...]) -> np.ndarray:
        opt.step([np.ones((3, 2))])
        return np.zeros(shape)

    with pytest.raises(RuntimeError, match="from inside"):
        opt.resize(0, 5, init=init)
    np.testing.assert_equal(snapshot(opt), before)


# ---- with state dicts, rows that are behind, anchors, threads -----------------------------------


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("way", ["dict", "file", "pickle", "deepcopy"])
def test_interrupted_is_uninterrupted(
    rule: Rule, way: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    opt = rule.cls([rng.standard_normal((4, 3))], **rule.options)
    opt.step(gradients(opt, rng))
    opt.resize(0, 7, init=1.0)
    opt.step(gradients(opt, rng))
    other = copied(way, opt, rule, tmp_path)
    assert everything(other) == everything(opt)
    steps = rng.standard_normal((2, 9, 3))
    for each in (opt, other):
        each.step([steps[0][:7]])
        each.resize(0, 9, init=2.0)
        each.step([steps[1]])
    assert everything(other) == everything(opt)


def copied(way: str, opt: fs.Optimizer, rule: Rule, path: Path) -> fs.Optimizer:
    if way == "pickle":
        return pickle.loads(pickle.dumps(opt))
    if way == "deepcopy":
        return copy.deepcopy(opt)
    other = rule.cls([opt.params[0].copy()], **rule.options)
    if way == "dict":
        other.load_state_dict(opt.state_dict())
    else:
        opt.save(path / "x")
        other.load(path / "x")
    return other


def test_room_to_spare_is_not_pickled() -> None:
    opt = fs.Adam(np.zeros((10_000, 10)))
    opt.resize(0, 10_001)
    assert len(pickle.dumps(opt)) < 3 * 8 * 100_010 + 10_000


@pytest.mark.parametrize("rule", [rule for rule in SOME if rule.states], ids=str)
@pytest.mark.parametrize("rows", ["lazy", "exact"])
def test_a_state_dict_of_another_size(rule: Rule, rows: Any) -> None:
    opt = rule.cls([np.ones((4, 3))], rows=rows, **rule.options)
    opt.step([fs.Rows([1], np.ones((1, 3)))])
    old = opt.state_dict()
    opt.resize(0, 5)
    before = snapshot(opt)
    with pytest.raises(ValueError, match="shape"):
        opt.load_state_dict(old)
    np.testing.assert_equal(snapshot(opt), before)
    small = rule.cls([np.ones((4, 3))], rows=rows, **rule.options)
    with pytest.raises(ValueError, match="shape"):
        small.load_state_dict(opt.state_dict())
    small.load_state_dict(old)


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("has_anchor", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_rows_that_are_behind(
    rule: Rule, has_anchor: bool, again: bool, rng: np.random.Generator
) -> None:
    """They have missed what they have missed; new rows have missed nothing."""
    start = rng.standard_normal((6, 2))
    exact, dense = (
        rule.cls([start.copy()], **{**rule.options, "rows": rows}) for rows in ("exact", "lazy")
    )
    rows = 6
    if has_anchor:
        for opt in (exact, dense):
            opt.anchor(0.3, [np.zeros((6, 2))])
    for step in range(60):
        if step in ((20, 25, 40) if again else (20,)):
            rows += 2
            more = rng.standard_normal((2, 2))
            for opt in (exact, dense):
                opt.resize(0, rows, init=more)
        indices = rng.permutation(rows - 1)[: rng.integers(0, 3)]
        values = rng.standard_normal((len(indices), 2))
        exact.step([fs.Rows(indices, values)])
        dense.step([scattered((rows, 2), indices, values)])
    exact.flush()
    np.testing.assert_allclose(exact.params[0], dense.params[0], rtol=0, atol=1e-9)
    for name in rule.states:
        np.testing.assert_allclose(
            exact.state[0][name], dense.state[0][name], rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("way", ["dict", "file", "pickle", "deepcopy"])
def test_rows_that_are_behind_are_saved(way: str, tmp_path: Path, rng: np.random.Generator) -> None:
    rule = Rule(fs.Adam, ROWWISE[0].reference, {"rows": "exact"})
    opt = fs.Adam([rng.standard_normal((6, 2))], rows="exact")
    opt.step([np.ones((6, 2))])
    for _ in range(5):
        opt.step([fs.Rows([0], np.ones((1, 2)))])
    opt.resize(0, 8, init=1.0)
    opt.step([fs.Rows([7, 1], np.ones((2, 2)))])
    assert opt.state_dict()["state"][0]["missed_steps"].tolist() == [1, 0, 6, 6, 6, 6, 1, 0]
    other = copied(way, opt, rule, tmp_path)
    for each in (opt, other):
        each.step([fs.Rows([6], np.ones((1, 2)))])
        each.flush()
    assert everything(opt) == everything(other)


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("has_importance", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_anchored_tables(
    rule: Rule, has_importance: bool, dtype: np.dtype, rng: np.random.Generator
) -> None:
    """Old rows are tied to what they were tied to, bit for bit; new ones to nothing."""
    start = rng.standard_normal((6, 3)).astype(dtype)
    penalty = some_penalty(rng, start.shape, dtype)
    if not has_importance:
        penalty = penalty._replace(importance=1.0)
    small, opt, free = (rule.cls([start.copy()], **rule.options) for _ in range(3))
    anchor(small, penalty)
    anchor(opt, penalty)
    for each, n in ((opt, 8), (free, 8), (opt, 9), (free, 9)):
        each.resize(0, n, init=0.5)
    assert opt.anchors[0]["reference"].shape == (9, 3)
    for _ in range(4):
        g = rng.standard_normal((9, 3)).astype(dtype)
        small.step([g[:6]])
        opt.step([g])
        free.step([g])
    for name, rows in (("small", slice(6)), ("free", slice(6, None))):
        twin = {"small": small, "free": free}[name]
        expected = twin.params[0] if name == "small" else twin.params[0][rows]
        np.testing.assert_array_equal(bits(opt.params[0][rows]), bits(expected))
    other = pickle.loads(pickle.dumps(opt))
    np.testing.assert_equal(other.anchors, opt.anchors)


def test_an_anchor_after_the_table_has_grown(rng: np.random.Generator) -> None:
    """Old rows have two, new ones one."""
    start = rng.standard_normal((2, 3))
    opt = fs.SGD([start.copy()], lr=0.1)
    first = some_penalty(rng, (2, 3))
    anchor(opt, first)
    opt.resize(0, 4, init=2.0)
    second = some_penalty(rng, (4, 3))
    anchor(opt, second)
    opt.step([np.zeros((4, 3))])
    nothing = np.zeros((2, 3))
    first = Penalty(
        first.strength,
        np.concatenate([first.reference, nothing]),
        np.concatenate([first.importance, nothing]),
    )
    whole = np.concatenate([start, np.full((2, 3), 2.0)])
    np.testing.assert_allclose(opt.params[0], pulled(whole, 0.1, first, second), rtol=1e-13)


@pytest.mark.parametrize("init", [np.nan, np.inf, -np.inf])
def test_new_rows_of_an_anchored_table_may_be_filled_later(init: float) -> None:
    """What they are first filled with is not what they are tied to: they are tied to nothing."""
    opt = fs.SGD(np.ones((3, 2)), lr=0.5)
    opt.anchor(1.0)
    table = opt.resize(0, 5, init=init)
    table[3:] = 2.0
    opt.load_state_dict(opt.state_dict())
    opt.step(np.ones((5, 2)))
    np.testing.assert_array_equal(table[3:], 1.5)


def test_an_anchor_that_could_not_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """If memory for the larger anchor is not to be had, nothing has happened."""
    from fusestep import _penalties

    opt = fs.SGD(np.ones((3, 2)), lr=0.5)
    opt.anchor(1.0)
    before = snapshot(opt)

    def full(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(_penalties, "grown", full)
    with pytest.raises(MemoryError):
        opt.resize(0, 5)
    np.testing.assert_equal(snapshot(opt), before)


@pytest.mark.parametrize("rule", SOME, ids=str)
def test_tiers_and_threads(rule: Rule) -> None:
    found = []
    for tier in AVAILABLE:
        for threads in (1, 2, 3):
            _cpu.use_tier(tier)
            fs.set_num_threads(threads)
            rng = np.random.default_rng(5)
            opt = rule.cls([rng.standard_normal((700, 90)).astype(f32)], **rule.options)
            for n in (701, 705, 1500):
                opt.step(gradients(opt, rng))
                opt.resize(0, n, init=0.1)
            opt.step(gradients(opt, rng))
            found.append(everything(opt))
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("rows", ["lazy", "exact"])
def test_one_optimizer_in_many_threads(rows: Any) -> None:
    """One lets the table grow while others step on its first rows, and save."""
    opt = fs.SGD([np.zeros((10, 4))], lr=1.0, rows=rows)
    one = np.ones((1, 4))
    done = threading.Event()

    def work(i: int) -> None:
        if i == 0:
            for n in range(11, 300):
                opt.resize(0, n, init=-5.0)
            done.set()
        elif i < 3:
            for _ in range(300):
                opt.step([fs.Rows([i], one)])
        else:
            while not done.is_set():
                pickle.loads(pickle.dumps(opt))
                opt.flush()

    in_threads(4, work)
    opt.flush()
    expected = np.full((299, 4), -5.0)
    expected[:10] = 0
    expected[1:3] = -300
    np.testing.assert_array_equal(opt.params[0], expected)


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(EVERY),
    script=st.lists(
        st.one_of(
            st.tuples(st.just("resize"), st.integers(0, 2), st.integers(0, 9)),
            st.tuples(st.just("dense"), st.integers(0, 2), st.just(0)),
            st.tuples(st.just("rows"), st.integers(0, 2), st.integers(0, 5)),
            st.tuples(st.just("anchor"), st.integers(0, 2), st.integers(0, 3)),
            st.tuples(st.just("release"), st.just(0), st.just(0)),
            st.tuples(st.just("save"), st.just(0), st.just(0)),
        ),
        max_size=25,
    ),
    max_norm=st.sampled_from([None, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_is_done_to_three_tables(
    rule: Rule, script: list[tuple[str, int, int]], max_norm: float | None, seed: int
) -> None:
    """Against an optimizer that is made anew, of larger tables, whenever one is resized."""
    rng = np.random.default_rng(seed)
    start = [rng.standard_normal((n, 2)) for n in (3, 0, 7)]
    ours, theirs = (
        rule.cls([w.copy() for w in start], max_norm=max_norm, **rule.options) for _ in range(2)
    )
    for what, i, n in script:
        if what == "resize":
            more = rng.standard_normal((n, 2))
            ours.resize(i, len(ours.params[i]) + n, init=more)
            theirs = remade(theirs, i, more)
        elif what in ("dense", "rows"):
            rows = len(ours.params[i])
            grads: list[Any] = [None, None, None]
            grads[i] = rng.standard_normal((rows, 2))
            if what == "rows":
                n = n if rows else 0
                grads[i] = fs.Rows(rng.integers(0, max(rows, 1), n), rng.standard_normal((n, 2)))
            for opt in (ours, theirs):
                opt.step(grads)
        elif what == "anchor":
            for opt in (ours, theirs):
                opt.anchor([float(n) if k == i else None for k in range(3)])
        elif what == "release":
            ours.release_anchor()
            theirs.release_anchor()
        else:
            ours = pickle.loads(pickle.dumps(ours))
        assert everything(ours) == everything(theirs)


def remade(opt: fs.Optimizer, i: int, more: np.ndarray) -> fs.Optimizer:
    """The same with these rows more, by way of its state dict."""
    saved = opt.__getstate__()
    params = [w.copy() for w in opt.params]
    params[i] = np.concatenate([params[i], more])
    entry = saved["state_dict"]["state"][i]
    initial = saved["hyperparameters"].get("initial_accumulator_value", 0.0)
    if "anchor" in entry:
        ones = np.ones_like(entry["anchor"])
        entry["anchor_importance"] = entry.get("anchor_importance", ones)
    fill = {"anchor": 0.0, "anchor_importance": 0.0}
    for name, array in entry.items():
        if np.ndim(array):
            rest = np.full((len(more), *array.shape[1:]), fill.get(name, initial))
            entry[name] = np.concatenate([array, rest])
    twin = type(opt).__new__(type(opt))
    twin.__setstate__({**saved, "params": params})
    return twin


def test_the_bare_kernel(rng: np.random.Generator) -> None:
    w = rng.standard_normal((6, 4))
    opt = fs.RowwiseAdagrad(w.copy(), lr=0.1, weight_decay=0.01)
    total = np.zeros(6)
    for step in range(1, 6):
        g = fs.Rows([1, 4, 1], rng.standard_normal((3, 4)))
        opt.step(g)
        fs.functional.rowwise_adagrad_(w, g, total, step=step, lr=0.1, weight_decay=0.01)
    np.testing.assert_array_equal(w, opt.params)
    np.testing.assert_array_equal(total, opt.state[0]["sum"])
    with pytest.raises(ValueError, match="one element for each row"):
        fs.functional.rowwise_adagrad_(w, g, np.zeros((6, 4)), step=6)
