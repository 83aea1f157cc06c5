"""Samples on a GPU: weighed, bounded, hidden in noise and added up there, with the CPU's bits."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
from devices import Capsule, Interface, Library, assert_same, in_use, on_host
from fusestep import functional as F  # noqa: N812
from rules import PLAIN, ROWWISE, RULES, Rule
from test_gpu import DTYPES, LAYOUTS, LENGTHS, REAL, needs, needs_two, refused, standard
from test_gpu_rows import dtype_for, layout_for, some_importance
from test_gpu_selections import TABLES, WherePair, of_elements, of_rows, random_wheres

if TYPE_CHECKING:
    from collections.abc import Iterator

f32 = np.float32

NOISE: dict[str, Any] = {"max_norm": 1.5, "noise_multiplier": 0.7, "reduction": 6}
WAYS: list[dict[str, Any]] = [{}, {"reduction": "sum"}, {"max_norm": 1.5}, NOISE]


@pytest.fixture(scope="module", params=["simulated", *REAL])
def lib(request: pytest.FixtureRequest) -> Iterator[Library]:
    """Each library in turn."""
    yield from in_use(request.param)


class SamplesPair(WherePair):
    """The same with gradients of samples, whose weights are in either's memory."""

    def __init__(self, *args: Any, weights: str = "host", **options: Any) -> None:
        super().__init__(*args, **options)
        self.weights = weights

    def mirrored(self, arrays: Any) -> tuple[Any, list[Any]]:
        named = arrays if isinstance(arrays, dict) else dict(enumerate(arrays))
        values = {key: x.values if isinstance(x, fs.Samples) else x for key, x in named.items()}
        likes, mirrors = super().mirrored(
            values if isinstance(arrays, dict) else [*values.values()]
        )
        for key, x in named.items():
            if isinstance(x, fs.Samples):
                like = copy.copy(x)
                like.values = likes[key]
                if self.weights == "gpu" and x.weight is not None:
                    like.weight = self.lib.put(np.asarray(x.weight))
                likes[key] = like
        return likes, mirrors


def samples(
    rng: np.random.Generator, like: np.ndarray, count: int, dtype: Any = f32, **options: Any
) -> fs.Samples:
    return fs.Samples(standard(rng, (count, *like.shape), dtype), **options)


def some_weight(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.exponential(1, count) * (rng.random(count) < 0.7)


# ---- every rule, dtype, length ------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rule_dtype_and_number(
    lib: Library, rule: Rule, dtype: np.dtype, rng: np.random.Generator
) -> None:
    """More than a launch can take, of every dtype; any number of samples, of which some are not
    there, and their gradients not finite."""
    needs(lib, dtype)
    shapes = [*((n,) for n in LENGTHS * 5), *TABLES]
    pair = SamplesPair(lib, rule.cls, [standard(rng, s, dtype) for s in shapes], **rule.options)
    for count in (1, 3, 4, 5, 9):
        how = WAYS[count % len(WAYS)]
        weight = None if count == 3 else some_weight(rng, count)
        kinds = [lib.dtypes[(i + count) % len(lib.dtypes)] for i in range(len(shapes))]
        grads = [
            samples(rng, w, count, kind, weight=weight, **how)
            for w, kind in zip(pair.cpu.params, kinds, strict=True)
        ]
        if weight is not None:
            for g in grads:
                g.values[weight == 0] = np.nan
        pair.step(grads, grad_scale=0.5)
        pair.check()


@settings(max_examples=400, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    shape=st.one_of(
        st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
        st.tuples(st.integers(1, 70), st.integers(1, 70)),
        st.sampled_from([(1023,), (1024,), (1025,), (3, 5, 64, 8), (2, 1, 2000), (300, 5)]),
    ),
    count=st.integers(0, 9),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=2, max_size=2),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    how=st.sampled_from(WAYS),
    weights=st.sampled_from(["host", "gpu", None]),
    kind=st.sampled_from([None, "rows", "elements", "blocks", "top"]),
    frozen=st.sampled_from(["freeze", "track"]),
    is_anchored=st.booleans(),
    zero_grad=st.booleans(),
    grad_scale=st.sampled_from([1.0, -0.3]),
    options=st.sampled_from(
        [{}, {"max_norm": 0.7}, {"skip_nonfinite": True}, {"state_dtype": "float64"}]
    ),
)
def test_any_layout_and_selection(
    lib: Library,
    rule: Rule,
    shape: tuple[int, ...],
    count: int,
    layouts: list[str],
    dtypes: tuple[np.dtype, np.dtype],
    how: dict[str, Any],
    weights: str | None,
    kind: str | None,
    frozen: Any,
    is_anchored: bool,
    zero_grad: bool,
    grad_scale: float,
    options: dict[str, Any],
) -> None:
    """The bits of the CPU, and nothing else, nor what is between the elements, is touched."""
    w_dtype, v_dtype = (dtype_for(lib, dtype) for dtype in dtypes)
    of_parameter, of_values = (layout_for(lib, layout) for layout in layouts)
    rng = np.random.default_rng(8)
    start = of_parameter(standard(rng, shape, w_dtype))
    pair = SamplesPair(
        lib, rule.cls, [start], weights=weights or "host", seed=2, **options, **rule.options
    )
    if is_anchored:
        importance = [some_importance(rng, shape)]
        for opt in (pair.cpu, pair.gpu):
            opt.anchor(3.0, None, importance)
    for is_partial in (False, True, False):
        where: Any = None
        if is_partial and kind in ("rows", "elements"):
            mask = (of_rows if kind == "rows" else of_elements)(rng, shape)
            where = [fs.Mask(mask, frozen=frozen)]
        elif is_partial and kind == "blocks":
            where = fs.RandomBlocks(0.5, int(rng.choice([1, 7, 64])), frozen=frozen)
        elif is_partial and kind == "top":
            where = fs.TopK(0.3, by="update" if zero_grad else "gradient", frozen=frozen)
        if rule in ROWWISE and kind != "rows":
            where = None
        values = of_values(standard(rng, (count, *shape), v_dtype))
        weight = None if weights is None else some_weight(rng, count)
        pair.step(
            [fs.Samples(values, weight, **how)],
            where=where,
            zero_grad=zero_grad,
            grad_scale=grad_scale,
        )
        pair.check()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_norms_have_the_same_bits(
    lib: Library, rule: Rule, dtype: str, rng: np.random.Generator
) -> None:
    """Those of samples, more than are summed at once, and that of their sum; squares overflow."""
    params = [standard(rng, shape, dtype) for shape in [*LENGTHS, *TABLES]]
    params += [standard(rng, (40, 30), dtype).T, standard(rng, (3, 4, 50), dtype)[:, ::2]]
    options = {"max_norm": 0.3, "skip_nonfinite": True}
    pair = SamplesPair(lib, rule.cls, params, **options, **rule.options)
    for how, scale in [({"max_norm": 0.5}, 1.0), (NOISE, 1.0), ({"max_norm": 0.5}, 1e200)]:
        scale = scale if dtype == "f8" else 1.0
        weight = some_weight(rng, 70)
        values = [standard(rng, (70, *w.shape), dtype) * dtype_of(w).type(scale) for w in params]
        values[-2] = values[-2].swapaxes(1, 2).copy().swapaxes(1, 2)
        pair.step([fs.Samples(v, weight, **how) for v in values])
        pair.check()


def dtype_of(array: np.ndarray) -> np.dtype:
    return array.dtype


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_sequences_of_selections(lib: Library, rule: Rule, rng: np.random.Generator) -> None:
    """Beside dense gradients, gradients of rows and none; of any ages."""
    params = [standard(rng, shape) for shape in [(40, 30), (1030,), (), (0,), (300, 7)]]
    pair = SamplesPair(lib, rule.cls, params, seed=3, max_norm=0.5, **rule.options)
    for i, where in enumerate([*random_wheres(rng, params, 12), None]):
        grads: list[Any] = [
            samples(rng, w, 5, weight=some_weight(rng, 5), **WAYS[i % len(WAYS)]) for w in params
        ]
        if i % 3 == 0:
            grads[1], grads[2] = standard(rng, params[1].shape), None
        pair.step(grads, where=where, zero_grad=i % 2 == 0)
        pair.check()


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_tables_whose_rows_have_missed_steps(
    lib: Library, rule: Rule, rng: np.random.Generator
) -> None:
    pair = SamplesPair(lib, rule.cls, [standard(rng, (9, 40))], rows="exact", **rule.options)
    for _ in range(3):
        pair.step([fs.Rows([1, 7, 1], standard(rng, (3, 40)))])
        pair.step([samples(rng, pair.cpu.params[0], 3, weight=[1, 0, 2])])
    pair.check()


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5, "skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_several_devices(
    lib: Library, options: dict[str, Any], how: dict[str, Any], rng: np.random.Generator
) -> None:
    """A sample is bounded by its gradients on all of them."""
    places = {"a": 0, "b": None, "c": 1 if lib.devices() > 1 else 0, "d": 0}
    params = {key: standard(rng, (60, 70)) for key in places}
    pair = SamplesPair(lib, fs.NAdam, params, places=places, seed=1, **options)
    for step in range(5):
        weight = some_weight(rng, 6)
        grads: dict[str, Any] = {
            key: samples(rng, w, 6, weight=weight, **how) for key, w in params.items()
        }
        if step == 2 and options and not how:
            grads["c"].values[np.flatnonzero(weight)[0], -1, -1] = np.inf
        if step == 3:
            grads["d"] = standard(rng, (60, 70))
        where = fs.RandomBlocks(0.5, 100) if step == 4 else None
        pair.step(grads, where=where, zero_grad=True)
        pair.check()
    assert pair.gpu.skipped_steps == (1 if options and not how else 0)


def test_weights_of_their_own(lib: Library, rng: np.random.Generator) -> None:
    """Those of the parameter before, others, those of fewer samples, none; and more than a launch
    takes."""
    pair = SamplesPair(lib, fs.Adam, [standard(rng, 9) for _ in range(7)])
    a, b = 0.5 + rng.random(5), 0.5 + rng.random(5)
    fewer, others = np.array([1.0, 0, 1, 1, 1]), np.array([1.0, 1, 0, 1, 1])
    for reduction in ("mean", "sum"):
        weights = [a, a, b, fewer, others, np.zeros(5), a]
        pair.step(
            [
                samples(rng, w, 5, weight=weight, reduction=reduction)
                for w, weight in zip(pair.cpu.params, weights, strict=True)
            ]
        )
    pair.step([samples(rng, w, 5000, weight=rng.random(5000)) for w in pair.cpu.params])
    pair.check()


# ---- nobody is there ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5, "skip_nonfinite": True}], ids=str)
def test_nobody_there_is_no_step(
    lib: Library, rule: Rule, options: dict[str, Any], rng: np.random.Generator
) -> None:
    """Of all parameters, or of some, on one device or on others; the values are cleared."""
    for places in ([0, 0, 0], [0, None, 0], [0, lib.devices() - 1, None]):
        params = [standard(rng, (5, 4)), standard(rng, (5, 300)), standard(rng, (7, 2))]
        pair = SamplesPair(lib, rule.cls, params, places=places, **options, **rule.options)

        def nobody(i: int, pair: SamplesPair = pair) -> fs.Samples:
            return samples(rng, pair.cpu.params[i], 3, weight=[0, 0, 0], max_norm=1.0)

        absent = [nobody(0), nobody(1), nobody(2)]
        pair.step(absent, zero_grad=True)
        assert not any(one.values.any() for one in absent)
        pair.step([standard(rng, w.shape) for w in params])
        pair.step([nobody(0), nobody(1), standard(rng, (7, 2))], zero_grad=True)
        pair.step([nobody(0), standard(rng, (5, 300)), None])
        pair.step([nobody(0), None, nobody(2)], zero_grad=True)
        pair.check()
        assert pair.gpu.steps == 3


# ---- decisions on the GPU -----------------------------------------------------------------------


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("has_max_norm", [False, True])
def test_what_is_not_finite(
    lib: Library, how: dict[str, Any], has_max_norm: bool, rng: np.random.Generator
) -> None:
    """A step that the GPU leaves out draws no noise: the next one draws it."""
    options = {"max_norm": 0.5} if has_max_norm else {}
    params = [standard(rng, (5, 100)), standard(rng, 3000)]
    pair = SamplesPair(lib, fs.Adam, params, lr=0.1, skip_nonfinite=True, **options)
    for step in range(7):
        weight = some_weight(rng, 5)
        weight[0] = 1
        grads = [samples(rng, w, 5, weight=weight, **how) for w in params]
        if step in (1, 2, 5):
            grads[step % 2].values[0].flat[7] = np.inf
        pair.step(grads, zero_grad=True)
    pair.check()
    assert (pair.gpu.steps, pair.gpu.skipped_steps) == (4, 3)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5, "skip_nonfinite": True}], ids=str)
def test_step_counts_on_the_gpu(
    lib: Library, rule: Rule, options: dict[str, Any], rng: np.random.Generator
) -> None:
    """Beside parameters without elements, and in any layout."""
    params = [standard(rng, shape) for shape in [(0, 3), (40, 30), (1030,), (3, 2000)]]
    params[1] = params[1].T
    common = {**options, **rule.options}
    pair = SamplesPair(lib, rule.cls, params, gpu={"capturable": True}, **common)
    for how in WAYS * 2:
        weight = some_weight(rng, 5)
        pair.step([samples(rng, w, 5, weight=weight, **how) for w in params])
        pair.step([standard(rng, w.shape) for w in params])
    pair.check()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_graph_adds_up_what_the_values_are_then(
    lib: Library, rule: Rule, rng: np.random.Generator
) -> None:
    """With the weights of when it was captured."""
    params = [standard(rng, (40, 30)), standard(rng, (1030, 1))]
    pair = SamplesPair(lib, rule.cls, params, gpu={"capturable": True}, **rule.options)
    weight = some_weight(rng, 5)

    def grads() -> list[fs.Samples]:
        return [samples(rng, w, 5, weight=weight) for w in params]

    pair.step(grads())
    first = grads()
    memory, _ = pair.mirrored(first)
    replay = lib.capture(lambda: pair.gpu.step(memory))
    for i in range(3):
        new = first if i == 0 else grads()
        for g, here in zip(memory, new, strict=True):
            lib.set(g.values, here.values)
        replay()
        pair.cpu.step(new)
    pair.check()


def test_what_a_graph_cannot_do(lib: Library, rng: np.random.Generator) -> None:
    """Norms, noise, and weights on the GPU: the host has to know."""
    start = standard(rng, (40, 3))
    w, v, weight = lib.put(start), lib.put(standard(rng, (2, 40, 3))), lib.put(np.ones(2))
    opt = fs.Adam([w], capturable=True)
    with lib.stream():
        opt.step([fs.Samples(v)])
    for bad, words in [
        (fs.Samples(v, max_norm=1.0), "it is the host that bounds samples (max_norm)"),
        (fs.Samples(v, **NOISE), "CUDA graph is being captured"),
        (fs.Samples(v, weight), "the weights of the samples for parameter 0 would have to be"),
    ]:
        refused(
            opt,
            [w, v],
            lambda bad=bad: lib.capture(lambda: opt.step([bad], zero_grad=True)),
            RuntimeError,
            words,
        )
    other = fs.Adam([lib.put(start)], capturable=True)
    with lib.stream():
        other.step([lib.put(start)])
    refused(
        other,
        other.params,
        lambda: lib.capture(lambda: other.step([fs.Samples(v)])),
        RuntimeError,
        "memory that is not there yet",
    )


# ---- arrays of any kind -------------------------------------------------------------------------


def test_values_and_weights_of_any_array(lib: Library, rng: np.random.Generator) -> None:
    start, values = standard(rng, (10, 6)), standard(rng, (4, 10, 6))
    weight = np.array([1.0, 0.0, 2.0, 0.5])
    expected = start.copy()
    fs.SGD([expected], lr=1.0).step([fs.Samples(values, weight)])
    put = lib.put(values)
    for form in (put, Interface(put), Capsule(lib, put)):
        for numbers in (
            weight,
            [*weight],
            lib.put(weight),
            lib.put(np.stack([weight, weight], 1))[:, 0],
            Interface(lib.put(weight.astype(f32))),
            Capsule(lib, lib.put(weight)),
        ):
            w = lib.put(start)
            lib.synchronize()
            fs.SGD([w], lr=1.0).step([fs.Samples(form, numbers)])
            assert_same(on_host(w), expected)


def test_bare_kernels(lib: Library, rng: np.random.Generator) -> None:
    start, values = standard(rng, (10, 6)), standard(rng, (4, 10, 6))
    w = lib.put(start)
    for param, v in ((start, values), (w, lib.put(values))):
        F.sgd_(param, fs.Samples(v, [1, 0, 2, 1], max_norm=2.0), step=1, lr=1.0)
    assert_same(on_host(w), start)


def test_steps_are_in_the_order_of_streams(lib: Library, rng: np.random.Generator) -> None:
    """Values that the current stream is still to write."""
    start, values = standard(rng, (400, 40)), standard(rng, (5, 400, 40))
    w, v, late = lib.put(start), lib.put(np.zeros_like(values)), lib.put(values)
    opt, cpu = fs.Adam([w], max_norm=0.5), fs.Adam([start], max_norm=0.5)
    for how in WAYS:
        with lib.stream():
            if lib.name != "simulated":
                lib.spin()
            v[...] = late
            opt.step([fs.Samples(v, **how)], zero_grad=True)
            opt.step([fs.Samples(late, **how)])
            lib.fill(v, np.nan)
        cpu.step([fs.Samples(values.copy(), **how)])
        cpu.step([fs.Samples(values, **how)])
        assert_same(on_host(w), start)


@pytest.mark.parametrize("common", [{}, {"max_norm": 0.5, "skip_nonfinite": True}], ids=str)
def test_what_is_refused_changes_nothing(
    lib: Library, common: dict[str, Any], rng: np.random.Generator
) -> None:
    arrays = [lib.put(standard(rng, 4)), lib.put(standard(rng, (5, 3)))]
    a, b = lib.put(standard(rng, (2, 4))), lib.put(standard(rng, (2, 5, 3)))
    opt = fs.Adam(arrays, **common)
    opt.step([fs.Samples(a), fs.Samples(b)])
    on_host = fs.Samples(standard(rng, (2, 5, 3)))
    negative = fs.Samples(b, lib.put(np.array([1.0, -1.0])))
    bounded = fs.Samples(b, max_norm=1.0)
    cases: list[tuple[Any, type[Exception], str]] = [
        ([fs.Samples(a), on_host], ValueError, "is on cpu; expected cuda:0"),
        ([fs.Samples(a), fs.Samples(a)], ValueError, "have values of shape (2, 4)"),
        ([fs.Samples(a), negative], ValueError, "the weight of sample 1"),
        ([fs.Samples(a), fs.Samples(b, [1.0])], ValueError, "one weight for each gradient"),
        ([fs.Samples(a, max_norm=2.0), bounded], ValueError, "with max_norm 1"),
        ([fs.Samples(a), fs.Samples(arrays[1][None])], ValueError, "shares memory with"),
    ]
    for grads, error, words in cases:
        refused(
            opt,
            [*arrays, a, b],
            lambda grads=grads: opt.step(grads, zero_grad=True),
            error,
            words,
        )
    opt.step([fs.Samples(a), bounded])
    assert opt.steps == 2


def test_on_another_gpu(lib: Library, rng: np.random.Generator) -> None:
    needs_two(lib)
    w, v = lib.put(standard(rng, 4), 1), lib.put(standard(rng, (2, 4)), 0)
    opt = fs.Adam([w])
    refused(opt, [w, v], lambda: opt.step([fs.Samples(v)]), ValueError, "is on", "expected")
