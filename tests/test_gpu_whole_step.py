"""What a step on a GPU does besides: averages, copies, clipped values, narrow state, rounding at
random. All with the bits of the CPU, whatever moves and in whatever layout."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
from devices import Library, Mirror, assert_same, bfloat16, in_use, on_host, state_on_host
from rules import PLAIN, ROWWISE, RULES, Rule
from test_gpu import DTYPES, LAYOUTS, LENGTHS, REAL, needs, refused, standard
from test_gpu_rows import dtype_for, layout_for, some_importance, some_rows
from test_gpu_samples import SamplesPair, some_weight
from test_gpu_selections import of_elements, of_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

f32 = np.float32

EVERY = [*RULES, *ROWWISE]
WITH_STATE = [rule for rule in RULES if rule.states]
SHAPES = [*((n,) for n in LENGTHS), (40, 30), (3, 5, 64, 8), (2, 1, 2000), (0, 3)]
BLOCKS = [63, 64, 65, 127, 128, 129, 960, 1087, 1088]
"""Lengths around whole blocks of state in 8 bits."""


@pytest.fixture(scope="module", params=["simulated", *REAL])
def lib(request: pytest.FixtureRequest) -> Iterator[Library]:
    """Each library in turn."""
    yield from in_use(request.param)


class WholePair(SamplesPair):
    """The same with copies, which are mirrored as well; averages must be the same, too."""

    def __init__(
        self,
        lib: Library,
        cls: type[fs.Optimizer],
        params: Sequence[np.ndarray],
        *,
        copies: Sequence[np.ndarray | None] | None = None,
        gpu: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.copies = Mirror(lib)
        likes = copies and [None if x is None else self.copies.like(x) for x in copies]
        on_gpu = {"copies": likes, **(gpu or {})}
        super().__init__(lib, cls, params, cpu={"copies": copies}, gpu=on_gpu, **options)

    def check(self) -> None:
        super().check()
        self.copies.check()
        for ours, theirs in zip(self.gpu._averages, self.cpu._averages, strict=True):
            assert_same(on_host(ours), theirs)


def step_or_refuse(pair: WholePair, grads: Any, **arguments: Any) -> None:
    """A step; or, where it would move a part of a block, both refuse it."""
    try:
        pair.step(grads, **arguments)
    except ValueError as error:
        if "in blocks of 64 elements" not in str(error):
            raise
        likes, _ = pair.mirrored(grads)
        with pytest.raises(ValueError, match="in blocks of 64 elements"):
            pair.gpu.step(likes, **arguments)


def laid_out_as(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Zeros in one piece of memory, whose axes have the order of the array's, as state has them."""
    order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    return np.zeros([array.shape[axis] for axis in order], dtype).transpose(np.argsort(order))


def some_copies(
    rng: np.random.Generator, params: Sequence[np.ndarray], dtypes: Sequence[np.dtype]
) -> list[np.ndarray | None]:
    """Of any dtype."""
    return [
        None if rng.random() < 0.2 else np.zeros(x.shape, dtypes[i % len(dtypes)])
        for i, x in enumerate(params)
    ]


# ---- every rule, dtype, length ------------------------------------------------------------------


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", [None, "float64", "bfloat16", "int8"])
def test_every_rule_dtype_and_length(
    lib: Library, rule: Rule, dtype: np.dtype, state_dtype: str | None, rng: np.random.Generator
) -> None:
    """All at once, on more parameters than a launch takes, some of them anchored."""
    needs(lib, dtype, bfloat16)
    shapes = [*SHAPES, *((n,) for n in BLOCKS)] * 7
    params = [standard(rng, shape, dtype) for shape in shapes]
    if rule in ROWWISE:
        params = [x for x in params if x.ndim]
    pair = WholePair(
        lib,
        rule.cls,
        params,
        copies=some_copies(rng, params, lib.dtypes),
        ema_decay=0.75,
        clip_value=0.5,
        stochastic_rounding=True,
        state_dtype=state_dtype,
        seed=9,
        **rule.options,
    )
    for opt in (pair.cpu, pair.gpu):
        opt.anchor([2.0 if i % 5 == 0 else None for i in range(len(params))])
    for step in range(3):
        kinds = [lib.dtypes[(i + step) % len(lib.dtypes)] for i in range(len(params))]
        grads = [standard(rng, x.shape, kind) for x, kind in zip(params, kinds, strict=True)]
        pair.step(grads, grad_scale=0.7, zero_grad=step == 1)
        pair.check()


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize(
    "option",
    [
        {"ema_decay": 0.9},
        {"copies": bfloat16},
        {"clip_value": 0.3},
        {"state_dtype": "bfloat16"},
        {"state_dtype": "int8"},
        {"stochastic_rounding": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [f32, bfloat16])
def test_one_by_one(
    lib: Library, rule: Rule, option: dict[str, Any], dtype: Any, rng: np.random.Generator
) -> None:
    """None of them needs another."""
    needs(lib, bfloat16)
    params = [standard(rng, shape, dtype) for shape in SHAPES]
    option = dict(option)
    if kind := option.pop("copies", None):
        option["copies"] = [np.zeros(x.shape, kind) for x in params]
    pair = WholePair(lib, rule.cls, params, **option, **rule.options)
    for _ in range(3):
        pair.step([standard(rng, x.shape) for x in params])
        pair.check()


# ---- whatever moves -----------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_combination(lib: Library, data: st.DataObject) -> None:
    """Nothing else is touched, nor what is between the elements."""

    def draw(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    rule = draw(*EVERY)
    shape = data.draw(
        st.one_of(
            st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
            st.tuples(st.integers(1, 70), st.integers(1, 70)),
            st.sampled_from([(1023,), (1025,), (3, 5, 64, 8), (2, 1, 2000), (300, 5), (3, 1025)]),
            st.tuples(st.integers(1, 30), st.sampled_from([64, 128, 192, 1024, 1088])),
            st.sampled_from([(64,), (65,), (640, 3), (5, 2, 64), (4, 16, 5, 8), (1, 64), (64, 1)]),
        )
    )
    w_dtype, g_dtype, copy_dtype = (dtype_for(lib, draw(*DTYPES)) for _ in range(3))
    of_parameter, of_gradient = (layout_for(lib, draw(*sorted(LAYOUTS))) for _ in range(2))
    state_dtypes = [None, "float32", "float64", "int8", "int8", "int8"]
    state_dtypes += ["bfloat16"] * (bfloat16 in lib.dtypes)
    options: dict[str, Any] = {
        "state_dtype": draw(*state_dtypes),
        "stochastic_rounding": draw(True, False),
        "clip_value": draw(None, 0.4),
        "max_norm": draw(None, 0.8),
        "skip_nonfinite": draw(False, True),
        "ema_decay": draw(None, 0.0, 0.3, 0.99, fs.EmaWarmup(0.9)),
        "rows": draw("lazy", "lazy", "exact"),
        "seed": draw(0, 12345678901234567890),
    }
    if options["rows"] == "exact":
        options["ema_decay"] = None
        if options["state_dtype"] == "int8":
            options["rows"] = "lazy"
    rng = np.random.default_rng(8)
    start = of_parameter(standard(rng, shape, w_dtype))
    copies = [laid_out_as(start, copy_dtype)] if draw(True, False) else None
    pair = WholePair(lib, rule.cls, [start], copies=copies, **options, **rule.options)
    if draw(False, True):
        importance = draw(None, [some_importance(rng, shape)])
        for opt in (pair.cpu, pair.gpu):
            opt.anchor(3.0, None, importance)
    for _ in range(3):
        kind = draw("array", "rows", "samples")
        g: Any = of_gradient(standard(rng, shape, g_dtype))
        if kind == "rows":
            g = some_rows(rng, start, 7 if shape[0] else 0, g_dtype)
        elif kind == "samples" and options["rows"] == "lazy":
            values = standard(rng, (3, *shape), g_dtype)
            g = fs.Samples(of_gradient(values), some_weight(rng, 3))
        where: Any = None
        if options["rows"] == "lazy":
            what = draw(None, "rows", "elements", "blocks", "top")
            frozen = draw("freeze", "track")
            if what == "rows":
                where = [fs.Mask(of_rows(rng, shape), frozen=frozen)]
            elif what == "elements" and rule not in ROWWISE:
                where = [fs.Mask(of_elements(rng, shape), frozen=frozen)]
            elif what == "blocks" and rule not in ROWWISE:
                where = fs.RandomBlocks(0.5, draw(1, 7, 64, 1024), frozen=frozen)
            elif what == "top" and kind == "array" and rule not in ROWWISE:
                where = fs.TopK(0.3, draw("gradient", "update"), frozen=frozen)
        step_or_refuse(
            pair, [g], where=where, zero_grad=draw(False, True), grad_scale=draw(1.0, -0.3)
        )
        pair.check()
    if options["rows"] == "exact":
        for opt in (pair.cpu, pair.gpu):
            opt.flush()
        pair.check()


@pytest.mark.parametrize("rule", [*PLAIN, ROWWISE[0]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_catch_up(
    lib: Library, rule: Rule, dtype: np.dtype, rng: np.random.Generator
) -> None:
    """Their copies do as well, whether a step finds them behind or somebody asks for them."""
    needs(lib, dtype, bfloat16)
    params = [standard(rng, (60, n), dtype) for n in (1, 8, 33, 1030)]
    pair = WholePair(
        lib,
        rule.cls,
        params,
        copies=[np.zeros(x.shape, bfloat16) for x in params],
        rows="exact",
        state_dtype="bfloat16",
        stochastic_rounding=True,
        **rule.options,
    )
    for step in range(8):
        pair.step([some_rows(rng, x, 9) for x in params])
        if step == 4:
            for opt in (pair.cpu, pair.gpu):
                opt.catch_up([np.arange(20)] * len(params))
        pair.check()
    for opt in (pair.cpu, pair.gpu):
        opt.flush()
    pair.check()
    if dtype != np.float64:  # which ml_dtypes rounds twice
        for x, like in zip(pair.cpu.params, pair.cpu.copies.values(), strict=True):
            assert_same(like, x.astype(bfloat16))


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_several_devices(lib: Library, state_dtype: str, rng: np.random.Generator) -> None:
    """Each rounds as if it were alone."""
    needs(lib, bfloat16)
    places = {"a": 0, "b": None, "c": 1 if lib.devices() > 1 else 0}
    params = {key: standard(rng, (60, 70), bfloat16) for key in places}
    pair = SamplesPair(
        lib,
        fs.NAdam,
        params,
        places=places,
        state_dtype=state_dtype,
        stochastic_rounding=True,
        clip_value=0.2,
        max_norm=0.5,
        ema_decay=0.5,
        skip_nonfinite=True,
    )
    for step in range(4):
        grads = {key: standard(rng, (60, 70)) for key in places}
        if step == 2:
            grads["c"][-1, -1] = np.nan
        pair.step(grads)
        pair.check()
    for ours, theirs in zip(pair.gpu._averages, pair.cpu._averages, strict=True):
        assert_same(on_host(ours), theirs)


# ---- state in blocks ----------------------------------------------------------------------------

SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 1e-38, -3e-39, 1e37, 3e38, -1e19, 2.0**-60]


@pytest.mark.parametrize("rule", WITH_STATE, ids=str)
@pytest.mark.parametrize("dtype", [f32, np.float64])
def test_strange_numbers_in_blocks(
    lib: Library, rule: Rule, dtype: Any, rng: np.random.Generator
) -> None:
    """Blocks with what is huge or not finite, among others that are all small, or all zeros."""
    params = [standard(rng, n, dtype) for n in (3, 64, 200, 1500)]
    params.append(standard(rng, (40, 50), dtype).T)
    pair = WholePair(lib, rule.cls, params, state_dtype="int8", **rule.options)
    for step in range(6):
        grads = [standard(rng, x.shape, dtype) for x in params]
        for g in grads:
            scales = 10.0 ** rng.uniform(-30, 15, -(-g.size // 64))
            g *= np.repeat(scales, 64)[: g.size].reshape(g.shape) * (rng.random(g.shape) < 0.8)
            if step % 2:
                some = rng.random(g.shape) < 0.01
                g[some] = rng.choice(SPECIAL, np.count_nonzero(some))
        with np.errstate(all="ignore"):
            pair.step(grads)
        pair.check()


@pytest.mark.parametrize("rule", WITH_STATE, ids=str)
@pytest.mark.parametrize("layout", ["c", "transposed", "gappy", "unaligned"])
@pytest.mark.parametrize("columns", [64, 192, 1088])
def test_rows_of_blocks(
    lib: Library, rule: Rule, layout: str, columns: int, rng: np.random.Generator
) -> None:
    """Tables, and the values of rows, in any layout; lists of none, too."""
    params = [LAYOUTS[layout](standard(rng, (40, columns))) for _ in range(3)]
    params.append(LAYOUTS[layout](standard(rng, (5, 2, columns // 2), np.float64)))
    pair = WholePair(lib, rule.cls, params, state_dtype="int8", ema_decay=0.8, **rule.options)
    for step in range(4):
        grads: list[Any] = [some_rows(rng, x, 9) for x in params]
        grads[1].values = LAYOUTS[layout](grads[1].values)
        if step == 1:
            grads[2] = fs.Rows(np.zeros(0, np.int64), np.zeros((0, columns), f32))
        if step == 2:
            grads[0] = standard(rng, params[0].shape)
        pair.step(grads, zero_grad=step == 3)
        pair.check()


@pytest.mark.parametrize("layout", ["c", "transposed", "reversed", "middle axis first"])
@pytest.mark.parametrize("capturable", [False, True])
def test_rows_of_blocks_in_any_layout_with_counts(
    lib: Library, layout: str, capturable: bool, rng: np.random.Generator
) -> None:
    """Tables whose lists are empty count their steps on the GPU, too."""
    make = layout_for(lib, layout)
    params = [make(standard(rng, (30, 4, 16))), make(standard(rng, (7, 64)))]
    gpu = {"capturable": capturable}
    pair = WholePair(lib, fs.NAdam, params, gpu=gpu, state_dtype="int8", skip_nonfinite=True)
    for step in range(6):
        grads = [some_rows(rng, x, step % 3 * 4) for x in params]
        if step == 4:
            grads[1] = standard(rng, (7, 64))
            grads[1][3, 3] = np.inf
        pair.step(grads)
    pair.check()


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize(
    "where",
    [
        fs.RandomBlocks(0.4, block=128),
        fs.CyclicBlocks(3, frozen="track"),
        fs.RandomBlocks(0.5, block=7, frozen="track"),
        fs.TopK(0.3, frozen="track"),
        fs.TopK(0.3, by="update", frozen="track"),
    ],
    ids=repr,
)
def test_parts_of_blocks(
    lib: Library, layout: str, where: fs.Selection, rng: np.random.Generator
) -> None:
    """What is not selected keeps its value, whatever block it is in; some of it is anchored."""
    make = layout_for(lib, layout)
    params = [make(standard(rng, shape)) for shape in [(30, 50), (1000,), (3, 5, 64, 8), (60,)]]
    copies = [laid_out_as(x, np.dtype("f2")) for x in params]
    options = {"ema_decay": 0.9, "max_norm": 1.0, "state_dtype": "int8", "seed": 4}
    pair = WholePair(lib, fs.AdamW, params, copies=copies, **options)
    for opt in (pair.cpu, pair.gpu):
        opt.anchor([2.0, None, 1.0, None])
    for step in range(4):
        grads = [make(standard(rng, x.shape)) for x in params]
        pair.step(grads, where=None if step == 1 else where, zero_grad=step == 2)
        pair.check()


def test_blocks_are_loaded_from_anywhere(lib: Library, rng: np.random.Generator) -> None:
    """On the CPU or on a GPU, of another dtype or of the same; copies and pickles are the same."""
    start, grads = standard(rng, (30, 50)), [standard(rng, (30, 50)) for _ in range(6)]
    options: dict[str, Any] = {"lr": 0.1, "amsgrad": True, "seed": 3}
    saved = {}
    for dtype in ("int8", "float32"):
        opt = fs.Adam([start.copy()], state_dtype=dtype, **options)
        for g in grads[:3]:
            opt.step([g])
        saved[dtype] = opt.state_dict(), on_host(opt.params[0])
    for dtype, (state, w) in saved.items():
        pair = WholePair(lib, fs.Adam, [w.copy()], state_dtype="int8", **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pair.cpu.load_state_dict(state)
            pair.gpu.load_state_dict(state)
        pair.check()
        for g in grads[3:]:
            pair.step([g])
        pair.check()
        again = fs.Adam([w.copy()], state_dtype="int8", **options)
        again.load_state_dict(state_on_host(pair.gpu))
        np.testing.assert_equal(again.state_dict(), pair.cpu.state_dict())
        wide = pair.gpu.state_dict(state_dtype="float32")["state"][0]
        for name, value in pair.cpu.state_dict(state_dtype="float32")["state"][0].items():
            np.testing.assert_equal(wide[name], value)
        narrower = fs.Adam([lib.put(w)], state_dtype=None, **options)
        with pytest.warns(UserWarning, match="from int8 to float32"):
            narrower.load_state_dict(pair.gpu.state_dict())
        np.testing.assert_equal(on_host(narrower.state[0]["exp_avg"]), wide["exp_avg"])
        assert dtype in saved


def test_tables_of_blocks_grow(lib: Library, rng: np.random.Generator) -> None:
    start = standard(rng, (10, 20))
    options = {"state_dtype": "int8", "initial_accumulator_value": 0.5}
    pair = WholePair(lib, fs.Adagrad, [start], **options)
    pair.step([standard(rng, (10, 20))])
    pair.check()
    new = standard(rng, (15, 20))
    tables = [opt.resize(0, 25, init=new) for opt in (pair.cpu, pair.gpu)]
    g = standard(rng, (25, 20))
    pair.cpu.step([g])
    pair.gpu.step([lib.put(g)])
    assert_same(on_host(tables[1]), tables[0])
    np.testing.assert_equal(state_on_host(pair.gpu)["state"], pair.cpu.state_dict()["state"])


def test_parts_of_blocks_are_refused(lib: Library, rng: np.random.Generator) -> None:
    w, g = (lib.put(standard(rng, (20, 60))) for _ in range(2))
    opt = fs.Adam(w, state_dtype="int8")
    opt.step(g)
    rows = fs.Rows([1], lib.put(np.ones((1, 60), f32)))
    for grads, where in (
        (g, np.arange(20) < 3),
        (g, fs.TopK(0.1)),
        (g, fs.RandomBlocks(0.5, block=100)),
        (rows, None),
        (rows, fs.Mask(np.arange(20) < 3, frozen="track")),
    ):
        call = lambda: opt.step([grads], where=where)  # noqa: B023, E731
        refused(opt, [w, g], call, ValueError, "in blocks of 64 elements")


# ---- counts on the GPU, and graphs --------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "ema_decay": 0.9,
    "clip_value": 0.3,
    "stochastic_rounding": True,
    "seed": 77,
}
NARROW = ["bfloat16", "int8"]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("common", [{}, {"max_norm": 0.5, "skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("state_dtype", NARROW)
def test_counts_on_the_gpu(
    lib: Library,
    rule: Rule,
    common: dict[str, Any],
    state_dtype: str,
    rng: np.random.Generator,
) -> None:
    """Random numbers depend on how often a parameter has moved, which only the GPU knows."""
    needs(lib, bfloat16)
    dtypes = [bfloat16, f32, np.float64, np.float16] * 100
    params = [standard(rng, 5 + i % 3, dtype) for i, dtype in enumerate(dtypes)]
    pair = WholePair(
        lib,
        rule.cls,
        params,
        copies=[np.zeros(x.shape, np.float16) for x in params],
        gpu={"capturable": True},
        state_dtype=state_dtype,
        **common,
        **EVERYTHING,
        **rule.options,
    )
    for step in range(5):
        grads: list[Any] = [None if rng.random() < 0.3 else standard(rng, x.shape) for x in params]
        if step == 2 and common:
            grads[7] = np.full(params[7].shape, np.nan, f32)
        pair.step(grads)
        if step == 3:  # the host says how far they have come
            for opt in (pair.cpu, pair.gpu):
                opt.load_state_dict(opt.state_dict())
    pair.check()


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("state_dtype", NARROW)
def test_replays_are_steps(
    lib: Library, rule: Rule, state_dtype: str, rng: np.random.Generator
) -> None:
    """Each rounds by random numbers of its own."""
    needs(lib, bfloat16)
    params = [standard(rng, 1500, bfloat16), standard(rng, (30, 40), f32)]
    pair = WholePair(
        lib,
        rule.cls,
        params,
        copies=[None, np.zeros((30, 40), bfloat16)],
        gpu={"capturable": True},
        state_dtype=state_dtype,
        **EVERYTHING,
        **rule.options,
    )
    grads = [standard(rng, x.shape) for x in params]
    memory = [lib.put(g) for g in grads]
    pair.cpu.step(grads)
    pair.gpu.step(memory)
    replay = lib.capture(lambda: pair.gpu.step(memory))
    for _ in range(3):
        replay()
        pair.cpu.step(grads)
        pair.check()


@pytest.mark.parametrize(
    "option",
    [{"stochastic_rounding": True}, {"state_dtype": "bfloat16"}, {"state_dtype": "int8"}],
    ids=str,
)
def test_a_graph_that_would_round_alike_is_refused(lib: Library, option: dict[str, Any]) -> None:
    """Without capturable=True every replay would draw the same random numbers."""
    needs(lib, bfloat16)
    w, g = (lib.put(np.ones(5, bfloat16)) for _ in range(2))
    opt = fs.SGD([w], lr=0.5, momentum=0.5, **option)
    opt.step([g])
    message = "create the optimizer with capturable=True"
    call = lambda: lib.capture(lambda: opt.step([g]))  # noqa: E731
    refused(opt, [w, g], call, RuntimeError, "captured", message)
    opt.step([g])


# ---- averages -----------------------------------------------------------------------------------


def test_a_decay_that_changes(lib: Library, rng: np.random.Generator) -> None:
    params = [standard(rng, 3000), standard(rng, (40, 50), np.float64)]
    pair = WholePair(lib, fs.Adam, params, lr=0.1, ema_decay=lambda step: step / 10)
    for step in range(6):
        if step == 4:
            pair.cpu.ema_decay = pair.gpu.ema_decay = 0.5
        pair.step([standard(rng, x.shape) for x in params])
        pair.check()


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
def test_swapped_averages(lib: Library, options: dict[str, Any], rng: np.random.Generator) -> None:
    """The parameters and their copies hold the averages' values, until the block ends."""
    start = standard(rng, (30, 40))
    w, like = lib.put(start), lib.put(np.zeros((30, 40), np.float16))
    opt = fs.SGD([w], lr=1.0, ema_decay=0.5, copies=[like], **options)
    opt.step([lib.full((30, 40), 2.0, "float32")])
    moved, averages = on_host(w), on_host(opt.averages[0])
    assert lib.is_own(opt.averages[0])
    assert_same(moved, start - f32(2))
    with opt.swap_averages():
        assert_same(on_host(w), averages)
        assert_same(on_host(like), averages.astype(np.float16))
        with pytest.raises(RuntimeError, match="swap_averages"):
            opt.step([w])
    assert_same(on_host(w), moved)
    assert_same(on_host(like), moved.astype(np.float16))


def test_a_copy_elsewhere_is_refused(lib: Library) -> None:
    w = lib.put(np.ones(3, f32))
    with pytest.raises(ValueError, match="the copy of parameter 0 is on cpu; expected cuda:0"):
        fs.SGD([w], copies=[np.zeros(3, f32)])
