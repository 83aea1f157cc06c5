"""Partial updates on a GPU, anchors and rows, are those on the CPU, bit for bit."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
from devices import Capsule, Interface, Library, assert_same, bfloat16, in_use, on_host
from fusestep import _cpu
from rules import PLAIN, ROWWISE, RULES, Rule
from test_gpu import (
    DTYPES,
    LAYOUTS,
    LENGTHS,
    NEGATIVE,
    REAL,
    SHAPES,
    Pair,
    needs,
    refused,
    standard,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

f32 = np.float32


@pytest.fixture(scope="module", params=["simulated", *REAL])
def lib(request: pytest.FixtureRequest) -> Iterator[Library]:
    """Each library in turn."""
    yield from in_use(request.param)


def layout_for(lib: Library, layout: str) -> Callable[[np.ndarray], np.ndarray]:
    return LAYOUTS["gappy" if layout in NEGATIVE and not lib.has_negative_strides else layout]


def dtype_for(lib: Library, dtype: np.dtype) -> np.dtype:
    return dtype if dtype in lib.dtypes else np.dtype("f2")


# ---- anchors ------------------------------------------------------------------------------------


def some_importance(rng: np.random.Generator, shape: Any) -> np.ndarray:
    """0 in some places and large in others."""
    return rng.exponential(1, shape) ** 2 * (rng.random(shape) < 0.7)


def anchor(pair: Pair, strength: Any, reference: Any = None, importance: Any = None) -> None:
    """Anchor both; what the anchors hold must be the same, and where the parameters are."""
    for opt in (pair.cpu, pair.gpu):
        opt.anchor(strength, reference, importance)
    check_anchors(pair)


def check_anchors(pair: Pair) -> None:
    assert list(pair.gpu.anchors) == list(pair.cpu.anchors)
    for key, expected in pair.cpu.anchors.items():
        found = pair.gpu.anchors[key]
        assert found["strength"] == expected["strength"]
        for name in ("reference", "importance"):
            if expected[name] is None:
                assert found[name] is None
                continue
            assert_same(on_host(found[name]), expected[name])
            assert pair.places[key] is None or pair.lib.is_own(found[name])


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_importance", [False, True])
def test_anchors_of_every_rule_dtype_and_length(
    lib: Library, rule: Rule, dtype: np.dtype, has_importance: bool, rng: np.random.Generator
) -> None:
    needs(lib, dtype)
    pair = Pair(lib, rule.cls, [standard(rng, n, dtype) for n in LENGTHS], **rule.options)
    importance = [some_importance(rng, n) for n in LENGTHS] if has_importance else None
    anchor(pair, 7.0, [standard(rng, n) for n in LENGTHS], importance)
    for _ in range(3):
        pair.step([standard(rng, n, dtype) for n in LENGTHS])
    pair.check()


@settings(max_examples=150, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    shape=SHAPES,
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=2, max_size=2),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    strength=st.sampled_from([0.0, 0.3, 1e6, 1e300]),
    has_importance=st.booleans(),
    zero_grad=st.booleans(),
    options=st.sampled_from([{}, {"max_norm": 0.7}, {"skip_nonfinite": True}]),
    state_dtype=st.sampled_from([None, "float64"]),
)
def test_any_anchor(
    lib: Library,
    rule: Rule,
    shape: tuple[int, ...],
    layouts: list[str],
    dtypes: tuple[np.dtype, np.dtype],
    strength: float,
    has_importance: bool,
    zero_grad: bool,
    options: dict[str, Any],
    state_dtype: str | None,
) -> None:
    w_dtype, g_dtype = (dtype_for(lib, dtype) for dtype in dtypes)
    of_parameter, of_gradient = (layout_for(lib, layout) for layout in layouts)
    rng = np.random.default_rng(4)
    start = of_parameter(standard(rng, shape, w_dtype))
    pair = Pair(lib, rule.cls, [start], state_dtype=state_dtype, **options, **rule.options)
    importance = [some_importance(rng, shape)] if has_importance else None
    anchor(pair, strength, [standard(rng, shape)], importance)
    for _ in range(2):
        pair.step([of_gradient(standard(rng, shape, g_dtype))], zero_grad=zero_grad)
    pair.check()


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"max_norm": 0.5, "skip_nonfinite": True}, {"capturable": True}], ids=str
)
def test_anchors_of_some_of_many(
    lib: Library, rule: Rule, options: dict[str, Any], rng: np.random.Generator
) -> None:
    """More than a launch can take, dense and strided, of several ages and strengths."""
    shapes = [(int(n),) if n % 3 else (int(n) // 3, 3) for n in rng.integers(0, 40, 700)]

    def arrays() -> list[np.ndarray]:
        made = [standard(rng, shape, "f4" if len(shape) > 1 else "f8") for shape in shapes]
        return [a.T.copy().T if i % 5 == 0 else a for i, a in enumerate(made)]

    common = {k: v for k, v in options.items() if k != "capturable"}
    gpu = {"capturable": options.get("capturable", False)}
    pair = Pair(lib, rule.cls, arrays(), gpu=gpu, **common, **rule.options)
    strengths = [None if i % 4 == 0 else float(rng.random()) for i in range(len(shapes))]
    importance = [some_importance(rng, shape) for shape in shapes]
    anchor(pair, strengths)
    anchor(pair, strengths[:-50] + [None] * 50, None, importance)
    for _ in range(3):
        grads = arrays()
        absent = rng.random(len(shapes)) < 0.3
        pair.step([None if absent[i] else g for i, g in enumerate(grads)], zero_grad=True)
    pair.check()


def test_anchors_come_and_go(lib: Library, rng: np.random.Generator) -> None:
    """Merged with others, released, with another learning rate for a step."""
    params = {"a": standard(rng, (7, 5)), "b": standard(rng, 1030, "f2")}
    pair = Pair(lib, fs.Adam, params, lr=0.1)

    def steps() -> None:
        for lr in (None, 0.5):
            pair.step({key: standard(rng, x.shape) for key, x in params.items()}, lr=lr)
        pair.check()

    anchor(pair, 3.0)
    steps()
    anchor(pair, 2.0, {"a": standard(rng, (7, 5))}, {"a": some_importance(rng, (7, 5))})
    steps()
    anchor(pair, {"a": None, "b": 5.0})
    steps()
    for opt in (pair.cpu, pair.gpu):
        opt.release_anchor()
    check_anchors(pair)
    steps()
    anchor(pair, 1.0)
    steps()


def test_references_on_the_gpu(lib: Library, rng: np.random.Generator) -> None:
    """They are copied: what becomes of the arrays afterwards does not matter."""
    start, reference, importance = (standard(rng, (5, 7)) for _ in range(3))
    w = lib.put(start)
    given = [lib.put(reference), lib.put(np.abs(importance))]
    opt, cpu = fs.SGD([w], lr=0.1), fs.SGD([start], lr=0.1)
    opt.anchor(2.0, given[:1], given[1:])
    cpu.anchor(2.0, [reference], [np.abs(importance)])
    for array in given:
        lib.fill(array, np.nan)
    g = standard(rng, (5, 7))
    opt.step([lib.put(g)])
    cpu.step([g])
    assert_same(on_host(w), start)


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("common", [{}, {"max_norm": 0.5, "skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("has_importance", [False, True])
def test_anchors_pull_in_replays(
    lib: Library,
    rule: Rule,
    common: dict[str, Any],
    has_importance: bool,
    rng: np.random.Generator,
) -> None:
    """By the learning rate of the replay, which is on the GPU."""
    params = [standard(rng, 1500)]
    pair = Pair(lib, rule.cls, params, gpu={"capturable": True}, **common, **rule.options)
    importance = [some_importance(rng, 1500)] if has_importance else None
    anchor(pair, 4.0, [standard(rng, 1500)], importance)
    memory = [lib.put(np.zeros(1500, f32))]

    def step_of_both(replay: Callable[[], None]) -> None:
        g = standard(rng, 1500)
        lib.set(memory[0], g)
        replay()
        pair.cpu.step([g])
        pair.check()

    with lib.stream():
        step_of_both(lambda: pair.gpu.step(memory))
    first = standard(rng, 1500)
    lib.set(memory[0], first)
    replay = lib.capture(lambda: pair.gpu.step(memory))
    replay()
    pair.cpu.step([first])
    pair.check()
    for lr in (0.3, 0.01):
        pair.cpu.lr = pair.gpu.lr = lr
        step_of_both(replay)


@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "deepcopy"])
def test_anchors_are_kept(lib: Library, way: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """And go from the CPU to the GPU and back."""
    params = {"a": standard(rng, (7, 5)), "b": standard(rng, 1030)}
    pair = Pair(lib, fs.AdamW, params, lr=0.1)
    anchor(pair, {"a": 2.0, "b": None})
    anchor(pair, 1.0, None, {"a": some_importance(rng, (7, 5)), "b": some_importance(rng, 1030)})
    pair.step({key: standard(rng, x.shape) for key, x in params.items()})
    if way == "state_dict":
        saved = pair.cpu.state_dict(), pair.gpu.state_dict()
        lib.fill(pair.gpu.anchors["a"]["reference"], 5.0)  # the other is a copy
        pair.cpu.load_state_dict(saved[1])
        pair.gpu.load_state_dict(saved[0])
    elif way == "file":
        pair.cpu.save(tmp_path / "cpu")
        pair.gpu.save(tmp_path / "gpu")
        pair.gpu.release_anchor()
        pair.gpu.load(tmp_path / "cpu")
        pair.cpu.load(tmp_path / "gpu")
    else:
        other = (
            copy.deepcopy(pair.gpu) if way == "deepcopy" else pickle.loads(pickle.dumps(pair.gpu))
        )
        g = {key: standard(rng, x.shape) for key, x in params.items()}
        pair.step(g)
        other.step({key: lib.put(x) for key, x in g.items()})
        for key, x in pair.cpu.params.items():
            assert_same(on_host(other.params[key]), x)
    check_anchors(pair)
    pair.step({key: standard(rng, x.shape) for key, x in params.items()})
    pair.check()


def test_anchors_on_several_devices(lib: Library, rng: np.random.Generator) -> None:
    places = {"a": 0, "b": None, "c": 1 if lib.devices() > 1 else 0}
    params = {key: standard(rng, 1030) for key in places}
    pair = Pair(lib, fs.NAdam, params, places=places, max_norm=0.5, skip_nonfinite=True)
    anchor(pair, 3.0)
    anchor(pair, 1.0, None, {key: some_importance(rng, 1030) for key in places})
    for _ in range(3):
        pair.step({key: standard(rng, 1030) for key in places})
    pair.check()


@pytest.mark.parametrize("speaks", ["interface", "DLPack"])
def test_present_values_of_arrays_of_nobodys_library(
    lib: Library, speaks: str, rng: np.random.Generator
) -> None:
    start, g = standard(rng, (6, 5)), standard(rng, (6, 5))
    on_gpu = lib.put(start)
    w = Interface(on_gpu) if speaks == "interface" else Capsule(lib, on_gpu)
    opt, cpu = fs.SGD([w], lr=0.5), fs.SGD([start], lr=0.5)
    lib.synchronize()  # streams are not the point here
    for one, gradient in ((opt, lib.put(g)), (cpu, g)):
        one.anchor(2.0)
        one.step([gradient])
    assert_same(on_host(on_gpu), start)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((-1.0,), ValueError, "strength"),
        ((1.0, [np.ones(3), np.ones(3)]), ValueError, "parameter 1 has shape"),
        ((1.0, [np.ones(3), np.full(4, np.nan)]), ValueError, "parameter 1 is not finite"),
        ((1.0, None, [np.ones(3), -np.ones(4)]), ValueError, "parameter 1 is negative"),
        ((1.0, [np.ones(3), np.full(4, 1e300)]), ValueError, "float32 cannot hold"),
    ],
)
def test_anchors_that_are_refused_change_nothing(
    lib: Library, arguments: tuple[Any, ...], error: type[Exception], words: str
) -> None:
    opt = fs.SGD([lib.put(np.ones(3, f32)), lib.put(np.ones(4, f32))], lr=0.5)
    opt.anchor([2.0, None])
    before = opt.anchors
    with pytest.raises(error, match=words):
        opt.anchor(*arguments)
    assert list(opt.anchors) == [0]
    assert opt.anchors[0]["reference"] is before[0]["reference"]
    saved = opt.state_dict()
    saved["state"][1]["anchor"] = np.ones(4)
    with pytest.raises(ValueError, match="an anchor without its strength"):
        opt.load_state_dict(saved)
    assert list(opt.anchors) == [0]


def test_numbers_of_every_magnitude_are_pulled(lib: Library, rng: np.random.Generator) -> None:
    """Any bits at all in the parameter; and pulls that overflow."""
    bits = rng.integers(0, 2**32, 20_000, np.uint32)
    pair = Pair(lib, fs.SGD, [bits.view(f32)], lr=1.0)
    importance = np.ldexp(1.0, rng.integers(-140, 128, 20_000))
    with np.errstate(over="ignore"):
        reference = np.ldexp(rng.standard_normal(20_000), rng.integers(-140, 126, 20_000))
    anchor(pair, 1.0, [reference], [importance])
    for _ in range(2):
        pair.step([standard(rng, 20_000)])
    pair.check()


def test_sixteen_bits_and_an_anchor(lib: Library, rng: np.random.Generator) -> None:
    """The rule's move and the pull are rounded together."""
    for dtype in (np.dtype("f2"), bfloat16):
        if dtype not in lib.dtypes:
            continue
        pair = Pair(lib, fs.Adam, [standard(rng, 5000, dtype)], lr=1e-3)
        anchor(pair, 100.0, [standard(rng, 5000)])
        for _ in range(5):
            pair.step([standard(rng, 5000, dtype)])
        pair.check()


# ---- rows ---------------------------------------------------------------------------------------

EVERY = [*RULES, *ROWWISE]
SOME = [*PLAIN, ROWWISE[1]]
INDEX_PLACES = ["host", "gpu"]


def some_rows(
    rng: np.random.Generator, table: np.ndarray, count: int, dtype: Any = f32, kind: str = "any"
) -> fs.Rows:
    """Gradients of so many rows: in any order and several times, or ascending, each once."""
    rows = len(table)
    indices = rng.integers(0, rows, count if rows else 0)
    if kind == "ascending":
        indices = np.unique(indices)
    if kind == "one":
        indices[:] = rows - 1
    return fs.Rows(indices, standard(rng, (len(indices), *table.shape[1:]), dtype))


class RowsPair(Pair):
    """The same with gradients of some rows, the lists of which are in either's memory."""

    def __init__(self, *args: Any, indices: str = "host", **options: Any) -> None:
        super().__init__(*args, **options)
        self.indices = indices

    def mirrored(self, arrays: Any) -> tuple[Any, list[Any]]:
        named = arrays if isinstance(arrays, dict) else dict(enumerate(arrays))
        values = {key: x.values if isinstance(x, fs.Rows) else x for key, x in named.items()}
        likes, mirrors = super().mirrored(values)
        for key, x in named.items():
            if isinstance(x, fs.Rows):
                on_gpu = self.places[key] is not None and self.indices == "gpu"
                indices = self.lib.put(np.asarray(x.indices)) if on_gpu else x.indices
                likes[key] = fs.Rows(indices, likes[key])
        return (likes if isinstance(arrays, dict) else list(likes.values())), mirrors


WIDTHS = [1, 3, 4, 5, 31, 32, 33, 64, 127, 128, 129, 1023, 1024, 1025, 2304]


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_rule_dtype_and_width(
    lib: Library, rule: Rule, dtype: np.dtype, rng: np.random.Generator
) -> None:
    """More tables than a launch takes; some of rows that are not aligned."""
    needs(lib, dtype)
    pair = RowsPair(
        lib, rule.cls, [standard(rng, (9, n), dtype) for n in WIDTHS * 3], **rule.options
    )
    kinds = ["any", "ascending", "one"]
    for step in range(3):
        pair.step(
            [
                some_rows(
                    rng,
                    w,
                    int(rng.integers(0, 14)),
                    lib.dtypes[(i + step) % len(lib.dtypes)],
                    kinds[(i + step) % 3],
                )
                for i, w in enumerate(pair.cpu.params)
            ]
        )
    pair.check()


TABLES = st.one_of(
    st.tuples(st.integers(1, 70), st.integers(0, 70)),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 70)),
    st.sampled_from([(5, 1024), (3, 1025), (4, 40, 60), (3, 5, 64, 8), (2, 1, 2000)]),
)


@settings(max_examples=200, deadline=None)
@given(
    rule=st.sampled_from(EVERY),
    shape=TABLES,
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=2, max_size=2),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    counts=st.lists(st.sampled_from([0, 1, 7, 8, 9, 31, 33, 300]), min_size=2, max_size=2),
    kind=st.sampled_from(["any", "ascending", "one"]),
    indices=st.sampled_from(INDEX_PLACES),
    is_anchored=st.sampled_from([None, False, True]),
    zero_grad=st.booleans(),
    grad_scale=st.sampled_from([1.0, -0.3]),
    options=st.sampled_from(
        [{}, {"max_norm": 0.7}, {"skip_nonfinite": True}, {"state_dtype": "float64"}]
    ),
)
def test_any_rows(
    lib: Library,
    rule: Rule,
    shape: tuple[int, ...],
    layouts: list[str],
    dtypes: tuple[np.dtype, np.dtype],
    counts: list[int],
    kind: str,
    indices: str,
    is_anchored: bool | None,
    zero_grad: bool,
    grad_scale: float,
    options: dict[str, Any],
) -> None:
    """The bits of the CPU, and no other row, and nothing between the elements, is touched."""
    w_dtype, g_dtype = (dtype_for(lib, dtype) for dtype in dtypes)
    of_table, of_values = (layout_for(lib, layout) for layout in layouts)
    rng = np.random.default_rng(5)
    start = of_table(standard(rng, shape, w_dtype))
    pair = RowsPair(lib, rule.cls, [start], indices=indices, **options, **rule.options)
    if is_anchored is not None:  # with importance, or without
        anchor(pair, 3.0, None, [some_importance(rng, shape)] if is_anchored else None)
    for count in counts:
        rows = some_rows(rng, start, count, g_dtype, kind)
        rows.values = of_values(rows.values)
        pair.step([rows], zero_grad=zero_grad, grad_scale=grad_scale)
    pair.step([of_values(standard(rng, shape, g_dtype))], zero_grad=zero_grad)
    pair.check()


@pytest.mark.parametrize("rule", SOME, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"max_norm": 0.5, "skip_nonfinite": True}, {"capturable": True}], ids=str
)
def test_rows_beside_other_gradients(
    lib: Library, rule: Rule, options: dict[str, Any], rng: np.random.Generator
) -> None:
    """Tables, dense and anchored parameters, in any order, some left out; a NaN in a row."""
    shapes = [(50, 8), (30,), (200, 33), (50, 8), (4, 1500), (7, 5, 3)]
    common = {k: v for k, v in options.items() if k != "capturable"}
    gpu = {"capturable": options.get("capturable", False)}
    params = [standard(rng, s, "f8" if i == 3 else f32) for i, s in enumerate(shapes)]
    pair = RowsPair(lib, rule.cls, params, gpu=gpu, **common, **rule.options)
    anchor(pair, [None, 2.0, 3.0, None, None, None])
    for step in range(6):
        grads: list[Any] = [
            some_rows(rng, w, 40) if rng.random() < 0.6 else standard(rng, w.shape) for w in params
        ]
        if step == 3 and common:
            values = grads[2].values if isinstance(grads[2], fs.Rows) else grads[2]
            values[-1, -1] = np.nan
        grads[int(rng.integers(0, len(shapes)))] = None
        pair.step(grads, zero_grad=step % 2 == 1)
    pair.check()


@pytest.mark.parametrize("rule", SOME, ids=str)
def test_long_lists(lib: Library, rule: Rule, rng: np.random.Generator) -> None:
    """That take more than one launch to bring over; a row that is listed often; many tiles."""
    params = [standard(rng, (3000, 5)), standard(rng, (7, 2100))]
    pair = RowsPair(lib, rule.cls, params, max_norm=1.0, **rule.options)
    for count in (9000, 4087, 128, 129):
        pair.step([some_rows(rng, params[0], count), some_rows(rng, params[1], count // 9)])
    pair.check()


def test_lists_of_any_integers(lib: Library, rng: np.random.Generator) -> None:
    """On the host or the GPU; and views, of which not all elements are indices."""
    start = standard(rng, (10, 6))
    values = standard(rng, (5, 6))
    numbers = np.array([7, 2, 7, 0, 9])
    wide = np.stack([numbers, numbers + 100], 1)
    forms: list[Any] = [numbers, numbers.astype(np.int32), numbers.tolist(), wide[:, 0]]
    forms += [lib.put(numbers), lib.put(numbers.astype(np.int32)), lib.put(wide)[:, 0]]
    forms += [Interface(lib.put(numbers)), Interface(lib.put(wide)[:, 0])]
    forms += [Capsule(lib, lib.put(numbers))]
    expected = start.copy()
    fs.SGD([expected], lr=1.0).step([fs.Rows(numbers, values)])
    for form in forms:
        w = lib.put(start)
        lib.synchronize()
        fs.SGD([w], lr=1.0).step([fs.Rows(form, lib.put(values))])
        assert_same(on_host(w), expected)


@pytest.mark.parametrize("indices", INDEX_PLACES)
@pytest.mark.parametrize("common", [{}, {"max_norm": 0.5, "skip_nonfinite": True}], ids=str)
def test_rows_that_are_refused_change_nothing(
    lib: Library, indices: str, common: dict[str, Any], rng: np.random.Generator
) -> None:
    table, other = lib.put(standard(rng, (5, 3))), lib.put(standard(rng, (4,)))
    g = lib.put(standard(rng, (4,)))
    opt = fs.Adam([other, table], **common)

    def put(numbers: Any) -> Any:
        array = np.array(numbers)
        return lib.put(array) if indices == "gpu" else array

    def values(*shape: int, dtype: Any = f32) -> Any:
        return lib.put(standard(rng, shape, dtype))

    opt.step([g, fs.Rows(put([4, 0]), values(2, 3))])
    cases = [
        (fs.Rows(put([0, 5]), values(2, 3)), IndexError, "row 5 (at position 1"),
        (fs.Rows(put([-1]), values(1, 3)), IndexError, "row -1"),
        (fs.Rows(put([0, 1]), values(1, 3)), ValueError, "2 indices"),
        (fs.Rows(put([0]), values(1, 4)), ValueError, "values of shape (1, 4)"),
        (fs.Rows(put([[0]]), values(1, 3)), ValueError, "2 dimensions"),
        (fs.Rows(put([0.0]), values(1, 3)), TypeError, "float64; expected int32 or int64"),
        (fs.Rows(put([0]), standard(rng, (1, 3))), ValueError, "is on cpu; expected cuda:0"),
        (fs.Rows(put([0]), table[:1]), ValueError, "shares memory with parameter 1"),
    ]
    for rows, error, words in cases:
        refused(
            opt,
            [table, other, g],
            lambda rows=rows: opt.step([g, rows], zero_grad=True),
            error,
            words,
        )
    opt.step([g, fs.Rows(put([4, 0]), values(2, 3))])
    assert opt.steps == 2


def test_what_has_no_rows(lib: Library) -> None:
    scalar = lib.put(np.ones((), f32))
    opt = fs.SGD([scalar])
    rows = fs.Rows([0], lib.put(np.ones(1, f32)))
    refused(opt, [scalar], lambda: opt.step([rows]), ValueError, "has no dimensions")
    with pytest.raises(ValueError, match="has no dimensions"):
        fs.RowwiseAdagrad([scalar])


def test_catching_up_has_nothing_to_do(lib: Library) -> None:
    opt = fs.Adam([lib.put(np.ones((5, 2), f32))])
    opt.catch_up([lib.put(np.array([1, 2]))])
    opt.catch_up([[3]])
    opt.flush()
    with pytest.raises(ValueError, match="got 2 arrays of indices for 1 parameter"):
        opt.catch_up([[3], [4]])


@pytest.mark.parametrize("rule", [r for r in SOME if r.cls in (fs.SGD, fs.NAG)], ids=str)
@pytest.mark.parametrize("width", [5, 64])
def test_rows_in_a_graph(lib: Library, rule: Rule, width: int, rng: np.random.Generator) -> None:
    """A replay moves the rows that were listed, by the values of now, and as often as need be."""
    start = standard(rng, (300, width))
    pair = RowsPair(lib, rule.cls, [start], gpu={"capturable": True}, **rule.options)
    rows = some_rows(rng, start, 500)
    values = lib.put(rows.values)
    captured = fs.Rows(rows.indices, values)
    with lib.stream():
        pair.gpu.step([captured])
    pair.cpu.step([rows])
    pair.check()
    replay = lib.capture(lambda: pair.gpu.step([captured]))
    for _ in range(3):
        replay()
        pair.cpu.step([rows])
        pair.check()
        pair.step([some_rows(rng, start, 30)])  # another list, in the same memory
        pair.check()


def test_lists_on_the_gpu_cannot_be_captured(lib: Library, rng: np.random.Generator) -> None:
    """Nor lists that are longer than any before. Nothing has been changed."""
    w, values = lib.put(standard(rng, (300, 4))), lib.put(standard(rng, (300, 4)))
    numbers = rng.integers(0, 300, 300)
    on_gpu = lib.put(numbers)
    opt = fs.SGD([w], lr=0.5)
    few = fs.Rows(numbers[:3], values[:3])
    with lib.stream():
        opt.step([few])
    for rows, words in [
        (fs.Rows(on_gpu, values), "would have to be fetched from the GPU"),
        (fs.Rows(numbers, values), "needs memory that is not there yet"),
    ]:
        refused(
            opt,
            [w, values],
            lambda rows=rows: lib.capture(lambda: opt.step([rows])),
            RuntimeError,
            "CUDA graph is being captured",
            words,
        )
    lib.capture(lambda: opt.step([few]))()
    opt.step([fs.Rows(on_gpu, values)])


@pytest.mark.parametrize("indices", INDEX_PLACES)
def test_rows_are_moved_in_the_order_of_streams(
    lib: Library, indices: str, rng: np.random.Generator
) -> None:
    """Lists and values that the current stream is still to write."""
    start, values = standard(rng, (400, 40)), standard(rng, (600, 40))
    numbers = rng.integers(0, 400, 600)
    w, g = lib.put(start), lib.put(np.zeros_like(values))
    late, list_on_gpu = lib.put(values), lib.put(np.zeros_like(numbers))
    late_list = lib.put(numbers)
    opt, cpu = fs.Adam([w]), fs.Adam([start])
    with lib.stream():
        if lib.name != "simulated":
            lib.spin()
        g[...] = late
        list_on_gpu[...] = late_list
        opt.step([fs.Rows(list_on_gpu if indices == "gpu" else numbers, g)], zero_grad=True)
        opt.step([fs.Rows(numbers[:7], late[:7])])
        lib.fill(g, np.nan)
    cpu.step([fs.Rows(numbers, values)])
    cpu.step([fs.Rows(numbers[:7], values[:7])])
    assert_same(on_host(w), start)


def test_tables_on_several_devices(lib: Library, rng: np.random.Generator) -> None:
    places = {"a": 0, "b": None, "c": 1 if lib.devices() > 1 else 0, "d": 0}
    params = {key: standard(rng, (60, 70)) for key in places}
    for indices in INDEX_PLACES:
        pair = RowsPair(
            lib,
            fs.NAdam,
            {key: x.copy() for key, x in params.items()},
            places=places,
            indices=indices,
            max_norm=0.5,
            skip_nonfinite=True,
        )
        for step in range(4):
            grads: dict[str, Any] = {key: some_rows(rng, x, 50) for key, x in params.items()}
            grads["d"] = standard(rng, (60, 70))
            if step == 2:
                grads["c"].values[-1, -1] = np.nan
            pair.step(grads, zero_grad=True)
        pair.check()
        assert pair.gpu.skipped_steps == 1


@pytest.mark.parametrize("rule", ROWWISE, ids=str)
def test_rowwise_state_of_long_rows(lib: Library, rule: Rule, rng: np.random.Generator) -> None:
    """Sums of sums: a row of more than 1,024 tiles, in float64, which shows its last bit."""
    shapes = [(2, 1024 * 1024 + 5), (3, 4099), (5, 1)]
    pair = RowsPair(lib, rule.cls, [standard(rng, s, "f8") for s in shapes], **rule.options)
    pair.step([standard(rng, s, "f4") * f32(rng.random()) for s in shapes])
    pair.step([some_rows(rng, w, 3) for w in pair.cpu.params])
    pair.check()


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
def test_rowwise_state_of_any_memory_layout(
    lib: Library, options: dict[str, Any], rng: np.random.Generator
) -> None:
    for layout in sorted(LAYOUTS):
        start = layout_for(lib, layout)(standard(rng, (40, 30)))
        pair = RowsPair(lib, fs.RowwiseAdagrad, [start], gpu=options, lr=0.1)
        pair.step([standard(rng, (40, 30))])
        pair.step([some_rows(rng, start, 60)])
        pair.check()


@pytest.mark.parametrize("way", ["state_dict", "file"])
def test_tables_go_from_cpu_to_gpu(
    lib: Library, way: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    for rule in (ROWWISE[1], PLAIN[3]):
        start = standard(rng, (40, 30))
        pair = RowsPair(lib, rule.cls, [start], **rule.options)
        pair.step([some_rows(rng, start, 60)])
        if way == "state_dict":
            saved = pair.cpu.state_dict(), pair.gpu.state_dict()
            pair.cpu.load_state_dict(saved[1])
            pair.gpu.load_state_dict(saved[0])
        else:
            pair.cpu.save(tmp_path / "a")
            pair.gpu.load(tmp_path / "a")
        pair.step([some_rows(rng, start, 60)])
        pair.check()


# ---- exact rows ---------------------------------------------------------------------------------


class ExactPair(RowsPair):
    """The same with rows that miss steps."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, rows="exact", **options)

    def step_rows(
        self, rng: np.random.Generator, most: int, dtype: Any = f32, **arguments: Any
    ) -> None:
        """A step of so many rows or fewer of each parameter, the first of them more often."""
        grads = []
        for w in self.cpu.params:
            indices = rng.integers(0, len(w), most) * rng.integers(0, 2, most)
            indices = indices[: rng.integers(0, most + 1)]
            grads.append(fs.Rows(indices, standard(rng, (len(indices), *w.shape[1:]), dtype)))
        self.step(grads, **arguments)

    def idle(self, steps: int, **arguments: Any) -> None:
        """Steps that list no row."""
        nothing = [np.zeros((0, *w.shape[1:]), f32) for w in self.cpu.params]
        for _ in range(steps):
            self.step([fs.Rows([], values) for values in nothing], **arguments)

    def flush(self) -> None:
        self.cpu.flush()
        self.gpu.flush()
        self.check()

    def check(self) -> None:
        """What is noted is the same, too."""
        super().check()
        for ours, theirs in zip(*(missed(opt) for opt in (self.gpu, self.cpu)), strict=True):
            np.testing.assert_equal(ours, theirs)


def missed(opt: fs.Optimizer) -> list[Any]:
    entries = opt.state_dict()["state"].values()
    return [(entry.get("missed_steps"), entry.get("recent_steps")) for entry in entries]


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_rows_of_every_rule_dtype_and_width(
    lib: Library, rule: Rule, dtype: np.dtype, rng: np.random.Generator
) -> None:
    """More tables than a launch takes; some of rows that are not aligned."""
    needs(lib, dtype)
    widths = [1, 3, 4, 33, 64, 128, 1023, 1024, 1500, 2304, *[5] * 30]
    pair = ExactPair(lib, rule.cls, [standard(rng, (9, n), dtype) for n in widths], **rule.options)
    for step in range(8):
        pair.step_rows(rng, 7, lib.dtypes[step % len(lib.dtypes)])
        pair.check()
    assert any(missed(pair.gpu))
    pair.flush()


@settings(max_examples=200, deadline=None)
@given(
    rule=st.sampled_from(EVERY),
    shape=TABLES,
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
    is_anchored=st.sampled_from([None, None, False, True]),
    arguments=st.fixed_dictionaries(
        {"zero_grad": st.booleans(), "grad_scale": st.sampled_from([1.0, -0.3])}
    ),
    options=st.sampled_from(
        [
            {},
            {"max_norm": 0.7},
            {"skip_nonfinite": True},
            {"max_norm": 0.7, "skip_nonfinite": True, "maximize": True},
            {"state_dtype": "float64"},
            {"state_dtype": "float32"},
        ]
    ),
    indices=st.sampled_from(INDEX_PLACES),
)
def test_any_exact_rows(
    lib: Library,
    rule: Rule,
    shape: tuple[int, ...],
    layout: str,
    dtype: np.dtype,
    is_anchored: bool | None,
    arguments: dict[str, Any],
    options: dict[str, Any],
    indices: str,
) -> None:
    """Other rates, gradients of all rows in between, rows that are asked for, skipped steps."""
    rng = np.random.default_rng(6)
    of_table = layout_for(lib, layout)
    start = of_table(standard(rng, shape, dtype_for(lib, dtype)))
    pair = ExactPair(lib, rule.cls, [start], indices=indices, **options, **rule.options)
    if is_anchored is not None:
        anchor(pair, 3.0, None, [some_importance(rng, shape)] if is_anchored else None)
    for step in range(12):
        pair.step_rows(rng, 4, lr=0.3 / (step + 1), **arguments)
        if step == 4:
            pair.step([of_table(standard(rng, shape))], **arguments)
        if step in (5, 6):
            values = np.full((1, *shape[1:]), np.nan, f32)
            if options.get("skip_nonfinite") and values.size:
                pair.step([fs.Rows([len(start) - 1], values)], **arguments)
        if step in (3, 8):
            asked = rng.integers(0, len(start), 5)
            pair.cpu.catch_up([asked])
            pair.gpu.catch_up([lib.put(asked) if indices == "gpu" else asked])
        pair.check()
    pair.flush()


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [np.float64, f32])
@pytest.mark.parametrize("gap", [1, 2, 300])
def test_gaps_of_every_length(
    lib: Library, rule: Rule, dtype: type, gap: int, rng: np.random.Generator
) -> None:
    """With a rate that changes, and hyper-parameters that do."""
    pair = ExactPair(lib, rule.cls, [standard(rng, (6, 7), dtype)], **rule.options)
    for _ in range(3):
        pair.step([some_rows(rng, pair.cpu.params[0], 9)])
        pair.idle(gap // 2, lr=0.02)
        for opt in (pair.cpu, pair.gpu):
            opt.weight_decay = 0.01
        pair.idle(gap - gap // 2)
        pair.check()
    pair.step([standard(rng, (6, 7), dtype)])
    pair.check()


@pytest.mark.slow
@pytest.mark.parametrize("rule", [*PLAIN, *ROWWISE], ids=str)
def test_more_steps_than_are_noted(lib: Library, rule: Rule, rng: np.random.Generator) -> None:
    """After 65,536 of them all rows are brought up to date, and it begins anew."""
    pair = ExactPair(lib, rule.cls, [standard(rng, (6, 7))], **rule.options)
    values = lib.put(np.zeros((0, 7), f32))
    pair.step([some_rows(rng, pair.cpu.params[0], 9)])
    for step in range(70_000):
        pair.cpu.step([fs.Rows([], np.zeros((0, 7), f32))])
        pair.gpu.step([fs.Rows([], values)])
        if step % 10_000 == 0:
            pair.step([some_rows(rng, pair.cpu.params[0], 2)])
    pair.check()
    pair.flush()


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_no_closed_form_suits(
    lib: Library, rule: Rule, dtype: np.dtype, rng: np.random.Generator
) -> None:
    """Zeros, the smallest and the largest, infinities and NaN: in a whole row, or in one place."""
    needs(lib, dtype)
    info = ml_dtypes.finfo(dtype)
    odd = [0.0, -0.0, info.smallest_subnormal, info.tiny, -info.max, info.max, np.inf, np.nan]
    start = standard(rng, (20, 70), dtype)
    for row, number in enumerate(odd):
        start[row] = number
        start[10 + row, 69 - row] = number
    pair = ExactPair(lib, rule.cls, [start], **rule.options)
    gradients = start[::-1].copy()
    with np.errstate(all="ignore"):
        pair.step([fs.Rows(np.arange(20), gradients)])
    pair.idle(7)
    pair.cpu.catch_up([np.arange(0, 20, 2)])
    pair.gpu.catch_up([np.arange(0, 20, 2)])
    pair.check()
    pair.idle(2)
    pair.flush()


@pytest.mark.parametrize("rule", SOME, ids=str)
@pytest.mark.parametrize("common", [{}, {"max_norm": 0.5, "skip_nonfinite": True}], ids=str)
def test_exact_rows_beside_other_gradients(
    lib: Library, rule: Rule, common: dict[str, Any], rng: np.random.Generator
) -> None:
    """Tables, dense and anchored parameters on two GPUs and the CPU; some left out; a NaN."""
    shapes = [(50, 8), (30,), (200, 33), (50, 8), (4, 1500), (5,) if rule in ROWWISE else ()]
    second = 1 if lib.devices() > 1 else 0
    places = dict(enumerate([0, 0, second, None, 0, 0]))
    params = [standard(rng, s, "f8" if i == 3 else f32) for i, s in enumerate(shapes)]
    pair = ExactPair(lib, rule.cls, params, places=places, **common, **rule.options)
    anchor(pair, [None, 2.0, 3.0, None, None, None])
    for step in range(12):
        grads: list[Any] = [
            some_rows(rng, w, 3) if w.ndim and rng.random() < 0.8 else standard(rng, w.shape)
            for w in params
        ]
        if step in (3, 4) and common:
            values = grads[2].values if isinstance(grads[2], fs.Rows) else grads[2]
            values[-1, -1] = np.nan
        grads[int(rng.integers(0, len(shapes)))] = None
        pair.step(grads, zero_grad=step % 2 == 1)
        pair.check()
    pair.flush()


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("way", ["state_dict", "file", "pickle"])
def test_missed_steps_go_from_cpu_to_gpu(
    lib: Library, rule: Rule, way: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """And back. What the GPU has of an earlier history is of no use to the next."""
    pair = ExactPair(lib, rule.cls, [standard(rng, (40, 30))], **rule.options)
    for _ in range(4):
        for _ in range(3):
            pair.step_rows(rng, 9)
        if way == "state_dict":
            saved = pair.cpu.state_dict(), pair.gpu.state_dict()
            pair.cpu.load_state_dict(saved[1])
            pair.gpu.load_state_dict(saved[0])
        elif way == "file":
            pair.cpu.save(tmp_path / "cpu")
            pair.gpu.save(tmp_path / "gpu")
            pair.gpu.load(tmp_path / "cpu")
            pair.cpu.load(tmp_path / "gpu")
        else:
            other = pickle.loads(pickle.dumps(pair.gpu))
            other.flush()
            expected = copy.deepcopy(pair.cpu)
            expected.flush()
            assert_same(on_host(other.params[0]), expected.params[0])
        pair.step_rows(rng, 9)
        pair.check()
    pair.flush()


def test_lists_of_missed_steps_of_any_length(lib: Library, rng: np.random.Generator) -> None:
    """That take several launches to bring over: of rows, of gaps, of steps."""
    pair = ExactPair(lib, fs.AdamW, [standard(rng, (3000, 3))], lr=schedule)
    for step in range(700):
        pair.step([fs.Rows(np.arange(4 * step, 4 * step + 4), standard(rng, (4, 3)))])
    pair.step([some_rows(rng, pair.cpu.params[0], 9000)])
    pair.check()
    pair.flush()


def schedule(step: int) -> float:
    return 0.1 * 0.998**step


def test_anchors_that_come_and_go_between_missed_steps(
    lib: Library, rng: np.random.Generator
) -> None:
    pair = ExactPair(lib, fs.Adam, [standard(rng, (30, 5))], lr=0.1)
    for turn in range(4):
        pair.step_rows(rng, 3)
        pair.idle(2)
        if turn % 2:
            for opt in (pair.cpu, pair.gpu):
                opt.release_anchor()
        else:
            anchor(pair, 2.0, None, [some_importance(rng, (30, 5))])
        pair.check()
    pair.flush()


def test_exact_rows_cannot_be_captured(lib: Library, rng: np.random.Generator) -> None:
    """No step, nor what makes up for them. Nothing has been changed."""
    with pytest.raises(ValueError, match="capturable=True is for CUDA graphs, and rows='exact'"):
        fs.Adam([lib.put(np.ones((2, 2), f32))], rows="exact", capturable=True)
    w, values = lib.put(standard(rng, (30, 4))), lib.put(standard(rng, (30, 4)))
    opt = fs.SGD([w], lr=0.5, momentum=0.9, rows="exact")
    few = fs.Rows(np.arange(3), values[:3])
    with lib.stream():
        opt.step([fs.Rows(np.arange(20), values[:20])])
        opt.step([few])
    for call in (
        lambda: opt.step([few]),
        lambda: opt.step([values]),
        lambda: opt.catch_up([[5]]),
        opt.flush,
    ):
        refused(opt, [w], lambda call=call: lib.capture(call), RuntimeError, 'rows="exact"')
    opt.flush()
    refused(opt, [w], lambda: lib.capture(lambda: opt.step([values])), RuntimeError, "is noted on")


def test_rows_that_are_not_there_are_not_caught_up(lib: Library, rng: np.random.Generator) -> None:
    w = lib.put(standard(rng, (5, 4)))
    opt = fs.SGD([w], lr=0.5, momentum=0.9, rows="exact")
    for listed in ([0, 1, 2, 3, 4], [0]):
        opt.step([fs.Rows(listed, lib.put(standard(rng, (len(listed), 4))))])
    refused(opt, [w], lambda: opt.catch_up([[2, 5]]), IndexError, "row 5 (at position 1")
    row = lib.put(standard(rng, (1, 4)))
    refused(opt, [w], lambda: opt.step([fs.Rows([5], row)]), IndexError, "row 5 (at position 0")


def test_missed_steps_are_made_up_for_in_the_order_of_streams(
    lib: Library, rng: np.random.Generator
) -> None:
    """Before the values, which the current stream is still to write, move the rows."""
    start, values = standard(rng, (400, 40)), standard(rng, (400, 40))
    w, late, g = lib.put(start), lib.put(values), lib.put(np.zeros_like(values))
    opt, cpu = fs.AdamW([w], rows="exact"), fs.AdamW([start], rows="exact")
    every = np.arange(400)
    with lib.stream():
        for rows in (every, every[:5], every[::2]):
            if lib.name != "simulated":
                lib.spin()
            g[...] = late
            opt.step([fs.Rows(rows, g[: len(rows)])])
            lib.fill(g, np.nan)
            cpu.step([fs.Rows(rows, values[: len(rows)])])
        opt.flush()
    cpu.flush()
    assert_same(on_host(w), start)


# ---- tables that grow ---------------------------------------------------------------------------


def resize(pair: Pair, key: Any, count: int, init: Any = 0.0, gpu_init: Any = None) -> None:
    """Of both; what comes of it is an array of the same library, on the same device."""
    table = pair.cpu.resize(key, count, init=init)
    on_gpu = pair.gpu.resize(key, count, init=init if gpu_init is None else gpu_init)
    assert on_gpu is pair.gpu.params[key]
    assert on_host(on_gpu).dtype == table.dtype
    if pair.places[key] is not None:
        assert pair.lib.is_own(on_gpu)
        assert pair.lib.device_of(on_gpu) == pair.places[key]
    check_tables(pair)


def check_tables(pair: Pair) -> None:
    """Also those that lie elsewhere by now."""
    pair.check()
    params = pair.cpu.params
    for key in params if isinstance(params, dict) else range(len(params)):
        assert_same(on_host(pair.gpu.params[key]), params[key])


def inits(lib: Library, values: np.ndarray) -> list[Any]:
    """Ways of saying what new rows are."""
    return [values, values.tolist(), lib.put(values), lambda shape: lib.put(values.reshape(shape))]


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ["lazy", "exact"])
@pytest.mark.parametrize("is_anchored", [False, True])
def test_tables_that_grow(
    lib: Library,
    rule: Rule,
    dtype: np.dtype,
    rows: str,
    is_anchored: bool,
    rng: np.random.Generator,
) -> None:
    """By a row, by many, by none; of any width, with steps in between."""
    needs(lib, dtype)
    shapes = [(9, 5), (4,), (0, 3), (3, 2, 64), (4, 0)]
    params = [standard(rng, shape, dtype) for shape in shapes]
    pair = RowsPair(lib, rule.cls, params, rows=rows, **rule.options)
    for step in range(8):
        if step == 2 and is_anchored:
            importance = [some_importance(rng, w.shape) for w in pair.cpu.params]
            anchor(pair, 2.0, None, importance)
        for key in range(len(shapes)):
            old = pair.cpu.params[key].shape
            more = int(rng.choice([0, 1, 1, 20])) if step != 4 else 0
            values = standard(rng, (more, *old[1:]))
            ways = [(values, way) for way in inits(lib, values)] if values.size else []
            ways += [(0.0, None), (0.25, np.float32(0.25)), (True, 1)]
            init, gpu_init = ways[(step + key) % len(ways)]
            resize(pair, key, old[0] + more, init, gpu_init)
        if is_anchored:
            check_anchors(pair)
        pair.step([some_rows(rng, w, 4) for w in pair.cpu.params])
        if step == 5:
            pair.step([standard(rng, w.shape, dtype) for w in pair.cpu.params])
        check_tables(pair)
    for opt in (pair.cpu, pair.gpu):
        opt.flush()
    check_tables(pair)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_tables_of_any_layout_grow(lib: Library, layout: str, rng: np.random.Generator) -> None:
    start = layout_for(lib, layout)(standard(rng, (6, 5)))
    pair = RowsPair(lib, fs.AdamW, [start])
    for count in (7, 30):
        pair.step([standard(rng, pair.cpu.params[0].shape)])
        resize(pair, 0, count, 1.0)
    pair.step([some_rows(rng, pair.cpu.params[0], 9)])
    check_tables(pair)


@pytest.mark.parametrize(
    "options", [{}, {"max_norm": 0.5, "skip_nonfinite": True}, {"capturable": True}], ids=str
)
def test_tables_grow_on_several_devices(
    lib: Library, options: dict[str, Any], rng: np.random.Generator
) -> None:
    """In every way of counting steps; in a dict; room is left for more."""
    is_captured = "capturable" in options
    second = 1 if lib.devices() > 1 and not is_captured else 0
    places = {"a": 0, "b": 0 if is_captured else None, "c": second}
    params = {key: standard(rng, (5, 33)) for key in places}
    common = {} if is_captured else options
    gpu = options if is_captured else {}
    pair = RowsPair(lib, fs.NAdam, params, places=places, gpu=gpu, **common)
    addresses = set()
    for step in range(9):
        grads = {key: some_rows(rng, w, 7) for key, w in pair.cpu.params.items()}
        if step == 3 and common:
            grads["c"].values[-1, -1] = np.nan
        pair.step(grads, zero_grad=True)
        for key in places:
            resize(pair, key, 6 + step, float(step))
        addresses.add(_cpu.describe_array(pair.gpu.params["a"], "a")[0])
    pair.step({key: standard(rng, w.shape) for key, w in pair.cpu.params.items()})
    check_tables(pair)
    assert len(addresses) <= 4
    if common:
        assert pair.gpu.skipped_steps == 1


def test_tables_with_blocks_of_their_own_age_grow(lib: Library, rng: np.random.Generator) -> None:
    pair = RowsPair(lib, fs.Adam, [standard(rng, (12, 128))], seed=3)
    for count in (12, 14, 25):
        resize(pair, 0, count, 0.5)
        shape = pair.cpu.params[0].shape
        for _ in range(3):
            pair.step([standard(rng, shape)], where=fs.RandomBlocks(0.4, block=128))
        pair.step([standard(rng, shape)])
    check_tables(pair)


def test_tables_grow_in_the_order_of_streams(lib: Library, rng: np.random.Generator) -> None:
    """Rows that the current stream is still to write."""
    start = standard(rng, (300, 40))
    w, late = lib.put(np.zeros_like(start)), lib.put(start)
    opt, cpu = fs.SGD([w], lr=1.0), fs.SGD([start], lr=1.0)
    g = standard(rng, (320, 40))
    on_gpu = lib.put(g)
    with lib.stream():
        if lib.name != "simulated":
            lib.spin()
        w[...] = late
        table = opt.resize(0, 320, init=2.0)
        lib.fill(w, np.nan)
        opt.step([on_gpu])
    expected = cpu.resize(0, 320, init=2.0)
    cpu.step([g])
    assert_same(on_host(table), expected)


def test_what_cannot_grow_changes_nothing(lib: Library, rng: np.random.Generator) -> None:
    w, odd = lib.put(standard(rng, (5, 3))), Interface(lib.put(standard(rng, (5, 3))))
    opt = fs.Adam([w, odd])
    cases: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((0, 4), ValueError, "has 5 rows; it cannot be resized to 4"),
        ((0, 7, lib.put(np.ones((3, 3)))), ValueError, "init has shape (3, 3)"),
        ((0, 7, "x"), TypeError, "init is 'x'"),
        ((1, 7), TypeError, "only arrays of NumPy, CuPy and PyTorch can be resized"),
        ((2, 7), KeyError, "2 is not a parameter"),
    ]
    for (key, count, *init), error, words in cases:
        named = {"init": init[0]} if init else {}
        refused(
            opt,
            [w],
            lambda key=key, count=count, named=named: opt.resize(key, count, **named),
            error,
            words,
        )
        assert opt.params[0] is w
