"""Partial updates on a GPU, anchors and rows, are those on the CPU, bit for bit."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
from devices import Capsule, Interface, Library, assert_same, bfloat16, in_use, on_host
from rules import PLAIN, RULES, Rule
from test_gpu import DTYPES, LAYOUTS, LENGTHS, NEGATIVE, REAL, SHAPES, Pair, needs, standard

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
