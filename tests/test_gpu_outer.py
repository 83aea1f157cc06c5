"""Outer products on a GPU: made there, with the CPU's bits."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
from devices import Library, assert_same, in_use, on_host
from rules import PLAIN, ROWWISE, RULES, Rule
from test_gpu import DTYPES, LAYOUTS, REAL, needs, refused, standard
from test_gpu_rows import dtype_for, layout_for, some_importance
from test_gpu_samples import WAYS, some_weight
from test_gpu_selections import WherePair, of_elements, of_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

f32 = np.float32


@pytest.fixture(scope="module", params=["simulated", *REAL])
def lib(request: pytest.FixtureRequest) -> Iterator[Library]:
    """Each library in turn."""
    yield from in_use(request.param)


class OuterPair(WherePair):
    """The same with factors in the memory of either, which nothing changes."""

    def mirrored(self, arrays: Any) -> tuple[Any, list[Any]]:
        named = arrays if isinstance(arrays, dict) else dict(enumerate(arrays))
        mirrors: list[Any] = []

        def on_gpu(of_each: dict[Any, Any]) -> Any:
            in_form = of_each if isinstance(arrays, dict) else [*of_each.values()]
            likes, found = super(OuterPair, self).mirrored(in_form)
            mirrors.extend(found)
            return likes

        def factor(name: str) -> dict[Any, Any]:
            return {
                key: getattr(x, name, None) if isinstance(x, fs.Outer) else None
                for key, x in named.items()
            }

        errors, xs = on_gpu(factor("error")), on_gpu(factor("x"))
        likes = on_gpu({k: None if isinstance(x, fs.Outer) else x for k, x in named.items()})
        for key, x in named.items():
            if isinstance(x, fs.Outer):
                like = copy.copy(x)
                like.error, like.x = errors[key], xs[key]
                likes[key] = like
        return likes, mirrors


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rule_dtype_and_number(
    lib: Library, rule: Rule, dtype: np.dtype, rng: np.random.Generator
) -> None:
    """More than a launch can take, of every dtype; weights and biases; some not there."""
    needs(lib, dtype)
    shapes: list[tuple[int, ...]] = [(5, 3), (1, 1), (40, 70), (0, 3), (7, 2000), (3, 0)] * 4
    shapes += [(7,), (1030,)]
    pair = OuterPair(lib, rule.cls, [standard(rng, s, dtype) for s in shapes], **rule.options)
    for count in (1, 4, 9):
        how = WAYS[count % len(WAYS)]
        weight = some_weight(rng, count) + (np.arange(count) == 0)
        kind = lib.dtypes[count % len(lib.dtypes)]
        grads = []
        for shape in shapes:
            error = standard(rng, (count, shape[0]), kind)
            error[weight == 0] = np.nan
            x = None if len(shape) == 1 else standard(rng, (count, shape[1]), lib.dtypes[0])
            grads.append(fs.Outer(x, error, weight, **how))
        pair.step(grads, grad_scale=0.5)
        pair.check()


@settings(max_examples=200, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    shape=st.tuples(st.integers(0, 40), st.integers(0, 70)),
    count=st.integers(0, 9),
    positions=st.sampled_from([None, None, 1, 3]),
    has_x=st.booleans(),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=3, max_size=3),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    how=st.sampled_from(WAYS),
    kind=st.sampled_from([None, "rows", "elements", "blocks", "top"]),
    is_anchored=st.booleans(),
    zero_grad=st.booleans(),
    options=st.sampled_from(
        [{}, {"max_norm": 0.7}, {"skip_nonfinite": True}, {"state_dtype": "float64"}]
    ),
)
def test_any_layout_and_selection(
    lib: Library,
    rule: Rule,
    shape: tuple[int, int],
    count: int,
    positions: int | None,
    has_x: bool,
    layouts: list[str],
    dtypes: tuple[np.dtype, np.dtype, np.dtype],
    how: dict[str, Any],
    kind: str | None,
    is_anchored: bool,
    zero_grad: bool,
    options: dict[str, Any],
) -> None:
    """The bits of the CPU, and nothing else is touched, neither x nor error."""
    of_dtype = [dtype_for(lib, dtype) for dtype in dtypes]
    of_layout = [layout_for(lib, layout) for layout in layouts]
    rng = np.random.default_rng(8)
    own_shape = shape if has_x else shape[:1]
    start = of_layout[0](standard(rng, own_shape, of_dtype[0]))
    pair = OuterPair(lib, rule.cls, [start], seed=2, **options, **rule.options)
    if is_anchored:
        importance = [some_importance(rng, own_shape)]
        for opt in (pair.cpu, pair.gpu):
            opt.anchor(3.0, None, importance)
    middle = () if positions is None else (positions,)
    for is_partial in (False, True):
        where: Any = None
        if is_partial and kind in ("rows", "elements"):
            where = [(of_rows if kind == "rows" else of_elements)(rng, own_shape)]
        elif is_partial and kind == "blocks":
            where = fs.RandomBlocks(0.5, 7)
        elif is_partial and kind == "top":
            where = fs.TopK(0.3)
        if rule in ROWWISE and kind != "rows":
            where = None
        x = of_layout[1](standard(rng, (count, *middle, shape[1]), of_dtype[1]))
        error = of_layout[2](standard(rng, (count, *middle, shape[0]), of_dtype[2]))
        weight = some_weight(rng, count)
        gradient = fs.Outer(x if has_x else None, error, weight, **how)
        pair.step([gradient], where=where, zero_grad=zero_grad)
        pair.check()


def test_one_sample_and_many(lib: Library, rng: np.random.Generator) -> None:
    pair = OuterPair(lib, fs.Adam, [standard(rng, (20, 30)), standard(rng, 20)])
    pair.step([fs.Outer(standard(rng, 30), standard(rng, 20), 2.0), None])
    x, error = standard(rng, (300, 30)), standard(rng, (300, 20))
    pair.step([fs.Outer(x, error, rng.random(300)), fs.Outer(None, error)], zero_grad=True)
    pair.check()


def test_several_devices(lib: Library, rng: np.random.Generator) -> None:
    """A sample is bounded by its gradients on all of them, made of factors or not."""
    places = {"a": 0, "b": None, "c": 1 if lib.devices() > 1 else 0}
    params = {key: standard(rng, (60, 70)) for key in places}
    pair = OuterPair(lib, fs.NAdam, params, places=places, seed=1, max_norm=0.5)
    for how in WAYS:
        weight = some_weight(rng, 6)
        x, error = standard(rng, (6, 70)), standard(rng, (6, 60))
        pair.step({key: fs.Outer(x, error, weight, **how) for key in params})
        pair.check()


@pytest.mark.parametrize("rule", PLAIN[:2], ids=str)
def test_tables_whose_rows_have_missed_steps(
    lib: Library, rule: Rule, rng: np.random.Generator
) -> None:
    pair = OuterPair(lib, rule.cls, [standard(rng, (9, 40))], rows="exact", **rule.options)
    for _ in range(2):
        pair.step([fs.Outer(standard(rng, (3, 40)), standard(rng, (3, 9)), [1, 0, 2])])
    pair.check()


def test_steps_are_in_the_order_of_streams(lib: Library, rng: np.random.Generator) -> None:
    """Factors that the current stream is still to write."""
    start, x, error = standard(rng, (90, 80)), standard(rng, (5, 80)), standard(rng, (5, 90))
    w, late = lib.put(start), [lib.put(x), lib.put(error)]
    now = [lib.put(np.zeros_like(x)), lib.put(np.zeros_like(error))]
    opt, cpu = fs.Adam([w], max_norm=0.5), fs.Adam([start], max_norm=0.5)
    for how in WAYS:
        with lib.stream():
            if lib.name != "simulated":
                lib.spin()
            for a, b in zip(now, late, strict=True):
                a[...] = b
            opt.step([fs.Outer(*now, **how)])
            for a in now:
                lib.fill(a, np.nan)
        cpu.step([fs.Outer(x, error, **how)])
        assert_same(on_host(w), start)


def test_what_is_refused_changes_nothing(lib: Library, rng: np.random.Generator) -> None:
    w = lib.put(standard(rng, (5, 4)))
    host_x, host_error = standard(rng, (2, 4)), standard(rng, (2, 5))
    x, error = lib.put(host_x), lib.put(host_error)
    opt = fs.Adam([w])
    opt.step([fs.Outer(x, error)])
    cases: list[tuple[Any, type[Exception], str]] = [
        (fs.Outer(host_x, error), ValueError, "is on cpu; expected cuda:0"),
        (fs.Outer(x, host_error), ValueError, "is on cpu; expected cuda:0"),
        (fs.Outer(error, x), ValueError, "the outer products of"),
        (fs.Outer(w[:2], error), ValueError, "shares memory with"),
        (fs.Outer(x, error, [-1.0, 1.0]), ValueError, "the weight of sample 0"),
    ]
    for gradient, kind, words in cases:
        refused(opt, [w, x, error], lambda gradient=gradient: opt.step([gradient]), kind, words)
