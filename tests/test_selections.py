"""Selections: what is selected moves as if it were alone, and the rest keeps its bits."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import pickle
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

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
from test_anchors import Penalty, anchor, pulled, some_penalty
from test_bits import LAYOUTS
from test_dlpack import Foreign
from test_rows import everything, summed
from test_state import _edit as edited

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

f32, f64 = np.float32, np.float64
bfloat16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(name) for name in ("f8", "f4", "f2")] + [bfloat16]
FROZEN = ["freeze", "track"]
ADAM = next(rule for rule in PLAIN if rule.cls is fs.Adam)
NADAM = next(rule for rule in PLAIN if rule.cls is fs.NAdam)


# ---- what must come out -------------------------------------------------------------------------


def raw(array: np.ndarray) -> np.ndarray:
    """To compare every bit: -0 is not 0, and a NaN is the same one."""
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")


def assert_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert (ours.dtype, ours.size) == (theirs.dtype, theirs.size)
    np.testing.assert_array_equal(raw(ours), raw(theirs))


def arrays_of(opt: fs.Optimizer) -> dict[str, np.ndarray]:
    """The first parameter and its state."""
    first = next(iter(opt.params.values())) if isinstance(opt.params, dict) else opt.params[0]
    state = next(iter(opt.state.values()))
    return {"parameter": first, **{name: state[name] for name in opt._state_names}}


def snapshot(opt: fs.Optimizer) -> Any:
    """Everything that must not change where something is refused."""
    return everything(opt), copy.deepcopy(opt.anchors), opt.state_dict()


def updates_of(opt: fs.Optimizer) -> np.ndarray:
    """How many updates each element of the first parameter has had."""
    entry, size = opt.state_dict()["state"][0], opt.params[0].size
    if "block_size" not in entry:
        return np.full(size, entry["step"])
    return np.repeat(entry["block_steps"], min(entry["block_size"], size))[:size]


def largest(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """The top elements in C order: NaN before all numbers, the first ones of equals."""
    flat = np.abs(sizes.reshape(-1))
    count = math.ceil(round(fraction * flat.size, 9))
    is_nan = np.isnan(flat)
    order = np.lexsort((-np.where(is_nan, 0, flat), ~is_nan))
    found = np.zeros(flat.size, bool)
    found[order[:count]] = True
    return found.reshape(sizes.shape)


def compute_dtype(*arrays: np.ndarray) -> Any:
    return f64 if any(array.dtype == f64 for array in arrays) else f32


def would_move(opt: fs.Optimizer, g: np.ndarray, **arguments: Any) -> np.ndarray:
    """How far each element would move: a dense step of a copy that is not rounded to 16 bits."""
    [w] = opt.params
    wide = w.astype(compute_dtype(*arrays_of(opt).values()), order="C")
    saved = {**opt.__getstate__(), "params": [wide]}
    twin = type(opt).__new__(type(opt))
    twin.__setstate__(saved)
    before = wide.copy()
    twin.step([g], **arguments)
    return np.abs(wide - before)


class Selected(NamedTuple):
    """What one step is told to move, and what it should move then."""

    where: Any
    mask: np.ndarray
    tracks: bool


class Truth:
    """A rule's reference, with a count of updates for each element of its own."""

    def __init__(self, rule: Rule, w: np.ndarray) -> None:
        self.rule, self.w = rule, w.astype(f64)
        initial = rule.options.get("initial_accumulator_value", 0.0)
        shape = w.shape if rule in RULES else (len(w), *[1] * (w.ndim - 1))
        self.states = {name: np.full(shape, initial) for name in rule.states}
        self.counts, self.products = np.zeros(w.shape, int), np.ones(w.shape)
        self.steps, self.product, self.differ = 0, 1.0, False
        self.penalty: Penalty | None = None

    def step(
        self, g: np.ndarray, mask: np.ndarray, *, tracks: bool = False, chooses: bool = True
    ) -> None:
        if chooses and not tracks and not self.differ:
            self.counts[...], self.products[...], self.differ = self.steps, self.product, True
        counts = self.counts if self.differ else np.full_like(self.counts, self.steps)
        products = self.products if self.differ else np.full(self.w.shape, self.product)
        moved = np.ones_like(mask) if tracks else mask
        for count in np.unique(counts[moved]):
            self._move(g, moved & (counts == count), mask, count, products)
        self.counts = counts + moved
        spare = {"step": self.steps, "mu_product": self.product}
        self.rule.reference(0.0, 0.0, spare, **self.rule.options)
        self.steps, self.product = self.steps + 1, spare.get("mu_product", 1.0)

    def _move(
        self, g: np.ndarray, here: np.ndarray, written: np.ndarray, count: int, products: Any
    ) -> None:
        state = {"step": count, "mu_product": products[here]}
        state |= {name: s[here] for name, s in self.states.items()}
        if count == 0:
            state.pop("momentum_buffer", None)  # its first value is the gradient
        w = self.rule.reference(self.w[here], g[here], state, **self.rule.options)
        if self.penalty:
            strength, reference, importance = self.penalty
            weight = importance[here] if isinstance(importance, np.ndarray) else importance
            w = pulled(w, self.rule.options["lr"], Penalty(strength, reference[here], weight))
        self.w[here] = np.where(written[here], w, self.w[here])
        for name, s in self.states.items():
            s[here] = state[name]
        self.products[here] = state.get("mu_product", 1.0)

    def check(self, opt: fs.Optimizer, tolerance: float) -> None:
        np.testing.assert_allclose(opt.params[0], self.w, rtol=0, atol=tolerance)
        for name, s in self.states.items():
            np.testing.assert_allclose(opt.state[0][name], s, rtol=tolerance, atol=tolerance)
        assert opt.state[0]["step"] == opt.steps == self.steps
        if self.differ and self.w.size:
            np.testing.assert_array_equal(updates_of(opt), self.counts.reshape(-1))


class Apart:
    """Each element as a parameter by itself, whose gradient is None where it is not to move."""

    def __init__(self, rule: Rule, w: np.ndarray, groups: np.ndarray | None = None, **common: Any):
        flat = w.reshape(-1)
        numbers = np.arange(flat.size) if groups is None else groups.reshape(-1)
        self.places = [np.flatnonzero(numbers == i) for i in np.unique(numbers)]
        self.parts = [flat[places] for places in self.places]
        self.w = flat.copy()
        spare = np.zeros(1, w.dtype)  # there must be one
        self.opt = rule.cls([*self.parts, spare], **rule.options, **common)

    def step(self, g: np.ndarray, chosen: Selected, **arguments: Any) -> None:
        flat, mask = g.reshape(-1), chosen.mask.reshape(-1)
        kept = [part.copy() for part in self.parts]
        selected = [bool(mask[places[0]]) for places in self.places]
        gradients = [
            flat[places] if chosen.tracks or is_selected else None
            for places, is_selected in zip(self.places, selected, strict=True)
        ]
        self.opt.step([*gradients, None], **arguments)
        for part, before, is_selected in zip(self.parts, kept, selected, strict=True):
            if not is_selected:
                part[...] = before

    def array(self, name: str) -> np.ndarray:
        state = self.opt.state
        arrays = [
            part if name == "parameter" else state[i][name] for i, part in enumerate(self.parts)
        ]
        result = np.zeros(self.w.size, arrays[0].dtype if arrays else self.w.dtype)
        for places, array in zip(self.places, arrays, strict=True):
            result[places] = array
        return result

    def check(self, opt: fs.Optimizer) -> None:
        if not self.parts:
            return
        for name, array in arrays_of(opt).items():
            assert_bits(array, self.array(name))
        state = self.opt.state
        counts = [state[i]["step"] for i in range(len(self.parts))]
        expected = np.zeros(self.w.size, int)
        for places, count in zip(self.places, counts, strict=True):
            expected[places] = count
        np.testing.assert_array_equal(updates_of(opt), expected)


# ---- what may be asked for ----------------------------------------------------------------------


def _mask(rng: np.random.Generator, opt: fs.Optimizer, g: Any, frozen: Any, to: Any) -> Selected:
    mask = rng.random(g.shape) < rng.choice([0, 0.02, 0.3, 0.9, 1])
    return Selected(fs.Mask(to(mask), frozen=frozen), mask, frozen == "track")


def _run(rng: np.random.Generator, opt: fs.Optimizer, g: Any, frozen: Any, to: Any) -> Selected:
    mask = np.zeros(g.shape, bool)
    begin, end = sorted(rng.integers(0, g.size + 1, 2))
    mask.reshape(-1)[begin:end] = True
    return Selected(fs.Mask(to(mask), frozen=frozen), mask, frozen == "track")


def _rows(rng: np.random.Generator, opt: fs.Optimizer, g: Any, frozen: Any, to: Any) -> Selected:
    if g.ndim == 0:
        return _mask(rng, opt, g, frozen, to)
    rows = rng.random(len(g)) < 0.5
    mask = np.broadcast_to(rows.reshape(-1, *[1] * (g.ndim - 1)), g.shape).copy()
    return Selected(fs.Mask(to(rows), frozen=frozen), mask, frozen == "track")


def _random(rng: np.random.Generator, opt: fs.Optimizer, g: Any, frozen: Any, to: Any) -> Selected:
    block = int(rng.choice([1, 2, 3, 15, 16, 17, 64, 100, 1000, 1024, 1025, 5000]))
    where = fs.RandomBlocks(float(rng.choice([0, 0.1, 0.5, 0.77, 1])), block, frozen=frozen)
    return Selected(where, where.mask(g.shape, step=opt.steps, seed=opt.seed), frozen == "track")


def _cyclic(rng: np.random.Generator, opt: fs.Optimizer, g: Any, frozen: Any, to: Any) -> Selected:
    count = int(rng.choice([1, 2, 3, 7, 64, 3000]))
    block = max(1, -(-g.size // count))
    mask = (np.arange(g.size) // block == opt.steps % count).reshape(g.shape)
    return Selected(fs.CyclicBlocks(count, frozen=frozen), mask, frozen == "track")


def _top(rng: np.random.Generator, opt: fs.Optimizer, g: Any, frozen: Any, to: Any) -> Selected:
    fraction = float(rng.choice([0, 0.01, 0.25, 0.9, 1]))
    seen = g.astype(compute_dtype(*arrays_of(opt).values()))
    return Selected(fs.TopK(fraction, frozen=frozen), largest(seen, fraction), frozen == "track")


def _top_update(
    rng: np.random.Generator, opt: fs.Optimizer, g: Any, frozen: Any, to: Any
) -> Selected:
    fraction = float(rng.choice([0, 0.01, 0.25, 0.9, 1]))
    mask = largest(would_move(opt, g), fraction)
    return Selected(fs.TopK(fraction, by="update", frozen=frozen), mask, frozen == "track")


def _none(rng: np.random.Generator, opt: fs.Optimizer, g: Any, frozen: Any, to: Any) -> Selected:
    return Selected(None, np.ones(g.shape, bool), False)


KINDS: dict[str, Callable[..., Selected]] = {
    "mask": _mask,
    "one run": _run,
    "rows": _rows,
    "random blocks": _random,
    "cyclic blocks": _cyclic,
    "top gradients": _top,
    "top updates": _top_update,
    "everything": _none,
}

SHAPES: list[tuple[int, ...]] = [
    *[(), (0,), (1,), (3, 0), (2, 3), (15,), (16,), (17,), (63,), (64,), (65,), (5, 7, 3)],
    *[(1024,), (1025,), (2, 3, 1, 4), (1, 2, 1, 3, 1, 2, 1, 2), (9, 16), (2, 700)],
]


def laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    if array.ndim == 0:
        return array.copy()
    if layout == "packed" and array.dtype == bfloat16:  # which NumPy cannot
        layout = "gappy"
    return LAYOUTS[layout](array)


# ---- the truth ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", FROZEN)
def test_twenty_steps(rule: Rule, kind: str, frozen: str) -> None:
    """Against the papers' formulas, each element with a count of its own."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal((37, 3))
    opt, truth = rule.cls([w], **rule.options, seed=3), Truth(rule, w)
    for step in range(20):
        g = rng.standard_normal(w.shape)
        draw = KINDS["everything" if step % 7 == 3 else kind]
        chosen = draw(rng, opt, g, frozen, np.asarray)
        opt.step([g], where=chosen.where)
        truth.step(g, chosen.mask, tracks=chosen.tracks, chooses=chosen.where is not None)
    truth.check(opt, 1e-11)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_kinds_in_turn_in_every_dtype(rule: Rule, dtype: np.dtype) -> None:
    """Each step is the exact one from where it begins, rounded once."""
    rng = np.random.default_rng(2)
    w = rng.standard_normal((40, 31)).astype(dtype)
    opt, truth = rule.cls([w], **rule.options), Truth(rule, w)
    for step in range(16):
        g = rng.standard_normal(w.shape).astype(dtype)
        draw = list(KINDS.values())[step % len(KINDS)]
        chosen = draw(rng, opt, g, FROZEN[step // 3 % 2], np.asarray)
        truth.w[...] = w
        for name, s in truth.states.items():
            s[...] = opt.state[0][name]
        opt.step([g], where=chosen.where)
        truth.step(
            g.astype(f64), chosen.mask, tracks=chosen.tracks, chooses=chosen.where is not None
        )
        low, high = (truth.w - 1e-4).astype(dtype), (truth.w + 1e-4).astype(dtype)
        assert np.all((w >= low) & (w <= high))
        for name, s in truth.states.items():
            np.testing.assert_allclose(opt.state[0][name], s, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(updates_of(opt), truth.counts.reshape(-1))


@settings(max_examples=300, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    tier=st.sampled_from(AVAILABLE),
    threads=st.integers(1, 3),
    shape=st.sampled_from(SHAPES),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    state_dtype=st.sampled_from([None, None, "float64"]),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=3, max_size=3),
    kinds=st.lists(
        st.tuples(st.sampled_from(sorted(KINDS)), st.sampled_from(FROZEN)), min_size=1, max_size=5
    ),
    maximize=st.booleans(),
    grad_scale=st.sampled_from([1.0, -1.0, 1 / 128]),
    seed=st.integers(0, 2**64 - 1),
)
def test_each_element_moves_as_if_it_were_alone(
    rule: Rule,
    tier: str,
    threads: int,
    shape: tuple[int, ...],
    dtypes: tuple[np.dtype, np.dtype],
    state_dtype: str | None,
    layouts: list[str],
    kinds: list[tuple[str, str]],
    maximize: bool,
    grad_scale: float,
    seed: int,
) -> None:
    """Bit for bit, whatever is selected before and after, for any shape, strides and dtypes."""
    rng = np.random.default_rng(seed)
    start = rng.standard_normal(shape).astype(dtypes[0])
    w = laid_out(start, layouts[0])
    common = {"maximize": maximize, "state_dtype": state_dtype}
    opt = rule.cls([w], **rule.options, **common, seed=seed)
    apart = Apart(rule, start, **common)
    before = _cpu.active_tier()
    _cpu.use_tier(tier)
    fs.set_num_threads(threads)
    try:
        for kind, frozen in kinds:
            g = np.asarray(rng.standard_normal(shape).round(int(rng.integers(0, 4))))
            g = g.astype(dtypes[1])
            given_g = laid_out(g, layouts[1])
            if kind == "top updates":
                given_g, grad_scale = g, 1.0  # of which the expected sizes are
            chosen = KINDS[kind](rng, opt, g, frozen, lambda mask: laid_out(mask, layouts[2]))
            opt.step([given_g], where=chosen.where, grad_scale=grad_scale)
            apart.step(g, chosen, grad_scale=grad_scale)
            assert_bits(given_g, g)
    finally:
        _cpu.use_tier(before)
    assert opt.steps == len(kinds)
    assert_bits(w, apart.array("parameter"))
    if any(choice == "freeze" and kind != "everything" for kind, choice in kinds):
        apart.check(opt)


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize(
    ("dtype", "block", "shape"),
    [
        ("f8", 16, (50, 40)),
        ("f4", 100, (90, 51)),
        ("f2", 1000, (90, 51)),
        (bfloat16, 1024, (7, 1500)),
        ("f4", 10_007, (400, 401)),
    ],
    ids=str,
)
def test_blocks_move_as_parameters_of_their_own(
    rule: Rule, dtype: Any, block: int, shape: tuple[int, ...]
) -> None:
    """Also those that go over from one tile to the next, in large arrays on several threads."""
    rng = np.random.default_rng(3)
    fs.set_num_threads(3)
    w = rng.standard_normal(shape).astype(dtype)
    apart = Apart(rule, w, np.arange(w.size) // block)
    opt = rule.cls([w], **rule.options, seed=9)
    where = fs.RandomBlocks(0.4, block)
    for step in range(5):
        g = rng.standard_normal(w.shape).astype(dtype)
        mask = where.mask(w.shape, step=opt.steps, seed=9)
        chosen = Selected(where, mask, False)
        if step == 3:
            chosen = Selected(None, np.ones_like(mask), False)
        opt.step([g], where=chosen.where)
        apart.step(g, chosen)
    apart.check(opt)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_frozen_rest_is_no_part_of_the_array(rule: Rule, tier: str) -> None:
    """The same bits as an optimizer of the selected elements alone."""
    rng = np.random.default_rng(4)
    w = rng.standard_normal((70, 41)).astype(f32)
    mask = rng.random(w.shape) < 0.4
    mask.reshape(-1)[500:1500] = True
    alone = w[mask]
    opt, twin = rule.cls([w], **rule.options), rule.cls([alone], **rule.options)
    for _ in range(9):
        g = rng.standard_normal(w.shape).astype(f32)
        opt.step([g], where=[mask])
        twin.step([g[mask]])
    for name, array in arrays_of(opt).items():
        assert_bits(array[mask], arrays_of(twin)[name])


WHOLE: dict[str, Callable[[Any], Any]] = {
    "mask": lambda shape: [np.ones(shape, bool)],
    "row mask": lambda shape: [np.ones(shape[:1], bool)],
    "random": lambda shape: fs.RandomBlocks(1.0, block=100),
    "one block": lambda shape: fs.RandomBlocks(1, block=2**62 - 1),
    "cyclic": lambda shape: fs.CyclicBlocks(1),
    "top": lambda shape: fs.TopK(1.0),
    "top update": lambda shape: fs.TopK(1.0, by="update"),
    "tracking": lambda shape: fs.RandomBlocks(1.0, frozen="track"),
}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("whole", WHOLE)
def test_a_whole_selection_is_no_selection(rule: Rule, whole: str) -> None:
    rng = np.random.default_rng(5)
    ours = rng.standard_normal((45, 50)).astype(f32)
    theirs = ours.copy()
    opt, plain = (
        rule.cls([x], **rule.options, max_norm=2.0, skip_nonfinite=True) for x in (ours, theirs)
    )
    for step in range(6):
        g = rng.standard_normal(ours.shape).astype(f32)
        if step == 2:
            g[3, 4] = np.inf
        opt.step([g], where=WHOLE[whole](ours.shape) if step != 4 else None)
        plain.step([g])
    assert everything(opt) == everything(plain)


def test_hyperparameters_may_change_between_steps() -> None:
    """Blocks that have had as many updates may differ in their momentum product."""
    rng = np.random.default_rng(6)
    w = rng.standard_normal(50).astype(f32)
    opt, apart = fs.NAdam([w]), Apart(Rule(fs.NAdam, None, {}), w)
    for step in range(12):
        mask = np.arange(50) % 2 == step % 2
        for each in (opt, apart.opt):
            each.momentum_decay = 0.05 * step
            each.lr = 0.01 * (1 + step)
        g = rng.standard_normal(50).astype(f32)
        chosen = Selected(None if step > 9 else [mask], mask | (step > 9), False)
        opt.step([g], where=chosen.where)
        apart.step(g, chosen)
    apart.check(opt)
    product = opt.state_dict()["state"][0]["block_mu_products"]
    assert product.shape == (50,)


# ---- what is not selected keeps its bits --------------------------------------------------------


def strange_bits(rng: np.random.Generator, array: np.ndarray, where: np.ndarray) -> None:
    """Any bits at all, with signalling NaNs, -0 and denormals among them."""
    as_bits = array.view(f"u{array.itemsize}")
    noise = rng.integers(0, 256, array.nbytes, np.uint8).view(as_bits.dtype).reshape(array.shape)
    kinds = rng.integers(0, 4, array.shape)
    top = np.array(1, as_bits.dtype) << np.array(8 * array.itemsize - 1, as_bits.dtype)
    one = np.array(1, as_bits.dtype)
    all_exponents = np.array(np.inf).astype(array.dtype).view(as_bits.dtype)
    strange = np.choose(kinds, [noise, top, all_exponents | one, one])
    as_bits[where] = strange[where].astype(as_bits.dtype)


UNTOUCHED: dict[str, Callable[[np.ndarray, str], Any]] = {
    "mask": lambda mask, frozen: [fs.Mask(mask, frozen=frozen)],
    "rows": lambda mask, frozen: [fs.Mask(mask.any(1), frozen=frozen)],
    "random": lambda mask, frozen: fs.RandomBlocks(0.5, 100, frozen=frozen),
    "cyclic": lambda mask, frozen: fs.CyclicBlocks(3, frozen=frozen),
    "top": lambda mask, frozen: fs.TopK(0.3, frozen=frozen),
}


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", UNTOUCHED)
@pytest.mark.parametrize("layout", ["c", "gappy"])
def test_unselected_bits_are_left(rule: Rule, dtype: np.dtype, kind: str, layout: str) -> None:
    """Whatever they are: the value and the state with "freeze", the value with "track"."""
    rng = np.random.default_rng(7)
    mask = rng.random((40, 60)) < 0.3
    mask[::3] = False
    mask[10] = True
    rest = ~np.broadcast_to(mask.any(1)[:, None], mask.shape) if kind == "rows" else ~mask
    for tier, frozen in itertools.product(AVAILABLE, FROZEN):
        _cpu.use_tier(tier)
        w = laid_out(rng.standard_normal(mask.shape).astype(dtype), layout)
        opt = rule.cls([w], **rule.options)
        where = UNTOUCHED[kind](mask, frozen)
        if kind in ("random", "cyclic"):
            rest = ~where.mask(w.shape, step=0)
        g = np.where(rest, 0, 1 + rng.random(mask.shape)).astype(dtype)
        if kind == "top":
            where = fs.TopK(float((~rest).mean()), frozen=frozen)
        arrays = arrays_of(opt) if frozen == "freeze" else {"parameter": w}
        for array in arrays.values():
            strange_bits(rng, array, rest)
        w[~rest] = 0.5
        before = {name: raw(array).copy() for name, array in arrays.items()}
        opt.step([g], where=where)
        for name, array in arrays.items():
            np.testing.assert_array_equal(
                raw(array)[rest.reshape(-1)], before[name][rest.reshape(-1)]
            )
        assert (raw(w) != before["parameter"])[~rest.reshape(-1)].all()


# ---- the same bits everywhere -------------------------------------------------------------------


def digest(rule: Rule, dtype: np.dtype, layout: str = "c", **common: Any) -> str:
    """Of parameters and state after a step of every kind."""
    rng = np.random.default_rng(8)
    w = laid_out(rng.standard_normal((400, 401)).astype(dtype), layout)
    opt = rule.cls([w], **rule.options, **common)
    mask = rng.random(w.shape) < 0.3
    mask[100:130] = True
    wheres = [
        [laid_out(mask, layout)],
        fs.RandomBlocks(0.3, 1000, frozen="track"),
        fs.TopK(0.1),
        fs.RandomBlocks(0.3),
        fs.TopK(0.2, by="update"),
        fs.CyclicBlocks(9),
        None,
    ]
    for where in wheres:
        opt.step([laid_out(rng.standard_normal(w.shape).astype(dtype), layout)], where=where)
    result = hashlib.sha256()
    for array in arrays_of(opt).values():
        result.update(raw(array).tobytes())
    result.update(updates_of(opt).tobytes())
    return result.hexdigest()


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [*[(rule, DTYPES[1]) for rule in PLAIN], *[(NADAM, dtype) for dtype in DTYPES]],
    ids=str,
)
def test_tiers_threads_and_layouts(rule: Rule, dtype: np.dtype) -> None:
    """Of an array that is spread over threads."""
    digests = set()
    for tier, (threads, layout) in itertools.product(
        AVAILABLE, [(1, "c"), (4, "c"), (2, "transposed")]
    ):
        _cpu.use_tier(tier)
        fs.set_num_threads(threads)
        digests.add(digest(rule, dtype, layout))
    assert len(digests) == 1


@pytest.mark.parametrize("block", [100, 700, 5000])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_more_than_caches_hold(block: int, dtype: Any) -> None:
    """Where memory is asked for blocks ahead of time: once what was drawn, then the rest."""
    size = 4_200_000 + 5
    g = np.random.default_rng(3).standard_normal(size).astype(dtype)
    whole = fs.Adam([np.ones(size, dtype)])
    whole.step([g])
    opt = fs.Adam([np.ones(size, dtype)])
    drawn = fs.RandomBlocks(0.1, block=block)
    mask = drawn.mask(size, step=0)
    opt.step([g], where=drawn)
    assert np.array_equal(opt.params[0] != 1, mask & (g != 0))
    opt.step([g], where=[~mask])
    for name, expected in arrays_of(whole).items():
        assert_bits(arrays_of(opt)[name], expected)


@pytest.mark.parametrize("rule", [PLAIN[0], ADAM], ids=str)
def test_clipping_sums_in_a_fixed_order(rule: Rule) -> None:
    digests = set()
    for tier, (threads, layout) in itertools.product(AVAILABLE, [(1, "c"), (3, "gappy")]):
        _cpu.use_tier(tier)
        fs.set_num_threads(threads)
        digests.add(digest(rule, DTYPES[1], layout, max_norm=0.3))
    assert len(digests) == 1


# ---- blocks drawn at random ---------------------------------------------------------------------


def chi_square_is_likely(counts: Any, expected: float) -> bool:
    """Five standard deviations: the seeds are fixed, so that it holds or does not."""
    counts = np.asarray(counts, f64)
    freedom = counts.size - 1
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return chi_square < freedom + 5 * math.sqrt(2 * freedom) + 5


def drawn(where: fs.RandomBlocks, blocks: int, steps: int, **options: Any) -> np.ndarray:
    """Which of the blocks are drawn in each of so many steps."""
    size = blocks * where.block
    masks = [where.mask(size, step=step, **options)[:: where.block] for step in range(steps)]
    return np.array(masks)


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 10, 64, 99])
@pytest.mark.parametrize("fraction", [0, 1e-9, 0.07, 1 / 3, 0.5, 0.99, 1])
def test_so_many_blocks_are_drawn(blocks: int, fraction: float) -> None:
    where = fs.RandomBlocks(fraction, 1)
    counts = drawn(where, blocks, 300).sum(1)
    exact = round(fraction * blocks, 9)
    assert set(counts) <= {math.floor(exact), math.ceil(exact)}
    deviation = math.sqrt(300 * 0.25) * 5
    assert abs(counts.sum() - 300 * fraction * blocks) <= deviation * (exact % 1 > 0) + 1e-5


@pytest.mark.parametrize("blocks", [2, 3, 4, 5, 6, 7, 8, 11, 13, 16, 30, 100])
@pytest.mark.parametrize("share", ["one", "third", "most"])
@pytest.mark.parametrize("seed", [0, 11])
def test_each_block_has_the_same_chance(blocks: int, share: str, seed: int) -> None:
    count = {"one": 1, "third": max(1, blocks // 3), "most": blocks - 1}[share]
    steps = 3000
    found = drawn(fs.RandomBlocks(count / blocks, 1), blocks, steps, seed=seed)
    frequencies = found.mean(0)
    p = count / blocks
    chi_square = ((frequencies - p) ** 2).sum() * steps / (p * (1 - p)) * (blocks - 1) / blocks
    assert chi_square < blocks - 1 + 5 * math.sqrt(2 * (blocks - 1)) + 5


@pytest.mark.parametrize(("blocks", "count"), [(4, 2), (5, 2), (6, 3), (7, 2), (8, 4), (10, 2)])
def test_each_set_of_few_blocks_has_the_same_chance(blocks: int, count: int) -> None:
    found = drawn(fs.RandomBlocks(count / blocks, 1), blocks, 6000, seed=3)
    numbers = found @ (1 << np.arange(blocks))
    sets = [sum(1 << i for i in chosen) for chosen in itertools.combinations(range(blocks), count)]
    counts = [np.count_nonzero(numbers == one) for one in sets]
    assert sum(counts) == 6000
    assert chi_square_is_likely(counts, 6000 / len(sets))


@pytest.mark.parametrize(("blocks", "count"), [(16, 4), (16, 8), (30, 10), (64, 8), (100, 50)])
def test_pairs_of_blocks_are_independent(blocks: int, count: int) -> None:
    steps = 6000
    found = drawn(fs.RandomBlocks(count / blocks, 1), blocks, steps, seed=4).astype(f64)
    p = count * (count - 1) / blocks / (blocks - 1)
    together = (found.T @ found)[np.triu_indices(blocks, 1)]
    z = (together - steps * p) / math.sqrt(steps * p * (1 - p))
    assert np.abs(z).max() < 5.5
    assert (z**2).mean() < 1 + 6 * math.sqrt(2 / z.size) + 0.3


@pytest.mark.parametrize("blocks", [7, 16, 64])
def test_steps_and_parameters_are_drawn_independently(blocks: int) -> None:
    """Whether a block is drawn says nothing about it in the next step, parameter or seed."""
    where, steps, p = fs.RandomBlocks(0.25, 1), 3000, 0.25
    first = drawn(where, blocks, steps)
    others = [
        np.roll(first, 1, 0),
        drawn(where, blocks, steps, parameter=1),
        drawn(where, blocks, steps, seed=1),
        drawn(where, blocks, steps, seed=2**64 - 1),
    ]
    for other in others:
        assert (first != other).any()
        z = ((first & other).mean() - p**2) / math.sqrt(p**2 * (1 - p**2) / first.size)
        assert abs(z) < 5


@settings(max_examples=60, deadline=None)
@given(
    seed=st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**63, 2**64 - 1])),
    fraction=st.floats(0, 1),
    block=st.one_of(st.integers(1, 300), st.sampled_from([1024, 2**31, 2**62 - 1])),
    frozen=st.sampled_from(FROZEN),
    start=st.integers(0, 3),
)
def test_the_mask_says_beforehand_what_moves(
    seed: int, fraction: float, block: int, frozen: Any, start: int
) -> None:
    shapes = [(), (0,), (301,), (20, 30), (1,)]
    params = [np.zeros(shape, f32) for shape in shapes]
    opt = fs.SGD(params, lr=1.0, seed=seed)
    ones = [np.ones(shape, f32) for shape in shapes]
    for _ in range(start):
        opt.step([None, *ones[1:]])
    where = fs.RandomBlocks(fraction, block, frozen=frozen)
    expected = [
        where.mask(shape, step=start, seed=seed, parameter=i) for i, shape in enumerate(shapes)
    ]
    before = [p.copy() for p in params]
    opt.step(ones, where=where)
    for p, mask, old in zip(params, expected, before, strict=True):
        assert mask.dtype == bool
        np.testing.assert_array_equal(p != old, mask)


def test_draws_depend_on_seed_step_and_position_only(rng: np.random.Generator) -> None:
    """Not on what was drawn before, on names, threads, gradients or other parameters."""
    where = fs.RandomBlocks(0.5, 3)
    a, b, c = (np.zeros(200, f32) for _ in range(3))
    one, two = fs.SGD([a, b], seed=5, lr=1.0), fs.Adam({"x": np.zeros(3, f32), "y": c}, seed=5)
    for _ in range(4):
        before = b.copy(), c.copy()
        fs.set_num_threads(int(rng.integers(1, 4)))
        one.step([None, np.ones(200, f32)], where=where)
        two.step({"y": rng.random(200) + 1}, where={"y": where})
        np.testing.assert_array_equal(b != before[0], c != before[1])
    assert not a.any()
    expected = where.mask(200, step=3, seed=5, parameter=1)
    np.testing.assert_array_equal(b != before[0], expected)


def test_a_skipped_step_draws_again() -> None:
    w = np.zeros(100, f32)
    opt = fs.SGD([w], lr=1.0, skip_nonfinite=True)
    where = fs.RandomBlocks(0.2, 1)
    opt.step([np.full(100, np.nan, f32)], where=where)
    opt.step([np.ones(100, f32)], where=where)
    np.testing.assert_array_equal(w != 0, where.mask(100, step=0))


def test_fractions_may_follow_a_schedule() -> None:
    asked: list[int] = []

    def fraction(step: int) -> float:
        asked.append(step)
        return [0, 1, np.float32(0.5)][step % 3]

    for kind in (fs.RandomBlocks(fraction, 2), fs.TopK(fraction)):
        asked.clear()
        w = np.zeros(8, f32)
        opt = fs.SGD({"w": w}, lr=1.0)
        for moved in (0, 8, 4, 0, 8, 4):
            before = w.copy()
            opt.step({"w": np.ones(8, f32)}, where=kind)
            assert np.count_nonzero(w != before) == moved
        assert set(asked) == set(range(6))
    assert fs.RandomBlocks(fraction, 2).mask(8, step=1).all()


# ---- blocks in turn -----------------------------------------------------------------------------


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 7, 40, 10**12, 2**62 - 1])
@pytest.mark.parametrize("size", [0, 1, 7, 39, 2500])
def test_blocks_have_their_turn(n_blocks: int, size: int) -> None:
    w, where = np.zeros(size, f32), fs.CyclicBlocks(n_blocks)
    opt = fs.SGD([w], lr=1.0)
    block = max(1, -(-size // n_blocks))
    for step in range(9):
        before = w.copy()
        opt.step([np.ones(size, f32)], where=where)
        expected = np.arange(size) // block == step % n_blocks
        np.testing.assert_array_equal(w != before, expected)
        np.testing.assert_array_equal(where.mask(size, step=step), expected)
    assert opt.steps == 9


def test_one_round_moves_everything_once() -> None:
    w = np.zeros((7, 11), f32)
    opt = fs.SGD([w], lr=1.0)
    for _ in range(5):
        opt.step([np.ones_like(w)], where=fs.CyclicBlocks(5))
    assert (w == -1).all()


# ---- the largest --------------------------------------------------------------------------------


def chosen_by_top(g: np.ndarray, fraction: float, **options: Any) -> np.ndarray:
    """What a tracking SGD moves; by whether its memory changes, since a gradient may be 0."""
    opt = fs.SGD([np.zeros(g.shape, g.dtype)], lr=1.0)
    opt.step([g], where=fs.TopK(fraction, **options))
    return updates_of(opt).reshape(g.shape) == 1


def top_data(kind: str, size: int, dtype: Any) -> np.ndarray:
    rng = np.random.default_rng(9)
    tiny = float(np.finfo(dtype).smallest_subnormal)
    made: dict[str, Callable[[], np.ndarray]] = {
        "normal": lambda: rng.standard_normal(size),
        "ascending": lambda: np.arange(size) / size,
        "descending": lambda: -np.arange(size, 0, -1) / size,
        "all equal": lambda: np.where(rng.random(size) < 0.5, 3, -3.0),
        "zeros": lambda: np.where(rng.random(size) < 0.5, 0.0, -0.0),
        "two values": lambda: rng.choice([-1.0, 2.0], size),
        "few values": lambda: rng.integers(-3, 4, size).astype(f64),
        "denormals": lambda: rng.integers(-5, 6, size) * tiny,
        "infinite": lambda: rng.choice([np.inf, -np.inf, 1, 2], size),
        "NaN": lambda: np.where(rng.random(size) < 0.2, np.nan, rng.standard_normal(size)),
        "all NaN": lambda: np.full(size, np.nan),
        "wide": lambda: rng.standard_normal(size) * 10.0 ** rng.integers(-30, 30, size),
        "a few huge tiles": lambda: (
            np.where((np.arange(size) // 1024) % 50 == 17, 1e6, 1) * rng.standard_normal(size)
        ),
        "between the sampled tiles": lambda: (
            np.where(np.isin(np.arange(size) // 1024, np.arange(64) * -(-size // 1024) // 64), 0, 1)
            * (1 + rng.random(size))
        ),
    }
    with np.errstate(over="ignore"):
        return made[kind]().astype(dtype)


TOP_DATA = [
    *["normal", "ascending", "descending", "all equal", "zeros", "two values", "few values"],
    *["denormals", "infinite", "NaN", "all NaN", "wide", "a few huge tiles"],
]


@pytest.mark.parametrize("kind", [*TOP_DATA, "between the sampled tiles"])
@pytest.mark.parametrize("dtype", [f32, f64])
def test_top_is_what_sorting_finds(kind: str, dtype: Any) -> None:
    for size in (1, 2, 17, 1024, 5000, 200_003):
        g = top_data(kind, size, dtype)
        for fraction in (0.003, 0.5, 0.98):
            np.testing.assert_array_equal(chosen_by_top(g, fraction), largest(g, fraction))


@pytest.mark.parametrize("kind", ["ascending", "two values", "a few huge tiles"])
def test_top_of_a_million(kind: str, tier: str) -> None:
    """A sample of which says little, or the wrong thing."""
    g = top_data(kind, 1_000_003, f32)
    for fraction in (1e-6, 0.01, 0.7):
        np.testing.assert_array_equal(chosen_by_top(g, fraction), largest(g, fraction))


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("kind", TOP_DATA)
def test_top_of_sixteen_bits(kind: str, dtype: np.dtype) -> None:
    dtype_of_tiny = np.float16 if dtype == bfloat16 else dtype
    g = top_data(kind, 3001, dtype_of_tiny).astype(dtype)
    np.testing.assert_array_equal(chosen_by_top(g, 0.3), largest(g.astype(f32), 0.3))


@settings(max_examples=80, deadline=None)
@given(
    size=st.sampled_from([1, 2, 3, 10, 100, 999]),
    top=st.integers(0, 1000),
    places=st.integers(-2, 2),
    special=st.sampled_from([0, 0.1, 0.6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_top_of_ties(size: int, top: int, places: int, special: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    g = (rng.standard_normal(size) * 10).round(places)
    values = rng.choice([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 5e-324], size)
    g = np.where(rng.random(size) < special, values, g)
    np.testing.assert_array_equal(chosen_by_top(g, top / 1000), largest(g, top / 1000))


@pytest.mark.parametrize(("dtype", "quiet"), [("f4", 0x7FC00000), ("f8", 0x7FF8000000000000)])
def test_one_nan_is_as_large_as_another(dtype: str, quiet: int) -> None:
    """Whatever its payload, which other processors do not even keep: the first ones are chosen."""
    payloads = np.array([0, 3, 1, 2, 7, 5], f"u{dtype[1]}")
    g = (payloads + np.array(quiet, payloads.dtype)).view(dtype)
    np.testing.assert_array_equal(chosen_by_top(g, 1 / 3), [1, 1, 0, 0, 0, 0])


@pytest.mark.parametrize("size", [100, 29, 7])
@pytest.mark.parametrize("fraction", [0.07, 0.29, 0.57, 1 / 3, 5e-324, 1e-15, 1.0])
def test_top_counts(size: int, fraction: float) -> None:
    """ceil(fraction * size), of the number that was meant: 0.07 * 100 is 7."""
    expected = max(1, math.ceil(round(fraction * size, 9)))
    found = chosen_by_top(np.random.default_rng(0).standard_normal(size), fraction)
    assert np.count_nonzero(found) == expected


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("has_anchor", [False, True])
def test_top_updates(rule: Rule, frozen: Any, has_anchor: bool) -> None:
    """With decay, anchor and clipping, from blocks that have come differently far."""
    rng = np.random.default_rng(10)
    w = rng.standard_normal((60, 41)).astype(f32)
    opt = rule.cls([w], **rule.options, max_norm=3.0)
    if has_anchor:
        anchor(opt, some_penalty(rng, w.shape, f32))
    for step in range(4):
        g = (rng.standard_normal(w.shape) * (rng.random(w.shape) < 0.7)).astype(f32)
        sizes = would_move(opt, g)
        before = w.copy()
        opt.step([g], where=fs.TopK(0.2, by="update", frozen=frozen))
        expected = largest(sizes, 0.2)
        np.testing.assert_array_equal(np.abs(w - before), np.where(expected, sizes, 0))
        if step == 1:
            opt.step([g], where=fs.RandomBlocks(0.5, 7))


def test_top_of_several_parameters(rng: np.random.Generator) -> None:
    """So many of each."""
    params = [np.zeros(n, f32) for n in (10, 1, 200)]
    grads = [rng.standard_normal(p.size).astype(f32) * 10**i for i, p in enumerate(params)]
    fs.SGD(params, lr=1.0).step(grads, where=fs.TopK(0.1))
    assert [np.count_nonzero(p) for p in params] == [1, 1, 20]


# ---- clipping, skipping and clearing ------------------------------------------------------------


def clipped(g: np.ndarray, of: np.ndarray, limit: float) -> np.ndarray:
    norm = math.sqrt(float((g[of].astype(f64) ** 2).sum()))
    return g * min(1.0, limit / (norm + 1e-6))


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", FROZEN)
def test_clipping_looks_at_what_moves(rule: Rule, kind: str, frozen: str) -> None:
    rng = np.random.default_rng(11)
    w = rng.standard_normal((40, 30))
    opt, truth = rule.cls([w], **rule.options, max_norm=5.0), Truth(rule, w)
    for step in range(6):
        g = rng.standard_normal(w.shape)
        chosen = KINDS[kind if step != 3 else "everything"](rng, opt, g, frozen, np.asarray)
        of_all = chosen.tracks or kind.startswith("top")
        opt.step([g], where=chosen.where)
        g = clipped(g, np.ones_like(chosen.mask) if of_all else chosen.mask, 5.0)
        truth.step(g, chosen.mask, tracks=chosen.tracks, chooses=chosen.where is not None)
    truth.check(opt, 1e-11)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("is_selected", [False, True])
@pytest.mark.parametrize("kind", ["mask", "rows", "cyclic", "top"])
def test_skipping_looks_at_what_moves(
    bad: float, frozen: Any, is_selected: bool, kind: str
) -> None:
    w, g = np.zeros((6, 50), f32), np.ones((6, 50), f32)
    mask = np.zeros(w.shape, bool)
    mask[:3] = True
    where = {
        "mask": [fs.Mask(mask, frozen=frozen)],
        "rows": [fs.Mask(mask[:, 0], frozen=frozen)],
        "cyclic": fs.CyclicBlocks(2, frozen=frozen),
        "top": fs.TopK(0.5, frozen=frozen),
    }[kind]
    g[1 if is_selected else 4, 7] = bad
    opt = fs.SGD([w], lr=1.0, skip_nonfinite=True)
    opt.step([g], where=where, zero_grad=True)
    is_skipped = is_selected or frozen == "track" or kind == "top"
    assert (opt.steps, opt.skipped_steps) == (not is_skipped, is_skipped)
    np.testing.assert_array_equal(w, 0 if is_skipped else np.where(mask, -1, 0))
    assert not g.any()


@pytest.mark.parametrize("kind", WHOLE)
def test_a_skipped_step_changes_nothing(kind: str) -> None:
    """Not even how blocks are counted from now on."""
    opt = fs.Adam([np.ones((4, 5), f32)], skip_nonfinite=True)
    opt.step([np.ones((4, 5), f32)])
    before = opt.state_dict()
    opt.step([np.full((4, 5), np.nan, f32)], where=WHOLE[kind]((4, 5)))
    after = opt.state_dict()
    assert after["fusestep"].pop("skipped_steps") == 1
    before["fusestep"].pop("skipped_steps")
    np.testing.assert_equal(after, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize(("layout", "dtype"), [*zip(LAYOUTS, DTYPES * 2, strict=False)], ids=str)
def test_the_whole_gradient_is_cleared(kind: str, frozen: str, layout: str, dtype: Any) -> None:
    rng = np.random.default_rng(23)
    opt = fs.SGD([np.zeros((40, 33), f32)], lr=1.0)
    g = rng.standard_normal((40, 33)).astype(dtype)
    strided = laid_out(g.copy(), layout)
    chosen = KINDS[kind](rng, opt, g, frozen, np.asarray)
    opt.step([strided], where=chosen.where, zero_grad=True)
    assert not raw(strided).any()
    np.testing.assert_array_equal(opt.params[0], np.where(chosen.mask, -g.astype(f32), 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [70, 500])
def test_nothing_beside_the_gradient_is_cleared(dtype: np.dtype, size: int) -> None:
    around = np.ones((3 * size, size), dtype)
    g = around[1::3, 2:-3][::-1]
    opt = fs.Adam([np.zeros(g.shape, f32)])
    for where in (fs.RandomBlocks(0.5, 100), [g > 2]):
        g[...] = 1
        opt.step([g], where=where, zero_grad=True)
        assert not g.any()
        assert np.count_nonzero(around) == around.size - g.size


# ---- anchors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("has_importance", [False, True])
def test_anchors_pull_what_may_move(rule: Rule, frozen: str, has_importance: bool) -> None:
    rng = np.random.default_rng(12)
    w = rng.standard_normal((30, 47))
    opt, truth = rule.cls([w], **rule.options), Truth(rule, w)
    truth.penalty = some_penalty(rng, w.shape)
    if not has_importance:
        truth.penalty = truth.penalty._replace(importance=1.0)
    anchor(opt, truth.penalty)
    kinds = ["mask", "one run", "random blocks", "everything", "top gradients", "top updates"]
    for kind in kinds * 2:
        g = rng.standard_normal(w.shape)
        chosen = KINDS[kind](rng, opt, g, frozen, np.asarray)
        opt.step([g], where=chosen.where)
        truth.step(g, chosen.mask, tracks=chosen.tracks, chooses=chosen.where is not None)
    truth.check(opt, 1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_anchors_of_any_layout(layout: str) -> None:
    """As the same anchor of parameters of one element."""
    rng = np.random.default_rng(13)
    start = rng.standard_normal((12, 19)).astype(f32)
    penalty = some_penalty(rng, start.shape, f32)
    w = laid_out(start, layout)
    opt, apart = fs.Adam([w], lr=0.1), Apart(Rule(fs.Adam, None, {"lr": 0.1}), start)
    anchor(opt, penalty)
    parts = ([a[i : i + 1] for i in range(start.size)] + [None] for a in map(np.ravel, penalty[1:]))
    apart.opt.anchor(penalty.strength, *parts)
    for kind in ("mask", "one run", "random blocks", "mask"):
        g = rng.standard_normal(start.shape).astype(f32)
        chosen = KINDS[kind](rng, opt, g, "freeze", np.asarray)
        opt.step([laid_out(g, layout)], where=chosen.where)
        apart.step(g, chosen)
    apart.check(opt)


# ---- gradients of some rows ---------------------------------------------------------------------


def dense_of(rows: int, indices: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sums as a dense gradient, and which elements are listed."""
    numbers, sums = summed(indices, values)
    g = np.zeros((rows, *values.shape[1:]))
    listed = np.zeros(g.shape, bool)
    g[numbers], listed[numbers] = sums, True
    return g, listed


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("rest", [(), (5, 7), (600,)], ids=str)
def test_rows_that_are_listed_and_selected(rule: Rule, frozen: str, rest: tuple[int, ...]) -> None:
    rng = np.random.default_rng(14)
    w = rng.standard_normal((23, *rest))
    opt, truth = rule.cls([w], **rule.options), Truth(rule, w)
    draws = [_none, _mask, _rows, _random, _cyclic, _none, _mask, _run, _none]
    for draw in draws:
        indices = rng.integers(0, 23, rng.integers(0, 30))
        values = rng.standard_normal((len(indices), *rest))
        g, listed = dense_of(23, indices, values)
        chosen = draw(rng, opt, g, frozen, np.asarray)
        before = w.copy()
        opt.step([fs.Rows(indices, values)], where=chosen.where)
        step_of_rows(truth, g, listed, chosen)
        still = ~(listed & chosen.mask)
        assert_bits(w[still], before[still])
    truth.check(opt, 1e-11)


def step_of_rows(truth: Truth, g: np.ndarray, listed: np.ndarray, chosen: Selected) -> None:
    """Before blocks differ, counts are shared; tracking moves the state of what is listed."""
    is_lazy = not truth.differ and (chosen.where is None or chosen.tracks)
    if is_lazy or not chosen.tracks:
        moved = listed if chosen.tracks else listed & chosen.mask
        kept = truth.w.copy()
        truth.step(g, moved, chooses=not is_lazy)
        truth.w[~chosen.mask] = kept[~chosen.mask]
        return
    kept = truth.w.copy()
    truth.step(g, listed)
    truth.w[~chosen.mask] = kept[~chosen.mask]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_rows_with_selections_bit_for_bit(rule: Rule, dtype: np.dtype) -> None:
    rng = np.random.default_rng(15)
    w = rng.standard_normal((30, 37)).astype(dtype)
    apart = Apart(rule, w)
    opt = rule.cls([w], **rule.options)
    nothing = Selected([np.zeros(30, bool)], np.zeros(w.shape, bool), False)
    opt.step([w.copy()], where=nothing.where)
    in_double = f64 if dtype == f64 else f32
    for draw in (_none, _mask, _random, _rows, _none):
        indices = rng.integers(0, 30, 20)
        values = rng.standard_normal((20, 37)).astype(dtype)
        numbers, sums = summed(indices, values, in_double)
        g, listed = np.zeros(w.shape, in_double), np.zeros(w.shape, bool)
        g[numbers], listed[numbers] = sums, True
        chosen = draw(rng, opt, g, "freeze", np.asarray)
        given_values = np.asfortranarray(values)
        opt.step([fs.Rows(indices, given_values)], where=chosen.where, zero_grad=True)
        apart.step(g, chosen._replace(mask=chosen.mask & listed))
        assert not given_values.any()
    apart.check(opt)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("frozen", FROZEN)
def test_rows_of_small_tables(shape: tuple[int, ...], frozen: Any) -> None:
    w = np.zeros(shape, f32)
    opt = fs.Adam([w])
    indices = np.arange(shape[0])
    for where in (fs.RandomBlocks(1, frozen=frozen), [np.ones(shape[0], bool)], None):
        opt.step([fs.Rows(indices, np.ones(shape, f32))], where=where)
    assert opt.steps == 3
    assert (w < 0).all()


# ---- state of rows ------------------------------------------------------------------------------


def _row_selections(rng: np.random.Generator, rows: int, size: int) -> list[Any]:
    return [
        [np.ones(rows, bool)],
        [rng.random(rows) < 0.5],
        fs.RandomBlocks(0.5, block=size),
        fs.RandomBlocks(0.3, block=3 * size),
        fs.CyclicBlocks(1),
        [np.zeros(rows, bool)],
        None,
    ]


@pytest.mark.parametrize("rule", ROWWISE, ids=str)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("shape", [(20,), (20, 3), (9, 1100), (20, 2, 5)], ids=str)
@pytest.mark.parametrize("is_of_rows", [False, True])
def test_rowwise_rules_move_whole_rows(
    rule: Rule, frozen: Any, shape: tuple[int, ...], is_of_rows: bool
) -> None:
    rng = np.random.default_rng(16)
    w = rng.standard_normal(shape)
    opt, size = rule.cls([w], **rule.options), math.prod(shape[1:])
    expected, state = w.copy(), np.zeros(shape[0])
    for i, where in enumerate(_row_selections(rng, shape[0], size) * 2):
        mask = np.ones(shape[0], bool)
        if isinstance(where, list):
            [mask], where = where, [fs.Mask(where[0], frozen=frozen)]
        elif where is not None:
            where.frozen = frozen
            if isinstance(where, fs.CyclicBlocks):
                where = fs.CyclicBlocks(1, frozen=frozen)
            mask = where.mask(shape, step=i).reshape(shape[0], -1).all(1)
        indices = rng.permutation(shape[0])[:7] if is_of_rows else np.arange(shape[0])
        g = rng.standard_normal((len(indices), *shape[1:]))
        opt.step([fs.Rows(indices, g) if is_of_rows else g], where=where)
        for row, gradient in zip(indices, g, strict=True):
            known = {"sum": state[row], "step": i}
            moved = rule.reference(expected[row][None], gradient[None], known, **rule.options)
            if mask[row]:
                expected[row] = moved[0]
            if mask[row] or frozen == "track":
                state[row] = np.squeeze(known["sum"])
    np.testing.assert_allclose(w, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(opt.state[0]["sum"], state, rtol=1e-12)


NOT_ROWS: list[Callable[[], Any]] = [
    lambda: [np.ones((6, 4), bool)],
    lambda: fs.RandomBlocks(0.5, block=6),
    lambda: fs.CyclicBlocks(4),
    lambda: fs.TopK(0.5),
    lambda: fs.TopK(1.0, by="update", frozen="track"),
]


@pytest.mark.parametrize("make", NOT_ROWS)
def test_rowwise_rules_refuse_parts_of_rows(make: Callable[[], Any]) -> None:
    opt = fs.RowwiseAdagrad([np.ones((6, 4), f32)])
    refused(opt, [np.ones((6, 4), f32)], make(), ValueError, "whole rows")


# ---- tables that grow ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("block", [1, 3, 5, 10, 1024])
def test_rows_that_are_new_have_had_no_updates(rule: Rule, block: int) -> None:
    rng = np.random.default_rng(17)
    w = rng.standard_normal((7, 5)).astype(f32)
    opt = rule.cls([w], **rule.options)
    for _ in range(3):
        opt.step([rng.standard_normal((7, 5))], where=fs.RandomBlocks(0.6, block))
    counts = updates_of(opt)
    w = opt.resize(0, 11, init=1.0)
    np.testing.assert_array_equal(updates_of(opt), [*counts, *[0] * 20])
    fresh = rule.cls([np.ones((4, 5), f32)], **rule.options)
    for _ in range(4):
        g = rng.standard_normal((11, 5)).astype(f32)
        opt.step([g])
        fresh.step([g[7:]])
    assert_bits(w[7:], fresh.params[0])
    np.testing.assert_array_equal(updates_of(opt), np.append(counts + 4, [4] * 20))


def test_an_empty_table_grows() -> None:
    opt = fs.Adam([np.zeros((0, 3), f32)])
    opt.step([np.zeros((0, 3), f32)], where=fs.RandomBlocks(0.5))
    w = opt.resize(0, 4)
    opt.step([np.ones((4, 3), f32)], where=[np.array([1, 0, 0, 1], bool)])
    np.testing.assert_array_equal(w != 0, [[1] * 3, [0] * 3, [0] * 3, [1] * 3])


# ---- saving -------------------------------------------------------------------------------------


def partly_trained(rule: Rule, **common: Any) -> fs.Optimizer:
    """With blocks that differ, and one parameter whose blocks do not."""
    rng = np.random.default_rng(18)
    params = {"a": rng.standard_normal((13, 9)).astype(f32), "b": rng.standard_normal(5)}
    opt = rule.cls(params, **rule.options, **common)
    for _ in range(4):
        train(opt, rng, {"a": fs.RandomBlocks(0.4, 5)})
    return opt


def train(opt: fs.Optimizer, rng: np.random.Generator, where: Any) -> None:
    opt.step({k: rng.standard_normal(p.shape) for k, p in opt.params.items()}, where=where)


def continued(opt: fs.Optimizer) -> Any:
    """After steps of every kind: nothing that was not taken over can hide."""
    rng = np.random.default_rng(19)
    for where in (fs.RandomBlocks(0.3, 4), None, {"b": fs.TopK(0.5)}, fs.CyclicBlocks(3)):
        train(opt, rng, where)
    return everything(opt), opt.state_dict()


WAYS: dict[str, Callable[[fs.Optimizer, Rule, Any], fs.Optimizer]] = {}


def way(work: Callable[[fs.Optimizer, Rule, Any], fs.Optimizer]) -> Any:
    WAYS[work.__name__] = work
    return work


@way
def by_pickle(opt: fs.Optimizer, rule: Rule, path: Path) -> fs.Optimizer:
    return pickle.loads(pickle.dumps(opt))


@way
def by_deepcopy(opt: fs.Optimizer, rule: Rule, path: Path) -> fs.Optimizer:
    return copy.deepcopy(opt)


def _stranger(opt: fs.Optimizer, rule: Rule) -> fs.Optimizer:
    """Of the same parameters, which has come somewhere else."""
    twin = rule.cls({k: p.copy() for k, p in opt.params.items()}, **rule.options, seed=1)
    train(twin, np.random.default_rng(0), fs.RandomBlocks(0.5, 2))
    for name, p in opt.params.items():
        twin.params[name][...] = p
    return twin


@way
def by_state_dict(opt: fs.Optimizer, rule: Rule, path: Path) -> fs.Optimizer:
    twin = _stranger(opt, rule)
    twin.load_state_dict(opt.state_dict())
    return twin


@way
def by_file(opt: fs.Optimizer, rule: Rule, path: Path) -> fs.Optimizer:
    twin = _stranger(opt, rule)
    opt.save(path / "state")
    twin.load(path / "state")
    return twin


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("how", WAYS)
def test_training_goes_on_from_what_was_saved(rule: Rule, how: str, tmp_path: Path) -> None:
    seed = 2**64 - 1
    opt = partly_trained(rule, seed=seed)
    twin = WAYS[how](opt, rule, tmp_path)
    assert twin.seed == seed
    np.testing.assert_equal(continued(twin), continued(opt))


def test_a_huge_block_can_be_saved() -> None:
    opt = fs.Adam([np.zeros(4, f32)])
    opt.step([np.ones(4, f32)], where=fs.RandomBlocks(1.0, block=2**60))
    copy.deepcopy(opt).load_state_dict(opt.state_dict())


def test_state_dicts_without_blocks() -> None:
    """Of before, or of torch: the counts of blocks are forgotten, the seed stays."""
    opt = fs.Adam([np.zeros(4, f32)], seed=7)
    opt.step([np.ones(4, f32)])
    saved = opt.state_dict()
    assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    del saved["fusestep"]["seed"]
    opt.step([np.ones(4, f32)], where=[np.array([1, 0, 0, 0], bool)])
    assert opt.state_dict()["state"][0]["block_steps"].tolist() == [2, 1, 1, 1]
    opt.load_state_dict(saved)
    assert "block_steps" not in opt.state_dict()["state"][0]
    assert opt.seed == 7


def test_entries_of_blocks() -> None:
    opt = partly_trained(NADAM)
    entries = opt.state_dict()["state"]
    assert entries["a"]["block_size"] == 5
    assert entries["a"]["block_steps"].shape == entries["a"]["block_mu_products"].shape == (24,)
    assert "block_size" not in entries["b"]
    entries["a"]["block_steps"][...] = 99  # a copy
    assert opt.state_dict()["state"]["a"]["block_steps"].max() <= 4


BLOCKS = 6  # of partly_counted()'s parameter of 17 elements, 3 in each

BAD_BLOCKS: list[tuple[str, Any, type[Exception]]] = [
    ("no size", {"block_size": ...}, TypeError),
    ("no steps", {"block_steps": ...}, (TypeError, ValueError)),
    ("no products", {"block_mu_products": ...}, (TypeError, ValueError)),
    ("size 0", {"block_size": 0}, ValueError),
    ("negative size", {"block_size": -3}, ValueError),
    ("half a size", {"block_size": 2.5}, ValueError),
    ("NaN size", {"block_size": np.nan}, ValueError),
    ("size of text", {"block_size": "3"}, TypeError),
    ("another size", {"block_size": 4}, ValueError),
    ("too few", {"block_steps": np.ones(BLOCKS - 1, int)}, ValueError),
    ("too many", {"block_steps": np.ones(BLOCKS + 1, int)}, ValueError),
    ("two axes", {"block_steps": np.ones((BLOCKS, 1), int)}, ValueError),
    ("a scalar", {"block_steps": 3}, ValueError),
    ("negative", {"block_steps": np.array([1, 1, -1, 1, 1, 1])}, ValueError),
    ("too large", {"block_steps": np.full(BLOCKS, 2**32)}, ValueError),
    ("floats", {"block_steps": np.ones(BLOCKS)}, TypeError),
    ("complex", {"block_steps": np.ones(BLOCKS, complex)}, TypeError),
    ("text", {"block_steps": np.full(BLOCKS, "1")}, TypeError),
    ("objects", {"block_steps": np.full(BLOCKS, None)}, TypeError),
    ("too few products", {"block_mu_products": np.ones(BLOCKS - 1)}, ValueError),
    ("NaN product", {"block_mu_products": np.full(BLOCKS, np.nan)}, ValueError),
    ("product > 1", {"block_mu_products": np.full(BLOCKS, 1.5)}, ValueError),
    ("product < 0", {"block_mu_products": np.full(BLOCKS, -0.5)}, ValueError),
    ("product of text", {"block_mu_products": np.full(BLOCKS, "x")}, TypeError),
]


def partly_counted(cls: type[fs.Optimizer] = fs.NAdam) -> fs.Optimizer:
    opt = cls([np.ones(17, f32)])
    opt.step([np.ones(17, f32)], where=fs.RandomBlocks(0.5, 3))
    return opt


@pytest.mark.parametrize(
    ("edit", "error"), [b[1:] for b in BAD_BLOCKS], ids=[b[0] for b in BAD_BLOCKS]
)
def test_bad_blocks_change_nothing(edit: dict[str, Any], error: type[Exception]) -> None:
    opt = partly_counted()
    before = snapshot(opt)
    changes = {f"state__0__{name}": value for name, value in edit.items()}
    with pytest.raises(error):
        opt.load_state_dict(edited(**changes)(opt.state_dict()))
    np.testing.assert_equal(snapshot(opt), before)


@pytest.mark.parametrize(
    ("seed", "error"),
    [(-1, ValueError), (2**64, ValueError), (1.0, TypeError), ("1", TypeError), (True, TypeError)],
)
def test_bad_seeds(seed: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="seed"):
        fs.Adam([np.ones(3, f32)], seed=seed)
    opt = partly_counted()
    before = snapshot(opt)
    with pytest.raises(error, match="seed"):
        opt.seed = seed
    with pytest.raises(error, match="seed"):
        opt.load_state_dict(edited(fusestep__seed=seed)(opt.state_dict()))
    np.testing.assert_equal(snapshot(opt), before)


def test_blocks_are_not_for_exact_rows() -> None:
    saved = partly_counted(fs.Adam).state_dict()
    exact = fs.Adam([np.ones(17, f32)], rows="exact")
    before = snapshot(exact)
    with pytest.raises(ValueError, match="lazy"):
        exact.load_state_dict(saved)
    np.testing.assert_equal(snapshot(exact), before)


@pytest.mark.parametrize("steps", [2**31, 2**32 - 2])
def test_counts_that_are_very_large(steps: int) -> None:
    opt = partly_counted(fs.Adam)
    entry = edited(state__0__block_steps=np.full(BLOCKS, steps))(opt.state_dict())
    opt.load_state_dict(entry)
    for expected in (steps + 1, min(steps + 2, 2**32 - 1), min(steps + 3, 2**32 - 1)):
        opt.step([np.ones(17, f32)])
        assert set(updates_of(opt)) == {expected}
    assert np.isfinite(opt.params[0]).all()


def test_the_seed_is_an_attribute() -> None:
    opt = fs.SGD([np.zeros(50, f32)], lr=1.0)
    assert opt.seed == 0
    assert "seed" not in repr(opt)
    opt.seed = np.uint64(2**64 - 1)
    assert opt.seed == 2**64 - 1
    assert f"seed={2**64 - 1}" in repr(opt)
    opt.step([np.ones(50, f32)], where=fs.RandomBlocks(0.5, 1))
    mask = fs.RandomBlocks(0.5, 1).mask(50, step=0, seed=2**64 - 1)
    np.testing.assert_array_equal(opt.params[0] != 0, mask)


# ---- forms --------------------------------------------------------------------------------------


def test_one_for_each_parameter() -> None:
    def params() -> dict[str, np.ndarray]:
        return {"a": np.zeros(4, f32), "b": np.zeros((2, 2), f32), "c": np.zeros(3, f32)}

    a, rows = np.array([1, 0, 0, 1], bool), np.array([0, 1], bool)
    expected = [[-1, 0, 0, -1], [0, 0, -1, -1], [-1, -1, -1]]
    ones = {k: np.ones_like(p) for k, p in params().items()}
    named, listed, tupled = params(), params(), params()
    fs.SGD(named, lr=1.0).step(ones, where={"b": fs.Mask(rows), "a": a})
    fs.SGD(list(listed.values()), lr=1.0).step([*ones.values()], where=[a, rows, None])
    fs.SGD(tuple(tupled.values()), lr=1.0).step([*ones.values()], where=(a, rows, None))
    for given_form in (named, listed, tupled):
        for p, values in zip(given_form.values(), expected, strict=True):
            np.testing.assert_array_equal(p.reshape(-1), values)


def test_one_array() -> None:
    w = np.zeros(3, f32)
    opt = fs.SGD(w, lr=1.0)
    opt.step(np.ones(3, f32), where=np.array([1, 0, 0], bool))
    opt.step(np.ones(3, f32), where=fs.Mask(np.array([1, 0, 1], bool), frozen="track"))
    opt.step(np.ones(3, f32), where=fs.CyclicBlocks(3))
    np.testing.assert_array_equal(w, [-2, 0, -2])


def test_a_parameter_without_a_gradient_does_not_age() -> None:
    a, b = np.zeros(4, f32), np.zeros(4, f32)
    opt = fs.Adam({"a": a, "b": b})
    opt.step({"a": np.ones(4, f32)}, where=fs.RandomBlocks(0.5, 1))
    assert not b.any()
    assert opt.state["b"]["step"] == 0
    assert "block_steps" not in opt.state_dict()["state"]["b"]


def test_a_step_that_moves_nothing_counts() -> None:
    opt = fs.Adam([np.ones(4, f32)])
    opt.step([np.ones(4, f32)], where=[np.zeros(4, bool)])
    assert opt.steps == 1
    np.testing.assert_array_equal(updates_of(opt), 0)
    assert (opt.params[0] == 1).all()
    assert not opt.state[0]["exp_avg"].any()


def _odd_booleans(a: np.ndarray) -> np.ndarray:
    """True is whatever is not 0."""
    return (a.astype(np.uint8) * 254).view(bool)


def _read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


def _tensor(a: np.ndarray) -> Any:
    return pytest.importorskip("torch").tensor(a)


MASK_FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    **LAYOUTS,
    "read-only": _read_only,
    "odd booleans": _odd_booleans,
    "a list in a list": lambda a: np.asarray(a.tolist()),
    "DLPack": Foreign,
    "torch": _tensor,
    "torch transposed": lambda a: _tensor(a.T.copy()).permute(*reversed(range(a.ndim))),
    "torch every second": lambda a: _tensor(np.repeat(a, 2, 0))[::2],
}


@pytest.mark.parametrize("form", MASK_FORMS)
@pytest.mark.parametrize("shape", [(50,), (40, 60), (7, 5, 11)], ids=str)
def test_masks_of_every_library_and_layout(form: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(20)
    w, mask = np.zeros(shape, f32), rng.random(shape) < 0.5
    where = MASK_FORMS[form](mask)
    opt = fs.SGD(w, lr=1.0)
    opt.step(np.ones(shape, f32), where=where)
    opt.step(np.ones(shape, f32), where=fs.Mask(where))
    np.testing.assert_array_equal(w, np.where(mask, -2, 0))


def test_masks_without_strides() -> None:
    """One row of booleans for all rows, one column for all columns, one boolean for all."""
    rng = np.random.default_rng(21)
    for shape in ((1, 60), (40, 1), (1, 1)):
        mask = np.broadcast_to(rng.random(shape) < 0.5, (40, 60))
        w = np.zeros((40, 60), f32)
        fs.SGD([w], lr=1.0).step([np.ones_like(w)], where=[mask])
        np.testing.assert_array_equal(w, np.where(mask, -1, 0))
    rows = np.broadcast_to(np.array(True), 40)
    fs.SGD([w], lr=1.0).step([w.copy()], where=[rows])
    assert not w.any()


def test_a_mask_is_read_when_the_step_is_taken() -> None:
    """The array is kept, not copied; and kept alive."""
    selected = np.zeros(5, bool)
    where = fs.Mask(selected)
    w = np.zeros(5, f32)
    opt = fs.SGD(w, lr=1.0)
    selected[2] = True
    opt.step(np.ones(5, f32), where=where)
    del selected
    opt.step(np.ones(5, f32), where=where)
    np.testing.assert_array_equal(w, [0, 0, -2, 0, 0])
    assert where.selected.sum() == 1


@pytest.mark.parametrize("value", [True, False])
def test_masks_of_a_scalar(value: bool) -> None:
    w = np.zeros((), f64)
    opt = fs.Adam([w], lr=0.5)
    opt.step([np.ones(())], where=[np.array(value)])
    assert (w != 0) == value


def test_representations() -> None:
    assert repr(fs.RandomBlocks(0.5, 3)) == "RandomBlocks(0.5, block=3, frozen='freeze')"
    assert repr(fs.CyclicBlocks(3, frozen="track")) == "CyclicBlocks(3, frozen='track')"
    assert repr(fs.TopK(0.5)) == "TopK(0.5, by='gradient', frozen='freeze')"
    assert repr(fs.Mask(np.ones((2, 3), bool))) == "Mask(shape (2, 3), frozen='freeze')"


# ---- errors -------------------------------------------------------------------------------------


def refused(
    opt: fs.Optimizer, grads: Any, where: Any, error: Any, message: str = "", **arguments: Any
) -> None:
    before = snapshot(opt)
    kept = copy.deepcopy([g for g in grads if isinstance(g, np.ndarray)])
    with pytest.raises(error) as caught:
        opt.step(grads, where=where, **arguments)
    assert message in str(caught.value)
    np.testing.assert_equal(snapshot(opt), before)
    np.testing.assert_equal([g for g in grads if isinstance(g, np.ndarray)], kept)


def _raises(step: int) -> float:
    raise RuntimeError("no fraction today")


_TRUE = np.ones((4, 3), bool)
BAD_WHERES: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("one mask", lambda: _TRUE, TypeError, "where is a ndarray"),
    ("a dict", lambda: {"a": _TRUE}, TypeError, "where is a dict"),
    ("text", lambda: "all", TypeError, "where is a str"),
    ("a number", lambda: 1, TypeError, "where is a int"),
    ("too few", lambda: [_TRUE], ValueError, "1 entries for 2 parameters"),
    ("too many", lambda: [None] * 3, ValueError, "3 entries for 2 parameters"),
    ("none", list, ValueError, "0 entries"),
    ("floats", lambda: [_TRUE.astype(f32), None], TypeError, "dtype float32"),
    ("bytes", lambda: [_TRUE.astype(np.uint8), None], TypeError, "dtype uint8"),
    ("an entry of text", lambda: ["x", None], TypeError, "booleans"),
    ("an entry of a number", lambda: [3, None], TypeError, "booleans"),
    ("an entry that is a class", lambda: [fs.TopK, None], TypeError, "booleans"),
    ("shape", lambda: [np.ones((3, 4), bool), None], ValueError, "(3, 4); expected (4, 3)"),
    ("shape of the second", lambda: [_TRUE, np.ones(4, bool)], ValueError, "(4,); expected (5,)"),
    ("columns", lambda: [np.ones(3, bool), None], ValueError, "one element for each of its rows"),
    ("a column", lambda: [np.ones((4, 1), bool), None], ValueError, "(4, 1)"),
    ("a scalar", lambda: [np.array(True), None], ValueError, "shape ()"),
    ("a fraction > 1", lambda: fs.TopK(lambda s: 1.5), ValueError, "fraction(step)"),
    ("a fraction NaN", lambda: fs.RandomBlocks(lambda s: np.nan), ValueError, "fraction(step)"),
    ("a fraction None", lambda: fs.RandomBlocks(lambda s: None), TypeError, "fraction(step)"),
    ("a fraction raises", lambda: [None, fs.TopK(_raises)], RuntimeError, "no fraction today"),
]


@pytest.mark.parametrize(
    ("make", "error", "message"), [b[1:] for b in BAD_WHERES], ids=[b[0] for b in BAD_WHERES]
)
@pytest.mark.parametrize("has_blocks", [False, True])
def test_bad_selections_change_nothing(
    make: Any, error: type[Exception], message: str, has_blocks: bool
) -> None:
    opt = fs.Adam([np.ones((4, 3), f32), np.ones(5, f32)])
    grads = [np.ones((4, 3), f32), np.ones(5, f32)]
    opt.step(grads, where=fs.RandomBlocks(0.5, 2) if has_blocks else None)
    refused(opt, grads, make(), error, message, zero_grad=True)


BAD_ARGUMENTS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: fs.RandomBlocks(1.01), ValueError, "fraction"),
    (lambda: fs.RandomBlocks(-1e-9), ValueError, "fraction"),
    (lambda: fs.RandomBlocks(np.nan), ValueError, "fraction"),
    (lambda: fs.RandomBlocks("half"), TypeError, "fraction"),
    (lambda: fs.RandomBlocks(None), TypeError, "fraction"),
    (lambda: fs.RandomBlocks(True), TypeError, "fraction"),
    (lambda: fs.RandomBlocks(0.5, 0), ValueError, "block"),
    (lambda: fs.RandomBlocks(0.5, -1), ValueError, "block"),
    (lambda: fs.RandomBlocks(0.5, 2**63), ValueError, "block"),
    (lambda: fs.RandomBlocks(0.5, 2.0), TypeError, "block"),
    (lambda: fs.RandomBlocks(0.5, True), TypeError, "block"),
    (lambda: fs.RandomBlocks(0.5, frozen="thaw"), ValueError, "frozen"),
    (lambda: fs.RandomBlocks(0.5, frozen=None), (TypeError, ValueError), "frozen"),
    (lambda: fs.CyclicBlocks(0), ValueError, "n_blocks"),
    (lambda: fs.CyclicBlocks(1.5), TypeError, "n_blocks"),
    (lambda: fs.CyclicBlocks(2**62), ValueError, "n_blocks"),
    (lambda: fs.TopK(2), ValueError, "fraction"),
    (lambda: fs.TopK(np.inf), ValueError, "fraction"),
    (lambda: fs.TopK(0.5, by="size"), ValueError, "by"),
    (lambda: fs.TopK(0.5, "gradient", "track"), TypeError, "positional"),
    (lambda: fs.Mask(np.ones(3)), TypeError, "float64"),
    (lambda: fs.Mask(np.ones(3, bool), frozen="no"), ValueError, "frozen"),
    (lambda: fs.Mask(None), TypeError, "booleans"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_dicts_of_selections_are_checked() -> None:
    opt = fs.Adam({"a": np.ones(3, f32)})
    g = {"a": np.ones(3, f32)}
    before = snapshot(opt)
    for where, error in [({"b": None}, ValueError), ([None], TypeError), (_TRUE, TypeError)]:
        with pytest.raises(error):
            opt.step(g, where=where)
    np.testing.assert_equal(snapshot(opt), before)
    opt.step(g, where={})
    assert opt.steps == 1


def test_exact_rows_take_no_selections() -> None:
    opt = fs.Adam([np.ones((4, 3), f32), np.ones(5, f32)], rows="exact")
    grads = [np.ones((4, 3), f32), np.ones(5, f32)]
    opt.step([fs.Rows([1], np.ones((1, 3), f32)), None])
    for where in (fs.RandomBlocks(0.5), [_TRUE, None], [None, np.ones(5, bool)]):
        refused(opt, grads, where, ValueError, "rows='exact'")
    opt.step(grads, where=[None, None])


@pytest.mark.parametrize("by", ["gradient", "update"])
@pytest.mark.parametrize("has_blocks", [False, True])
def test_top_of_rows_is_refused(by: Any, has_blocks: bool) -> None:
    opt = fs.Adam([np.ones((4, 3), f32)])
    if has_blocks:
        opt.step([np.ones((4, 3), f32)], where=[_TRUE])
    rows = fs.Rows(np.array([1]), np.ones((1, 3), f32))
    refused(opt, [rows], fs.TopK(0.5, by=by), ValueError, "TopK")


def test_bad_gradients_are_refused_as_without() -> None:
    w = np.ones((4, 3), f32)
    opt = fs.Adam([w])
    where = fs.RandomBlocks(0.5, 2)
    refused(opt, [np.ones((3, 4), f32)], where, ValueError, "(3, 4)")
    refused(opt, [w], where, ValueError, "shares memory")
    refused(opt, [np.broadcast_to(f32(1), (4, 3))], where, ValueError, "", zero_grad=True)
    refused(opt, [fs.Rows([4], np.ones((1, 3), f32))], where, IndexError, "4")
    refused(opt, [np.ones((4, 3), f32)], where, ValueError, "lr", lr=-1.0)
    refused(opt, [np.ones((4, 3), f32)], where, ValueError, "grad_scale", grad_scale=np.nan)


def test_after_a_refused_mask_the_next_gradient_is_used() -> None:
    """And not the one that was given before it."""
    w = np.zeros(4, f32)
    opt = fs.SGD([w], lr=1.0)
    before, g = np.full(4, 1, f32), np.full(4, 10, f32)
    opt.step([before])
    refused(opt, [g], [np.ones(3, bool)], ValueError, "mask")
    opt.step([g])
    np.testing.assert_array_equal(w, -11)


def test_after_a_refused_mask_gradients_are_still_compared() -> None:
    """Two that share memory cannot be cleared, with or without a failure before."""
    a, b = np.zeros(4, f32), np.zeros(4, f32)
    opt = fs.SGD([a, b], lr=1.0)
    g = np.ones(4, f32)
    opt.step([g, np.ones(4, f32)], zero_grad=True)
    refused(opt, [g, g], [None, np.ones(3, bool)], ValueError, "mask", zero_grad=True)
    refused(opt, [g, g], None, ValueError, "share memory", zero_grad=True)


# ---- threads ------------------------------------------------------------------------------------


def test_two_optimizers_at_once() -> None:
    rng = np.random.default_rng(22)
    g = rng.standard_normal(60_000).astype(f32)
    kinds = [fs.TopK(0.1), fs.RandomBlocks(0.3), fs.TopK(0.2, by="update"), [g > 0.5]]
    digests: dict[int, Any] = {}

    def work(i: int) -> None:
        opt = fs.Adam([np.zeros(g.size, f32)])
        for step in range(12):
            opt.step([g], where=kinds[step % 4])
        digests[i] = everything(opt)

    in_threads(3, work)
    assert digests[0] == digests[1] == digests[2]


def test_one_optimizer_in_many_threads() -> None:
    """Steps, and what else may be done meanwhile."""
    w = np.zeros(50_000, f32)
    opt = fs.Adam([w])
    done = threading.Event()

    def work(i: int) -> None:
        if i == 0:
            for step in range(20):
                opt.step([np.ones_like(w)], where=[fs.RandomBlocks, fs.TopK][step % 2](0.5))
            done.set()
        while not done.is_set():
            if i == 1:
                opt.load_state_dict(opt.state_dict())
            else:
                pickle.loads(pickle.dumps(opt.state_dict()))
                opt.seed = 3

    in_threads(3, work)
    assert np.isfinite(w).all()


def test_a_mask_that_changes_during_the_step() -> None:
    """Some moment's mask decides for each element; nothing is lost, nothing crashes."""
    w, mask = np.zeros(300_000, f32), np.zeros(300_000, bool)
    opt = fs.SGD([w], lr=1.0, momentum=0.5, max_norm=1e9)
    done = threading.Event()

    def work(i: int) -> None:
        if i == 0:
            for _ in range(40):
                opt.step([np.ones_like(w)], where=[mask])
            done.set()
        while not done.is_set():
            np.logical_not(mask, out=mask)
            mask[::3] = True

    in_threads(2, work)
    assert np.isfinite(w).all()
    assert (w <= 0).all()
    assert updates_of(opt).max() <= 40


CHANGING_GRADIENT = """
import sys, threading
import numpy as np
import fusestep as fs

rng = np.random.default_rng(0)
g = rng.standard_normal(100_000).astype(np.float32)
others = [np.zeros_like(g), g.copy(), g.round()]
opt = fs.SGD([np.zeros_like(g)], lr=1.0)
done = threading.Event()

def change():
    while not done.is_set():
        for other in others:
            np.copyto(g, other)

thread = threading.Thread(target=change)
thread.start()
for i in range(100):
    opt.step([g], where=fs.TopK([0.3, 0.01, 0.9][i % 3], by=sys.argv[1]))
done.set()
thread.join()
"""


@pytest.mark.parametrize("by", ["gradient", "update"])
def test_a_gradient_that_changes_during_the_step(by: str) -> None:
    """What is the largest may be anything then; but the step ends, within its memory."""
    command = [sys.executable, "-c", CHANGING_GRADIENT, by]
    assert subprocess.run(command, timeout=100, check=False).returncode == 0
