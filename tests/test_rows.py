"""Gradients of some rows: those rows move as by a dense step, and nothing else does."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import importlib.util
import math
import pickle
import platform
import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
import simulated_cupy
from concurrency import in_threads
from conftest import AVAILABLE
from devices import assert_same, library
from fusestep import _cpu
from fusestep import functional as F  # noqa: N812
from rules import PLAIN, RULES, Rule
from strategies import GRAD_SCALES, MAX_NORMS
from test_bits import LAYOUTS
from test_dlpack import Foreign
from test_truth import TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

f32 = np.float32
bfloat16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(name) for name in ("f8", "f4", "f2")] + [bfloat16]


# ---- what must come out -------------------------------------------------------------------------


def summed(
    indices: np.ndarray, values: np.ndarray, dtype: Any = np.float64
) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are listed, ascending, and the sums of their values in the list's order."""
    rows, first, inverse = np.unique(indices, return_index=True, return_inverse=True)
    again = np.ones(len(indices), bool)
    again[first] = False
    values = values.astype(dtype)
    sums = values[first]
    np.add.at(sums, inverse[again], values[again])
    return rows, sums


class Lazy:
    """A rule's reference, applied to the rows that are listed; only the step count is shared."""

    def __init__(self, rule: Rule, start: np.ndarray) -> None:
        self.rule, self.w = rule, start.astype(np.float64)
        initial = rule.options.get("initial_accumulator_value", 0.0)
        self.states = {name: np.full(start.shape, initial) for name in rule.states}
        self.steps, self.mu_product = 0, 1.0

    def step(self, indices: np.ndarray, values: np.ndarray) -> None:
        rows, sums = summed(indices, values)
        state = {"step": self.steps, "mu_product": self.mu_product}
        state |= {name: s[rows] for name, s in self.states.items()}
        if self.steps == 0:
            state.pop("momentum_buffer", None)  # its first value is the gradient
        self.w[rows] = self.rule.reference(self.w[rows], sums, state, **self.rule.options)
        for name, s in self.states.items():
            s[rows] = state[name]
        self.steps, self.mu_product = self.steps + 1, state["mu_product"]

    def check(self, opt: fs.Optimizer, w: np.ndarray, tolerance: float) -> None:
        np.testing.assert_allclose(w, self.w, rtol=0, atol=tolerance)
        for name, s in self.states.items():
            np.testing.assert_allclose(opt.state[0][name], s, rtol=tolerance, atol=tolerance)
        assert opt.state[0]["step"] == opt.steps == self.steps


def everything(opt: fs.Optimizer) -> dict[str, Any]:
    """All that a step may change: equal where every bit is, whatever the layout."""
    given = opt.params
    if isinstance(given, dict):
        params = list(given.values())
    else:
        params = given if isinstance(given, list) else [given]
    found: dict[str, Any] = {"steps": opt.steps, "skipped_steps": opt.skipped_steps}
    for parameter, (key, state) in zip(params, opt.state.items(), strict=True):
        for name, value in {"parameter": parameter, **state}.items():
            is_array = np.ndim(value) > 0 or name == "parameter"
            found[f"{name} {key}"] = (
                hashlib.sha256(np.asarray(value).tobytes()).hexdigest() if is_array else value
            )
    return found


def on_cpu(array: Any) -> np.ndarray:
    """A copy, whichever library it is of."""
    return np.array(array if isinstance(array, np.ndarray) else np.from_dlpack(array))


def arrays_of(opt: fs.Optimizer) -> dict[str, np.ndarray]:
    """The one parameter and its state."""
    [w] = opt.params
    return {"parameter": w, **{k: v for k, v in opt.state[0].items() if np.ndim(v)}}


def dense_twin(opt: fs.Optimizer, rows: np.ndarray) -> fs.Optimizer:
    """An optimizer of a table of these rows alone, which has come as far."""
    saved = opt.__getstate__()
    arrays = {name: np.ascontiguousarray(a[rows]) for name, a in arrays_of(opt).items()}
    saved["params"] = [arrays.pop("parameter")]
    saved["state_dict"]["state"][0].update(arrays)
    twin = type(opt).__new__(type(opt))
    twin.__setstate__(saved)
    return twin


def checked_step(opt: fs.Optimizer, gradient: fs.Rows, **arguments: Any) -> None:
    """A step of one parameter, which must be the dense step of a table of the listed rows alone.

    Bit for bit; and all other rows, the indices and the values must be left as they are.
    """
    arrays = arrays_of(opt)
    before = {name: array.copy() for name, array in arrays.items()}
    indices, values = on_cpu(gradient.indices), on_cpu(gradient.values)
    in_double = any(array.dtype == np.float64 for array in arrays.values())
    rows, sums = summed(indices, values, np.float64 if in_double else np.float32)
    twin = dense_twin(opt, rows)
    twin.step([sums], **{k: v for k, v in arguments.items() if k != "zero_grad"})

    opt.step([gradient], **arguments)
    for name, array in arrays_of(twin).items():
        before[name][rows] = array
        assert_same(arrays[name], before[name])
    ours, theirs = ({k: v for k, v in o.state[0].items() if not np.ndim(v)} for o in (opt, twin))
    assert ours == theirs
    assert (opt.steps, opt.skipped_steps) == (twin.steps, twin.skipped_steps)
    np.testing.assert_array_equal(on_cpu(gradient.indices), indices)
    left = np.zeros_like(values) if arguments.get("zero_grad") else values
    assert_same(on_cpu(gradient.values), left)


def assert_refused(
    opt: fs.Optimizer, gradients: Any, error: type[Exception], message: str = "", **arguments: Any
) -> None:
    """A step raises, and parameters, state, counters and gradients keep every bit."""
    flat = gradients.values() if isinstance(gradients, dict) else gradients
    given = [g.values if isinstance(g, fs.Rows) else g for g in flat]
    kept = [(g, g.copy()) for g in given if isinstance(g, np.ndarray)]
    before = everything(opt)
    with pytest.raises(error) as caught:
        opt.step(gradients, **arguments)
    assert message in str(caught.value)
    assert everything(opt) == before
    for g, copied in kept:
        assert_same(g, copied)


# ---- what may be given --------------------------------------------------------------------------


def _read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


def _every_second_row(a: np.ndarray) -> np.ndarray:
    return np.repeat(a, 2, axis=0)[::2]


def _columns_of_a_wider_table(a: np.ndarray) -> np.ndarray:
    if a.ndim < 2:
        return a.copy()
    wide = np.full((*a.shape[:-1], a.shape[-1] + 3), 7, a.dtype)
    wide[..., 1:-2] = a
    return wide[..., 1:-2]


def _tensor(a: np.ndarray) -> Any:
    import torch

    if a.dtype == bfloat16:
        return torch.tensor(a.astype(f32)).to(torch.bfloat16)
    return torch.tensor(np.ascontiguousarray(a))


INDEX_FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "int64": lambda i: i.astype(np.int64),
    "int32": lambda i: i.astype(np.int32),
    "long long": lambda i: i.astype(np.longlong),
    "list": lambda i: i.tolist(),
    "tuple": lambda i: tuple(i.tolist()),
    "every second": _every_second_row,
    "backwards": lambda i: i[::-1].astype(np.int32)[::-1],
    "a column": lambda i: np.stack([i, i + 1], 1)[:, 0],
    "a packed field": lambda i: LAYOUTS["packed"](i.astype(np.int32)),
    "read-only": _read_only,
    "DLPack": Foreign,
}
TABLE_LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    **LAYOUTS,
    "every second row": _every_second_row,
    "columns": _columns_of_a_wider_table,
}
VALUE_FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    **TABLE_LAYOUTS,
    "read-only": _read_only,
    "DLPack": Foreign,
}
if importlib.util.find_spec("torch"):
    INDEX_FORMS |= {
        "torch int64": _tensor,
        "torch int32": lambda i: _tensor(i.astype(np.int32)),
        "torch every second": lambda i: _tensor(np.repeat(i, 2))[::2],
    }
    VALUE_FORMS |= {
        "torch": _tensor,
        "torch transposed": lambda a: _tensor(a.T).permute(*reversed(range(a.ndim))),
    }


def draw_list(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Row numbers in no order: none, few, or more than there are; with and without duplicates."""
    kind = rng.integers(5)
    if kind == 0 or rows == 0:
        return np.zeros(0, np.int64)
    if kind == 1:
        return rng.permutation(rows)[: rng.integers(1, rows + 1)]
    if kind == 2:
        return np.sort(rng.permutation(rows)[: rng.integers(1, rows + 1)])
    if kind == 3:
        return np.full(rng.integers(2, 5), rng.integers(rows))
    return rng.integers(0, rows, rng.integers(1, 2 * rows + 2))


# ---- the truth ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_sixty_steps(rule: Rule, dtype: str, tier: str, rng: np.random.Generator) -> None:
    """Whatever holds indices and values; rows that are first listed late, too."""
    w = rng.standard_normal((37, 3)).astype(dtype)
    truth = Lazy(rule, w)
    opt = rule.cls([w], **rule.options)
    index_forms, value_forms = list(INDEX_FORMS.values()), list(VALUE_FORMS.values())
    for step in range(60):
        indices = draw_list(rng, 37 if step > 20 else 20)
        values = rng.standard_normal((len(indices), 3)).astype(dtype)
        others = np.setdiff1d(np.arange(37), indices)
        before = {name: array[others] for name, array in arrays_of(opt).items()}
        opt.step(
            [
                fs.Rows(
                    index_forms[step % len(index_forms)](indices),
                    value_forms[step % len(value_forms)](values),
                )
            ]
        )
        truth.step(indices, values)
        for name, array in arrays_of(opt).items():
            assert_same(array[others], before[name])
    truth.check(opt, w, TOLERANCE[dtype])


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_sixteen_bit_tables_round_once_a_step(
    rule: Rule, dtype: np.dtype, tier: str, rng: np.random.Generator
) -> None:
    """Also where a row is listed several times: its values are added up in float32."""
    w = rng.standard_normal((40, 7)).astype(dtype)
    opt, truth = rule.cls([w], **rule.options), Lazy(rule, w)
    for _ in range(30):
        indices = draw_list(rng, 40)
        values = rng.standard_normal((len(indices), 7)).astype(dtype)
        truth.w[...] = w
        opt.step([fs.Rows(indices, values)])
        truth.step(indices, values)
        # The exact result may lie on the other side of a rounding boundary by float32's error.
        low, high = (truth.w - 1e-4).astype(dtype), (truth.w + 1e-4).astype(dtype)
        assert np.all((w >= low) & (w <= high))


@pytest.mark.parametrize("table", DTYPES, ids=str)
@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("state", [None, "float32", "float64"])
def test_duplicates_are_added_in_order_in_the_compute_type(
    table: np.dtype, given: np.dtype, state: str | None, rng: np.random.Generator
) -> None:
    """Sums that any other order or precision would change, seen in the first momentum."""
    indices = rng.integers(0, 5, 60)
    values = (rng.standard_normal((60, 3)) * 10.0 ** rng.integers(-4, 5, (60, 1))).astype(given)
    w = np.zeros((5, 3), table)
    opt = fs.SGD([w], lr=0.0, momentum=0.9, state_dtype=state)
    opt.step([fs.Rows(indices, values)])
    compute = np.float64 if np.dtype("f8") in (table, np.dtype(state or "f4")) else np.float32
    expected = np.zeros((5, 3), compute)
    for i, value in zip(indices, values, strict=True):
        expected[i] += value.astype(compute)
    buffer = opt.state[0]["momentum_buffer"]
    assert_same(buffer, expected.astype(buffer.dtype))


ROW_SIZES = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 1023, 1024, 1025, 2000]
ROW_SHAPES: list[tuple[int, ...]] = [
    *[(size,) for size in ROW_SIZES],
    *[(), (0,), (3, 5), (1, 7), (7, 1), (2, 0, 3), (33, 40), (4, 3, 7), (2, 3, 1, 4)],
]


@settings(max_examples=400, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    tier=st.sampled_from(AVAILABLE),
    rest=st.sampled_from(ROW_SHAPES),
    rows=st.integers(0, 40),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    state_dtype=st.sampled_from([None, None, "float64"]),
    layout=st.sampled_from(sorted(TABLE_LAYOUTS)),
    forms=st.lists(
        st.tuples(st.sampled_from(sorted(INDEX_FORMS)), st.sampled_from(sorted(TABLE_LAYOUTS))),
        min_size=1,
        max_size=4,
    ),
    arguments=st.fixed_dictionaries(
        {},
        optional={
            "lr": st.just(0.03),
            "grad_scale": st.sampled_from(GRAD_SCALES),
            "zero_grad": st.just(True),
        },
    ),
    maximize=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_step_of_some_rows_is_a_dense_step_of_a_small_table(
    rule: Rule,
    tier: str,
    rest: tuple[int, ...],
    rows: int,
    dtypes: tuple[np.dtype, np.dtype],
    state_dtype: str | None,
    layout: str,
    forms: list[tuple[str, str]],
    arguments: dict[str, Any],
    maximize: bool,
    seed: int,
) -> None:
    """Bit for bit, for any shapes, strides and dtypes, from any state, and with any arguments."""
    rng = np.random.default_rng(seed)

    def draw(count: int, dtype: np.dtype, laid_out: str) -> np.ndarray:
        if dtype == bfloat16 and laid_out == "packed":  # which NumPy cannot
            laid_out = "gappy"
        return TABLE_LAYOUTS[laid_out](rng.standard_normal((count, *rest)).astype(dtype))

    w = draw(rows, dtypes[0], layout)
    opt = rule.cls([w], maximize=maximize, state_dtype=state_dtype, **rule.options)
    before = _cpu.active_tier()
    _cpu.use_tier(tier)
    try:
        for index_form, value_layout in forms:
            indices = draw_list(rng, rows)
            values = draw(len(indices), dtypes[1], value_layout)
            checked_step(opt, fs.Rows(INDEX_FORMS[index_form](indices), values), **arguments)
    finally:
        _cpu.use_tier(before)
    assert opt.steps == len(forms)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_listed_once_is_the_dense_step(
    rule: Rule, dtype: np.dtype, tier: str, rng: np.random.Generator
) -> None:
    """In any order, from the first step on: the same bits, state and counters."""
    dense, lazy = (np.ones((67, 19), dtype) for _ in range(2))
    dense_opt, lazy_opt = (rule.cls([w], **rule.options) for w in (dense, lazy))
    for step in range(5):
        g = rng.standard_normal(dense.shape).astype(dtype)
        order = rng.permutation(67) if step else np.arange(67)
        dense_opt.step([g], grad_scale=0.3)
        lazy_opt.step([fs.Rows(order, g[order])], grad_scale=0.3)
        assert everything(lazy_opt) == everything(dense_opt)


def test_sgd_without_momentum_is_the_dense_step(tier: str, rng: np.random.Generator) -> None:
    """Where no state ages and nothing decays, zeros for the other rows are the same gradient."""
    lazy = rng.standard_normal((300, 33)).astype(f32)
    dense = lazy.copy()
    lazy_opt, dense_opt = fs.SGD([lazy], lr=0.1), fs.SGD([dense], lr=0.1)
    for _ in range(10):
        indices = rng.permutation(300)[:50]
        values = rng.standard_normal((50, 33)).astype(f32)
        g = np.zeros_like(dense)
        g[indices] = values
        lazy_opt.step([fs.Rows(indices, values)])
        dense_opt.step([g])
    assert everything(lazy_opt) == everything(dense_opt)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("cls", "name", "options"),
    [
        (fs.Adam, "SparseAdam", {"lr": 0.01, "eps": 1e-12}),
        (fs.Adam, "SparseAdam", {"lr": 0.003, "eps": 1e-12, "betas": (0.7, 0.9)}),
        (fs.Adagrad, "Adagrad", {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1}),
        (fs.SGD, "SGD", {"lr": 0.1}),
    ],
    ids=str,
)
def test_embeddings_of_torch(
    cls: type[fs.Optimizer], name: str, options: dict[str, Any], maximize: bool
) -> None:
    """The gradient of torch's own embedding, as it is, against torch's sparse optimizers."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    theirs = torch.nn.Embedding(60, 9, sparse=True)
    ours = theirs.weight.detach().clone()
    other = getattr(torch.optim, name)(theirs.parameters(), maximize=maximize, **options)
    opt = cls([ours], maximize=maximize, **options)
    for step in range(50):
        count = 0 if step == 7 else int(torch.randint(1, 90, (), generator=generator))
        batch = torch.randint(0, 60, (count,), generator=generator)
        factors = torch.randn(count, 9, generator=generator)
        theirs.weight.grad = None
        (theirs(batch) * factors).sum().backward()
        gradient = theirs.weight.grad
        opt.step([fs.Rows(gradient._indices()[0], gradient._values())])
        other.step()
        np.testing.assert_allclose(ours, theirs.weight.detach(), rtol=0, atol=1e-5)
    assert opt.state[0]["step"] == 50


# ---- lists of every kind ------------------------------------------------------------------------


@pytest.mark.parametrize("table_rows", [1, 2, 2047, 2048, 2049, 2**16 + 1, 2**22, 2**22 + 1])
def test_lists_of_any_length_into_tables_of_any_length(
    table_rows: int, rng: np.random.Generator
) -> None:
    """Around the sizes where the list is put in order in another way, and its digits end."""
    w, expected = np.zeros(table_rows, f32), np.zeros(table_rows, f32)
    opt = fs.SGD([w], lr=1.0)
    edges = np.array([0, table_rows - 1, *(2**k + d for k in (11, 16, 22) for d in (-1, 0, 1))])
    edges = edges[edges < table_rows]
    for count in (0, 1, 2, 255, 256, 257, 3000):
        for source in (edges, np.arange(table_rows), np.arange(table_rows)[-300:]):
            indices = rng.choice(source, count)
            values = rng.standard_normal(count).astype(f32)
            opt.step([fs.Rows(indices, values)])
            rows, sums = summed(indices, values, f32)
            expected[rows] -= sums
    assert_same(w, expected)
    assert_refused(opt, [fs.Rows([0, table_rows], np.ones(2))], IndexError, f"row {table_rows} ")


@pytest.mark.parametrize("rest", [(), (1,), (3,), (16,)], ids=str)
@pytest.mark.parametrize("dtype", ["f8", "f4"])
@pytest.mark.parametrize("threads", [1, 3])
def test_many_duplicates(
    rest: tuple[int, ...], dtype: str, threads: int, rng: np.random.Generator
) -> None:
    """50,000 of 1,000 rows, some of them thousands of times, against np.add.at."""
    fs.set_num_threads(threads)
    indices = np.minimum(rng.zipf(1.3, 50_000), 1000) - 1
    values = (rng.standard_normal((50_000, *rest)) * 10).astype(dtype)
    assert np.bincount(indices).max() > 5000
    for order in (slice(None), np.argsort(indices, kind="stable"), np.argsort(-indices)):
        w, expected = np.zeros((2, 1000, *rest), dtype)
        np.add.at(expected, indices[order], -values[order])
        fs.SGD([w], lr=1.0).step([fs.Rows(indices[order], values[order])])
        assert_same(w, expected)


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("size", [1, 40, 2000])
def test_one_row_again_and_again(rule: Rule, size: int, rng: np.random.Generator) -> None:
    w = rng.standard_normal((9, size)).astype(f32)
    opt = rule.cls([w], **rule.options)
    for count in (2, 3, 700):
        values = rng.standard_normal((count, size)).astype(f32)
        checked_step(opt, fs.Rows(np.full(count, 4), values))
        checked_step(opt, fs.Rows(np.broadcast_to(np.int32(8), (count,)), values), zero_grad=True)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_empty_list_is_a_step(rule: Rule, tier: str, rng: np.random.Generator) -> None:
    """The first, too: whatever the rule does in a step 1 alone is over then."""
    for common in ({}, {"max_norm": 0.1, "skip_nonfinite": True}):
        w = rng.standard_normal((5, 4))
        start, truth = w.copy(), Lazy(rule, w)
        opt = rule.cls([w], **rule.options, **common)
        for indices in ([], np.zeros(0, np.int32), np.arange(9)[4:4]):
            opt.step([fs.Rows(indices, np.zeros((0, 4), f32))], zero_grad=True)
            truth.step(np.zeros(0, int), np.zeros((0, 4)))
            assert_same(w, start)
        assert opt.steps == opt.state[0]["step"] == 3
        values = np.full((2, 4), 1e-3)
        opt.step([fs.Rows([3, 1], values)])
        truth.step(np.array([3, 1]), values)
        truth.check(opt, w, 1e-12)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradients_that_cancel(rule: Rule, rng: np.random.Generator) -> None:
    """A row whose sum is zero is listed all the same: it decays, and its momentum moves it."""
    w = rng.standard_normal((6, 5)).astype(f32)
    opt = rule.cls([w], **rule.options)
    values = rng.standard_normal((6, 5)).astype(f32)
    checked_step(opt, fs.Rows(np.arange(6), values))
    start = w.copy()
    checked_step(opt, fs.Rows([2, 4, 2, 4], np.concatenate([values[:2], -values[:2]])))
    if rule.states and rule.cls is not fs.Adagrad and rule.options.get("betas", (1,))[0]:
        assert (w[[2, 4]] != start[[2, 4]]).all()
    if rule.options.get("weight_decay"):
        assert (w[[2, 4]] != start[[2, 4]]).all()


def test_values_with_no_memory_of_their_own(rng: np.random.Generator) -> None:
    """One row for all that are listed; one number for the whole gradient."""
    w = rng.standard_normal((50, 33)).astype(f32)
    opt = fs.Adam([w], lr=0.1)
    row = rng.standard_normal(33).astype(f32)
    indices = rng.integers(0, 50, 70)
    checked_step(opt, fs.Rows(indices, np.broadcast_to(row, (70, 33))))
    checked_step(opt, fs.Rows(indices, np.broadcast_to(f32(0.5), (70, 33))))


def test_what_lies_between_is_left_alone(tier: str) -> None:
    """Between the rows of a table, the elements of its rows, and those of the values."""
    wide, given = np.full((50, 60), 7.0, f32), np.full((20, 40), 5.0, f32)
    indices = np.array([3, 21, 3, 0, 24])
    given[::4, ::2] = 1.0
    fs.Adam([wide[::2, ::3]], lr=1.0).step([fs.Rows(indices, given[::4, ::2])], zero_grad=True)
    expected = np.full_like(wide, 7.0)
    expected[2 * indices, ::3] = 6.0
    np.testing.assert_array_equal(wide, expected)
    assert not given[::4, ::2].any()
    given[::4, ::2] = 5.0
    assert (given == 5).all()


def test_lists_that_change_between_steps(rng: np.random.Generator) -> None:
    """The same Rows, whose memory holds something else each time; or that holds other memory."""
    w = rng.standard_normal((30, 17)).astype(f32)
    opt = fs.AdamW([w], lr=0.1)
    gradient = fs.Rows(np.arange(12), np.ones((12, 17), f32))
    for _ in range(5):
        checked_step(opt, gradient, zero_grad=True)
        gradient.indices[...] = rng.integers(0, 30, 12)
        gradient.values[...] = rng.standard_normal((12, 17))
        checked_step(opt, gradient)
        gradient.indices = gradient.indices[::-1]
        gradient.values = gradient.values[:, ::-1]
        checked_step(opt, gradient)
        gradient.indices, gradient.values = gradient.indices[:7], gradient.values[:7]
        checked_step(opt, gradient)
        gradient = fs.Rows(rng.integers(0, 30, 12).astype(np.int32), np.ones((12, 17), f32))


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_dense_gradients_and_rows_in_turn(rule: Rule, rng: np.random.Generator) -> None:
    """A dense step is one of all rows; whatever memory the gradients before were in."""
    lazy = rng.standard_normal((12, 5)).astype(f32)
    other = lazy.copy()
    lazy_opt, opt = (rule.cls([w], **rule.options) for w in (lazy, other))
    every, few, memory = np.arange(12), np.array([3, 3, 11, 0]), np.ones((12, 5), f32)
    for step in range(12):
        memory[...] = rng.standard_normal(memory.shape)
        if step % 3 == 1:
            lazy_opt.step([fs.Rows(few, memory[:4])])
            opt.step([fs.Rows(few, memory[:4])], zero_grad=step % 2 == 0)
        else:
            lazy_opt.step([fs.Rows(every, memory)])
            opt.step([memory], zero_grad=step % 2 == 0)
        if step % 4 == 0:
            assert_refused(opt, [fs.Rows([12], memory[:1])], IndexError)
        assert everything(lazy_opt) == everything(opt)


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("named", [False, True])
def test_lists_of_dense_gradients_and_rows(
    rule: Rule, named: bool, rng: np.random.Generator
) -> None:
    """Each parameter moves, or does not, as if it were alone."""
    shapes = {"user": (30, 8), "item": (7, 3, 2), "W": (8, 8), "b": (), "unused": (4,)}
    start = {name: rng.standard_normal(shape).astype(f32) for name, shape in shapes.items()}
    alone = {name: rule.cls([w.copy()], **rule.options) for name, w in start.items()}
    params = {name: w.copy() for name, w in start.items()}
    opt = rule.cls(params if named else list(params.values()), **rule.options)
    for step in range(6):
        gradients: dict[str, Any] = {
            "user": fs.Rows(rng.integers(0, 30, 9), rng.standard_normal((9, 8)).astype(f32)),
            "item": fs.Rows([6, 0, 6], rng.standard_normal((3, 3, 2)).astype(f32)),
            "W": rng.standard_normal((8, 8)).astype(f32),
            "b": np.array(rng.standard_normal(), f32),
            "unused": None,
        }
        if step == 2:
            gradients["item"] = None
        if step == 3:
            gradients["W"] = fs.Rows([7], np.ones((1, 8), f32))
            gradients["user"] = rng.standard_normal((30, 8)).astype(f32)
        for name, g in gradients.items():
            if g is not None:
                alone[name].step([g])
        if named:
            opt.step({name: g for name, g in gradients.items() if g is not None or step == 0})
        else:
            opt.step(tuple(gradients.values()), zero_grad=True)
    assert [s["step"] for s in opt.state.values()] == [6, 5, 6, 6, 0]
    assert opt.steps == 6
    ours, keys = everything(opt), list(opt.state)
    for key, (name, single) in zip(keys, alone.items(), strict=True):
        theirs = everything(single)
        for what in ("parameter", "step", *rule.states):
            assert ours[f"{what} {key}"] == theirs[f"{what} 0"], name


def test_one_parameter_and_its_rows() -> None:
    w = np.zeros((3, 2))
    opt = fs.SGD(w, lr=1.0)
    opt.step(fs.Rows([2], np.ones((1, 2))))
    opt.step((fs.Rows([1], np.ones((1, 2))),))
    np.testing.assert_array_equal(w, [[0, 0], [-1, -1], [-1, -1]])
    for params in ([w], {"W": w}):
        with pytest.raises(TypeError, match="gradients are a Rows"):
            fs.SGD(params).step(fs.Rows([0], np.ones((1, 2))))


# ---- what a step is told ------------------------------------------------------------------------


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_maximize_and_grad_scale(rule: Rule, tier: str, rng: np.random.Generator) -> None:
    up, down = np.ones((2, 20, 9), f32)
    maximizer = rule.cls(up, maximize=True, **rule.options)
    minimizer = rule.cls(down, **rule.options)
    for _ in range(5):
        indices, g = rng.integers(0, 20, 15), rng.standard_normal((15, 9)).astype(f32)
        maximizer.step(fs.Rows(indices, 128 * g), grad_scale=1 / 128)
        minimizer.step(fs.Rows(indices, -g))
    assert everything(maximizer) == everything(minimizer)


def test_learning_rates() -> None:
    w, first = np.zeros((3, 1)), fs.Rows([0], np.ones((1, 1)))
    seen: list[int] = []
    opt = fs.SGD(w, lr=lambda step: seen.append(step) or 0.5)  # type: ignore[func-returns-value]
    opt.step(first)
    opt.step(first, lr=0.25)
    opt.step(fs.Rows([], np.ones((0, 1))))
    opt.step(first)
    assert seen == [0, 2, 3]
    assert w[0] == -1.25
    assert not w[1:].any()


@settings(max_examples=60, deadline=None)
@given(
    max_norm=st.sampled_from(MAX_NORMS),
    grad_scale=st.sampled_from(GRAD_SCALES),
    size=st.sampled_from([1, 3, 33, 1025]),
    magnitude=st.sampled_from([1e-3, 1.0, 1e200]),
    layout=st.sampled_from(sorted(TABLE_LAYOUTS)),
    maximize=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_clipping_is_that_of_the_dense_gradient(
    max_norm: float,
    grad_scale: float,
    size: int,
    magnitude: float,
    layout: str,
    maximize: bool,
    seed: int,
) -> None:
    """The norm is that of the sums, together with the dense gradients of the step."""
    rng = np.random.default_rng(seed)
    if magnitude > 1 and max_norm == math.inf:
        max_norm = 1.0
    options = {"lr": 0.1, "max_norm": max_norm, "maximize": maximize}
    tables, biases = rng.standard_normal((2, 1, 40, size)), rng.standard_normal((2, 1, 6))
    lazy = [TABLE_LAYOUTS[layout](tables[0][0]), biases[0][0]]
    dense = [tables[0][0].copy(), biases[0][0].copy()]
    lazy_opt, dense_opt = fs.SGD(lazy, **options), fs.SGD(dense, **options)
    for _ in range(3):
        indices = draw_list(rng, 40)
        values = magnitude * rng.standard_normal((len(indices), size))
        g, b = np.zeros((40, size)), rng.standard_normal(6)
        np.add.at(g, indices, values)
        lazy_opt.step([fs.Rows(indices, TABLE_LAYOUTS[layout](values)), b], grad_scale=grad_scale)
        dense_opt.step([g, b], grad_scale=grad_scale)
    scale = max(1.0, max(np.abs(w).max() for w in dense))
    for ours, theirs in zip(lazy, dense, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_clipped_rows_of_every_rule(rule: Rule, rng: np.random.Generator) -> None:
    w = rng.standard_normal((20, 6))
    truth, opt = Lazy(rule, w), rule.cls([w], max_norm=0.7, **rule.options)
    for _ in range(30):
        indices = draw_list(rng, 20)
        values = rng.standard_normal((len(indices), 6)) * 10.0 ** rng.integers(-3, 3)
        norm = np.linalg.norm(summed(indices, values)[1])
        opt.step([fs.Rows(indices, values)])
        truth.step(indices, values * min(1.0, 0.7 / (norm + 1e-6)))
    truth.check(opt, w, 1e-11)


def test_the_norm_is_of_the_sums() -> None:
    """Values that cancel clip nothing; a table's other rows count for nothing, NaN or not."""
    w, b = np.full((4, 2), np.nan), np.zeros(1)
    w[1:3] = 0
    opt = fs.SGD([w, b], lr=1.0, max_norm=10.0, skip_nonfinite=True)
    opt.step([fs.Rows([1, 2, 1], [[1e9, 0], [0, 0], [-1e9, 0]] * np.ones(1)), np.ones(1)])
    np.testing.assert_array_equal(w[1:3], 0)
    assert b[0] == -1
    opt.step([fs.Rows([1, 1], np.full((2, 2), [3.0, 4.0])), np.zeros(1)])  # (6, 8): just 10
    np.testing.assert_allclose(w[1], [-6, -8], rtol=1e-6)
    opt.step([fs.Rows([1, 1], np.full((2, 2), [30.0, 40.0])), np.zeros(1)])
    np.testing.assert_allclose(w[1], [-12, -16], rtol=1e-6)
    assert np.isnan(w[[0, 3]]).all()


NOT_FINITE: list[tuple[str, list[int], list[float], str]] = [
    ("NaN alone", [1], [math.nan], "f4"),
    ("NaN in the first of two", [1, 1], [math.nan, 1], "f4"),
    ("NaN in the last of three", [1, 0, 1, 1], [1, 1, 1, math.nan], "f4"),
    ("infinity", [3, 2], [1, -math.inf], "f2"),
    ("infinities that cancel", [1, 1], [math.inf, -math.inf], "f4"),
    ("a sum that overflows float32", [1, 1], [3e38, 3e38], "f4"),
    ("a sum that overflows on the way", [1, 1, 1], [3e38, 3e38, -3e38], "f4"),
    ("too large for float32", [0], [1e39], "f8"),
]


@pytest.mark.parametrize(
    ("indices", "values", "dtype"), [c[1:] for c in NOT_FINITE], ids=[c[0] for c in NOT_FINITE]
)
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("zero_grad", [False, True])
def test_steps_that_are_left_out(
    indices: list[int],
    values: list[float],
    dtype: str,
    max_norm: float | None,
    zero_grad: bool,
    tier: str,
) -> None:
    """No parameter moves, of the others neither, and nothing counts but what is left out."""
    params = [np.ones((4, 3), f32), np.ones(5, f32), np.ones((4, 3), f32)]
    opt = fs.Adam(params, max_norm=max_norm, skip_nonfinite=True)
    opt.step([fs.Rows([1, 1], np.ones((2, 3), f32)), np.ones(5, f32), None])
    before = everything(opt)
    bad = np.ones((len(values), 3), dtype)
    bad[:, 1] = values
    good = fs.Rows([0, 0], np.ones((2, 3), f32))
    dense, kept = np.ones(5, f32), bad.copy()
    opt.step([fs.Rows(indices, bad), dense, good], zero_grad=zero_grad)
    assert everything(opt) == {**before, "skipped_steps": 1}
    assert_same(bad, np.zeros_like(bad) if zero_grad else kept)
    for g in (dense, good.values):
        assert (g == (0 if zero_grad else 1)).all()
    opt.step([good, np.full(5, np.nan, f32), None])
    assert everything(opt) == {**before, "skipped_steps": 2}
    opt.step([good, np.ones(5, f32), good])
    assert (opt.steps, opt.skipped_steps) == (2, 2)


def test_large_values_that_are_finite_are_not_left_out() -> None:
    w = np.zeros((3, 2))
    opt = fs.SGD(w, lr=1.0, skip_nonfinite=True)
    opt.step(fs.Rows([1, 1], np.full((2, 2), 1e307)))
    assert (w[1] == -2e307).all()
    assert opt.skipped_steps == 0


def test_nan_stays_in_its_row(tier: str) -> None:
    w = np.ones((5, 40), f32)
    opt = fs.Adam(w)
    values = np.ones((4, 40), f32)
    values[2, 17] = np.nan
    opt.step(fs.Rows([4, 1, 3, 1], values))
    assert np.argwhere(np.isnan(w)).tolist() == [[3, 17]]
    assert np.argwhere(np.isnan(opt.state[0]["exp_avg"])).tolist() == [[3, 17]]


def test_zero_grad(tier: str, rng: np.random.Generator) -> None:
    """Whoever owns the values; and where they lie side by side, each once."""
    shared = rng.standard_normal((10, 6)).astype(f32)
    params = [np.ones((8, 6), f32), np.ones((8, 3), f32), np.ones((8, 3), f32)]
    opt = fs.SGD(params, lr=1.0)
    gradients = [
        fs.Rows([1, 1, 0], shared[:3]),
        fs.Rows([7] * 6, shared[4:, ::2]),
        fs.Rows([5] * 6, shared[4:, 1::2]),
    ]
    sums = shared[0] + shared[1], shared[4:, ::2].sum(0)
    opt.step(gradients, zero_grad=True)
    np.testing.assert_array_equal(params[0][1], 1 - sums[0])
    np.testing.assert_allclose(params[1][7], 1 - sums[1], rtol=1e-5)
    assert shared[3].all()
    shared[3] = 0
    assert not shared.any()


def test_zero_grad_clears_tensors() -> None:
    torch = pytest.importorskip("torch")
    w = torch.zeros(9, 4)
    values = torch.ones(3, 4)
    opt = fs.SGD([w], lr=1.0)
    opt.step([fs.Rows(torch.tensor([8, 0, 8]), values)], zero_grad=True)
    assert not values.any()
    assert w.sum(1).tolist() == [-4, 0, 0, 0, 0, 0, 0, 0, -8]


# ---- the same bits ------------------------------------------------------------------------------


LARGE = {  # each with more elements in its list than one thread takes: 131,072
    "numbers": (170_000, (), 140_000),
    "short rows": (9000, (17,), 8500),
    "long rows": (70, (2500,), 60),
}


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("shape", LARGE)
def test_tiers_and_threads(rule: Rule, shape: str) -> None:
    rows, rest, listed = LARGE[shape]
    rng = np.random.default_rng(1)
    start = rng.standard_normal((rows, *rest)).astype(f32)
    lists = []
    for _ in range(2):
        indices = np.concatenate([rng.permutation(rows)[:listed], rng.integers(0, rows, 50)])
        lists.append((indices, rng.standard_normal((len(indices), *rest)).astype(f32)))
    found = []
    for tier in AVAILABLE:
        for threads in (1, 2, 3):
            _cpu.use_tier(tier)
            fs.set_num_threads(threads)
            opt = rule.cls([start.copy()], max_norm=0.37, **rule.options)
            for indices, values in lists:
                g = values.copy()
                opt.step([fs.Rows(indices, g)], zero_grad=True)
                assert not g.any()
            found.append(everything(opt))
    assert all(f == found[0] for f in found)
    opt.max_norm = None
    checked_step(opt, fs.Rows(*lists[0]))  # with three threads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiers_and_threads_over_many_tables(dtype: np.dtype) -> None:
    """What threads share out begins, ends and is interspersed with lists of nothing."""
    rng = np.random.default_rng(2)
    start = [rng.standard_normal((40, 1 + i % 70)).astype(dtype) for i in range(150)]
    start[0], start[70], start[149] = (np.ones(s, dtype) for s in ((3, 0), (0, 5), (4, 4)))
    gradients: list[Any] = []
    for i, w in enumerate(start):
        count = 0 if i % 10 == 9 or len(w) < 40 else 39
        indices, values = rng.integers(0, 40, count), rng.standard_normal((count, *w.shape[1:]))
        gradients.append(fs.Rows(indices, values.astype(dtype)) if i % 4 else np.ones_like(w))
    gradients[5] = None
    found = []
    for tier in AVAILABLE:
        for threads in (1, 2, 3):
            _cpu.use_tier(tier)
            fs.set_num_threads(threads)
            opt = fs.Adam([w.copy() for w in start], lr=0.1, max_norm=0.5, skip_nonfinite=True)
            for _ in range(2):
                opt.step(gradients)
            found.append(everything(opt))
    assert all(f == found[0] for f in found)
    for i, (w, g) in enumerate(zip(start, gradients, strict=True)):
        if w.size:
            listed = [] if g is None else g.indices if isinstance(g, fs.Rows) else range(len(w))
            moved = (opt.params[i] != w).any(1)
            np.testing.assert_array_equal(np.flatnonzero(moved), np.unique(listed))


def test_the_callers_rounding_mode_changes_nothing() -> None:
    """Not the sums of duplicates either."""
    try:
        libm = ctypes.CDLL("libm.so.6")
    except OSError:
        pytest.skip("no libm.so.6 to set the rounding mode with")
    modes = {"x86_64": (0, 0x400, 0x800, 0xC00), "aarch64": (0, 0x400000, 0x800000, 0xC00000)}
    found = []
    for mode in modes[platform.machine()]:
        rng = np.random.default_rng(3)
        indices = rng.integers(0, 50, 400)
        values = rng.standard_normal((5, 400, 9)).astype(f32)
        opt = fs.Adam([np.ones((50, 9), f32)], max_norm=5.0)
        try:
            assert libm.fesetround(mode) == 0
            for g in values:
                opt.step([fs.Rows(indices, g)])
        finally:
            libm.fesetround(0)
        found.append(everything(opt))
    assert all(f == found[0] for f in found)


def test_steps_in_several_threads() -> None:
    """Of one optimizer they wait for each other; the lists of several do not get mixed up."""
    shared, own = np.zeros((300, 70)), np.zeros((3, 5000, 8))
    opt, opts = fs.SGD(shared, lr=1.0), [fs.SGD(w, lr=1.0) for w in own]

    def work(i: int) -> None:
        indices = np.arange(300)[:: i + 1].repeat(2)
        for step in range(20):
            opt.step(fs.Rows(indices, np.ones((indices.size, 70))))
            rows = np.arange(step, 5000, i + 2)
            opts[i].step(fs.Rows(rows, np.ones((rows.size, 8))))

    in_threads(3, work)
    expected = -40.0 * sum(np.arange(300) % (i + 1) == 0 for i in range(3))
    np.testing.assert_array_equal(shared, np.repeat(expected[:, None], 70, 1))
    for i, w in enumerate(own):
        counts = [sum(r >= s and (r - s) % (i + 2) == 0 for s in range(20)) for r in range(5000)]
        np.testing.assert_array_equal(w[:, 0], -np.array(counts, float))


# ---- functions, files and copies ----------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_functions_are_the_classes(rule: Rule, dtype: str, rng: np.random.Generator) -> None:
    """Whatever the strides of the state, which is the caller's here."""
    start = rng.standard_normal((9, 5, 3)).astype(dtype)
    bare, opt = start.copy("F"), rule.cls([start], maximize=True, **rule.options)
    options = dict(rule.options)
    initial = options.pop("initial_accumulator_value", 0.0)
    options.pop("amsgrad", None)
    layouts = [TABLE_LAYOUTS[name] for name in ("gappy", "reversed", "c")]
    state = {
        name: lay_out(np.full(start.shape, initial, dtype))
        for name, lay_out in zip(rule.states, layouts, strict=False)
    }
    if rule.cls is fs.NAdam:
        state["mu_product"] = np.ones(())
    for step in range(1, 8):
        indices = draw_list(rng, 9)
        g = fs.Rows(indices, rng.standard_normal((len(indices), 5, 3)).astype(dtype))
        opt.step([g], grad_scale=0.5)
        getattr(F, rule.cls.__name__.lower() + "_")(
            bare, g, **state, step=step, maximize=True, grad_scale=0.5, **options
        )
    assert_same(bare, start)
    for name, value in state.items():
        np.testing.assert_array_equal(opt.state[0][name], value)


def test_functions_refuse_as_classes_do() -> None:
    w, m, v = np.ones((3, 2), f32), np.zeros((3, 2), f32), np.zeros((3, 2), f32)
    for bad, error in [
        (fs.Rows([3], np.ones((1, 2), f32)), IndexError),
        (fs.Rows([0], np.ones((1, 3), f32)), ValueError),
        (fs.Rows([0], w[:1]), ValueError),
        (fs.Rows([0], v[1:2]), ValueError),
        (fs.Rows(np.zeros(1), np.ones((1, 2), f32)), TypeError),
    ]:
        with pytest.raises(error):
            F.adam_(w, bad, m, v, step=1)
    assert (w == 1).all()
    assert not m.any()
    assert not v.any()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("way", ["state_dict", "file", "pickle"])
def test_saved_and_continued(
    rule: Rule, way: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """After a few steps, wherever the state has been meanwhile."""
    w = rng.standard_normal((9, 4)).astype(f32)
    steps = []
    for _ in range(8):
        indices = draw_list(rng, 9)
        steps.append(fs.Rows(indices, rng.standard_normal((len(indices), 4)).astype(f32)))
    opt = rule.cls([w], **rule.options)
    for g in steps[:4]:
        opt.step([g])
    again = rule.cls([w.copy()], **rule.options)
    if way == "state_dict":
        again.load_state_dict(opt.state_dict())
    elif way == "file":
        opt.save(tmp_path / "state.safetensors")
        again.load(tmp_path / "state.safetensors")
    else:
        again = pickle.loads(pickle.dumps(opt))
    for g in steps[4:]:
        opt.step([g])
        again.step([copy.deepcopy(g)])
    assert everything(again) == everything(opt)


def test_rows_are_what_they_were_given() -> None:
    class Named(fs.Rows):
        pass

    i, v = np.array([2, 0]), np.ones((2, 3))
    rows = fs.Rows(i, v)
    assert rows.indices is i
    assert rows.values is v
    assert "(2,)" in repr(rows)
    assert "(2, 3)" in repr(rows)
    for copied in (copy.copy(rows), pickle.loads(pickle.dumps(rows)), Named([2, 0], v)):
        w = np.zeros((3, 3))
        fs.SGD([w], lr=1.0).step([copied])
        np.testing.assert_array_equal(w, [[-1] * 3, [0] * 3, [-1] * 3])


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "indices",
    [[0.0], [True], [None], ["1"], [2**63], [2**70], [1, 2.5], [1j], (False,), [np.float32(1)]],
    ids=str,
)
def test_lists_of_something_else(indices: Any) -> None:
    with pytest.raises(TypeError, match="indices"):
        fs.Rows(indices, np.ones((1, 2)))


def values_of(count: int, *rest: int, dtype: Any = f32) -> np.ndarray:
    return np.ones((count, *(rest or (3,))), dtype)


BAD_ROWS: list[tuple[str, Callable[[dict[str, Any]], fs.Rows], type[Exception], str]] = [
    ("-1", lambda k: fs.Rows([0, -1], values_of(2)), IndexError, "row -1 (at position 1 "),
    ("-1 in 32 bits", lambda k: fs.Rows(np.array([-1], "i4"), values_of(1)), IndexError, "row -1"),
    ("past the end", lambda k: fs.Rows([6], values_of(1)), IndexError, "row 6 "),
    ("far", lambda k: fs.Rows([2**62], values_of(1)), IndexError, f"row {2**62}"),
    ("lowest", lambda k: fs.Rows([-(2**63)], values_of(1)), IndexError, f"row {-(2**63)}"),
    ("a row in 32 bits", lambda k: fs.Rows([2**32 + 1], values_of(1)), IndexError, "row 42949"),
    (
        "the last of many",
        lambda k: fs.Rows(np.arange(1000) // 154, values_of(1000)),
        IndexError,
        "row 6 (at position 924 of the indices); expected 0 to 5",
    ),
    *[
        (f"dtype {dtype}", lambda k, d=dtype: fs.Rows(np.ones(2, d), values_of(2)), TypeError, "")
        for dtype in (
            "i1",
            "i2",
            "u1",
            "u4",
            "u8",
            "f2",
            "f4",
            "f8",
            "c16",
            "?",
            "O",
            "S1",
            "m8[s]",
        )
    ],
    ("big endian", lambda k: fs.Rows(np.ones(2, ">i8"), values_of(2)), TypeError, ">i8"),
    ("bfloat16", lambda k: fs.Rows(np.ones(2, bfloat16), values_of(2)), TypeError, "bfloat16"),
    (
        "a record",
        lambda k: fs.Rows(np.ones(2, [("x", "i8")]), values_of(2)),
        TypeError,
        "expected int32 or int64",
    ),
    ("no indices", lambda k: fs.Rows(None, values_of(2)), TypeError, "NoneType"),
    ("a number", lambda k: fs.Rows(1, values_of(1)), TypeError, "int"),
    ("a NumPy number", lambda k: fs.Rows(np.int64(1), values_of(1)), TypeError, "int64"),
    ("a range", lambda k: fs.Rows(range(2), values_of(2)), TypeError, "range"),
    ("a slice", lambda k: fs.Rows(slice(2), values_of(2)), TypeError, "slice"),
    ("a string", lambda k: fs.Rows("01", values_of(2)), TypeError, "str"),
    ("2-D", lambda k: fs.Rows([[0, 1]], values_of(2)), ValueError, "2 dimensions"),
    ("2-D column", lambda k: fs.Rows([[0], [1]], values_of(2)), ValueError, "2 dimensions"),
    ("2-D of nothing", lambda k: fs.Rows([[]], values_of(0)), ValueError, "2 dimensions"),
    ("0-D", lambda k: fs.Rows(np.array(1), values_of(1)), ValueError, "0 dimensions"),
    ("too few values", lambda k: fs.Rows([0, 1], values_of(1)), ValueError, "2 indices"),
    ("too many values", lambda k: fs.Rows([0], values_of(2)), ValueError, "1 indices"),
    ("values for no index", lambda k: fs.Rows([], values_of(1)), ValueError, "0 indices"),
    ("no values", lambda k: fs.Rows([0], values_of(0)), ValueError, "shape (0, 3)"),
    ("flat values", lambda k: fs.Rows([0, 1], np.ones(2, f32)), ValueError, "shape (2,)"),
    ("one row, flat", lambda k: fs.Rows([0], np.ones(3, f32)), ValueError, "shape (3,)"),
    ("0-D values", lambda k: fs.Rows([0], np.ones((), f32)), ValueError, "shape ()"),
    ("a scalar", lambda k: fs.Rows([0], f32(1)), ValueError, "shape ()"),
    ("long rows", lambda k: fs.Rows([0], values_of(1, 4)), ValueError, "shape (1, 4)"),
    ("short rows", lambda k: fs.Rows([0], values_of(1, 1)), ValueError, "shape (1, 1)"),
    ("one more axis", lambda k: fs.Rows([0], values_of(1, 3, 1)), ValueError, "(1, 3, 1)"),
    ("empty, long rows", lambda k: fs.Rows([], values_of(0, 4)), ValueError, "shape (0, 4)"),
    ("None for values", lambda k: fs.Rows([0], None), TypeError, "NoneType"),
    ("values in a list", lambda k: fs.Rows([0], [[1.0] * 3]), TypeError, "list"),
    ("integers", lambda k: fs.Rows([0], values_of(1, dtype=int)), TypeError, "int64"),
    ("complex values", lambda k: fs.Rows([0], values_of(1, dtype="c8")), TypeError, "complex64"),
    ("big values", lambda k: fs.Rows([0], values_of(1, dtype=">f4")), TypeError, ">f4"),
    (
        "masked values",
        lambda k: fs.Rows([0], np.ma.masked_array(values_of(1), True)),
        TypeError,
        "mask",
    ),
    ("Rows in Rows", lambda k: fs.Rows([0], fs.Rows([0], values_of(1))), TypeError, "Rows"),
    ("a part of the table", lambda k: fs.Rows([0], k["table"][5:]), ValueError, "shares memory"),
    ("the table backwards", lambda k: fs.Rows([0], k["table"][::-5][:1]), ValueError, "shares"),
    (
        "another parameter",
        lambda k: fs.Rows([0], k["dense"][1:4].reshape(1, 3)),
        ValueError,
        "shares memory with parameter",
    ),
    (
        "one element of the state",
        lambda k: fs.Rows([0] * 6, np.broadcast_to(k["state"]["exp_avg"][3:4, 2:3], (6, 3))),
        ValueError,
        "shares memory with the exp_avg of parameter",
    ),
    ("state", lambda k: fs.Rows([1], k["state"]["exp_avg_sq"][4:5]), ValueError, "exp_avg_sq"),
]


@pytest.mark.parametrize(
    ("make", "error", "message"), [b[1:] for b in BAD_ROWS], ids=[b[0] for b in BAD_ROWS]
)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("common", [{}, {"max_norm": 1.0, "skip_nonfinite": True}], ids=str)
def test_bad_rows_change_nothing(
    make: Callable[[dict[str, Any]], fs.Rows],
    error: type[Exception],
    message: str,
    first: bool,
    common: dict[str, Any],
) -> None:
    """Wherever in the list they stand, and whatever gradients were known before."""
    table, dense, other = (np.ones(shape, f32) for shape in ((6, 3), (4,), (6, 3)))
    order = slice(None, None, 1 if first else -1)
    opt = fs.Adam([table, dense, other][order], **common)
    good = [fs.Rows([1, 1], values_of(2)), np.ones(4, f32), fs.Rows([5], values_of(1))]
    opt.step(good[order])
    known = {"table": table, "dense": dense, "state": opt.state[0 if first else 2]}
    bad = [make(known), *good[1:]][order]
    assert_refused(opt, bad, error, message)
    opt.step(good[order])
    assert_refused(opt, bad, error, message, lr=0.5)
    opt.step(good[order])
    assert_refused(opt, bad, error, zero_grad=True)
    opt.step(good[order], zero_grad=True)  # and it still works
    assert opt.steps == 4


@pytest.mark.parametrize(
    ("shape", "indices", "error"),
    [
        ((), [0], ValueError),
        ((), [], ValueError),
        ((0,), [0], IndexError),
        ((0, 3), [0], IndexError),
        ((3, 0), [3], IndexError),
        ((3, 0), [-1], IndexError),
        ((1,), [1], IndexError),
    ],
    ids=str,
)
def test_tables_without_such_a_row(
    shape: tuple[int, ...], indices: list[int], error: type[Exception]
) -> None:
    opt = fs.Adam([np.ones(shape, f32)])
    opt.step([np.ones(shape, f32)])
    assert_refused(opt, [fs.Rows(indices, np.ones((len(indices), *shape[1:]), f32))], error)
    if shape:
        opt.step([fs.Rows([], np.ones((0, *shape[1:]), f32))])


def test_tensors_of_a_wrong_kind() -> None:
    torch = pytest.importorskip("torch")
    opt = fs.Adam([np.ones((6, 3), f32)])
    index = torch.tensor([0, 1])
    for bad in (torch.int16, torch.uint8, torch.float32, torch.bfloat16, torch.bool):
        assert_refused(opt, [fs.Rows(index.to(bad), values_of(2))], TypeError, "expected")
    for bad in (index.to_sparse(), index.to("meta")):
        assert_refused(opt, [fs.Rows(bad, values_of(2))], TypeError)
    assert_refused(opt, [fs.Rows(index[None], values_of(2))], ValueError, "2 dimensions")
    assert_refused(opt, [fs.Rows(index - 1, values_of(2))], IndexError, "row -1")
    assert_refused(opt, [fs.Rows(index, torch.ones(2, 4))], ValueError, "shape (2, 4)")
    assert_refused(opt, [fs.Rows(index, torch.ones(2, 3).to_sparse())], TypeError)


def test_an_empty_array_of_indices_may_have_any_dtype() -> None:
    """np.array([]) is of floats, and nobody means that."""
    w = np.ones((6, 3), f32)
    opt = fs.SGD([w], lr=1.0, momentum=0.9)
    for empty in (np.array([]), np.zeros(0, np.int8), np.zeros(0, bool)):
        opt.step([fs.Rows(empty, values_of(0))])
    assert opt.steps == 3
    assert (w == 1).all()


def test_zero_grad_needs_values_it_can_clear() -> None:
    params = [np.ones((4, 3), f32), np.ones((4, 3), f32)]
    opt = fs.SGD(params, lr=1.0)
    shared = values_of(5)
    bad = [
        ([fs.Rows([0], _read_only(values_of(1))), None], "read-only"),
        (
            [
                None,
                fs.Rows([0, 0], np.lib.stride_tricks.as_strided(np.ones(3, f32), (2, 3), (0, 4))),
            ],
            "overlaps itself",
        ),
        ([fs.Rows([0, 1], shared[:2]), fs.Rows([3, 3], shared[1:3])], "two gradients share memory"),
        ([fs.Rows([0, 1], shared[:2]), shared[1:]], "two gradients share memory"),
        ([fs.Rows([0] * 5, shared), fs.Rows([3], shared[4:])], "two gradients share memory"),
    ]
    for gradients, message in bad:
        assert_refused(opt, gradients, ValueError, message, zero_grad=True)
        opt.step(gradients)
    separate = [fs.Rows([0], shared[:1]), shared[1:]]
    opt.step(separate, zero_grad=True)
    assert not shared.any()


def test_values_where_a_dense_gradient_was() -> None:
    """That memory was found to be no parameter's; but the values reach further than it did."""
    memory = np.ones((40, 3), f32)
    for table in (memory[20:30], memory[20:30:2], memory[29:19:-1]):
        opt = fs.Adam([table])
        dense = memory[: len(table)]
        for count in (40, 21):
            opt.step([dense])
            bad = fs.Rows([0] * count, memory[:count])
            assert_refused(opt, [bad], ValueError, "shares memory")
        opt.step([fs.Rows([0] * 20, memory[:20])])
        opt.step([dense])


def test_values_that_share_memory_are_refused_again_and_again() -> None:
    """What a step that raised has found out about them does not let them pass the next time."""
    w = np.ones((6, 3), f32)
    for bad in (fs.Rows([0], w[5:]), fs.Rows([0, 1], w[::5]), w[::-1]):
        opt = fs.SGD([w], lr=1.0)
        for _ in range(3):
            assert_refused(opt, [bad], ValueError, "shares memory")


@pytest.mark.parametrize("dense", [False, True])
def test_values_between_the_elements_of_a_parameter(dense: bool) -> None:
    """That they share no memory with it says nothing of what else lies between its ends."""
    memory = np.ones(40)
    opt = fs.SGD([memory[2:12:2]])
    between = memory[1:11:2]
    for _ in range(2):
        opt.step([between if dense else fs.Rows([0] * 5, between)])
        assert_refused(opt, [fs.Rows([0, 1], memory[3:5])], ValueError, "shares memory")
        assert_refused(opt, [memory[4:9]], ValueError, "shares memory")


def test_masked_indices_are_refused() -> None:
    """As masked gradients are: a step would ignore the mask."""
    opt = fs.Adam([np.ones((6, 3), f32)])
    masked = np.ma.masked_array([0, 1], [0, 1])
    assert_refused(opt, [fs.Rows(masked, values_of(2))], TypeError, "mask")


def test_parameter_changed_behind_our_back() -> None:
    w = np.ones((6, 2), f32)
    opt = fs.Adam({"W": w})
    gradient = {"W": fs.Rows([0], np.ones((1, 2), f32))}
    w.flags.writeable = False
    with pytest.raises(ValueError, match="'W' has been"):
        opt.step(gradient)
    w.flags.writeable = True
    opt.step(gradient)
    w.resize((600_000, 2), refcheck=False)  # the old memory is gone
    with pytest.raises(ValueError, match="other memory"):
        opt.step(gradient)


class Meddling(Foreign):
    """An exporter of indices that does something else, too."""

    def __init__(self, array: np.ndarray, act: Callable[[], object]) -> None:
        super().__init__(array)
        self.act = act

    def __dlpack__(self, **kwargs: Any) -> Any:
        self.act()
        return super().__dlpack__(**kwargs)


@pytest.mark.parametrize("changed", ["this", "one before"])
def test_indices_whose_exporter_changes_a_parameter(changed: str) -> None:
    params = [np.zeros((3, 2)), np.zeros((3, 2))]
    w = params[1 if changed == "this" else 0]
    opt = fs.SGD(params, lr=1.0)
    indices = Meddling(np.arange(2), lambda: setattr(w.flags, "writeable", False))
    with pytest.raises(ValueError, match="made read-only"):
        opt.step([np.ones((3, 2)), fs.Rows(indices, np.ones((2, 2)))])
    assert not np.any(params)


def test_indices_whose_exporter_is_interrupted_or_steps() -> None:
    w = np.zeros((3, 2))
    opt = fs.SGD([w], lr=1.0)

    def interrupt() -> None:
        raise KeyboardInterrupt

    def step() -> None:
        with pytest.raises(RuntimeError, match="inside its own step"):
            opt.step([np.ones((3, 2))])

    with pytest.raises(KeyboardInterrupt):
        opt.step([fs.Rows(Meddling(np.arange(2), interrupt), np.ones((2, 2)))])
    assert not w.any()
    opt.step([fs.Rows(Meddling(np.arange(2), step), np.ones((2, 2)))])
    assert opt.steps == 1
    np.testing.assert_array_equal(w, [[-1, -1], [-1, -1], [0, 0]])


def test_references_are_given_back() -> None:
    w, i, v, bad = np.ones((3, 2)), np.arange(2), np.ones((2, 2)), np.ones((2, 3))
    rows, wrong = fs.Rows(i, v), fs.Rows(i, bad)
    opt = fs.Adam([np.ones(3), w])
    counts = [sys.getrefcount(x) for x in (i, v, bad, rows, wrong)]
    for _ in range(200):
        opt.step([np.ones(3), rows])
        with pytest.raises(ValueError, match="shape"):
            opt.step([np.ones(3), wrong])
        with pytest.raises(TypeError):
            opt.step([np.ones(3), fs.Rows(v, v)])
        with pytest.raises(IndexError):
            opt.step([np.ones(3), fs.Rows(i + 2, v)])
    assert [sys.getrefcount(x) for x in (i, v, bad, rows, wrong)] == counts


# ---- GPUs ---------------------------------------------------------------------------------------


def test_values_on_another_device_are_refused() -> None:
    """Of a table on a GPU; all else about these is in test_gpu_rows.py."""
    lib = library("simulated")
    with simulated_cupy.installed():
        w, b = lib.put(np.ones((5, 2), f32)), np.ones((5, 2), f32)
        opt = fs.Adam([b, w])
        opt.step([fs.Rows([1], np.ones((1, 2), f32)), lib.put(np.ones((5, 2), f32))])
        before, kept = opt.state_dict(), (lib.get(w), b.copy())
        with pytest.raises(ValueError, match="is on cpu; expected cuda:0"):
            opt.step([fs.Rows([2], np.ones((1, 2), f32)), fs.Rows([0], np.ones((1, 2), f32))])
        assert opt.steps == before["fusestep"]["steps"] == 1
        assert_same(lib.get(w), kept[0])
        assert_same(b, kept[1])
        for name in ("exp_avg", "exp_avg_sq"):
            assert_same(opt.state[0][name], before["state"][0][name])
            assert_same(lib.get(opt.state[1][name]), lib.get(before["state"][1][name]))


def test_lists_on_a_gpu_are_refused() -> None:
    """For a table on the CPU, as dense gradients there are."""
    lib = library("simulated")
    with simulated_cupy.installed():
        opt = fs.Adam([np.ones((5, 2), f32)])
        indices, values = lib.put(np.array([0])), lib.put(np.ones((1, 2), f32))
        assert_refused(opt, [fs.Rows(indices, np.ones((1, 2), f32))], TypeError, "indices")
        assert_refused(opt, [fs.Rows([0], values)], ValueError, "cuda:0")


@pytest.mark.parametrize("common", [{}, {"max_norm": 0.5, "skip_nonfinite": True}], ids=str)
def test_a_table_beside_parameters_on_a_gpu(common: dict[str, Any]) -> None:
    """It stays on the CPU, and the step is the one of parameters that all are there."""
    lib = library("simulated")
    rng = np.random.default_rng(0)
    table, dense = rng.standard_normal((30, 70)).astype(f32), rng.standard_normal(2000).astype(f32)
    with simulated_cupy.installed():
        here = fs.Adam([table.copy(), dense.copy(), table.copy()], lr=0.1, **common)
        there = fs.Adam([table.copy(), lib.put(dense), table.copy()], lr=0.1, **common)
        for step in range(4):
            rows = fs.Rows(rng.integers(0, 30, 40), rng.standard_normal((40, 70)).astype(f32))
            if step == 2:
                rows.values[7, 7] = np.nan if common else 0
            g = rng.standard_normal(2000).astype(f32)
            here.step([rows, g, None])
            there.step([rows, lib.put(g), None])
        assert (here.steps, here.skipped_steps) == (there.steps, there.skipped_steps)
        assert here.skipped_steps == (1 if common else 0)
        for i, w in enumerate(here.params):
            assert_same(w, lib.get(there.params[i]) if i == 1 else there.params[i])
