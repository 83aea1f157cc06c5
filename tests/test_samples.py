"""Gradients of samples: weighed, bounded, hidden in noise, and added up inside the step."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import fusestep as fs
from conftest import AVAILABLE
from fusestep import _cpu
from rules import PLAIN, RULES, Rule
from test_bits import LAYOUTS
from test_rows import everything

if TYPE_CHECKING:
    from collections.abc import Sequence

DTYPES = [np.dtype(t) for t in ("f4", "f8", "f2")] + [np.dtype(ml_dtypes.bfloat16)]
SHAPES: list[tuple[int, ...]] = [(33, 65), (1030,), (), (0,), (2, 3, 5)]


def raw(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")


def assert_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    np.testing.assert_array_equal(raw(ours), raw(theirs))


def assert_alike(ours: fs.Optimizer, theirs: fs.Optimizer) -> None:
    np.testing.assert_equal(everything(ours), everything(theirs))


def normal(rng: np.random.Generator, shape: Any, dtype: Any = np.float32) -> np.ndarray:
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def samples_of(
    rng: np.random.Generator, params: Sequence[np.ndarray], count: int, dtype: Any = np.float32
) -> list[np.ndarray]:
    return [normal(rng, (count, *p.shape), dtype) for p in params]


def added_up(values: np.ndarray, times: Sequence[float], dtype: Any) -> np.ndarray:
    """One after another, each operation rounded to the compute type."""
    total = np.full(values.shape[1:], -0.0, dtype)
    for value, t in zip(values, times, strict=True):
        if t != 0:
            total = total + np.asarray(t).astype(dtype) * value.astype(dtype)
    return np.asarray(total, dtype)


def compute_dtype(opt: fs.Optimizer, p: np.ndarray) -> Any:
    entry = next(iter(opt.state.values()))
    is_double = any(getattr(x, "dtype", None) == np.float64 for x in [p, *entry.values()])
    return np.float64 if is_double else np.float32


# ---- what is added up ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_by_their_sum(rule: Rule, dtype: np.dtype, tier: str) -> None:
    """The bits of a dense step by the sum, for all numbers of samples, weighed or not."""
    rng = np.random.default_rng(1)
    shapes = SHAPES if rule in PLAIN else [s for s in SHAPES if s]
    ours = rule.cls([normal(rng, s, dtype) for s in shapes], **rule.options)
    theirs = rule.cls([p.copy() for p in ours.params], **rule.options)
    for count, (weighed, reduction) in itertools.product(
        (1, 3, 4, 5, 17), [(False, "mean"), (True, "sum"), (True, 6.5)]
    ):
        of = samples_of(rng, ours.params, count, DTYPES[count % len(DTYPES)])
        weight = rng.exponential(1, count) if weighed else None
        divisor = {"mean": count, "sum": 1}.get(reduction, reduction)
        times = [float(w) / divisor for w in (np.ones(count) if weight is None else weight)]
        ours.step([fs.Samples(v, weight, reduction=reduction) for v in of], grad_scale=0.5)
        theirs.step(
            [
                added_up(v, times, compute_dtype(theirs, p))
                for v, p in zip(of, theirs.params, strict=True)
            ],
            grad_scale=0.5,
        )
        assert_alike(ours, theirs)


@settings(max_examples=200, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    shape=st.one_of(
        st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
        st.tuples(st.integers(1, 70), st.integers(1, 70)),
        st.sampled_from([(1023,), (1024,), (1025,), (3, 5, 64, 8), (2, 1, 2000)]),
    ),
    count=st.integers(0, 9),
    layouts=st.tuples(st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS))),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    zero_grad=st.booleans(),
    options=st.sampled_from(
        [{}, {"max_norm": 0.7}, {"skip_nonfinite": True}, {"state_dtype": "float64"}]
    ),
    where=st.sampled_from([None, "rows", "blocks", "top"]),
    is_anchored=st.booleans(),
)
def test_any_layout_and_option(
    rule: Rule,
    shape: tuple[int, ...],
    count: int,
    layouts: tuple[str, str],
    dtypes: tuple[np.dtype, np.dtype],
    zero_grad: bool,
    options: dict[str, Any],
    where: str | None,
    is_anchored: bool,
) -> None:
    """As a dense step by their sum: with selections, anchors, clipping and all."""
    rng = np.random.default_rng(2)
    start = normal(rng, shape, dtypes[0])
    ours = rule.cls([LAYOUTS[layouts[0]](start)], **options, **rule.options)
    theirs = rule.cls([start.copy()], **options, **rule.options)
    if is_anchored:
        for opt in (ours, theirs):
            opt.anchor(2.0)
    choice: Any = None
    if where == "rows":
        choice = [rng.random(shape[0]) < 0.5]
    elif where and rule in PLAIN:
        choice = fs.RandomBlocks(0.5, 7) if where == "blocks" else fs.TopK(0.3)
    for _ in range(2):
        weight = rng.integers(0, 3, count).astype(float)
        values = LAYOUTS[layouts[1]](normal(rng, (count, *shape), dtypes[1]))
        times = [float(w) / max(1, np.count_nonzero(weight)) for w in weight]
        g = added_up(values, times, compute_dtype(theirs, start))
        ours.step([fs.Samples(values, weight)], where=choice, zero_grad=zero_grad)
        if weight.any():
            theirs.step([g], where=choice)
        assert not zero_grad or not np.count_nonzero(values)
        for p, q in zip(ours.params, theirs.params, strict=True):
            if not options.get("max_norm"):  # whose last bit depends on the order of the sum
                assert_bits(np.asarray(p), q)
            np.testing.assert_allclose(p.astype("f8"), q.astype("f8"), rtol=2e-2, atol=1e-3)
        assert (ours.steps, ours.skipped_steps) == (theirs.steps, theirs.skipped_steps)


@pytest.mark.parametrize("threads", [1, 3])
def test_large_ones_on_any_number_of_threads(threads: int, rng: np.random.Generator) -> None:
    fs.set_num_threads(threads)
    start, values = normal(rng, 300_000), normal(rng, (6, 300_000))
    ours, theirs = fs.Adam([start.copy()]), fs.Adam([start.copy()])
    ours.step([fs.Samples(values, range(6), max_norm=1e9)])
    theirs.step([added_up(values, [w / 5 for w in range(6)], np.float32)])
    assert_alike(ours, theirs)


def test_beside_other_gradients(rng: np.random.Generator) -> None:
    params = [normal(rng, (9, 4)) for _ in range(4)]
    ours, theirs = fs.Adam([p.copy() for p in params]), fs.Adam([p.copy() for p in params])
    values, dense, rows = normal(rng, (3, 9, 4)), normal(rng, (9, 4)), normal(rng, (2, 4))
    ours.step([fs.Samples(values, reduction="sum"), dense, fs.Rows([1, 1], rows), None])
    total = added_up(values, [1, 1, 1], np.float32)
    theirs.step([total, dense, fs.Rows([1, 1], rows), None])
    assert_alike(ours, theirs)


def test_tables_whose_rows_have_missed_steps(rng: np.random.Generator) -> None:
    """All rows see a gradient of samples."""
    start = normal(rng, (9, 4))
    ours, theirs = (fs.Adam([start.copy()], rows="exact") for _ in range(2))
    for opt in (ours, theirs):
        opt.step([fs.Rows([1], np.ones((1, 4), np.float32))])
    values = normal(rng, (3, 9, 4))
    ours.step([fs.Samples(values, reduction="sum")])
    theirs.step([added_up(values, [1, 1, 1], np.float32)])
    assert_alike(ours, theirs)


@pytest.mark.parametrize("form", ["list", "tuple", "int", "bool", "f2", "torch", "strided"])
def test_weights_of_any_kind(form: str, rng: np.random.Generator) -> None:
    weight = np.array([1.0, 0.0, 1.0, 1.0])
    forms: dict[str, Any] = {
        "list": weight.tolist(),
        "tuple": tuple(weight),
        "int": weight.astype(int),
        "bool": weight.astype(bool),
        "f2": weight.astype("f2"),
        "strided": np.stack([weight, weight], 1)[:, 0],
    }
    if form == "torch":
        forms["torch"] = pytest.importorskip("torch").tensor(weight)
    values = normal(rng, (4, 7))
    ours, theirs = fs.SGD([np.zeros(7, np.float32)]), fs.SGD([np.zeros(7, np.float32)])
    ours.step([fs.Samples(values, forms[form])])
    theirs.step([fs.Samples(values[weight > 0])])
    assert_alike(ours, theirs)


# ---- who is not there ----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", 3.0])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_no_weight_is_not_there(
    reduction: Any, max_norm: float | None, rng: np.random.Generator
) -> None:
    """Also where its gradient is not finite."""
    values, weight = normal(rng, (9, 50)), rng.integers(0, 2, 9).astype(float)
    values[weight == 0] = np.nan
    ours, theirs = fs.Adam([np.ones(50)]), fs.Adam([np.ones(50)])
    ours.step([fs.Samples(values, weight, max_norm=max_norm, reduction=reduction)])
    theirs.step([fs.Samples(values[weight > 0], max_norm=max_norm, reduction=reduction)])
    assert_alike(ours, theirs)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("count", [0, 3])
def test_nobody_there_is_no_step(rule: Rule, count: int, rng: np.random.Generator) -> None:
    params = [normal(rng, (5, 4)), normal(rng, (5, 2))]
    opt = rule.cls(params, **rule.options)
    opt.step([normal(rng, p.shape) for p in params])
    before = everything(opt)
    nobody = fs.Samples(normal(rng, (count, 5, 4)), np.zeros(count), max_norm=1.0)
    opt.step([nobody, None], zero_grad=True)
    np.testing.assert_equal(everything(opt), before)
    assert not nobody.values.any()
    g = normal(rng, (5, 2))
    opt.step([fs.Samples(normal(rng, (count, 5, 4)), np.zeros(count)), g])
    assert opt.steps == 2
    np.testing.assert_array_equal(opt.state_dict()["state"][0]["step"], 1)


# ---- bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("grad_scale", [1.0, -0.25])
@pytest.mark.parametrize("max_norm", [1e-3, 5.0, 1e9])
def test_a_sample_is_bounded_over_all_parameters(
    dtype: str, grad_scale: float, max_norm: float, rng: np.random.Generator
) -> None:
    """Abadi et al. (2016), in float64; more samples than are summed at once."""
    params = [normal(rng, shape, dtype) for shape in SHAPES]
    values = samples_of(rng, params, 70, dtype)
    weight = rng.integers(0, 3, 70).astype(float)
    flat = [v.reshape(70, -1).astype("f8") * grad_scale for v in values]
    norms = np.sqrt(sum((v**2).sum(1) for v in flat))
    clip = np.minimum(1, max_norm / (norms + 1e-6))
    expected = [
        p - (weight * clip) @ v / 64 for p, v in zip([q.ravel() for q in params], flat, strict=True)
    ]
    fs.SGD(params, lr=1.0).step(
        [fs.Samples(v, weight, max_norm=max_norm, reduction=64) for v in values],
        grad_scale=grad_scale,
    )
    for p, e in zip(params, expected, strict=True):
        np.testing.assert_allclose(p.ravel(), e, rtol=1e-5 if dtype == "f4" else 1e-12, atol=1e-6)


def test_who_is_not_there_for_one_parameter_has_no_norm(rng: np.random.Generator) -> None:
    a, b = normal(rng, (2, 3), "f8"), normal(rng, (2, 4), "f8")
    a[0] = np.nan
    p, q = np.zeros(3), np.zeros(4)
    options: Any = {"max_norm": 1e-3, "reduction": "sum"}
    fs.SGD([p, q], lr=1.0).step([fs.Samples(a, [0, 1], **options), fs.Samples(b, **options)])
    lengths = np.sqrt([(b[0] ** 2).sum(), (a[1] ** 2).sum() + (b[1] ** 2).sum()])
    clip = 1e-3 / (lengths + 1e-6)
    np.testing.assert_allclose(q, -clip @ b, rtol=1e-12)


def test_norms_that_overflow(rng: np.random.Generator) -> None:
    w, values = np.zeros(3), np.array([[3e200, 4e200, 0], [0, 0, 1e-200]])
    fs.SGD([w], lr=1.0).step([fs.Samples(values, max_norm=5.0, reduction="sum")])
    np.testing.assert_allclose(w, [-3, -4, -1e-200], rtol=1e-14)


def test_one_that_is_not_finite_leaves_the_step_out() -> None:
    w = np.ones(4)
    opt = fs.Adam([w], skip_nonfinite=True)
    values = np.ones((3, 4))
    values[1, 2] = np.inf
    opt.step([fs.Samples(values, max_norm=1.0)])
    assert (opt.steps, opt.skipped_steps) == (0, 1)
    assert (w == 1).all()
    opt.step([fs.Samples(values, [1, 0, 1], max_norm=1.0)])
    assert (opt.steps, opt.skipped_steps) == (1, 1)


# ---- noise ---------------------------------------------------------------------------------------


def noise_of(shape: Any, *, steps: int = 1, seed: int = 0, **options: Any) -> np.ndarray:
    """What the last of so many steps adds."""
    w = np.zeros(shape)
    opt = fs.SGD([w], lr=1.0, seed=seed)
    options = {"max_norm": 1.0, "noise_multiplier": 1.0, "reduction": "sum"} | options
    for _ in range(steps):
        w[...] = 0
        opt.step([fs.Samples(np.zeros((0, *w.shape)), **options)])
    return -w


def test_noise_is_normal() -> None:
    """Of an empty batch; in the tails, too."""
    x = noise_of(1_000_000)
    assert stats.kstest(x, "norm").pvalue > 1e-4
    for z in (3.0, 4.0):
        expected = 2 * stats.norm.sf(z) * x.size
        assert abs(np.count_nonzero(np.abs(x) > z) - expected) < 5 * np.sqrt(expected)
    for lag in (1, 2, 1024):
        assert abs(np.corrcoef(x[:-lag], x[lag:])[0, 1]) < 5e-3


def test_noise_is_as_large_as_abadi_says(rng: np.random.Generator) -> None:
    """Sigma C over the expected number of samples; not scaled with the gradients."""
    plain = noise_of(2000)
    found = noise_of(2000, max_norm=0.5, noise_multiplier=3.0, reduction=40)
    np.testing.assert_allclose(found, plain * 0.5 * 3.0 / 40, rtol=1e-13)
    values, w = rng.standard_normal((3, 2000)), [np.zeros(2000) for _ in range(2)]
    for p, noise_multiplier in zip(w, (0.0, 2.0), strict=True):
        samples = fs.Samples(values, max_norm=9.0, noise_multiplier=noise_multiplier, reduction=8)
        fs.SGD([p], lr=1.0).step([samples], grad_scale=0.01)
    np.testing.assert_allclose(w[0] - w[1], plain * 9.0 * 2.0 / 8, rtol=1e-9, atol=1e-12)


def test_noise_is_repeated_and_independent() -> None:
    """By seed, step and parameter; whatever the layout, the tier and the threads."""
    first = noise_of((300, 7))
    np.testing.assert_array_equal(first, noise_of((300, 7)))
    np.testing.assert_array_equal(first.ravel(), noise_of(2100))
    others = [noise_of((300, 7), steps=2), noise_of((300, 7), seed=1)]
    w = [np.zeros((300, 7)), np.zeros((300, 7)).T.copy().T]
    for tier, threads in itertools.product(AVAILABLE, (1, 3)):
        _cpu.use_tier(tier)
        fs.set_num_threads(threads)
        for p in w:
            p[...] = 0
        opt = fs.SGD(w, lr=1.0)
        options: Any = {"max_norm": 1.0, "noise_multiplier": 1.0, "reduction": "sum"}
        opt.step([fs.Samples(np.zeros((0, 300, 7)), **options) for _ in w])
        np.testing.assert_array_equal(-w[0], first)
        others.append(-w[1].copy())
    np.testing.assert_array_equal(others[2], others[-1])
    for other in others:
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.1


def test_noise_is_no_selection() -> None:
    """Blocks and noise are drawn from streams of their own."""
    drawn = fs.RandomBlocks(0.5, 1).mask(4000, step=0)
    assert abs(np.corrcoef(noise_of(4000), drawn)[0, 1]) < 0.08
    w = np.zeros(4000)
    samples = fs.Samples(np.zeros((0, 4000)), max_norm=1.0, noise_multiplier=1.0, reduction=1.0)
    fs.SGD([w], lr=1.0).step([samples], where=fs.RandomBlocks(0.5, 1))
    np.testing.assert_array_equal(-w, np.where(drawn, noise_of(4000), 0))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_norm": 0}, ValueError, "expected a positive number"),
        ({"max_norm": float("nan")}, ValueError, "expected a finite number"),
        ({"max_norm": "1"}, TypeError, "expected a number"),
        ({"noise_multiplier": 1.0}, ValueError, "without max_norm"),
        ({"max_norm": 1.0, "noise_multiplier": -1}, ValueError, "not negative"),
        ({"reduction": "max"}, ValueError, "'mean', 'sum' or the number"),
        ({"reduction": 0}, ValueError, "expected a positive number"),
    ],
)
def test_options_that_make_no_sense(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        fs.Samples(np.zeros((1, 2)), **options)


def test_what_is_refused_changes_nothing(rng: np.random.Generator) -> None:
    params = [normal(rng, (3, 4)), normal(rng, 5)]
    opt = fs.Adam(params, lr=0.1)
    a, b = samples_of(rng, params, 2)
    opt.step([fs.Samples(a), fs.Samples(b)])
    noise: Any = {"max_norm": 1.0, "noise_multiplier": 1.0}
    changed = fs.Samples(a)
    changed.reduction = 0.0
    cases: list[tuple[list[Any], dict[str, Any], type[Exception], str]] = [
        ([changed, b[0]], {}, ValueError, "reduction of the samples for parameter 0 is 0"),
        ([fs.Samples(a[:, 0]), b[0]], {}, ValueError, "have values of shape"),
        ([fs.Samples(a[0]), b[0]], {}, ValueError, "one gradient for each sample, of shape"),
        ([None, fs.Samples(np.float32(1.0))], {}, ValueError, "no dimensions"),
        ([fs.Samples(a, [1.0]), b[0]], {}, ValueError, "expected one weight for each gradient"),
        ([fs.Samples(a, [[1.0, 1.0]]), b[0]], {}, ValueError, "weights of shape (1, 2)"),
        ([fs.Samples(a, [1.0, -1.0]), b[0]], {}, ValueError, "the weight of sample 1"),
        ([fs.Samples(a, [np.nan, 1.0]), b[0]], {}, ValueError, "is nan; expected a finite number"),
        ([fs.Samples(a, ["x", "y"]), b[0]], {}, TypeError, "expected real numbers"),
        ([fs.Samples(a, [1j, 1]), b[0]], {}, TypeError, "expected real numbers"),
        ([fs.Samples(a.astype(int)), b[0]], {}, TypeError, "int64"),
        ([fs.Samples(params[0][None]), b[0]], {}, ValueError, "shares memory with parameter 0"),
        (
            [fs.Samples(a, max_norm=1.0), fs.Samples(b, max_norm=2.0)],
            {},
            ValueError,
            "2 samples for parameter 1 with max_norm 2",
        ),
        (
            [fs.Samples(a, max_norm=1.0), fs.Samples(b[:1], max_norm=1.0)],
            {},
            ValueError,
            "a sample's gradients are bounded together",
        ),
        ([fs.Samples(a[:0], **noise), b[0]], {}, ValueError, "reduction=256"),
        ([fs.Samples(a, **noise), b[0]], {"grad_scale": 0.0}, ValueError, "grad_scale is 0"),
        (
            [fs.Samples(np.broadcast_to(a[:1], a.shape)), b[0]],
            {"zero_grad": True},
            ValueError,
            "read-only",
        ),
    ]
    for grads, arguments, error, words in cases:
        before = everything(opt), a.copy(), b.copy()
        with pytest.raises(error) as caught:
            opt.step(grads, **arguments)
        assert words in str(caught.value)
        np.testing.assert_equal((everything(opt), a, b), before)


def test_bare_kernels_take_them_without_noise(rng: np.random.Generator) -> None:
    w, values = np.ones(5), rng.standard_normal((3, 5))
    fs.functional.sgd_(w, fs.Samples(values, reduction="sum"), step=1, lr=1.0)
    np.testing.assert_allclose(w, 1 - values.sum(0), rtol=1e-14)
    before = w.copy()
    with pytest.raises(ValueError, match="use one"):
        fs.functional.sgd_(
            w, fs.Samples(values, max_norm=1.0, noise_multiplier=1.0), step=1, lr=1.0
        )
    assert_bits(w, before)


def test_the_fisher_of_weighed_samples(rng: np.random.Generator) -> None:
    """A sample with weight 2 is two of them; one with weight 0 is not there."""
    params = [np.zeros((2, 3)), np.zeros(4)]
    a, b = samples_of(rng, params, 4)
    a[1] = np.nan
    weight = np.array([2, 0, 1, 3])
    ours, theirs = fs.Fisher(params), fs.Fisher(params)
    ours.add([fs.Samples(a, weight), fs.Samples(b, weight)])
    theirs.add([np.repeat(a, weight, 0), np.repeat(b, weight, 0)])
    assert ours.samples == theirs.samples == 6
    for one, other in zip(ours.importance, theirs.importance, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    before = copy.deepcopy(ours.importance)
    for bad, words in [
        ([fs.Samples(b, weight), b], "have shape"),
        ([fs.Samples(b[:, :3], weight)] * 2, "have shape"),
        ([fs.Samples(a[2:], [1, 2]), fs.Samples(b[2:], [2, 1])], "other weights"),
        ([fs.Samples(a[2:], [1]), b[2:]], "expected 2 finite numbers"),
        ([fs.Samples(a[2:], [1, -1]), b[2:]], "expected 2 finite numbers"),
        ([fs.Samples(a[2:], max_norm=1.0), b[2:]], "max_norm"),
        ([fs.Samples(a), b], "not finite"),
    ]:
        with pytest.raises(ValueError, match=words):
            ours.add(bad)
    np.testing.assert_equal(ours.importance, before)


# ---- private learning ----------------------------------------------------------------------------


def test_a_training_run_as_abadi_says(rng: np.random.Generator) -> None:
    """Logistic regression, batches drawn at random, against the algorithm in float64."""
    x = rng.standard_normal((200, 8))
    y = (x @ rng.standard_normal(8) > 0).astype(float)
    ours, theirs = [np.zeros(8), np.zeros(())], [np.zeros(8), np.zeros(())]
    opt = fs.SGD(ours, lr=0.5)
    for _ in range(60):
        batch = rng.random(200) < 0.1
        per_sample = []
        for w, b in (ours, theirs):
            error = 1 / (1 + np.exp(-(x[batch] @ w + b))) - y[batch]
            per_sample.append((error[:, None] * x[batch], error))
        opt.step([fs.Samples(g, max_norm=0.4, reduction=20) for g in per_sample[0]])
        gw, gb = per_sample[1]
        clip = np.minimum(1, 0.4 / (np.sqrt((gw**2).sum(1) + gb**2) + 1e-6))
        theirs[0] -= 0.5 * clip @ gw / 20
        theirs[1] -= 0.5 * clip @ gb / 20
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-10)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-10)
