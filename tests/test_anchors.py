"""Anchors: the proximal step after the rule's, against its formula; and Fisher information."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
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
from test_bits import LAYOUTS
from test_dlpack import Foreign, numpy_speaks_version_1
from test_rows import Lazy, everything
from test_state import _edit as edited

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

f32, f64 = np.float32, np.float64
bfloat16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(name) for name in ("f8", "f4", "f2")] + [bfloat16]

EVERY = [*RULES, *ROWWISE]
SOME = [*PLAIN, ROWWISE[0]]
ADAM = next(rule for rule in PLAIN if rule.cls is fs.Adam)

# Rounding of some fifty steps, with room; parameters and references are about 1.
TOLERANCE = {"float64": 1e-12, "float32": 1e-4}


class Penalty(NamedTuple):
    """lambda/2 sum F (w - w*)^2."""

    strength: float
    reference: np.ndarray
    importance: np.ndarray | float = 1.0


def pulled(w: np.ndarray, lr: float, *penalties: Penalty) -> np.ndarray:
    """Where (v - w)^2 / 2 + lr sum of the penalties of v is least."""
    above, below = w, np.ones_like(w)
    for strength, reference, importance in penalties:
        kappa = lr * strength * np.asarray(importance, f64)
        above, below = above + kappa * reference.astype(f64), below + kappa
    return above / below


def anchor(opt: fs.Optimizer, *penalties: Penalty) -> None:
    """Anchor the one parameter of a list."""
    for strength, reference, importance in penalties:
        has_importance = isinstance(importance, np.ndarray)
        opt.anchor(strength, [reference], [importance] if has_importance else None)


def some_penalty(
    rng: np.random.Generator, shape: Any, dtype: Any = f64, strength: float = 3.0
) -> Penalty:
    """With importances that are 0 in some places and large in others."""
    importance = (rng.exponential(1, shape) ** 2 * (rng.random(shape) < 0.7)).astype(dtype)
    return Penalty(strength, rng.standard_normal(shape).astype(dtype), importance)


def trajectory(
    rule: Rule, start: np.ndarray, gradients: list[np.ndarray], *penalties: Penalty
) -> np.ndarray:
    w, state = start.astype(f64), {}
    for g in gradients:
        w = rule.reference(w, g.astype(f64), state, **rule.options)
        w = pulled(w, rule.options["lr"], *penalties)
    return w


def bits(array: np.ndarray) -> np.ndarray:
    """To compare: -0 is not 0."""
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def anchors_of(opt: fs.Optimizer) -> dict[Any, Any]:
    """A copy of all there is to say about them."""
    return copy.deepcopy(opt.anchors)


def snapshot(opt: fs.Optimizer) -> dict[str, Any]:
    """Everything that must not change where something is refused."""
    return {**everything(opt), "anchors": anchors_of(opt), "state_dict": opt.state_dict()}


# ---- the formula --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("has_importance", [True, False])
def test_fifty_steps(
    rule: Rule, dtype: str, has_importance: bool, tier: str, rng: np.random.Generator
) -> None:
    """Of more than one tile, so that kernels go from one to the next."""
    w = rng.standard_normal((37, 30)).astype(dtype)
    penalty = some_penalty(rng, w.shape, dtype)
    if not has_importance:
        penalty = penalty._replace(importance=1.0)
    gradients = [rng.standard_normal(w.shape).astype(dtype) for _ in range(50)]
    expected = trajectory(rule, w, gradients, penalty)

    opt = rule.cls([w], **rule.options)
    anchor(opt, penalty)
    for g in gradients:
        opt.step([g])
    np.testing.assert_allclose(w, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("rule", SOME, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("has_importance", [True, False])
def test_sixteen_bit_parameters_round_once_a_step(
    rule: Rule, dtype: np.dtype, has_importance: bool, tier: str, rng: np.random.Generator
) -> None:
    """Rule and pull together, not each: the anchor is float32, as the state is."""
    w = rng.standard_normal((7, 43)).astype(dtype)
    penalty = some_penalty(rng, w.shape, f32)
    if not has_importance:
        penalty = penalty._replace(importance=1.0)
    opt = rule.cls([w], **rule.options)
    anchor(opt, penalty)
    assert opt.anchors[0]["reference"].dtype == f32
    state: dict = {}
    for _ in range(30):
        g = rng.standard_normal(w.shape).astype(dtype)
        exact = rule.reference(w.astype(f64), g.astype(f64), state, **rule.options)
        exact = pulled(exact, rule.options["lr"], penalty)
        opt.step([g])
        low, high = (exact - 1e-4).astype(dtype), (exact + 1e-4).astype(dtype)
        assert np.all((w >= low) & (w <= high))


@pytest.mark.parametrize("cls", [fs.Adam, fs.SGD])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", [None, "float32", "float64"])
def test_any_mix_of_dtypes(
    cls: type, dtype: np.dtype, given: np.dtype, state_dtype: str | None, rng: np.random.Generator
) -> None:
    w = rng.standard_normal(77).astype(dtype)
    exact = w.astype(f64)
    penalty = some_penalty(rng, 77, given)
    opt = cls([w], lr=0.1, state_dtype=state_dtype)
    anchor(opt, penalty)
    kept = opt.anchors[0]
    default = "float64" if dtype == f64 else "float32"
    assert kept["reference"].dtype == kept["importance"].dtype == (state_dtype or default)
    opt.step([np.zeros(77)])
    exact = pulled(exact, 0.1, penalty)
    epsilon = {"float64": 1e-6, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[str(dtype)]
    np.testing.assert_allclose(w.astype(f64), exact, rtol=epsilon, atol=epsilon / 10)


@pytest.mark.parametrize("given", [int, np.uint8, ">f8", "<f2"])
def test_references_and_importances_of_other_numbers(given: Any) -> None:
    w = np.zeros(4)
    opt = fs.SGD(w, lr=0.5)
    opt.anchor(2.0, np.array([1, 2, 3, 0], given), np.array([0, 1, 1, 3], given))
    opt.step(np.zeros(4))
    np.testing.assert_array_equal(w, [0, 1, 1.5, 0])


@pytest.mark.parametrize("rule", SOME, ids=str)
def test_one_array_and_what_is_like_an_array(rule: Rule, rng: np.random.Generator) -> None:
    start, g, reference = rng.standard_normal((3, 2, 3))
    results = []
    for form in (reference, reference.tolist(), np.asfortranarray(reference)):
        w = start.copy()
        opt = rule.cls(w, **rule.options)
        opt.anchor(2.0, form)
        opt.step(g)
        results.append(w)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    assert not np.array_equal(results[0], rule.reference(start, g, {}, **rule.options))


def test_scalars_and_nothing(tier: str) -> None:
    scalar, none, wide = np.array(1.0), np.zeros((0, 3)), np.zeros((5, 0))
    opt = fs.Adam([scalar, none, wide], lr=0.0)
    opt.anchor(1.0)
    opt.anchor(1.0, importance=[np.array(2.0), none, wide])
    opt.step([np.array(1.0), none.copy(), wide.copy()], lr=0.1)
    expected = 1 - 0.1 / 1.3
    np.testing.assert_allclose(scalar, expected, rtol=1e-7)


@settings(max_examples=100, deadline=None)
@given(
    rule=st.sampled_from(EVERY),
    tier=st.sampled_from(AVAILABLE),
    threads=st.integers(1, 3),
    shape=st.one_of(
        st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
        st.tuples(st.integers(30, 70), st.integers(30, 70)),
        st.just((270, 260)),
        st.just((1024,)),
        st.just((4097,)),
    ),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 4),
    has_importance=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    zero_grad=st.booleans(),
    kind=st.sampled_from(["dense", "rows"]),
)
def test_layout_tier_and_threads_change_nothing(
    rule: Rule,
    tier: str,
    threads: int,
    shape: tuple[int, ...],
    layouts: tuple[str, ...],
    has_importance: bool,
    dtype: np.dtype,
    zero_grad: bool,
    kind: str,
) -> None:
    """Nor does it matter whether the gradient of all rows is an array or Rows."""
    rng = np.random.default_rng(3)
    if rule in ROWWISE and len(shape) > 2:  # whose mean is taken in the order of memory
        layouts = ("c",) * 4
    if dtype == bfloat16:  # of which NumPy copies some strides only with an error
        layouts = tuple("transposed" if name == "packed" else name for name in layouts)
    parameter, reference, importance, gradient = (LAYOUTS[name] for name in layouts)
    start = rng.standard_normal(shape).astype(dtype)
    plain, odd = start.copy(), parameter(start)
    plain_opt, odd_opt = (rule.cls([w], **rule.options) for w in (plain, odd))
    penalty = some_penalty(rng, shape, dtype)
    anchor(plain_opt, penalty if has_importance else penalty._replace(importance=1.0))
    odd_opt.anchor(
        penalty.strength,
        [reference(penalty.reference)],
        [importance(penalty.importance)] if has_importance else None,
    )
    before = _cpu.active_tier()
    for _ in range(2):
        g = rng.standard_normal(shape).astype(dtype)
        _cpu.use_tier(before)
        fs.set_num_threads(1)
        plain_opt.step([g])
        _cpu.use_tier(tier)
        fs.set_num_threads(threads)
        strided = gradient(g.copy())
        rows = fs.Rows(np.arange(shape[0]), strided)
        odd_opt.step([strided if kind == "dense" else rows], zero_grad=zero_grad)
    np.testing.assert_array_equal(bits(plain), bits(odd))
    assert everything(plain_opt) == everything(odd_opt)


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiers_and_threads(rule: Rule, dtype: np.dtype) -> None:
    """One parameter that is spread over threads and one that is not, with and without F."""
    found = []
    for tier in AVAILABLE:
        for threads in (1, 2, 3):
            _cpu.use_tier(tier)
            fs.set_num_threads(threads)
            rng = np.random.default_rng(5)
            shapes = [(701, 100), (9, 5), (33,)]
            params = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
            opt = rule.cls(params, max_norm=3.0, **rule.options)
            opt.anchor(2.0, [some_penalty(rng, p.shape).reference for p in params])
            opt.anchor(2.0, importance=[some_penalty(rng, params[0].shape).importance, None, None])
            for _ in range(2):
                opt.step([rng.standard_normal(p.shape).astype(dtype) for p in params])
            found.append(everything(opt))
    assert all(other == found[0] for other in found)


@settings(max_examples=100, deadline=None)
@given(
    size=st.one_of(st.integers(0, 70), st.integers(1000, 1050), st.integers(4090, 4200)),
    strength=st.sampled_from([1e-20, 1e-3, 1.0, 1e3, 1e20]),
    scale=st.sampled_from([1e-20, 1.0, 1e15]),
    offset=st.integers(0, 7),
    has_importance=st.booleans(),
    dtype=st.sampled_from(["f8", "f4"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_lengths_around_vectors_and_tiles(
    size: int,
    strength: float,
    scale: float,
    offset: int,
    has_importance: bool,
    dtype: str,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    w = scale * rng.standard_normal(size + offset)
    w = w.astype(dtype)[offset:]
    penalty = some_penalty(rng, size, dtype, strength)
    penalty = penalty._replace(reference=(scale * penalty.reference).astype(dtype))
    if not has_importance:
        penalty = penalty._replace(importance=1.0)
    start, expected = w.copy(), pulled(w.astype(f64), 0.1, penalty)
    opt = fs.SGD([w], lr=0.1)
    anchor(opt, penalty)
    opt.step([np.zeros(size)])
    tolerance = {"f8": 1e-15, "f4": 5e-7}[dtype]
    largest = max(np.abs(x).max(initial=0) for x in (start, penalty.reference))
    np.testing.assert_allclose(w, expected, rtol=tolerance, atol=tolerance * float(largest))
    low, high = np.minimum(start, penalty.reference), np.maximum(start, penalty.reference)
    slack = tolerance * largest
    assert ((w >= low - slack) & (w <= high + slack)).all()


# ---- no pull, and the strongest -----------------------------------------------------------------


def pair(
    rule: Rule, start: np.ndarray, *penalties: Penalty, **options: Any
) -> tuple[fs.Optimizer, fs.Optimizer]:
    """An anchored optimizer and one without, of equal parameters."""
    anchored, free = (rule.cls([start.copy()], **{**rule.options, **options}) for _ in range(2))
    anchor(anchored, *penalties)
    return anchored, free


NO_PULL: dict[str, Callable[[Penalty], Penalty]] = {
    "strength 0": lambda p: p._replace(strength=0.0),
    "strength 0 without importance": lambda p: p._replace(strength=0, importance=1.0),
    "importance 0": lambda p: p._replace(importance=np.zeros_like(p.importance)),
    "strength 1e300, importance 0": lambda p: Penalty(1e300, p.reference, 0 * p.importance),
}


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", NO_PULL)
def test_no_pull_changes_no_bit(
    rule: Rule, dtype: np.dtype, kind: str, rng: np.random.Generator
) -> None:
    start = rng.standard_normal((31, 40)).astype(dtype)
    opt, free = pair(rule, start, NO_PULL[kind](some_penalty(rng, start.shape, dtype)))
    for _ in range(3):
        g = rng.standard_normal(start.shape).astype(dtype)
        opt.step([g])
        free.step([g])
    assert everything(opt) == everything(free)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", NO_PULL)
@pytest.mark.parametrize("value", [0.0, -0.0, np.inf, -np.inf, np.nan, "tiny", "largest"])
def test_no_pull_on_extreme_weights(dtype: np.dtype, kind: str, value: float | str) -> None:
    """A masked logit of -inf, say, that is not tied to anything."""
    info = ml_dtypes.finfo(dtype)
    value = {"tiny": info.smallest_subnormal, "largest": info.max}.get(value, value)  # type: ignore
    start = np.full((3, 20), value, dtype)
    reference = np.tile(np.array([0, -0.0, 1, -1, float(info.max)] * 4, dtype), (3, 1))
    reference[:, -1] = -info.max
    penalty = NO_PULL[kind](Penalty(2.0, reference, np.ones_like(reference)))
    opt, free = pair(next(r for r in PLAIN if r.cls is fs.SGD), start, penalty)
    for each in (opt, free):
        each.step([np.zeros((3, 20), dtype)])
    if np.isnan(start[0, 0]):
        assert np.isnan(opt.params[0].astype(f64)).all()
    else:
        np.testing.assert_array_equal(bits(opt.params[0]), bits(free.params[0]))


@pytest.mark.parametrize("rule", SOME, ids=str)
def test_no_rate_no_pull(rule: Rule, rng: np.random.Generator) -> None:
    start = rng.standard_normal((3, 4))
    opt, free = pair(rule, start, some_penalty(rng, start.shape, strength=1e300), lr=0.0)
    for each in (opt, free):
        each.step([np.ones_like(start)])
    assert everything(opt) == everything(free)


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", [1e30, 1e300])
@pytest.mark.parametrize("has_importance", [True, False])
def test_the_strongest_pull_is_the_reference(
    rule: Rule, dtype: np.dtype, strength: float, has_importance: bool, rng: np.random.Generator
) -> None:
    """Bit for bit; and what is of no importance does as it likes."""
    start = rng.standard_normal((31, 40)).astype(dtype)
    importance = np.where(rng.random(start.shape) < 0.5, 0, 10.0 ** rng.uniform(-3, 3, start.shape))
    importance = importance if has_importance else 1.0
    penalty = Penalty(strength, rng.standard_normal(start.shape).astype(dtype), importance)
    held = np.broadcast_to(np.asarray(importance) > 0, start.shape)
    opt, free = pair(rule, start, penalty)
    for _ in range(3):
        g = rng.standard_normal(start.shape).astype(dtype)
        before, free.params[0][held] = opt.params[0].copy(), opt.params[0][held]
        opt.step([g])
        free.step([g])
        w = opt.params[0]
        np.testing.assert_array_equal(bits(w[held]), bits(penalty.reference[held]))
        if rule not in ROWWISE:  # where what is held is a part of each row's decay
            np.testing.assert_array_equal(bits(w[~held]), bits(free.params[0][~held]))
        assert not np.array_equal(w[~held], before[~held]) or not (~held).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", [1e30, 1e300, np.finfo(f64).max])
@pytest.mark.parametrize("lr", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("importance", [1e-30, 1.0, 1e30])
def test_products_that_overflow(
    dtype: np.dtype, strength: float, lr: float, importance: float
) -> None:
    start, reference = np.array([1, 2, -3, 0], dtype), np.array([-1, 0.5, 0, 1], dtype)
    w = start.copy()
    opt = fs.SGD([w], lr=lr)
    anchor(opt, Penalty(strength, reference, np.array([importance] * 3 + [0.0])))
    opt.step([np.zeros(4, dtype)])
    assert np.isfinite(w.astype(f64)).all()
    assert w[3] == start[3]
    if np.log10(lr) + np.log10(strength) + np.log10(importance) > 20:
        np.testing.assert_allclose(w[:3].astype(f64), reference[:3].astype(f64), atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", [0.1, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_far_from_the_reference(dtype: np.dtype, strength: float, share: float) -> None:
    """Where all numbers are finite, w - w* need not be; between them the result must be."""
    largest = share * float(ml_dtypes.finfo(dtype).max)
    w = np.array([largest, -largest, largest], dtype)
    reference = -w
    opt = fs.SGD([w], lr=1.0)
    opt.anchor(strength, [reference])
    opt.step([np.zeros(3, dtype)])
    assert np.isfinite(w.astype(f64)).all()
    assert (np.abs(w.astype(f64)) <= np.abs(reference.astype(f64))).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", [1.0, 1e30, 1e300])
def test_no_nan_comes_of_an_infinite_weight(dtype: np.dtype, strength: float) -> None:
    w = np.array([np.inf, -np.inf, 1], dtype)
    opt = fs.SGD([w], lr=1.0)
    opt.anchor(strength, [np.zeros(3)], [np.array([1.0, 1e30, 1.0])])
    opt.step([np.zeros(3, dtype)])
    assert not np.isnan(w.astype(f64)).any()


@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.parametrize("strength", [0.0, 1e-300, 1.0, 1e300])
def test_importances_that_only_float64_can_hold(dtype: str, strength: float) -> None:
    """They are as good as infinite, or refused; no NaN comes of them."""
    w = np.ones(3, dtype)
    opt = fs.SGD([w], lr=0.5)
    before = snapshot(opt)
    try:
        opt.anchor(strength, [np.zeros(3)], [np.array([1e300, 1.0, 0.0])])
    except ValueError:
        np.testing.assert_equal(snapshot(opt), before)
        return
    opt.load_state_dict(opt.state_dict())
    opt.step([np.zeros(3)])
    assert np.isfinite(w).all()
    assert w[2] == 1
    assert w[0] == (1 if strength == 0 else pytest.approx(0, abs=1e-6)) or strength == 1e-300


def test_references_that_only_float64_can_hold() -> None:
    """Are refused: in float32 they are infinite."""
    w, other = np.ones(3, f32), np.ones(3)
    opt = fs.SGD([other, w], lr=0.5)
    before = snapshot(opt)
    with pytest.raises(ValueError, match="parameter 1"):
        opt.anchor(1.0, [np.zeros(3), np.full(3, 1e300)])
    np.testing.assert_equal(snapshot(opt), before)


# ---- what it is given, and keeps ----------------------------------------------------------------


@pytest.mark.parametrize("rule", SOME, ids=str)
def test_a_snapshot_of_the_present(rule: Rule, rng: np.random.Generator) -> None:
    """Which does not move along."""
    w = rng.standard_normal((4, 3))
    opt = rule.cls([w], **rule.options)
    start = w.copy()
    opt.anchor(1e30)
    np.testing.assert_array_equal(opt.anchors[0]["reference"], start)
    assert opt.anchors[0]["importance"] is None
    w[...] = 7
    opt.step([rng.standard_normal((4, 3))])
    np.testing.assert_array_equal(w, start)


@pytest.mark.parametrize("layout", ["c", "transposed", "gappy"])
def test_what_the_user_writes_later(layout: str, rng: np.random.Generator) -> None:
    start, reference, importance = np.abs(rng.standard_normal((3, 6, 5)))
    results = []
    for change in (False, True):
        arrays = [LAYOUTS[layout](x.copy()) for x in (start, reference, importance)]
        opt = fs.Adam([arrays[0]], lr=0.1)
        opt.anchor(2.0, [arrays[1]], [arrays[2]])
        opt.step([np.ones((6, 5))])
        if change:
            for array in arrays[1:]:
                array[...] = np.nan
            del array
        del arrays
        gc.collect()
        opt.step([np.ones((6, 5))])
        results.append(everything(opt))
    assert results[0] == results[1]


def test_a_gradient_may_be_the_array_that_was_the_reference() -> None:
    """It is a copy, so they share nothing; and so may the parameter itself."""
    w, shared = np.zeros(4), np.ones(4)
    opt = fs.SGD([w], lr=0.5)
    opt.anchor(2.0, [shared], [shared])
    opt.anchor(2.0, [w], [shared])
    opt.step([shared], zero_grad=True)
    assert not shared.any()
    np.testing.assert_allclose(w, (-0.5 + 1) / 3, rtol=1e-15)


FORMS: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "one for all": (2.0, {}, {"a", "b", "head"}),
    "some references": (2.0, {"reference": {"a": 0, "b": 1}}, {"a", "b"}),
    "None among references": (2.0, {"reference": {"a": 0, "b": 1, "head": None}}, {"a", "b"}),
    "some importances": (2.0, {"importance": {"a": 1}}, {"a"}),
    "None among importances": (2.0, {"importance": {"a": 1, "b": None}}, {"a"}),
    "both": (2.0, {"reference": {"a": 1, "b": 1}, "importance": {"b": 1, "head": 1}}, {"b"}),
    "strengths": ({"a": 1.0, "b": 2.0}, {}, {"a", "b"}),
    "None among strengths": ({"a": 1.0, "b": None, "head": 3}, {}, {"a", "head"}),
    "nothing": ({}, {}, set()),
    "no references": (2.0, {"reference": {}}, set()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("as_list", [False, True])
def test_what_is_left_out_is_left_as_it_is(form: str, as_list: bool) -> None:
    """A new head, say, which has nothing to remember."""
    strength, arguments, expected = FORMS[form]
    shapes = {"a": (3,), "b": (2, 2), "head": (5,)}

    def arrays(given: dict[str, Any]) -> dict[str, Any]:
        return {k: None if v is None else np.full(shapes[k], float(v)) for k, v in given.items()}

    def in_form(given: Any) -> Any:
        return [given.get(k) for k in shapes] if as_list and isinstance(given, dict) else given

    params = {name: np.full(shape, 4.0) for name, shape in shapes.items()}
    keys = dict(zip(shapes, range(3) if as_list else shapes, strict=True))
    opt = fs.SGD(in_form(params), lr=0.5)
    opt.anchor(in_form(strength), **{k: in_form(arrays(v)) for k, v in arguments.items()})
    assert set(opt.anchors) == {keys[name] for name in expected}
    opt.step(in_form({name: np.ones(shape) for name, shape in shapes.items()}))
    for name, w in params.items():
        if name not in expected:
            assert (w == 3.5).all()
            continue
        own = strength[name] if isinstance(strength, dict) else strength
        reference = arguments.get("reference", {}).get(name, 4.0)
        importance = arguments.get("importance", {}).get(name, 1.0)
        kappa = 0.5 * own * importance
        np.testing.assert_allclose(w, (3.5 + kappa * reference) / (1 + kappa), rtol=1e-15)


def test_tuples_and_other_mappings() -> None:
    from types import MappingProxyType

    first, second = np.ones(2), np.ones(2)
    opt = fs.SGD((first, second), lr=1.0)
    opt.anchor((1.0, None), (np.zeros(2), np.zeros(2)))
    assert list(opt.anchors) == [0]
    named = fs.SGD(MappingProxyType({"x": first, "y": second}), lr=1.0)
    named.anchor(MappingProxyType({"y": np.float32(2)}), MappingProxyType({"y": np.zeros(2)}))
    assert list(named.anchors) == ["y"]
    assert named.anchors["y"]["strength"] == 2.0


def test_a_parameter_without_a_gradient_is_not_pulled() -> None:
    """It does not move at all: "each step that moves a parameter"."""
    a, b = np.ones(3), np.ones(3)
    opt = fs.Adam({"a": a, "b": b}, lr=0.1)
    opt.anchor(1e30, {"a": np.full(3, 5.0), "b": np.full(3, 5.0)})
    opt.step({"a": np.ones(3)})
    assert (a == 5).all()
    assert (b == 1).all()
    opt.step({"a": None, "b": np.ones(3)})
    assert (b == 5).all()


def test_what_anchors_returns() -> None:
    opt = fs.SGD({"a": np.ones(2), "b": np.ones(3)})
    assert opt.anchors == {}
    opt.anchor({"a": 3}, importance={"a": np.array([0.5, 2.0])})
    assert set(opt.anchors) == {"a"}
    [entry] = opt.anchors.values()
    assert set(entry) == {"strength", "reference", "importance"}
    assert type(entry["strength"]) is float
    assert entry["strength"] == 3
    np.testing.assert_array_equal(entry["importance"], [0.5, 2])
    opt.anchors.clear()
    assert set(opt.anchors) == {"a"}


def test_torch_tensors(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    start, reference, importance = np.abs(rng.standard_normal((3, 4, 5))).astype(f32)
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.nn.Parameter(torch.tensor(start).to(dtype))
        w = tensor.detach().clone().float().numpy()
        opt, plain = fs.Adam([tensor], lr=0.1), fs.Adam([w], lr=0.1)
        f = torch.tensor(importance).to(dtype).requires_grad_()
        opt.anchor(2.0, [torch.tensor(reference).to(dtype)], [f])
        plain.anchor(2.0, [torch.tensor(reference).to(dtype).float().numpy()], [f.detach().float()])
        opt.anchor(1.0)
        plain.anchor(1.0)
        opt.step([torch.ones(4, 5, dtype=dtype)])
        plain.step([np.ones((4, 5), f32)])
        assert torch.equal(tensor.detach(), torch.tensor(w).to(dtype))


@numpy_speaks_version_1
@pytest.mark.parametrize("has_reference", [False, True])
def test_parameters_that_only_speak_dlpack(has_reference: bool) -> None:
    w = np.ones(3)
    opt = fs.SGD([Foreign(w)], lr=0.5)
    if has_reference:
        opt.anchor(2.0, [np.ones(3)])
    else:
        opt.anchor(2.0)
    opt.step([np.ones(3)])
    np.testing.assert_allclose(w, 0.75)


# ---- several anchors ----------------------------------------------------------------------------


def test_two_tasks(rng: np.random.Generator) -> None:
    """The one anchor that is kept is of the size of one."""
    w = rng.standard_normal((50, 3))
    opt = fs.SGD([w], lr=0.1)
    first, second = (some_penalty(rng, w.shape, strength=s) for s in (0.7, 12.0))
    start = w.copy()
    anchor(opt, first, second)
    assert opt.anchors[0]["reference"].shape == w.shape
    g = rng.standard_normal(w.shape)
    opt.step([g])
    np.testing.assert_allclose(w, pulled(start - 0.1 * g, 0.1, first, second), rtol=1e-13)


@settings(max_examples=150, deadline=None)
@given(
    strengths=st.lists(
        st.sampled_from([0.0, 1e-10, 0.1, 1.0, 7.0, 1e5, 1e30, 1e300]), min_size=2, max_size=4
    ),
    kinds=st.lists(st.sampled_from(["none", "some", "zero"]), min_size=4, max_size=4),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 2**32 - 1),
)
def test_anchors_add_up(strengths: list[float], kinds: list[str], order: Any, seed: int) -> None:
    """As the proximal step of the sum of all penalties; in any order."""
    rng = np.random.default_rng(seed)
    start, g = rng.standard_normal((2, 40))
    penalties = []
    for strength, kind in zip(strengths, kinds, strict=False):
        penalty = some_penalty(rng, 40, strength=strength)
        importance = {"none": 1.0, "some": penalty.importance, "zero": np.zeros(40)}[kind]
        penalties.append(penalty._replace(importance=importance))
    shuffled = penalties[:]
    order.shuffle(shuffled)
    results = []
    for given_order in (penalties, shuffled):
        w = start.copy()
        opt = fs.SGD([w], lr=0.1)
        anchor(opt, *given_order)
        opt.step([g])
        results.append(w)
    expected = pulled(start - 0.1 * g, 0.1, *penalties)
    np.testing.assert_allclose(results[0], expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_three_tasks_one_after_the_other(
    rule: Rule, dtype: str, tier: str, rng: np.random.Generator
) -> None:
    """Each begins where the one before has ended, with an anchor there."""
    w = rng.standard_normal((20, 3)).astype(dtype)
    opt = rule.cls([w], **rule.options)
    exact, state, penalties = w.astype(f64), {}, []
    for strength in (1.0, 0.3, 4.0):
        for _ in range(15):
            g = rng.standard_normal(w.shape).astype(dtype)
            exact = rule.reference(exact, g.astype(f64), state, **rule.options)
            exact = pulled(exact, rule.options["lr"], *penalties)
            opt.step([g])
        importance = some_penalty(rng, w.shape, dtype).importance
        penalties.append(Penalty(strength, exact, importance))
        opt.anchor(strength, importance=[importance])
    np.testing.assert_allclose(w, exact, rtol=0, atol=TOLERANCE[dtype])


def test_without_importance_the_sum_needs_no_array() -> None:
    opt = fs.SGD([np.zeros(3)], lr=0.5)
    anchor(opt, Penalty(1.0, np.ones(3)), Penalty(3.0, np.full(3, 5.0)))
    entry = opt.anchors[0]
    assert entry["importance"] is None
    assert entry["strength"] == 4
    np.testing.assert_allclose(entry["reference"], 4)


@pytest.mark.parametrize("dtype", ["f8", "f4"])
@pytest.mark.parametrize("strong", [1e10, 1e30, 1e300])
def test_a_weak_anchor_where_a_strong_one_has_no_importance(dtype: str, strong: float) -> None:
    """Its strength times its importance must not be lost beside the other's strength."""
    w = np.full(3, 2.0, dtype)
    opt = fs.SGD([w], lr=0.5)
    anchor(
        opt,
        Penalty(strong, np.array([0.5, 0, 0], dtype), np.array([1.0, 0, 0])),
        Penalty(2.0, np.ones(3, dtype)),
    )
    opt.step([np.zeros(3, dtype)])
    np.testing.assert_allclose(w, [0.5, 1.5, 1.5], rtol=1e-6)


_MOST = float(np.finfo(f64).max)


@pytest.mark.parametrize(
    ("strength", "importance"),
    [(_MOST, 1.0), (1.0, np.full(2, _MOST)), (1e200, np.full(2, 1e200)), (1e20, np.full(2, _MOST))],
)
def test_a_sum_that_overflows(strength: float, importance: Any) -> None:
    """What comes of it can be saved, pulls as the strongest do, and not where lr is 0."""
    opt = fs.SGD([np.full(2, 3.0)], lr=0.0)
    for _ in range(2):
        anchor(opt, Penalty(strength, np.ones(2), importance))
    opt.load_state_dict(opt.state_dict())
    opt.step([np.zeros(2)])
    np.testing.assert_array_equal(opt.params[0], 3)
    opt.step([np.zeros(2)], lr=0.1)
    np.testing.assert_array_equal(opt.params[0], 1)


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("rows", ["lazy", "exact"])
def test_release_anchor(rule: Rule, rows: Any, rng: np.random.Generator) -> None:
    start = rng.standard_normal((6, 3))
    opt, free = pair(rule, start, some_penalty(rng, start.shape), rows=rows)
    opt.release_anchor()
    opt.release_anchor()
    assert opt.anchors == {}
    g = rng.standard_normal(start.shape)
    for each in (opt, free):
        each.step([g])
    assert everything(opt) == everything(free)
    assert "anchor" not in opt.state_dict()["state"][0]
    opt.anchor(1e30, [start])  # and another may follow, of which alone it knows
    opt.step([g])
    np.testing.assert_array_equal(opt.params[0], start)


# ---- with everything else that a step can do ----------------------------------------------------


@pytest.mark.parametrize("rule", SOME, ids=str)
def test_rates_of_schedules_and_of_single_steps(rule: Rule, rng: np.random.Generator) -> None:
    """kappa has the rate of the step, without what the rule itself makes of it."""
    start = rng.standard_normal((5, 4))
    rates = [0.1 / (step + 1) for step in range(12)]
    opt = rule.cls([start.copy()], **{**rule.options, "lr": lambda step: rates[step]})
    penalty = some_penalty(rng, start.shape)
    anchor(opt, penalty)
    w, state = start, {}
    for step in range(12):
        g = rng.standard_normal(start.shape)
        if step == 6:
            opt.lr = 0.07
        own = {"lr": 0.5} if step % 4 == 3 else {}
        rate = own.get("lr", 0.07 if step >= 6 else rates[step])
        w = rule.reference(w, g, state, **{**rule.options, "lr": rate})
        w = pulled(w, rate, penalty)
        opt.step([g], **own)
    np.testing.assert_allclose(opt.params[0], w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", SOME, ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_clipping_and_scaling_are_of_the_gradient_alone(
    rule: Rule, maximize: bool, rng: np.random.Generator
) -> None:
    """The pull is neither clipped nor scaled nor turned round."""
    start = rng.standard_normal((5, 4))
    opt = rule.cls([start.copy()], max_norm=0.5, maximize=maximize, **rule.options)
    penalty = some_penalty(rng, start.shape, strength=20)
    anchor(opt, penalty)
    w, state = start, {}
    for _ in range(5):
        g = rng.standard_normal(start.shape)
        clipped = g / 3 * min(1, 0.5 / (np.linalg.norm(g / 3) + 1e-6)) * (-1 if maximize else 1)
        w = pulled(rule.reference(w, clipped, state, **rule.options), rule.options["lr"], penalty)
        opt.step([g], grad_scale=1 / 3)
    np.testing.assert_allclose(opt.params[0], w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", SOME, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["dense", "rows"])
def test_a_skipped_step_does_not_pull(
    rule: Rule, bad: float, kind: str, tier: str, rng: np.random.Generator
) -> None:
    start = rng.standard_normal((5, 4))
    opt = rule.cls([start.copy()], skip_nonfinite=True, **rule.options)
    opt.anchor(1e3, [np.zeros((5, 4))])
    opt.step([np.ones((5, 4))])
    before = everything(opt)
    g = np.ones((5, 4))
    g[3, 2] = bad
    opt.step([g if kind == "dense" else fs.Rows(np.arange(5), g)], zero_grad=True)
    assert everything(opt) == {**before, "skipped_steps": 1}
    assert not g.any()


@pytest.mark.parametrize("rule", [PLAIN[0], ADAM, ROWWISE[0]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("shape", [(3,), (1024,), (1025,), (5, 700), (300, 300)], ids=str)
@pytest.mark.parametrize("has_importance", [False, True])
@pytest.mark.parametrize("kind", ["dense", "rows"])
def test_gradients_are_cleared(
    rule: Rule, dtype: np.dtype, shape: tuple[int, ...], has_importance: bool, kind: str
) -> None:
    w, g = np.ones(shape, dtype), np.ones(shape, dtype)
    again, kept = w.copy(), g.copy()
    opt, other = (rule.cls([x], **rule.options) for x in (w, again))
    for each in (opt, other):
        each.anchor(2.0, [np.zeros(shape)], [np.ones(shape)] if has_importance else None)

    def gradient(array: np.ndarray) -> Any:
        return array if kind == "dense" else fs.Rows(np.arange(shape[0]), array)

    opt.step([gradient(g)], zero_grad=True)
    other.step([gradient(kept)])
    assert not g.any()
    assert kept.all()
    assert everything(opt) == everything(other)


def test_a_step_that_is_refused_does_not_pull() -> None:
    opt = fs.SGD([np.ones(3), np.ones(2)], lr=0.1)
    opt.anchor(1.0, [np.zeros(3), np.zeros(2)])
    before = snapshot(opt)
    with pytest.raises(ValueError, match="shape"):
        opt.step([np.ones(3), np.ones(3)])
    np.testing.assert_equal(snapshot(opt), before)


# ---- gradients of some rows ---------------------------------------------------------------------


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("has_importance", [False, True])
def test_lazy_rows(
    rule: Rule, dtype: str, has_importance: bool, tier: str, rng: np.random.Generator
) -> None:
    """Rows that are listed, however often, are pulled once; others not at all."""
    start = rng.standard_normal((30, 4)).astype(dtype)
    penalty = some_penalty(rng, start.shape, dtype)
    if not has_importance:
        penalty = penalty._replace(importance=1.0)
    opt, lazy = rule.cls([start.copy()], **rule.options), Lazy(rule, start)
    anchor(opt, penalty)
    for _ in range(25):
        indices = rng.integers(0, 20, rng.integers(0, 9))
        values = rng.standard_normal((len(indices), 4)).astype(dtype)
        opt.step([fs.Rows(indices, values)])
        lazy.step(indices, values.astype(f64))
        rows = np.unique(indices)
        parts = [Penalty(s, r[rows], f[rows] if has_importance else 1.0) for s, r, f in [penalty]]
        lazy.w[rows] = pulled(lazy.w[rows], rule.options["lr"], *parts)
    np.testing.assert_allclose(opt.params[0], lazy.w, rtol=0, atol=TOLERANCE[dtype])
    np.testing.assert_array_equal(opt.params[0][20:], start[20:])


def scattered(shape: tuple[int, ...], indices: np.ndarray, values: np.ndarray) -> np.ndarray:
    full = np.zeros(shape, values.dtype)
    np.add.at(full, indices, values)
    return full


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("layout", ["c", "transposed"])
@pytest.mark.parametrize("has_importance", [False, True])
def test_exact_rows_are_a_dense_run(
    rule: Rule, dtype: str, layout: str, has_importance: bool, rng: np.random.Generator
) -> None:
    """Bit for bit: with an anchor, missed steps are made up for one by one."""
    start = rng.standard_normal((12, 3)).astype(dtype)
    penalty = some_penalty(rng, start.shape, dtype, strength=0.5)
    lr = rule.options["lr"]
    exact, dense = (
        rule.cls([LAYOUTS[layout](start.copy())], **{**rule.options, "rows": rows})
        for rows in ("exact", "lazy")
    )
    for step in range(120):
        if step in (20, 70):  # rows are behind then
            for opt in (exact, dense):
                anchor(opt, penalty if has_importance else penalty._replace(importance=1.0))
        if step == 100:
            exact.release_anchor()
            dense.release_anchor()
        indices = rng.permutation(10)[: rng.integers(0, 3)]
        values = rng.standard_normal((len(indices), 3)).astype(dtype)
        rate = {"lr": lr * rng.random()}
        if step % 13 == 5:  # which is no step that could be missed
            exact.step([None], **rate)
            dense.step([None], **rate)
        exact.step([fs.Rows(indices, values)], **rate)
        dense.step([scattered(start.shape, indices, values)], **rate)
        if step == 50:
            exact.catch_up([np.arange(5)])
            np.testing.assert_allclose(
                exact.params[0][:5], dense.params[0][:5], rtol=0, atol=TOLERANCE[dtype]
            )
    exact.flush()
    # Before the anchor and after it, missed steps may have been put together.
    np.testing.assert_allclose(exact.params[0], dense.params[0], rtol=0, atol=TOLERANCE[dtype])
    for opt in (exact, dense):
        opt.params[0][...] = dense.params[0]
        anchor(opt, penalty)
    exact.load_state_dict(dense.state_dict())
    for _ in range(60):
        indices = rng.permutation(10)[: rng.integers(0, 3)]
        values = rng.standard_normal((len(indices), 3)).astype(dtype)
        exact.step([fs.Rows(indices, values)])
        dense.step([scattered(start.shape, indices, values)])
    exact.flush()
    assert everything(exact) == everything(dense)


@pytest.mark.parametrize("rule", SOME, ids=str)
@pytest.mark.parametrize("rows", ["lazy", "exact"])
def test_rows_on_tiers_and_in_threads(rule: Rule, rows: Any) -> None:
    """With rows of one tile and of several."""
    found = []
    for tier in AVAILABLE:
        for threads in (1, 2, 3):
            _cpu.use_tier(tier)
            fs.set_num_threads(threads)
            rng = np.random.default_rng(5)
            params = [rng.standard_normal(shape).astype(f32) for shape in [(40, 1100), (900, 90)]]
            opt = rule.cls(params, rows=rows, max_norm=9.0, **rule.options)
            opt.anchor(2.0, importance=[None, some_penalty(rng, params[1].shape).importance])
            opt.anchor([1.0, None], [rng.standard_normal(params[0].shape), None])
            for _ in range(3):
                grads = []
                for p in params:
                    indices = rng.integers(0, len(p), len(p))
                    values = rng.standard_normal(p.shape).astype(f32)
                    grads.append(fs.Rows(indices, values))
                opt.step(grads)
            opt.flush()
            found.append(everything(opt))
    assert all(other == found[0] for other in found)


def test_a_snapshot_of_rows_that_are_behind(rng: np.random.Generator) -> None:
    """They are brought up to date before: the present is what a dense run would have."""
    start = rng.standard_normal((6, 2))
    exact, dense = (fs.SGD([start.copy()], lr=0.1, momentum=0.9, rows=r) for r in ("exact", "lazy"))
    g = rng.standard_normal((6, 2))
    exact.step([g])
    dense.step([g])
    for _ in range(10):
        exact.step([fs.Rows([0], np.ones((1, 2)))])
        dense.step([scattered((6, 2), np.array([0]), np.ones((1, 2)))])
    exact.anchor(1.0)
    dense.anchor(1.0)
    np.testing.assert_allclose(
        exact.anchors[0]["reference"], dense.anchors[0]["reference"], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("through", ["dict", "file", "pickle", "deepcopy"])
def test_rows_that_are_behind_are_saved_with_their_anchor(
    through: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    start = rng.standard_normal((9, 2))
    opt, whole = (fs.Adam([start.copy()], rows="exact") for _ in range(2))
    for each in (opt, whole):
        anchor(each, Penalty(0.4, np.zeros((9, 2)), np.linspace(0, 2, 18).reshape(9, 2)))
    script = [(rng.permutation(9)[:2], rng.standard_normal((2, 2))) for _ in range(40)]
    for indices, values in script[:20]:
        opt.step([fs.Rows(indices, values)])
    opt = through_the(through, opt, lambda: fs.Adam([opt.params[0].copy()], rows="exact"), tmp_path)
    for indices, values in script[20:]:
        opt.step([fs.Rows(indices, values)])
    for indices, values in script:
        whole.step([fs.Rows(indices, values)])
    opt.flush()
    whole.flush()
    assert everything(opt) == everything(whole)


# ---- what is refused ----------------------------------------------------------------------------


def _ones(**changes: Any) -> dict[str, Any]:
    return {"a": np.ones(3), "b": np.ones((2, 2)), **changes}


BAD: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("negative strength", (-1.0,), ValueError, "strength"),
    ("NaN strength", (np.nan,), ValueError, "strength"),
    ("infinite strength", (np.inf,), ValueError, "strength"),
    ("strength too large", (10**400,), ValueError, "strength"),
    ("strength of text", ("1",), TypeError, "strength"),
    ("strength a bool", (True,), TypeError, "strength"),
    ("strength complex", (1j,), TypeError, "strength"),
    ("strength an array", (np.ones(3),), TypeError, "strength"),
    ("strengths a list", ([1.0, 1.0],), TypeError, "strength"),
    ("a bad strength among good ones", ({"a": 1.0, "b": -1.0},), ValueError, "'b'"),
    ("unknown name in strength", ({"a": 1.0, "c": 1.0},), ValueError, "'c'"),
    ("unknown name in reference", (1.0, _ones(c=np.ones(1))), ValueError, "'c'"),
    ("unknown name in importance", (1.0, None, {"c": np.ones(1)}), ValueError, "'c'"),
    ("reference of wrong shape", (1.0, _ones(b=np.ones(4))), ValueError, "(4,)"),
    ("reference that would broadcast", (1.0, _ones(b=np.ones(2))), ValueError, "(2,)"),
    ("reference a number", (1.0, _ones(b=1.0)), ValueError, "shape ()"),
    ("importance of wrong shape", (1.0, None, _ones(b=np.ones(4))), ValueError, "(4,)"),
    ("importance a number", (1.0, None, _ones(b=2.0)), ValueError, "shape ()"),
    ("reference one array", (1.0, np.ones(3)), TypeError, "expected a dict"),
    ("reference a list", (1.0, [np.ones(3), np.ones((2, 2))]), TypeError, "expected a dict"),
    ("importance one array", (1.0, None, np.ones(3)), TypeError, "expected a dict"),
    ("importance a number for all", (1.0, None, 1.0), TypeError, "expected a dict"),
    ("NaN reference", (1.0, _ones(b=np.full((2, 2), np.nan))), ValueError, "finite"),
    ("infinite reference", (1.0, _ones(b=np.full((2, 2), np.inf))), ValueError, "finite"),
    ("NaN importance", (1.0, None, _ones(b=np.full((2, 2), np.nan))), ValueError, "finite"),
    ("infinite importance", (1.0, None, _ones(b=np.full((2, 2), np.inf))), ValueError, "finite"),
    (
        "negative importance",
        (1.0, None, _ones(b=np.array([[0, -1e-300], [1, 1]]))),
        ValueError,
        "negative",
    ),
    ("complex reference", (1.0, _ones(b=np.ones((2, 2), complex))), TypeError, "complex"),
    ("bool importance", (1.0, None, _ones(b=np.ones((2, 2), bool))), TypeError, "bool"),
    ("object reference", (1.0, _ones(b=np.ones((2, 2), object))), TypeError, "object"),
    ("text", (1.0, _ones(b=np.full((2, 2), "1"))), TypeError, "dtype"),
    ("record", (1.0, _ones(b=np.zeros((2, 2), [("x", "f8")]))), TypeError, ""),
    ("dates", (1.0, _ones(b=np.zeros((2, 2), "M8[s]"))), TypeError, "datetime"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
@pytest.mark.parametrize("anchored", [False, True])
def test_bad_anchors_change_nothing(
    arguments: tuple[Any, ...], error: type[Exception], message: str, anchored: bool
) -> None:
    opt = fs.Adam({"a": np.full(3, 2.0), "b": np.full((2, 2), 2.0)})
    if anchored:
        opt.anchor({"a": 1.0}, importance={"a": np.array([0.0, 1, 2])})
    opt.step({"a": np.ones(3), "b": np.ones((2, 2))})
    before = snapshot(opt)
    with pytest.raises(error) as caught:
        opt.anchor(*arguments)
    assert message in str(caught.value)
    np.testing.assert_equal(snapshot(opt), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0, [np.ones(2)]), ValueError, "1 entries for 2 parameters"),
        (([1.0],), ValueError, "1 entries for 2 parameters"),
        ((1.0, None, [np.ones(2)] * 3), ValueError, "3 entries for 2 parameters"),
        ((1.0, {0: np.ones(2)}), TypeError, "expected a list"),
        ((1.0, np.ones((2, 2))), TypeError, "expected a list"),
        (({0: 1.0},), TypeError, "strength"),
    ],
)
def test_lists_of_the_wrong_form(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    opt = fs.SGD([np.ones(2), np.ones(2)])
    with pytest.raises(error, match=message):
        opt.anchor(*arguments)
    assert opt.anchors == {}


def test_weights_that_are_not_finite_cannot_be_a_reference() -> None:
    opt = fs.SGD([np.ones(2), np.array([1.0, -np.inf])])
    with pytest.raises(ValueError, match="parameter 1 is not finite"):
        opt.anchor(1.0)
    assert opt.anchors == {}


def test_references_on_another_device() -> None:
    """They may be anywhere; what is kept is where the parameter is (test_gpu_rows.py)."""
    lib = library("simulated")
    with simulated_cupy.installed():
        on_cpu, on_gpu = np.ones(3, f32), lib.put(np.ones(3, f32))
        opt = fs.SGD([on_cpu, on_gpu], lr=0.5)
        opt.anchor(2.0, [lib.put(np.zeros(3, f32)), np.zeros(3)])
        opt.step([np.zeros(3, f32), lib.put(np.zeros(3, f32))])
        for w in (on_cpu, lib.get(on_gpu)):
            np.testing.assert_array_equal(w, 0.5)
        assert isinstance(opt.anchors[0]["reference"], np.ndarray)
        assert lib.is_own(opt.anchors[1]["reference"])
        saved = opt.state_dict()
        opt.load_state_dict(edited(state__1=saved["state"][0])(saved))
        assert lib.is_own(opt.anchors[1]["reference"])


# ---- state dicts, files, pickles ----------------------------------------------------------------


def through_the(
    way: str, opt: fs.Optimizer, new: Callable[[], fs.Optimizer], path: Path
) -> fs.Optimizer:
    """The optimizer that comes out; `new` makes one with copies of the parameters."""
    if way == "pickle":
        return pickle.loads(pickle.dumps(opt))
    if way == "deepcopy":
        return copy.deepcopy(opt)
    other = new()
    if way == "dict":
        other.load_state_dict(opt.state_dict())
    else:
        opt.save(path / "opt.safetensors")
        other.load(path / "opt.safetensors")
    return other


def anchored_model(rule: Rule, **common: Any) -> fs.Optimizer:
    """Of all layouts and sizes; one without an anchor, one without importance."""
    rng = np.random.default_rng(0)
    params = {
        "layer.W": rng.standard_normal((3, 4)).astype(f32).T,
        "layer.b": rng.standard_normal(4),
        "head": np.ones(3, f32),
        "none": np.zeros((0, 2), f32),
        "half": rng.standard_normal((2, 3)).astype("f2"),
    }
    opt = rule.cls(params, **rule.options, **common)
    named = {k: v for k, v in params.items() if k != "head"}
    opt.anchor(0.7, {k: rng.standard_normal(v.shape) for k, v in named.items()})
    opt.anchor({"layer.W": 1.5, "none": 1.0}, importance={k: np.abs(v) for k, v in named.items()})
    assert set(opt.anchors) == set(named)
    return opt


def gradients_of(opt: fs.Optimizer, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal(p.shape).astype(p.dtype) for k, p in opt.params.items()}


def free_copy(rule: Rule, opt: fs.Optimizer) -> fs.Optimizer:
    return rule.cls({k: p.copy(order="K") for k, p in opt.params.items()}, **rule.options)


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("way", ["dict", "file", "pickle", "deepcopy"])
@pytest.mark.parametrize("target", ["free", "anchored otherwise"])
def test_interrupted_is_uninterrupted(rule: Rule, way: str, target: str, tmp_path: Path) -> None:
    whole, first = anchored_model(rule), anchored_model(rule)
    for seed in range(4):
        first.step(gradients_of(first, seed))

    def new() -> fs.Optimizer:
        opt = free_copy(rule, first)
        if target == "anchored otherwise":
            opt.anchor(9.0)
        return opt

    second = through_the(way, first, new, tmp_path)
    np.testing.assert_equal(second.anchors, first.anchors)
    np.testing.assert_equal(second.state_dict(), first.state_dict())
    assert all(
        second.anchors[k]["reference"] is not first.anchors[k]["reference"] for k in first.anchors
    )
    for seed in range(4, 8):
        second.step(gradients_of(second, seed))
    for seed in range(8):
        whole.step(gradients_of(whole, seed))
    assert everything(second) == everything(whole)
    np.testing.assert_equal(second.state_dict(), whole.state_dict())


@pytest.mark.parametrize("rule", SOME, ids=str)
@pytest.mark.parametrize("way", ["dict", "file"])
def test_loading_may_remove_an_anchor(rule: Rule, way: str, tmp_path: Path) -> None:
    """It is part of the state: of an optimizer without one, there is none afterwards."""
    anchored = anchored_model(rule)
    free = free_copy(rule, anchored)
    free.step(gradients_of(free, 0))
    for name, p in free.params.items():
        anchored.params[name][...] = p
    opt = through_the(way, free, lambda: anchored, tmp_path)
    assert opt is anchored
    assert opt.anchors == {}
    for seed in (1, 2):
        opt.step(gradients_of(opt, seed))
        free.step(gradients_of(free, seed))
    assert everything(opt) == everything(free)


def test_a_state_dict_is_a_copy() -> None:
    opt = anchored_model(ADAM)
    saved, kept = opt.state_dict(), anchors_of(opt)
    saved["state"]["layer.b"]["anchor"][...] = 99
    np.testing.assert_equal(opt.anchors, kept)
    opt.load_state_dict(saved)
    saved["state"]["layer.b"]["anchor"][...] = -99
    assert (opt.anchors["layer.b"]["reference"] == 99).all()


def test_the_state_dicts_names() -> None:
    opt = fs.Adam([np.ones(2), np.ones(2), np.ones(2)])
    opt.anchor([1.0, 2.0, None])
    opt.anchor(1.0, importance=[None, np.ones(2), None])
    entries = opt.state_dict()["state"]
    extra = [set(entries[i]) - set(opt.state[i]) for i in range(3)]
    assert extra == [
        {"anchor", "anchor_strength"},
        {"anchor", "anchor_strength", "anchor_importance"},
        set(),
    ]


def test_state_goes_to_a_wider_optimizer() -> None:
    narrow = fs.Adam([np.ones(3, f32)])
    narrow.anchor(0.3, [np.full(3, 0.1, f32)], [np.full(3, 0.7, f32)])
    wide = fs.Adam([np.ones(3, f32)], state_dtype="float64")
    wide.load_state_dict(narrow.state_dict())
    assert wide.anchors[0]["reference"].dtype == f64
    for name in ("reference", "importance"):
        np.testing.assert_array_equal(wide.anchors[0][name], narrow.anchors[0][name])


BAD_STATES: list[tuple[str, Any, type[Exception], str]] = [
    ("no strength", edited(state__0__anchor_strength=...), ValueError, "strength"),
    ("no reference", edited(state__0__anchor=...), ValueError, "strength or reference"),
    ("only an importance", edited(state__1__anchor_importance=np.ones(2)), ValueError, "strength"),
    ("negative strength", edited(state__0__anchor_strength=-1.0), ValueError, "strength"),
    ("NaN strength", edited(state__0__anchor_strength=np.nan), ValueError, "strength"),
    ("strength of text", edited(state__0__anchor_strength="1"), TypeError, "strength"),
    ("wrong shape", edited(state__0__anchor=np.ones(2)), ValueError, "(2,)"),
    ("NaN", edited(state__0__anchor=np.full(3, np.nan)), ValueError, "finite"),
    ("objects", edited(state__0__anchor=np.ones(3, object)), TypeError, "object"),
    ("not an array", edited(state__0__anchor="text"), TypeError, "anchor of parameter 0"),
    ("importance shape", edited(state__0__anchor_importance=np.ones(2)), ValueError, "(2,)"),
    ("importance < 0", edited(state__0__anchor_importance=-np.ones(3)), ValueError, "negative"),
    ("unknown key", edited(state__0__anchors=np.ones(3)), ValueError, "'anchors'"),
    (
        "good anchor, bad state",
        edited(state__0__anchor=np.ones(3), state__1__exp_avg=np.ones(7)),
        ValueError,
        "(7,)",
    ),
]


@pytest.mark.parametrize(
    ("edit", "error", "message"), [b[1:] for b in BAD_STATES], ids=[b[0] for b in BAD_STATES]
)
def test_bad_state_dicts_change_nothing(edit: Any, error: type[Exception], message: str) -> None:
    opt = fs.Adam([np.full(3, 2.0, f32), np.ones(2, f32)])
    opt.anchor(1.0, [np.zeros(3), None], [np.ones(3), None])
    opt.step([np.ones(3, f32), np.ones(2, f32)])
    before = snapshot(opt)
    with pytest.raises(error) as caught:
        opt.load_state_dict(edit(opt.state_dict()))
    assert message in str(caught.value)
    np.testing.assert_equal(snapshot(opt), before)


@pytest.mark.parametrize("rule", [rule for rule in SOME if rule.torch], ids=str)
def test_torchs_state_dict(rule: Rule) -> None:
    """Which knows no anchors, so that there is none afterwards; a new one may be set."""
    torch = pytest.importorskip("torch")
    tensor = torch.nn.Parameter(torch.ones(3))
    theirs = getattr(torch.optim, rule.torch)([tensor], **{**rule.options, **rule.torch_options})
    tensor.grad = torch.ones(3)
    theirs.step()
    start = tensor.detach().numpy().copy()
    opt, free = pair(rule, start, Penalty(2.0, np.zeros(3)))
    opt.load_state_dict(theirs.state_dict())
    free.load_state_dict(theirs.state_dict())
    assert opt.anchors == {}
    for each in (opt, free):
        each.step([np.ones(3, f32)])
    assert everything(opt) == everything(free)
    opt.anchor(1e30, [np.zeros(3)])
    opt.step([np.ones(3, f32)])
    np.testing.assert_allclose(opt.params[0], 0, atol=1e-20)


# ---- threads ------------------------------------------------------------------------------------


def test_one_optimizer_in_many_threads() -> None:
    """Whoever steps, anchors and saves: each step is with an anchor or without, wholly."""
    w = np.zeros(50_000, f32)
    opt = fs.SGD([w], lr=0.5)
    g, one = np.zeros_like(w), np.ones_like(w)
    done = threading.Event()

    def work(i: int) -> None:
        if i == 0:
            for _ in range(40):
                opt.step([g])
            done.set()
        while not done.is_set():
            if i == 1:
                opt.anchor(1.0, [one], [one])
            elif i == 2:
                entry = opt.state_dict()["state"][0]
                assert "anchor" not in entry or (entry["anchor"] == 1).all()
            else:
                opt.release_anchor()

    in_threads(4, work)
    assert (w == w[0]).all()
    assert 0 <= w[0] <= 1


# ---- Fisher information -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (4,), (3, 2), (2, 3, 4), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fisher_is_the_mean_of_squares(
    shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator
) -> None:
    fisher = fs.Fisher(np.zeros(shape))
    batches = [rng.standard_normal((n, *shape)).astype(dtype) for n in (5, 1, 0, 12)]
    for batch in batches:
        fisher.add(batch)
    assert fisher.samples == 18
    together = np.concatenate(batches).astype(f64)
    expected = np.einsum("i...,i...->...", together, together) / 18
    assert fisher.importance.dtype == f64
    assert fisher.importance.shape == shape
    np.testing.assert_allclose(fisher.importance, expected, rtol=1e-14)


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0, 1])
def test_fisher_of_several_tasks(decay: float, rng: np.random.Generator) -> None:
    fisher = fs.Fisher([np.zeros((2, 3))], decay=decay)
    expected = np.zeros((2, 3))
    for task in range(4):
        assert fisher.samples == 0
        np.testing.assert_allclose(fisher.importance[0], expected, rtol=1e-14)
        g = rng.standard_normal((6 + task, 2, 3))
        fisher.add([g[:4]])
        fisher.add([g[4:]])
        expected = decay * expected + np.mean(g**2, axis=0)
        np.testing.assert_allclose(fisher.importance[0], expected, rtol=1e-14)
        fisher.next_task()


def test_fisher_of_a_task_without_samples() -> None:
    """A task that nobody has seen anything of decays nothing."""
    fisher = fs.Fisher(np.zeros(2), decay=0.5)
    fisher.next_task()
    np.testing.assert_array_equal(fisher.importance, 0)
    fisher.add(np.ones((3, 2)))
    for _ in range(3):
        fisher.next_task()
    np.testing.assert_array_equal(fisher.importance, 1)


@pytest.mark.parametrize("form", ["one", "list", "dict"])
def test_fisher_in_every_form(form: str, rng: np.random.Generator) -> None:
    arrays = {"a": np.zeros((2, 3), f32), "b": np.zeros(4), "c": np.zeros(())}
    grads = {k: rng.standard_normal((5, *v.shape)) for k, v in arrays.items()}

    def shaped(given: dict[str, Any]) -> Any:
        return {"one": given["a"], "list": [*given.values()], "dict": given}[form]

    fisher = fs.Fisher(shaped(arrays))
    fisher.add(shaped(dict(reversed(grads.items())) if form == "dict" else grads))
    expected = shaped({k: np.mean(g**2, axis=0) for k, g in grads.items()})
    for importance in (fisher.importance, fs.Fisher(shaped(arrays)).importance):
        assert type(importance) is type(expected)
        values = {"one": [importance], "list": importance}.get(form) or importance.values()
        assert all(isinstance(x, np.ndarray) and x.dtype == f64 for x in values)
        if form == "dict":
            assert list(importance) == ["a", "b", "c"]
    for ours, theirs in zip(in_order(fisher.importance), in_order(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-14)
    opt = fs.SGD(shaped({k: v.copy() for k, v in arrays.items()}))
    opt.anchor(2.0, importance=fisher.importance)
    assert len(opt.anchors) == len(in_order(expected))


def in_order(given: Any) -> list[np.ndarray]:
    if isinstance(given, dict):
        return [*given.values()]
    return given if isinstance(given, list) else [given]


def test_fishers_importance_is_a_copy(rng: np.random.Generator) -> None:
    fisher = fs.Fisher([np.zeros(3)])
    for _ in range(2):
        fisher.importance[0][...] = 99
        fisher.add([np.ones((2, 3))])
        fisher.importance[0][...] = 99
        np.testing.assert_array_equal(fisher.importance[0], 1)
        fisher.next_task()
        fisher.importance[0][...] = 99
        np.testing.assert_array_equal(fisher.importance[0], 1)
        fisher = fs.Fisher([np.zeros(3)])


def test_fisher_copies_and_does_not_change_gradients(rng: np.random.Generator) -> None:
    g = rng.standard_normal((5, 3))
    kept = g.copy()
    fisher = fs.Fisher(np.zeros(3))
    fisher.add(g)
    np.testing.assert_array_equal(g, kept)
    g[...] = np.nan
    np.testing.assert_allclose(fisher.importance, np.mean(kept**2, axis=0), rtol=1e-14)
    g.flags.writeable = False
    kept.flags.writeable = False
    fisher.add(np.broadcast_to(kept[:1], (7, 3)))
    assert fisher.samples == 12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fisher_of_any_layout(layout: str, rng: np.random.Generator) -> None:
    g = rng.standard_normal((5, 3, 4))
    fisher, plain = fs.Fisher(np.zeros((3, 4))), fs.Fisher(np.zeros((3, 4)))
    fisher.add(LAYOUTS[layout](g))
    plain.add(g)
    np.testing.assert_allclose(fisher.importance, plain.importance, rtol=1e-14)


def test_fisher_of_torch_tensors(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    w = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    fisher = fs.Fisher({"w": w, "v": torch.zeros(())})
    g = torch.tensor(rng.standard_normal((5, 3))).bfloat16().requires_grad_()
    fisher.add({"w": g, "v": torch.arange(5.0)})
    expected = np.mean(g.detach().double().numpy() ** 2, axis=0)
    np.testing.assert_allclose(fisher.importance["w"], expected, rtol=1e-14)
    assert fisher.importance["v"] == 6
    opt = fs.Adam({"w": w, "v": torch.zeros(())})
    opt.anchor(1.0, importance=fisher.importance)
    np.testing.assert_allclose(opt.anchors["w"]["importance"], expected, rtol=1e-6)


_TWO = {"a": np.ones((3, 2)), "b": np.ones((3, 4))}

BAD_GRADIENTS: list[tuple[str, Any, type[Exception], str]] = [
    ("missing", {"a": np.ones((3, 2))}, ValueError, "'b' are missing"),
    ("None", {**_TWO, "b": None}, ValueError, "'b' are missing"),
    ("unknown", {**_TWO, "c": np.ones(3)}, ValueError, "'c'"),
    ("a list", [*_TWO.values()], TypeError, "expected a dict"),
    ("one array", np.ones((3, 2)), TypeError, "expected a dict"),
    ("other counts", {**_TWO, "b": np.ones((2, 4))}, ValueError, "[2, 3]"),
    ("other shape", {**_TWO, "b": np.ones((3, 5))}, ValueError, "(3, 5)"),
    ("no samples axis", {**_TWO, "b": np.ones(4)}, ValueError, "(4,)"),
    ("one axis more", {**_TWO, "b": np.ones((3, 4, 1))}, ValueError, "(3, 4, 1)"),
    ("a scalar", {**_TWO, "b": np.array(1.0)}, ValueError, "shape ()"),
    ("NaN", {**_TWO, "b": np.full((3, 4), np.nan)}, ValueError, "finite"),
    ("infinity", {**_TWO, "b": np.full((3, 4), np.inf)}, ValueError, "finite"),
    ("too large", {**_TWO, "b": np.full((3, 4), 1e200)}, ValueError, "too large"),
    ("not an array", {**_TWO, "b": "text"}, TypeError, "str"),
    ("nested lists", {**_TWO, "b": np.ones((3, 4)).tolist()}, TypeError, "list"),
    ("text", {**_TWO, "b": np.full((3, 4), "x")}, (TypeError, ValueError), ""),
    ("complex", {**_TWO, "b": np.ones((3, 4), complex)}, TypeError, ""),
]


@pytest.mark.parametrize(
    ("grads", "error", "message"), [b[1:] for b in BAD_GRADIENTS], ids=[b[0] for b in BAD_GRADIENTS]
)
def test_bad_gradients_leave_fisher_as_it_is(
    grads: Any, error: type[Exception], message: str
) -> None:
    fisher = fs.Fisher({"a": np.zeros(2), "b": np.zeros(4)}, decay=0.5)
    fisher.add(_TWO)
    fisher.next_task()
    fisher.add({k: 2 * v for k, v in _TWO.items()})
    before = fisher.importance
    with pytest.raises(error) as caught:
        fisher.add(grads)
    assert message in str(caught.value)
    assert fisher.samples == 3
    np.testing.assert_equal(fisher.importance, before)


def test_fishers_sum_does_not_overflow() -> None:
    """Each square is finite; if their sum is not, it is refused as one that is too large is."""
    fisher = fs.Fisher(np.zeros(1))
    fisher.add(np.full((1, 1), 1.3e154))
    before = fisher.importance
    with pytest.raises(ValueError, match="too large"):
        fisher.add(np.full((1, 1), 1.3e154))
    assert fisher.samples == 1
    np.testing.assert_array_equal(fisher.importance, before)


@pytest.mark.parametrize(
    ("params", "grads", "error"),
    [
        ([np.zeros(2)], [np.ones((1, 2)), np.ones((1, 2))], ValueError),
        ([np.zeros(2), np.zeros(2)], [np.ones((1, 2))], ValueError),
        ([np.zeros(2)], np.ones((3, 2)), ValueError),
        (np.zeros(2), None, ValueError),
        (np.zeros(2), {"a": np.ones((3, 2))}, TypeError),
        ([np.zeros(2)], 3, TypeError),
        ([np.zeros(2)], {"a": np.ones((3, 2))}, TypeError),
    ],
)
def test_fisher_and_gradients_of_the_wrong_form(
    params: Any, grads: Any, error: type[Exception]
) -> None:
    fisher = fs.Fisher(params)
    with pytest.raises(error):
        fisher.add(grads)
    assert fisher.samples == 0


@pytest.mark.parametrize(
    ("decay", "error"),
    [
        (-0.1, ValueError),
        (1.1, ValueError),
        (np.nan, ValueError),
        (np.inf, ValueError),
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
)
def test_bad_decay(decay: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="decay"):
        fs.Fisher(np.zeros(2), decay=decay)


@pytest.mark.parametrize("params", [[], {}, 3, "text", None, {0: np.zeros(2)}])
def test_fisher_of_no_parameters(params: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        fs.Fisher(params)


def test_elastic_weight_consolidation(rng: np.random.Generator) -> None:
    """Two regressions, one after the other: what the first depends on is kept."""
    features = rng.standard_normal((2, 200, 6))
    features[0][:, 3:] = 0  # the first task depends on three weights,
    features[1][:, :3] *= 0.1  # the second on all of them, most on the others
    truth = np.array([1.0, -2, 3, 0, 0, 0]), np.array([-1.0, 2, -3, 1, 1, 1])
    targets = [x @ t for x, t in zip(features, truth, strict=True)]

    def loss(w: np.ndarray, task: int) -> float:
        return float(np.mean((features[task] @ w - targets[task]) ** 2))

    def train(opt: fs.Optimizer, task: int) -> None:
        for _ in range(1500):
            x, y = features[task], targets[task]
            opt.step(2 * x.T @ (x @ opt.params - y) / len(y))

    results = {}
    for strength in (0.0, 100.0):
        opt = fs.Adam(np.zeros(6), lr=0.02)
        train(opt, 0)
        assert loss(opt.params, 0) < 1e-4
        fisher = fs.Fisher(opt.params)
        residuals = rng.standard_normal(200)  # of labels drawn from the model, of variance 1
        fisher.add(residuals[:, None] * features[0])
        opt.anchor(strength, importance=fisher.importance)
        train(opt, 1)
        results[strength] = [loss(opt.params, task) for task in (0, 1)]
    assert results[100.0][0] < 0.1 < 1 < results[0.0][0]
    assert results[100.0][1] < 1
