"""Gradients of linear layers as sums of outer products, made inside the step."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
from rules import PLAIN, RULES, Rule
from test_bits import LAYOUTS
from test_rows import everything
from test_samples import DTYPES, assert_alike, assert_bits, compute_dtype, normal

if TYPE_CHECKING:
    from collections.abc import Sequence

# Around what is summed in registers at a time, a tile, and what is made at a time.
SHAPES = [(1, 1), (3, 5), (8, 48), (9, 49), (10, 784), (64, 100), (130, 1030), (7, 5000), (700, 3)]
COUNTS = [1, 2, 3, 4, 5, 8, 40, 128, 129, 260]


def added_up(x: np.ndarray, error: np.ndarray, times: Sequence[float], dtype: Any) -> np.ndarray:
    """One after another, each operation rounded to the compute type."""
    count = int(np.prod(x.shape[:-1]))
    x, error = (a.reshape(count, a.shape[-1]).astype(dtype) for a in (x, error))
    times = np.repeat(times, count // len(times)) if len(times) else times
    total = np.full((error.shape[1], x.shape[1]), -0.0, dtype)
    for t, v, e in zip(times, x, error, strict=True):
        if t != 0:
            total = total + (dtype(t) * e)[:, None] * v
    return total


def times_of(weight: np.ndarray) -> list[float]:
    return [float(w) / max(1, np.count_nonzero(weight)) for w in weight]


# ---- what is added up ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_bits_of_a_dense_step(
    shape: tuple[int, int], dtype: str, threads: int, tier: str, rng: np.random.Generator
) -> None:
    """For all numbers of samples: made by rows or by blocks, by one thread or several."""
    fs.set_num_threads(threads)
    for count in COUNTS:
        ours = fs.Adam([normal(rng, shape, dtype)])
        theirs = fs.Adam([ours.params[0].copy()])
        x, error = normal(rng, (count, shape[1]), dtype), normal(rng, (count, shape[0]), dtype)
        weight = rng.integers(0, 3, count).astype(float)
        weight[0] = 1.5
        ours.step([fs.Outer(x, error, weight)])
        theirs.step([added_up(x, error, times_of(weight), np.dtype(dtype).type)])
        assert_alike(ours, theirs)


@settings(max_examples=250, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    shape=st.one_of(
        st.tuples(st.integers(0, 70), st.integers(0, 70)),
        st.sampled_from([(1, 1023), (2, 1025), (33, 300), (5, 2000)]),
    ),
    count=st.integers(0, 9),
    positions=st.sampled_from([None, None, 1, 3]),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    zero_grad=st.booleans(),
    grad_scale=st.sampled_from([1.0, -1.0, 0.3]),
    options=st.sampled_from([{}, {"maximize": True}, {"max_norm": 0.7}, {"skip_nonfinite": True}]),
    where=st.sampled_from([None, "rows", "blocks", "mask", "top"]),
    anchored=st.sampled_from(["", "lightly", "by importance"]),
)
def test_any_layout_and_option(
    rule: Rule,
    shape: tuple[int, int],
    count: int,
    positions: int | None,
    layouts: tuple[str, str, str],
    dtypes: tuple[np.dtype, np.dtype, np.dtype],
    zero_grad: bool,
    grad_scale: float,
    options: dict[str, Any],
    where: str | None,
    anchored: str,
) -> None:
    """As a dense step by their sum: with selections, anchors, clipping and all."""
    rng = np.random.default_rng(3)
    start = normal(rng, shape, dtypes[0])
    ours = rule.cls([LAYOUTS[layouts[0]](start)], **options, **rule.options)
    theirs = rule.cls([start.copy()], **options, **rule.options)
    importance = [rng.random(shape)] if anchored == "by importance" else None
    for opt in (ours, theirs) if anchored else ():
        opt.anchor(0.5, importance=importance)
    choice: Any = {
        "rows": [rng.random(shape[0]) < 0.5],
        "mask": [rng.random(shape) < 0.3],
        "blocks": fs.RandomBlocks(0.5, 7),
        "top": fs.TopK(0.3),
    }.get(where or "")
    if rule not in PLAIN and where != "rows":
        choice = None
    middle = () if positions is None else (positions,)
    for _ in range(2):
        weight = rng.integers(0, 3, count).astype(float)
        x = LAYOUTS[layouts[1]](normal(rng, (count, *middle, shape[1]), dtypes[1]))
        error = LAYOUTS[layouts[2]](normal(rng, (count, *middle, shape[0]), dtypes[2]))
        before = x.copy(), error.copy()
        ours.step(
            [fs.Outer(x, error, weight)], where=choice, zero_grad=zero_grad, grad_scale=grad_scale
        )
        for array, copy in zip((x, error), before, strict=True):
            assert_bits(np.asarray(array), copy)
        if weight.any():
            g = added_up(x, error, times_of(weight), compute_dtype(theirs, start))
            theirs.step([g], where=choice, grad_scale=grad_scale)
        for p, q in zip(ours.params, theirs.params, strict=True):
            if not options.get("max_norm"):  # whose last bit depends on the order of the sum
                assert_bits(np.asarray(p), q)
            np.testing.assert_allclose(p.astype("f8"), q.astype("f8"), rtol=2e-2, atol=1e-3)
        assert (ours.steps, ours.skipped_steps) == (theirs.steps, theirs.skipped_steps)


@pytest.mark.parametrize("count", [1, 3, 50])
@pytest.mark.parametrize("max_norm", [None, 1e-3])
def test_a_part_of_a_large_one(
    count: int, max_norm: float | None, tier: str, rng: np.random.Generator
) -> None:
    """Tiles that are not next to each other, also when blocks are made for several."""
    shape = (300, 700)
    x, error = normal(rng, (count, 700)), normal(rng, (count, 300))
    ours, theirs = (fs.Adam([np.ones(shape, np.float32)], max_norm=max_norm) for _ in range(2))
    mask = np.zeros(shape, bool)
    mask[40:90, 100:] = mask[95, 3] = mask[200:, ::3] = True
    choices: list[Any] = [fs.RandomBlocks(0.3, 5000), [mask], fs.CyclicBlocks(3), None]
    for choice in choices:
        ours.step([fs.Outer(x, error)], where=choice)
        theirs.step([added_up(x, error, [1 / count] * count, np.float32)], where=choice)
    assert_alike(ours, theirs)


def test_one_sample(rng: np.random.Generator) -> None:
    x, error = normal(rng, 5), normal(rng, 3)
    ours, theirs = (fs.SGD([np.zeros((3, 5), np.float32)], lr=0.5) for _ in range(2))
    ours.step([fs.Outer(x, error, np.float32(2.0))])
    theirs.step([fs.Outer(x[None], error[None], [2.0])])
    assert_alike(ours, theirs)
    np.testing.assert_array_equal(ours.params[0], -np.outer(error, x))


@pytest.mark.parametrize("positions", [(), (4,)])
def test_a_bias_has_ones_for_x(positions: tuple[int, ...], rng: np.random.Generator) -> None:
    error, weight = normal(rng, (6, *positions, 7)), rng.exponential(1, 6)
    ours, theirs = fs.Adam([np.zeros(7)]), fs.Adam([np.zeros((7, 1))])
    ours.step([fs.Outer(None, error, weight, max_norm=0.3)])
    theirs.step([fs.Outer(np.ones((6, *positions, 1)), error, weight, max_norm=0.3)])
    np.testing.assert_array_equal(ours.params[0], theirs.params[0][:, 0])


def test_beside_other_gradients(rng: np.random.Generator) -> None:
    params = [normal(rng, (9, 4)), normal(rng, 9), normal(rng, (9, 4)), normal(rng, (3, 2))]
    ours, theirs = fs.Adam([p.copy() for p in params]), fs.Adam([p.copy() for p in params])
    x, error, dense = normal(rng, (3, 4)), normal(rng, (3, 9)), normal(rng, (3, 2))
    outer = fs.Outer(x, error, reduction="sum")
    ours.step([outer, fs.Outer(None, error, reduction="sum"), outer, dense], zero_grad=True)
    total = added_up(x, error, [1, 1, 1], np.float32)
    of_bias = (error[0] + error[1]) + error[2]
    assert not dense.any()
    theirs.step([total, of_bias, total, normal(np.random.default_rng(0), (3, 2)) * 0])
    for p, q in zip(ours.params[:3], theirs.params[:3], strict=True):
        assert_bits(p, q)


@pytest.mark.parametrize("shape", [(2000, 3000)])
@pytest.mark.parametrize("count", [1, 3, 300])
def test_no_gradient_is_allocated(shape: tuple[int, int], count: int) -> None:
    """What a step of 24 MB needs besides: less than a tenth of that."""
    program = f"""
import numpy as np, fusestep as fs
def used():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
w = np.ones({shape}, np.float32)
x, error = np.ones(({count}, w.shape[1]), np.float32), np.ones(({count}, w.shape[0]), np.float32)
small = np.ones((64, 3000), np.float32)
fs.SGD([small]).step([fs.Outer(x, error[:, :64])])
before = used()
fs.SGD([w], max_norm=1.0).step([fs.Outer(x, error, max_norm=1.0)])
print(used() - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("what a process has used at most is read from /proc")
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < shape[0] * shape[1] * 4 / 10


# ---- who is there, and how much they may say -----------------------------------------------------


def test_no_weight_is_not_there(rng: np.random.Generator) -> None:
    """Also where its factors are not finite."""
    x, error, weight = normal(rng, (9, 50)), normal(rng, (9, 20)), rng.integers(0, 2, 9) * 1.0
    weight[:2] = 0, 1
    x[weight == 0], error[weight == 0] = np.nan, np.inf
    there = weight > 0
    for count, max_norm in itertools.product((9, 3), (None, 0.5)):
        ours, theirs = fs.Adam([np.ones((20, 50))]), fs.Adam([np.ones((20, 50))])
        ours.step([fs.Outer(x[:count], error[:count], weight[:count], max_norm=max_norm)])
        these = slice(None, count)
        left = x[these][there[these]], error[these][there[these]]
        theirs.step([fs.Outer(*left, max_norm=max_norm)])
        assert_alike(ours, theirs)


@pytest.mark.parametrize("count", [0, 3])
def test_nobody_there_is_no_step(count: int, rng: np.random.Generator) -> None:
    opt = fs.Adam([normal(rng, (5, 4)), normal(rng, 5)])
    before = everything(opt)
    error, weight = normal(rng, (count, 5)), np.zeros(count)
    opt.step([fs.Outer(normal(rng, (count, 4)), error, weight), fs.Outer(None, error, weight)])
    np.testing.assert_equal(everything(opt), before)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("positions", [(), (1,), (3,)])
@pytest.mark.parametrize("max_norm", [1e-3, 5.0, 1e9])
def test_a_sample_is_bounded_over_all_parameters(
    dtype: str, positions: tuple[int, ...], max_norm: float, rng: np.random.Generator
) -> None:
    """Products, biases and gradients in arrays together; in float64."""
    params = [normal(rng, shape, dtype) for shape in [(7, 1100), (7,), (3, 7), (2, 2)]]
    sizes, count = [(7, 1100), (7, None), (3, 7)], 20
    errors = [normal(rng, (count, *positions, rows), dtype) for rows, _ in sizes]
    xs = [None if c is None else normal(rng, (count, *positions, c), dtype) for _, c in sizes]
    values = normal(rng, (count, 2, 2), dtype)
    weight = rng.integers(0, 3, count).astype(float)

    def of_samples(x: np.ndarray | None, error: np.ndarray) -> np.ndarray:
        e = error.reshape(count, -1, error.shape[-1]).astype("f8")
        if x is None:
            return e.sum(1)
        return np.einsum("nto,nti->noi", e, x.reshape(count, -1, x.shape[-1]).astype("f8"))

    gradients = [of_samples(x, e) for x, e in zip(xs, errors, strict=True)] + [values.astype("f8")]
    norms = np.sqrt(sum((g.reshape(count, -1) ** 2).sum(1) for g in gradients))
    clip = np.minimum(1, max_norm / (norms * 0.5 + 1e-6))
    expected = [
        p - np.tensordot(weight * clip, g, 1) * 0.5 / 16
        for p, g in zip(params, gradients, strict=True)
    ]
    options: dict[str, Any] = {"weight": weight, "max_norm": max_norm, "reduction": 16}
    outers = [fs.Outer(x, e, **options) for x, e in zip(xs, errors, strict=True)]
    fs.SGD(params, lr=1.0).step([*outers, fs.Samples(values, **options)], grad_scale=0.5)
    for p, e in zip(params, expected, strict=True):
        np.testing.assert_allclose(p, e, rtol=1e-5 if dtype == "f4" else 1e-12, atol=1e-5)


@pytest.mark.parametrize(
    ("large", "small"), [(3e200, 1.0), (3e200, 1e-200), (3e200, 1e-199), (3e150, 1e150)]
)
def test_norms_that_overflow(large: float, small: float) -> None:
    for positions, swapped in itertools.product((1, 2), (False, True)):
        x, error = np.full((1, positions, 1), large), np.full((1, positions, 2), small)
        if swapped:
            x, error = np.full((1, positions, 1), small), np.full((1, positions, 2), large)
        w = np.zeros((2, 1))
        fs.SGD([w], lr=1.0).step([fs.Outer(x, error, max_norm=5.0)])
        of_each = positions * large * small
        np.testing.assert_allclose(w, np.full((2, 1), -min(of_each, 5 / np.sqrt(2))), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_positions_that_cancel(dtype: str) -> None:
    """The bound holds for the sum that is made, rounding and all."""
    tiny = np.finfo(dtype).eps
    cases = [
        ([[1e10], [600], [-1e10], [-600]], [[1], [1], [1], [1]]),
        ([[8e11], [8e11]], [[1], [-(1 + 1.5e-8)]]),
        ([[1e30, 1], [1e30, 1]], [[1, 1], [-1, -1 - 4 * tiny]]),
    ]
    if dtype == "f8":
        cases.append(([[1e200, 1], [1, 1e-200]], [[1e-200, 1e-200], [1, 1]]))
    for x, error in cases:
        w = np.zeros((len(error[0]), len(x[0])), dtype)
        outer = fs.Outer(np.array([x], dtype), np.array([error], dtype), max_norm=1.0)
        fs.SGD([w], lr=1.0).step([outer])
        assert np.linalg.norm(w.astype("f8")) <= 1 + 1e-5


def test_noise_is_that_of_samples(rng: np.random.Generator) -> None:
    x, error = rng.standard_normal((70, 60)), rng.standard_normal((70, 50))
    for count in (0, 1, 3, 70):
        w = [np.zeros((50, 60)) for _ in range(2)]
        options: Any = {"max_norm": 1.0, "noise_multiplier": 2.0, "reduction": 8}
        values = np.einsum("no,ni->noi", error[:count], x[:count])
        gradients = [fs.Outer(x[:count], error[:count], **options), fs.Samples(values, **options)]
        for p, gradient in zip(w, gradients, strict=True):
            fs.SGD([p], lr=1.0, seed=5).step([gradient])
        np.testing.assert_allclose(*w, rtol=1e-10, atol=1e-12)
        assert np.std(w[0]) == pytest.approx(2 / 8, rel=0.1)


# ---- elsewhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [(), (3,)])
def test_in_the_fisher(positions: tuple[int, ...], rng: np.random.Generator) -> None:
    x, error = rng.standard_normal((6, *positions, 5)), rng.standard_normal((6, *positions, 4))
    weight = rng.integers(0, 3, 6).astype(float)
    params = [np.zeros((4, 5)), np.zeros(4)]
    ours, theirs = fs.Fisher(params), fs.Fisher(params)
    ours.add([fs.Outer(x, error, weight), fs.Outer(None, error, weight)])
    x3, error3 = x.reshape(6, -1, 5), error.reshape(6, -1, 4)
    values = [np.einsum("nto,nti->noi", error3, x3), error3.sum(1)]
    theirs.add([fs.Samples(v, weight) for v in values])
    for a, b in zip(ours.importance, theirs.importance, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_the_bare_kernels_take_them(rng: np.random.Generator) -> None:
    x, error = normal(rng, (3, 5)), normal(rng, (3, 4))
    p, q = np.zeros((4, 5), np.float32), np.zeros((4, 5), np.float32)
    fs.functional.sgd_(p, fs.Outer(x, error), lr=0.1, step=1)
    fs.SGD([q], lr=0.1).step([fs.Outer(x, error)])
    assert_bits(p, q)
    with pytest.raises(ValueError, match="noise_multiplier"):
        fs.functional.sgd_(
            p, fs.Outer(x, error, max_norm=1.0, noise_multiplier=1.0), lr=0.1, step=1
        )


# ---- what is refused -----------------------------------------------------------------------------


def test_what_is_refused_changes_nothing(rng: np.random.Generator) -> None:
    params = [normal(rng, (3, 4)), normal(rng, 5)]
    opt = fs.Adam(params, lr=0.1)
    g = normal(rng, 5)
    x, error = normal(rng, (2, 4)), normal(rng, (2, 3))
    opt.step([fs.Outer(x, error), g])
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (fs.Outer(error, x), {}, ValueError, r"has shape \(3, 4\); the outer products of error"),
        (fs.Outer(None, error), {}, ValueError, r"without x have \(3,\)"),
        (fs.Outer(x[:1], error), {}, ValueError, "the same but for the last axis"),
        (fs.Outer(x[:, None], error), {}, ValueError, "the same but for the last axis"),
        (fs.Outer(np.float32(1), np.float32(1)), {}, ValueError, r"expected \(out,\)"),
        (fs.Outer(x, error[None, None]), {}, ValueError, r"expected \(out,\)"),
        (fs.Outer(x, error, [1.0]), {}, ValueError, "expected one weight for each gradient"),
        (fs.Outer(x, error, [1.0, -1.0]), {}, ValueError, "the weight of sample 1"),
        (fs.Outer(x.astype(int), error), {}, TypeError, "the x for parameter 0"),
        (fs.Outer(x, error.astype(int)), {}, TypeError, "the error for parameter 0"),
        (fs.Outer(params[0][:2], error), {}, ValueError, "shares memory with parameter 0"),
        (fs.Outer(x, params[0][:2, :3]), {}, ValueError, "shares memory with parameter 0"),
        (
            fs.Outer(g[None, :4], error[:1]),
            {"zero_grad": True},
            ValueError,
            "two gradients share memory",
        ),
    ]
    before = everything(opt)
    for gradient, options, kind, words in cases:
        with pytest.raises(kind, match=words):
            opt.step([gradient, g], **options)
        np.testing.assert_equal(everything(opt), before)
    with pytest.raises(ValueError, match=r"of samples 1 and 2|bounded together"):
        opt.step([fs.Outer(x, error, max_norm=1.0), fs.Samples(normal(rng, (3, 5)), max_norm=1.0)])
    np.testing.assert_equal(everything(opt), before)
