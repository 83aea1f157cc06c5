"""A step on a GPU is the step on the CPU, bit for bit, whatever library the arrays are of.

Each test runs with CuPy's double over kernels that are simulated in the host's memory, and, marked
``gpu``, with CuPy and with torch where there is a GPU.
"""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
from concurrency import in_threads
from devices import (
    Capsule,
    Interface,
    Library,
    Mirror,
    assert_same,
    bfloat16,
    in_use,
    library,
    on_host,
    simulate,
    state_on_host,
)
from fusestep import functional as F  # noqa: N812
from rules import PLAIN, RULES, Rule
from strategies import GRAD_SCALES, MAX_NORMS, ORDERS, SHAPE_LISTS, dtype_lists

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

f32 = np.float32
DTYPES = [np.dtype(name) for name in ("f8", "f4", "f2")] + [bfloat16]
REAL = [
    pytest.param(
        name,
        marks=[
            pytest.mark.gpu,
            # What the libraries have to say: from C, it comes as if from here.
            pytest.mark.filterwarnings("ignore::DeprecationWarning"),
            pytest.mark.filterwarnings("ignore:::(cupy|torch|numba)"),
        ],
    )
    for name in ("cupy", "torch")
]

on_real_gpus = pytest.mark.parametrize("lib", REAL, indirect=True)
with_cupy = pytest.mark.parametrize("lib", REAL[:1], indirect=True)
with_torch = pytest.mark.parametrize("lib", REAL[1:], indirect=True)
in_simulation = pytest.mark.parametrize("lib", ["simulated"], indirect=True)


@pytest.fixture(scope="module", params=["simulated", *REAL])
def lib(request: pytest.FixtureRequest) -> Iterator[Library]:
    """Each library in turn."""
    yield from in_use(request.param)


def needs(lib: Library, *dtypes: np.dtype) -> None:
    for dtype in dtypes:
        if dtype not in lib.dtypes:
            pytest.skip(f"this {lib.name} has no {dtype}")


def needs_two(lib: Library) -> None:
    if lib.devices() < 2:
        pytest.skip("needs two GPUs")


class Pair:
    """An optimizer of NumPy arrays, and its like on a GPU, that take the same steps.

    Parameters
    ----------
    params
        NumPy arrays, which are mirrored: a list or a dict.
    places
        The GPU that each is on, by position or name; None is the CPU. All on GPU 0 without it.
    cpu, gpu
        Options of the one on the CPU, and of the one on the GPU, alone.
    """

    def __init__(
        self,
        lib: Library,
        cls: type[fs.Optimizer],
        params: Any,
        *,
        places: Any = None,
        cpu: dict[str, Any] | None = None,
        gpu: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.lib = lib
        named = params if isinstance(params, dict) else dict(enumerate(params))
        self.places = {key: 0 if places is None else places[key] for key in named}
        likes, self.mirrors = self.mirrored(params)
        self.cpu = cls(params, **options, **cpu or {})
        self.gpu = cls(likes, **options, **gpu or {})

    def mirrored(self, arrays: Any) -> tuple[Any, list[Mirror]]:
        mirrors = {place: Mirror(self.lib, place) for place in set(self.places.values())}

        def like(key: Any, array: Any) -> Any:
            return None if array is None else mirrors[self.places[key]].like(array)

        if isinstance(arrays, dict):
            return {key: like(key, x) for key, x in arrays.items()}, [*mirrors.values()]
        return [like(i, x) for i, x in enumerate(arrays)], [*mirrors.values()]

    def step(self, grads: Any, **arguments: Any) -> None:
        """Both step; gradients must be the same afterwards, too."""
        likes, mirrors = self.mirrored(grads)
        self.cpu.step(grads, **arguments)
        self.gpu.step(likes, **arguments)
        for mirror in mirrors:
            mirror.check()

    def check(self) -> None:
        """Parameters, state and counters are the same, and state is where it belongs."""
        for mirror in self.mirrors:
            mirror.check()
        assert (self.gpu.steps, self.gpu.skipped_steps) == (self.cpu.steps, self.cpu.skipped_steps)
        ours, theirs = self.gpu.state, self.cpu.state
        assert list(ours) == list(theirs)
        for key, entry in theirs.items():
            assert list(ours[key]) == list(entry)
            for name, value in entry.items():
                if not isinstance(value, np.ndarray):
                    assert ours[key][name] == value, (key, name)
                    continue
                assert_same(on_host(ours[key][name]), value)
                if self.places[key] is None:
                    assert isinstance(ours[key][name], np.ndarray)
                else:
                    assert self.lib.is_own(ours[key][name])
                    assert self.lib.device_of(ours[key][name]) == self.places[key]


def standard(rng: np.random.Generator, shape: Any, dtype: Any = f32) -> np.ndarray:
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def in_one_block(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The same arrays of one dimension and dtype, one right after the other: seldom aligned."""
    block = np.concatenate(arrays)
    return np.split(block, np.cumsum([array.size for array in arrays])[:-1])


def refused(
    opt: fs.Optimizer | None,
    arrays: Sequence[Any],
    call: Callable[[], Any],
    error: type[Exception],
    *words: str,
) -> None:
    """`call` raises, says these words, and changes neither arrays nor state."""
    before = [on_host(array).copy() for array in arrays], opt and state_on_host(opt)
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    for array, old in zip(arrays, before[0], strict=True):
        assert_same(on_host(array), old)
    np.testing.assert_equal(opt and state_on_host(opt), before[1])


# ---- every rule, dtype, length ------------------------------------------------------------------

LENGTHS = [0, 1, 3, 4, 5, 255, 256, 257, 1023, 1024, 1025, 4099]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rule_dtype_and_length(
    lib: Library, rule: Rule, dtype: np.dtype, rng: np.random.Generator
) -> None:
    """With gradients of every dtype; aligned, and not."""
    needs(lib, dtype)

    def arrays(kinds: Sequence[np.dtype]) -> list[np.ndarray]:
        apart = [standard(rng, n, kind) for kind in kinds for n in LENGTHS]
        blocks = [in_one_block([standard(rng, n, kind) for n in LENGTHS]) for kind in kinds]
        return [*apart, *itertools.chain(*blocks)]

    pair = Pair(lib, rule.cls, arrays([dtype] * len(lib.dtypes)), **rule.options)
    for _ in range(4):
        pair.step(arrays(lib.dtypes))
    pair.check()


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_state_of_another_dtype(lib: Library, rule: Rule, rng: np.random.Generator) -> None:
    for state_dtype, dtype in [("float64", "f4"), ("float64", "f2"), ("float32", "f8")]:
        params = [standard(rng, n, dtype) for n in (5, 1030)]
        pair = Pair(lib, rule.cls, params, state_dtype=state_dtype, **rule.options)
        for _ in range(3):
            pair.step([standard(rng, n, "f4") for n in (5, 1030)], grad_scale=0.37)
        pair.check()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_every_magnitude(
    lib: Library, rule: Rule, dtype: np.dtype, rng: np.random.Generator
) -> None:
    """Any bits at all: subnormal numbers, infinities, quotients and roots of every exponent."""
    needs(lib, dtype)

    def any_bits() -> np.ndarray:
        return rng.integers(0, 2 ** (8 * dtype.itemsize), 20_000, f"u{dtype.itemsize}").view(dtype)

    pair = Pair(lib, rule.cls, [any_bits(), standard(rng, 20_000, dtype)], **rule.options)
    for step in range(4):
        tiny = np.ldexp(standard(rng, 20_000, "f8"), -149 if step % 2 else -30).astype(dtype)
        pair.step([any_bits(), tiny])
    pair.check()


@pytest.mark.parametrize("dtype", [np.dtype("f2"), bfloat16], ids=str)
def test_every_sixteen_bit_value_goes_in_and_out(lib: Library, dtype: np.dtype) -> None:
    needs(lib, dtype)
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    pair = Pair(lib, fs.SGD, [every.copy(), np.zeros(2**16, f32)], lr=0.0)
    pair.step([np.zeros(2**16, dtype), every])
    pair.check()
    with np.errstate(invalid="ignore"):  # signalling NaNs among them
        numbers = ~np.isnan(every)
    assert_same(on_host(pair.gpu.params[0])[numbers], every[numbers])


@pytest.mark.parametrize("dtype", [np.dtype("f2"), bfloat16], ids=str)
@pytest.mark.parametrize("computed", ["f4", "f8"])
def test_rounding_to_sixteen_bits(
    lib: Library, dtype: np.dtype, computed: str, rng: np.random.Generator
) -> None:
    """Ties, their neighbours, overflow, subnormal results."""
    needs(lib, dtype)
    with np.errstate(all="ignore"):
        every = np.arange(2**16, dtype=np.uint16).view(dtype).astype("f8")
        every = np.unique(every[np.isfinite(every)])
        ties = (every[1:] + every[:-1]) / 2
        beside = [np.nextafter(ties.astype(computed), to) for to in (np.inf, -np.inf)]
        values = np.concatenate([every, ties, *beside, 2 * every[[0, -1]]]).astype(computed)
    state = "float64" if computed == "f8" else None
    options = {"lr": 1.0, "momentum": 0.5, "state_dtype": state}
    pair = Pair(lib, fs.SGD, [np.zeros(values.size, dtype)], **options)
    pair.step([values])
    pair.check()


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"max_norm": 0.5}, {"skip_nonfinite": True}, {"capturable": True}], ids=str
)
def test_a_thousand_small_arrays(
    lib: Library, rule: Rule, options: dict[str, Any], rng: np.random.Generator
) -> None:
    """More than a launch can take, of all dtypes, dense and strided, of very different ages."""
    count = 1000
    shapes = [(int(n),) if n % 3 else (int(n) // 3, 3) for n in rng.integers(0, 40, count)]
    dtypes = rng.choice(["f8", "f4", "f2"], (2, count), p=[0.1, 0.7, 0.2])
    strided = rng.random(count) < 0.2

    def arrays(kinds: Sequence[str]) -> list[np.ndarray]:
        made: list[Any] = [None] * count
        for kind in ("f8", "f4", "f2"):
            places = [i for i in range(count) if kinds[i] == kind]
            parts = in_one_block([standard(rng, math.prod(shapes[i]), kind) for i in places])
            for i, part in zip(places, parts, strict=True):
                shape = shapes[i]
                turned = strided[i] and len(shape) > 1
                made[i] = part.reshape(shape[::-1]).T if turned else part.reshape(shape)
        return made

    capturable = {"capturable": options.get("capturable", False)}
    common = {k: v for k, v in options.items() if k != "capturable"}
    pair = Pair(lib, rule.cls, arrays(dtypes[0]), gpu=capturable, **common, **rule.options)
    for _ in range(4):
        grads = arrays(dtypes[1])
        absent = rng.random(count) < 0.3
        pair.step([None if absent[i] else g for i, g in enumerate(grads)], zero_grad=True)
    pair.check()
    assert len({entry["step"] for entry in pair.gpu.state.values()}) == 5


def test_sums_of_sums_of_sums(lib: Library, rng: np.random.Generator) -> None:
    """More than 1,024 tiles: a norm of two levels. In float64, which shows its last bit."""
    sizes = (3, 1024 * 1024 + 5, 70_000)
    params = [standard(rng, n, "f8") for n in sizes]
    pair = Pair(lib, fs.Adam, params, max_norm=1.0, skip_nonfinite=True)
    for _ in range(2):
        pair.step([standard(rng, n, "f4") * f32(rng.random()) for n in sizes])
    pair.check()
    grads = [standard(rng, n, "f4") for n in sizes]
    grads[1][-1] = np.nan
    pair.step(grads)
    pair.check()
    assert pair.gpu.skipped_steps == 1


# ---- layouts ------------------------------------------------------------------------------------


def _gappy(a: np.ndarray) -> np.ndarray:
    wide = np.full(tuple(2 * n + 1 for n in a.shape), 7, a.dtype)
    view = wide[(*(slice(1, None, 2) for _ in a.shape), ...)]
    view[...] = a
    return view


def _reversed(a: np.ndarray) -> np.ndarray:
    backwards = (*(slice(None, None, -1) for _ in a.shape), ...)
    return a[backwards].copy()[backwards]


def _turned(a: np.ndarray) -> np.ndarray:
    axis = a.ndim // 2
    return np.moveaxis(np.moveaxis(a, axis, 0).copy(), 0, axis) if a.ndim else a.copy()


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "c": lambda a: a.copy(),
    "fortran": lambda a: np.array(a, order="F"),
    "transposed": lambda a: a.T.copy().T,
    "gappy": _gappy,
    "reversed": _reversed,
    "columns reversed": lambda a: a[..., ::-1].copy()[..., ::-1] if a.ndim else a.copy(),
    "middle axis first": _turned,
    "unaligned": lambda a: np.concatenate([a.ravel()[:1], a.ravel()])[min(1, a.size) :].reshape(
        a.shape
    ),
}
NEGATIVE = {"reversed", "columns reversed"}
SHAPES = st.one_of(
    st.lists(st.integers(0, 9), max_size=5).map(tuple),
    st.tuples(st.integers(30, 70), st.integers(30, 70)),
    st.sampled_from([(3, 5, 64, 80), (270, 260), (1, 2000, 1)]),
)


@settings(max_examples=150, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    shape=SHAPES,
    parameter=st.sampled_from(sorted(LAYOUTS)),
    gradients=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=2, max_size=3),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    zero_grad=st.booleans(),
    options=st.sampled_from([{}, {"max_norm": 0.7}, {"skip_nonfinite": True}]),
)
def test_any_layout(
    lib: Library,
    rule: Rule,
    shape: tuple[int, ...],
    parameter: str,
    gradients: list[str],
    dtypes: tuple[np.dtype, np.dtype],
    zero_grad: bool,
    options: dict[str, Any],
) -> None:
    """The bits of the CPU, and nothing between the elements is touched."""
    layouts = [parameter, *gradients]
    if not lib.has_negative_strides:
        layouts = ["gappy" if layout in NEGATIVE else layout for layout in layouts]
    w_dtype, g_dtype = (dtype if dtype in lib.dtypes else np.dtype("f2") for dtype in dtypes)
    rng = np.random.default_rng(3)
    start = LAYOUTS[layouts[0]](standard(rng, shape, w_dtype))
    pair = Pair(lib, rule.cls, [start], **options, **rule.options)
    for layout in layouts[1:]:
        pair.step([LAYOUTS[layout](standard(rng, shape, g_dtype))], zero_grad=zero_grad)
    pair.check()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0, "skip_nonfinite": True}], ids=str)
def test_zero_dimensional_and_empty_arrays(
    lib: Library, shape: tuple[int, ...], options: dict[str, Any], rng: np.random.Generator
) -> None:
    """Alone, and beside another one."""
    for others in ([], [(7,)]):
        shapes = [shape, *others]
        pair = Pair(lib, fs.NAdam, [standard(rng, s) for s in shapes], **options)
        for _ in range(3):
            pair.step([standard(rng, s) for s in shapes], zero_grad=True)
        pair.check()
        assert [entry["step"] for entry in pair.gpu.state.values()] == [3] * len(shapes)


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_broadcast_gradients(lib: Library, rule: Rule, rng: np.random.Generator) -> None:
    shapes = [(40, 50), (50, 40), (3, 4, 5), (2000,)]
    pair = Pair(lib, rule.cls, [standard(rng, s, "f8") for s in shapes], max_norm=3.0)
    for _ in range(3):
        pair.step(
            [
                np.broadcast_to(standard(rng, 50), shapes[0]),
                np.broadcast_to(standard(rng, (50, 1)), shapes[1]),
                np.broadcast_to(standard(rng, (4, 1)), shapes[2]),
                np.broadcast_to(standard(rng, ()), shapes[3]),
            ]
        )
    pair.check()


def test_columns_as_parameters(lib: Library, rng: np.random.Generator) -> None:
    """Interleaved in one block of memory; half of them are frozen."""
    weights, gradients = standard(rng, (30, 80)), standard(rng, (30, 80))
    pair = Pair(lib, fs.Adam, [weights[:, i] for i in range(0, 80, 2)])
    for _ in range(2):
        pair.step([gradients[:, i + 1] for i in range(0, 80, 2)], zero_grad=True)
    pair.check()
    assert gradients[:, ::2].all()


def test_state_has_the_layout_of_the_parameter(lib: Library) -> None:
    w = Mirror(lib).like(np.zeros((4, 3, 5), f32).transpose(2, 0, 1))
    opt = fs.Adam([w])
    opt.step([lib.full((5, 4, 3), 1.0, "float32")])
    for name in ("exp_avg", "exp_avg_sq"):
        state = opt.state[0][name]
        strides = state.stride() if lib.name == "torch" else state.strides
        assert tuple(strides) == tuple(w.stride() if lib.name == "torch" else w.strides)


# ---- what a step may be asked -------------------------------------------------------------------


def test_one_array_list_and_dict_are_the_same_step(lib: Library, rng: np.random.Generator) -> None:
    start, g = standard(rng, (2, 5, 3))
    expected = start.copy()
    fs.Adam(expected).step(g)
    one, listed, generated, named = (lib.put(start) for _ in range(4))
    gradient = lib.put(g)
    assert fs.Adam(one).step(gradient) is None
    fs.Adam([listed]).step((gradient,))
    fs.Adam(x for x in [generated]).step([gradient])
    opt = fs.Adam({"W": named})
    opt.step({"W": gradient})
    for array in (one, listed, generated, named):
        assert_same(on_host(array), expected)
    assert opt.params["W"] is named
    assert repr(opt) == repr(fs.Adam({"W": start}))


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}], ids=str)
def test_none_leaves_parameter_and_state_and_age(
    lib: Library, rule: Rule, options: dict[str, Any], rng: np.random.Generator
) -> None:
    params = {key: standard(rng, 1030) for key in "abcd"}
    pair = Pair(lib, rule.cls, params, **options, **rule.options)
    for names in ("ab", "b", "", "abc", "ca", "b"):
        pair.step({key: standard(rng, 1030) for key in names})
        pair.check()
    pair.step({"a": None, "b": standard(rng, 1030)})
    pair.step({})
    pair.check()
    assert [pair.gpu.state[key]["step"] for key in "abcd"] == [3, 5, 2, 0]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("common", [{}, {"skip_nonfinite": True}], ids=str)
def test_arguments_and_attributes(
    lib: Library, rule: Rule, common: dict[str, Any], rng: np.random.Generator
) -> None:
    """lr, grad_scale, zero_grad; every hyper-parameter that may be assigned between steps."""
    sizes = (3, 1030)

    def step(**arguments: Any) -> None:
        pair.step([standard(rng, n, "f2") for n in sizes], **arguments)
        pair.check()

    params = [standard(rng, n) for n in sizes]
    pair = Pair(lib, rule.cls, params, maximize=True, **common, **rule.options)
    step()
    step(lr=0.25)
    step(grad_scale=-1 / 3, zero_grad=True)
    changes = {
        "lr": 0.03,
        "maximize": False,
        "weight_decay": 0.07,
        "betas": (0.7, 0.97),
        "eps": 1e-3,
        "momentum": 0.5,
        "dampening": 0.25,
        "momentum_decay": 0.02,
        "lr_decay": 0.1,
        "max_norm": 0.5,
    }
    assigned = 0
    for name, value in changes.items():
        if name not in rule.cls._fields():
            continue
        try:
            setattr(pair.cpu, name, value)
        except ValueError:  # it decides the state, or does not go with another one
            with pytest.raises(ValueError, match=name):
                setattr(pair.gpu, name, value)
            continue
        setattr(pair.gpu, name, value)
        assigned += 1
        step()
    assert assigned >= 4
    pair.cpu.max_norm = pair.gpu.max_norm = None
    step()
    assert repr(pair.gpu) == repr(pair.cpu)


@pytest.mark.parametrize("common", [{}, {"skip_nonfinite": True}], ids=str)
def test_a_schedule_counts_the_steps_that_were_taken(
    lib: Library, common: dict[str, Any], rng: np.random.Generator
) -> None:
    seen: list[int] = []

    def schedule(step: int) -> float:
        seen.append(step)
        return 1 / (1 + step)

    pair = Pair(lib, fs.Adam, {"a": standard(rng, 9), "b": standard(rng, 9)}, lr=schedule, **common)
    for bad in (False, True, False, False):
        g = standard(rng, 9)
        if bad and common:
            g[3] = np.inf
        pair.step({"b": g})
    pair.step({})
    pair.check()
    assert seen[::2] == seen[1::2]  # the host's, the GPU's, ...
    assert seen[::2] == ([0, 1, 1, 2, 3] if common else [0, 1, 2, 3, 4])


def test_one_gradient_for_two_parameters(lib: Library) -> None:
    params, g = [lib.full(5, 0, "float32") for _ in range(2)], lib.full(5, 1, "float32")
    opt = fs.SGD(params, lr=1.0)
    opt.step([g, g])
    for w in params:
        assert_same(on_host(w), np.full(5, -1, f32))
    refused(
        opt, [*params, g], lambda: opt.step([g, g], zero_grad=True), ValueError, "two gradients"
    )


def test_references_are_given_back(lib: Library) -> None:
    w, g = (lib.full(5, 1, "float32") for _ in range(2))
    wrapped, capsule = Interface(g), Capsule(lib, g)
    counted = [w, g, wrapped, capsule]
    counts = [sys.getrefcount(x) for x in counted]
    opt = fs.Adam([w], skip_nonfinite=True)

    def work(opt: fs.Optimizer) -> None:
        for gradient in (g, wrapped, capsule) * 10:
            opt.step([gradient])
            with pytest.raises(ValueError, match="negative"):
                opt.step([gradient], lr=-1.0)

    work(opt)
    gc.collect()
    assert [sys.getrefcount(x) for x in counted][1:] == counts[1:]
    del opt
    gc.collect()
    assert [sys.getrefcount(x) for x in counted] == counts


# ---- clipping and skipping ----------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    rule=st.sampled_from(PLAIN),
    shapes=SHAPE_LISTS,
    dtypes=dtype_lists(8),
    common=st.fixed_dictionaries(
        {
            "max_norm": st.sampled_from([None, *MAX_NORMS]),
            "skip_nonfinite": st.booleans(),
            "maximize": st.booleans(),
        }
    ),
    grad_scale=st.sampled_from([*GRAD_SCALES, 0.0]),
    order=ORDERS,
)
def test_clipping(
    lib: Library,
    rule: Rule,
    shapes: list[tuple[int, ...]],
    dtypes: list[str],
    common: dict[str, Any],
    grad_scale: float,
    order: Any,
) -> None:
    rng = np.random.default_rng(0)
    params = [standard(rng, s, d) for s, d in zip(shapes, dtypes, strict=False)]
    pair = Pair(lib, rule.cls, params, **common, **rule.options)
    for _ in range(2):
        grads = [standard(rng, s, d) for s, d in zip(shapes, dtypes[4:], strict=False)]
        pair.step([np.array(g, order=order) for g in grads], grad_scale=grad_scale)
    pair.check()


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2"])
@pytest.mark.parametrize("gradient", ["f8", "f4", "f2"])
@pytest.mark.parametrize("value", [1e300, 1e160, 3e38, 1e30, 1e-42, 1e-170, 1e-300, 5e-324])
def test_norms_neither_overflow_nor_vanish(
    lib: Library, dtype: str, gradient: str, value: float, rng: np.random.Generator
) -> None:
    """Squares that do not fit in a float64; float64 gradients of float32 parameters, too."""
    pair = Pair(lib, fs.SGD, [standard(rng, 1500, dtype)], lr=1.0, max_norm=1e3)
    pair.cpu.skip_nonfinite = pair.gpu.skip_nonfinite = True
    with np.errstate(over="ignore"):
        grads = [(value * rng.standard_normal(1500)).astype(gradient) for _ in range(2)]
    for g in grads:
        pair.step([g], grad_scale=1e-3)
        pair.check()
    pair.cpu.skip_nonfinite = pair.gpu.skip_nonfinite = False
    pair.step([grads[0]])
    pair.check()


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["f8", "f4", "f2"])
def test_what_is_not_finite_spreads_without_skipping(
    lib: Library, rule: Rule, bad: float, dtype: str, rng: np.random.Generator
) -> None:
    params = [standard(rng, n, dtype) for n in (3, 1500)]
    pair = Pair(lib, rule.cls, params, max_norm=1.0, **rule.options)
    for where in (None, 1499, 0):
        grads = [standard(rng, n, dtype) for n in (3, 1500)]
        if where is not None:
            grads[1][where] = bad
        pair.step(grads)
        pair.check()
    assert pair.gpu.steps == 3


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["f8", "f4", "f2"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_skipping(
    lib: Library,
    rule: Rule,
    bad: float,
    dtype: str,
    max_norm: float | None,
    rng: np.random.Generator,
) -> None:
    """From the first step on, which is the first for momentum only once it has been taken."""
    params = {"a": standard(rng, 3, dtype), "b": standard(rng, 1500, dtype)}
    common = {"skip_nonfinite": True, "max_norm": max_norm}
    pair = Pair(lib, rule.cls, params, **common, **rule.options)
    taken = 0
    for where in (0, None, 1023, 1024, None, 1499, None):
        grads = {key: standard(rng, p.shape, dtype) for key, p in params.items()}
        if where is not None:
            grads["b"][where] = bad
        pair.step(grads, zero_grad=where == 1024)  # checks that they are cleared, too
        taken += where is None
        pair.check()
        assert pair.gpu.steps == taken
        assert pair.gpu.state["a"]["step"] == taken
    assert pair.gpu.skipped_steps == 4


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_skipping_is_turned_on_and_off(lib: Library, rule: Rule, rng: np.random.Generator) -> None:
    """Where the counts are kept, on the host or on the GPU, makes no difference."""
    sizes = (3, 1030)
    pair = Pair(lib, rule.cls, [standard(rng, n) for n in sizes], **rule.options)
    for skips, bad in itertools.product((False, True, False, True), (False, True, False)):
        pair.cpu.skip_nonfinite = pair.gpu.skip_nonfinite = skips
        grads = [standard(rng, n) for n in sizes]
        if bad and skips:
            grads[1][rng.integers(1030)] = np.nan
        pair.step([grads[0] if rng.random() < 0.7 else None, grads[1]])
    assert pair.gpu.steps == 10  # nobody has asked before
    pair.check()
    assert pair.gpu.skipped_steps == 2


def test_nothing_changes_where_a_step_is_skipped(lib: Library, rng: np.random.Generator) -> None:
    pair = Pair(lib, fs.NAdam, [standard(rng, 5)], skip_nonfinite=True)
    pair.step([standard(rng, 5)])
    w, before = pair.gpu.params[0], state_on_host(pair.gpu)
    old = on_host(w).copy()
    bad = standard(rng, 5)
    bad[2] = np.nan
    pair.gpu.step([lib.put(bad)])
    assert_same(on_host(w), old)
    after = state_on_host(pair.gpu)
    assert after["fusestep"].pop("skipped_steps") == 1
    assert before["fusestep"].pop("skipped_steps") == 0
    np.testing.assert_equal(after, before)


# ---- CUDA graphs --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    "common", [{}, {"max_norm": 0.5, "skip_nonfinite": True}, {"state_dtype": "float64"}], ids=str
)
def test_capturable_gives_the_same_bits(
    lib: Library, rule: Rule, common: dict[str, Any], rng: np.random.Generator
) -> None:
    params = {"a": standard(rng, 3), "b": standard(rng, 1500, "f2"), "c": standard(rng, 7, "f8")}
    pair = Pair(lib, rule.cls, params, gpu={"capturable": True}, **common, **rule.options)
    assert pair.gpu.capturable
    for step, names in enumerate(["abc", "ab", "b", "abc", "c", "abc"]):
        grads = {key: standard(rng, params[key].shape, "f4") for key in names}
        if step == 3 and "max_norm" in common:
            grads["b"][1200] = np.nan
        if step == 2:
            pair.cpu.lr = pair.gpu.lr = 0.02
        arguments = {"lr": 0.125} if step in (1, 4) else {}
        pair.step(grads, grad_scale=0.7, **arguments)
        if step % 2:
            pair.check()
    pair.check()
    assert pair.gpu.lr == 0.02


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("common", [{}, {"max_norm": 0.5, "skip_nonfinite": True}], ids=str)
def test_replays_are_steps(
    lib: Library, rule: Rule, common: dict[str, Any], rng: np.random.Generator
) -> None:
    """With other gradients and another learning rate each time, without the host."""
    sizes = (3, 1500)
    params = [standard(rng, n) for n in sizes]
    pair = Pair(lib, rule.cls, params, gpu={"capturable": True}, **common, **rule.options)
    memory = [lib.put(standard(rng, n)) for n in sizes]  # where the graph finds its gradients

    def gradients(bad: bool = False) -> None:
        grads = [standard(rng, n) for n in sizes]
        if bad:
            grads[1][700] = np.inf
        for g, values in zip(memory, grads, strict=True):
            lib.set(g, values)
        pair.cpu.step(grads, grad_scale=0.5)

    def step() -> None:
        pair.gpu.step(memory, grad_scale=0.5)

    with lib.stream():  # warming up, on a stream beside
        gradients()
        step()
    pair.check()
    gradients()
    replay = lib.capture(step)
    replay()
    pair.check()
    for i in range(6):
        pair.cpu.lr = pair.gpu.lr = 0.1 / (2 + i)
        gradients(bad=i == 3 and bool(common))
        replay()
        if i % 2:
            pair.check()
    gradients()
    step()  # as without a graph
    gradients()
    replay()
    pair.check()
    assert pair.gpu.steps == pair.cpu.steps == 10 - bool(common)


def test_a_graph_of_several_steps_and_arrays(lib: Library, rng: np.random.Generator) -> None:
    params = [standard(rng, 40, "f2") for _ in range(500)]
    pair = Pair(lib, fs.Adam, params, gpu={"capturable": True}, max_norm=1.0)
    grads = [standard(rng, 40) for _ in params]
    likes, _ = pair.mirrored(grads)

    def step() -> None:
        pair.gpu.step(likes)
        pair.gpu.step(likes[:250] + [None] * 250)

    with lib.stream():
        step()
    replay = lib.capture(step)
    for _ in range(3):
        replay()
    for _ in range(4):
        pair.cpu.step(grads)
        pair.cpu.step(grads[:250] + [None] * 250)
    pair.check()


@pytest.mark.parametrize(
    "make",
    [
        lambda w: fs.SGD(w, lr=0.1),
        lambda w: fs.SGD(w, lr=0.1, momentum=0.9),
        lambda w: fs.NAG(w, lr=0.1),
        lambda w: fs.SGD(w, lr=0.1, max_norm=1.0),
    ],
    ids=["SGD", "momentum", "NAG", "clipped"],
)
def test_steps_that_do_not_age_may_be_captured(
    lib: Library, make: Callable[[Any], fs.Optimizer], rng: np.random.Generator
) -> None:
    """SGD once its momentum is there: every step is like the one before."""
    start, g = standard(rng, (2, 1500))
    w, expected, gradient = lib.put(start), start.copy(), lib.put(g)
    gpu, cpu = make([w]), make([expected])
    with lib.stream():
        gpu.step([gradient])
    replay = lib.capture(lambda: gpu.step([gradient]))
    for _ in range(3):
        replay()
    for _ in range(4):
        cpu.step([g])
    assert_same(on_host(w), expected)


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("warm", [False, True])
def test_a_graph_that_would_be_wrong_is_refused(lib: Library, rule: Rule, warm: bool) -> None:
    """Without capturable=True a replay would repeat the step count of now."""
    w, g = (lib.full(5, 1, "float32") for _ in range(2))
    opt = rule.cls([w], **rule.options)
    ages = rule.cls not in (fs.SGD, fs.NAG)
    if warm:
        opt.step([g])
    if not ages and (warm or not rule.states):
        lib.capture(lambda: opt.step([g]))()
        return
    refused(
        opt,
        [w, g],
        lambda: lib.capture(lambda: opt.step([g])),
        RuntimeError,
        "CUDA graph is being captured",
        "capturable=True",
    )
    opt.step([g])  # and it still works
    assert opt.state[0]["step"] == 1 + warm


@pytest.mark.parametrize("then", ["created", "loaded", "switched"])
def test_a_capture_before_the_first_step_is_refused(lib: Library, then: str) -> None:
    """The GPU does not know the counts yet, and must not be told by a graph."""
    w, g = (lib.full(5, 1, "float32") for _ in range(2))
    opt = fs.Adam([w], capturable=True, max_norm=1.0)
    if then != "created":
        opt.step([g])
    if then == "loaded":
        opt.load_state_dict(opt.state_dict())
    if then == "switched":
        opt.skip_nonfinite = True
    message = "has not taken a step since it was created, loaded or changed"
    refused(
        opt, [w, g], lambda: lib.capture(lambda: opt.step([g])), RuntimeError, "captured", message
    )
    opt.step([g])
    replay = lib.capture(lambda: opt.step([g]))
    replay()
    assert opt.steps == (2 if then == "created" else 3)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {}], ids=str)
def test_a_captured_step_that_needs_memory_is_refused(
    lib: Library, options: dict[str, Any]
) -> None:
    """Memory is never allocated while a graph is captured."""
    params = {f"{i}": lib.full(2000, 1, "float32") for i in range(300)}
    grads = {key: lib.full(2000, 1, "float32") for key in params}
    few = {"0": grads["0"]}
    opt = fs.Adam(params, capturable=True, **options)
    opt.step(few)
    message = "needs memory that is not there yet: take one such step before the capture"
    arrays = [*params.values(), *grads.values()]
    refused(
        opt, arrays, lambda: lib.capture(lambda: opt.step(grads)), RuntimeError, "captured", message
    )
    lib.capture(lambda: opt.step(few))()
    opt.step(grads)
    lib.capture(lambda: opt.step(grads))()
    assert opt.state["0"]["step"] == 4
    assert opt.state["1"]["step"] == 2

    plain = fs.SGD(params, lr=1.0, max_norm=1.0)  # where a norm is new, too
    plain.max_norm = None
    plain.step(grads)
    plain.max_norm = 1.0
    refused(plain, arrays, lambda: lib.capture(lambda: plain.step(grads)), RuntimeError, message)


def test_capturable_needs_a_number_and_one_gpu(lib: Library, rng: np.random.Generator) -> None:
    start = standard(rng, 5)
    w = lib.put(start)
    with pytest.raises(ValueError, match="lr is a callable"):
        fs.Adam([w], lr=lambda step: 0.1, capturable=True)
    opt = fs.Adam([w], lr=0.5, capturable=True)
    opt.step([lib.put(start)])
    with pytest.raises(ValueError, match="lr is a callable"):
        opt.lr = lambda step: 0.1
    saved = opt.state_dict()
    saved["param_groups"][0]["lr"] = lambda step: 0.1
    refused(opt, [w], lambda: opt.load_state_dict(saved), ValueError, "lr is a callable")
    assert opt.lr == 0.5
    with pytest.raises(TypeError, match="capturable"):
        fs.Adam([w], capturable=1)
    others = [[start], [w, start]]
    if lib.devices() > 1:
        others.append([w, lib.put(start, 1)])
    for params in others:
        with pytest.raises(ValueError, match="all parameters to be on one GPU"):
            fs.Adam(params, capturable=True)


# ---- histories ----------------------------------------------------------------------------------

_STEP = st.tuples(
    st.just("step"),
    st.sets(st.sampled_from("abc")).map(sorted),
    st.sampled_from(["", "", "a", "c"]),  # where there is a NaN
    st.fixed_dictionaries(
        {},
        optional={
            "lr": st.sampled_from([0.0, 0.3]),
            "grad_scale": st.just(0.125),
            "zero_grad": st.booleans(),
        },
    ),
)
_CHANGE = st.one_of(
    st.tuples(st.just("lr"), st.sampled_from([0.01, 0.2])),
    st.tuples(st.just("max_norm"), st.sampled_from([None, 0.1])),
    st.tuples(st.just("skip_nonfinite"), st.booleans()),
    st.tuples(st.just("maximize"), st.booleans()),
)
_OTHER = st.sampled_from(
    [("check",), ("steps",), ("load own",), ("load other",), ("load new",), ("refuse",)]
)


@settings(max_examples=100, deadline=None)
@given(
    rule=st.sampled_from(PLAIN),
    capturable=st.booleans(),
    history=st.lists(st.one_of(_STEP, _STEP, _CHANGE, _OTHER), min_size=3, max_size=12),
)
def test_any_history(lib: Library, rule: Rule, capturable: bool, history: list[Any]) -> None:
    """Whatever is done to an optimizer in whatever order."""
    rng = np.random.default_rng(0)
    params = {"a": standard(rng, 3), "b": standard(rng, 1030, "f2"), "c": standard(rng, 9, "f8")}
    fresh = rule.cls(copy.deepcopy(params), **rule.options).state_dict()
    pair = Pair(lib, rule.cls, params, gpu={"capturable": capturable}, **rule.options)
    for action, *details in history:
        if action == "step":
            names, bad, arguments = details
            grads = {key: standard(rng, params[key].shape) for key in names}
            if bad in grads and pair.cpu.skip_nonfinite:
                grads[bad][-1] = np.nan
            pair.step(grads, **arguments)
        elif action == "check":
            pair.check()
        elif action == "steps":
            assert pair.gpu.steps == pair.cpu.steps
        elif action == "load own":
            for opt in (pair.cpu, pair.gpu):
                opt.load_state_dict(opt.state_dict())
        elif action == "load other":
            saved = pair.cpu.state_dict(), pair.gpu.state_dict()
            pair.gpu.load_state_dict(saved[0])
            pair.cpu.load_state_dict(saved[1])
        elif action == "load new":
            for opt in (pair.cpu, pair.gpu):
                opt.load_state_dict(fresh)
        elif action == "refuse":
            bad = {"a": lib.full(3, 1, "float32"), "c": lib.full(8, 1, "float32")}
            with pytest.raises(ValueError, match="the gradient of parameter 'c'"):
                pair.gpu.step(bad, lr=0.7, zero_grad=True)
        else:
            setattr(pair.cpu, action, details[0])
            setattr(pair.gpu, action, details[0])
    pair.check()


# ---- several devices ----------------------------------------------------------------------------

COMMON = [
    {},
    {"max_norm": 0.5},
    {"skip_nonfinite": True},
    {"max_norm": 0.5, "skip_nonfinite": True},
]


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("common", COMMON, ids=str)
@pytest.mark.parametrize("places", [(None, 0), (None, 0, 1), (0, 1)], ids=str)
def test_several_devices_in_one_optimizer(
    lib: Library,
    rule: Rule,
    common: dict[str, Any],
    places: tuple[int | None, ...],
    rng: np.random.Generator,
) -> None:
    """The norm is the one of the whole list, in its order, wherever its parts are."""
    if 1 in places:
        needs_two(lib)
    shapes = [(40, 50), (0,), (1025,), (), (70_001,), (3,)] * 2
    params = [standard(rng, s, "f8") for s in shapes]
    of = {i: places[i * 7 % 5 % len(places)] for i in range(len(shapes))}
    assert set(of.values()) == set(places)
    pair = Pair(lib, rule.cls, params, places=of, **common, **rule.options)
    for step in range(5):
        grads: list[Any] = [np.array(standard(rng, s), order="F") for s in shapes]
        if step and common.get("skip_nonfinite"):
            grads[(0, 2, 3, 4, 6)[step]].flat[-1] = np.nan
        if step == 4:
            grads[1] = grads[5] = None
        pair.step(grads, zero_grad=step == 3, grad_scale=0.9)
        pair.check()
    assert pair.gpu.steps == (1 if common.get("skip_nonfinite") else 5)


on_two_devices = pytest.mark.parametrize("places", [(None, 0), (0, 1)], ids=str)


@pytest.fixture
def pair_apart(
    lib: Library,
    common: dict[str, Any],
    places: tuple[int | None, ...],
    rng: np.random.Generator,
) -> Pair:
    """Parameters "a" and "b", each on a device of its own."""
    if 1 in places:
        needs_two(lib)
    of = dict(zip("ab", places, strict=True))
    return Pair(lib, fs.Adam, {key: standard(rng, 50) for key in "ab"}, places=of, **common)


@pytest.mark.parametrize("common", COMMON, ids=str)
@on_two_devices
def test_a_step_on_one_of_several_devices(pair_apart: Pair, rng: np.random.Generator) -> None:
    """The others have no gradients."""
    for names in ("a", "b", "ab", "b"):
        pair_apart.step({key: standard(rng, 50) for key in names})
        pair_apart.check()


@pytest.mark.parametrize("common", COMMON[2:], ids=str)
@on_two_devices
def test_skipping_on_one_of_several_devices(pair_apart: Pair, rng: np.random.Generator) -> None:
    """A step that is left out on the only GPU that takes part is not counted."""
    for names in ("a", "b", "ab", "b"):
        grads = {key: standard(rng, 50) for key in names}
        grads[names[-1]][7] = np.nan
        pair_apart.step(grads)
        pair_apart.check()
    assert pair_apart.gpu.skipped_steps == 4


def test_state_on_another_device_than_the_current_one(
    lib: Library, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Created, stepped, saved, loaded and copied while GPU 0 is the current one."""
    needs_two(lib)
    params = {"a": standard(rng, (4, 6)).T, "b": standard(rng, 9)}
    pair = Pair(lib, fs.NAdam, params, places={"a": 1, "b": 1}, skip_nonfinite=True)
    pair.step({key: standard(rng, p.shape) for key, p in params.items()})
    pair.check()
    saved = pair.gpu.state_dict()
    assert all(lib.device_of(entry["exp_avg"]) == 1 for entry in saved["state"].values())
    pair.gpu.save(tmp_path / "x")
    for load in (lambda: pair.gpu.load_state_dict(saved), lambda: pair.gpu.load(tmp_path / "x")):
        load()
        pair.step({key: standard(rng, p.shape) for key, p in params.items()})
        pair.check()
        pair.cpu.load_state_dict(saved)
        pair.gpu.load_state_dict(saved)


# ---- state --------------------------------------------------------------------------------------


def go(pair: Pair, rng: np.random.Generator, steps: int) -> None:
    params = pair.cpu.params
    for _ in range(steps):
        pair.step({key: standard(rng, p.shape) for key, p in params.items()})


def some_params(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "layer.W": standard(rng, (3, 4)).T,
        "layer.b": standard(rng, 4, "f8"),
        "none": np.zeros((0, 2), f32),
        "half": standard(rng, 1030, "f2"),
        "scalar": np.array(1.0, f32),
    }


GPU_OPTIONS = [{}, {"capturable": True}, {"skip_nonfinite": True}]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("gpu", GPU_OPTIONS, ids=str)
@pytest.mark.parametrize("through", ["dict", "file"])
def test_state_goes_from_cpu_to_gpu_and_back(
    lib: Library,
    rule: Rule,
    gpu: dict[str, Any],
    through: str,
    rng: np.random.Generator,
    tmp_path: Path,
) -> None:
    """Four optimizers: host to GPU, GPU to host, GPU to GPU; all go on as if nothing had been."""
    pair = Pair(lib, rule.cls, some_params(rng), gpu=gpu, **rule.options)
    go(pair, rng, 3)
    crossed = Pair(lib, rule.cls, copy.deepcopy(pair.cpu.params), gpu=gpu, **rule.options)
    go(crossed, rng, 1)
    for to, start in ((crossed.cpu, pair.gpu), (crossed.gpu, pair.cpu), (pair.gpu, pair.gpu)):
        lr = start.lr
        if through == "dict":
            to.load_state_dict(start.state_dict())
        else:
            start.save(tmp_path / "x")
            to.load(tmp_path / "x")
        assert to.lr == lr
    if gpu == {"skip_nonfinite": True}:  # which the host's state dict says is off, and vice versa
        crossed.cpu.skip_nonfinite = False
        crossed.gpu.skip_nonfinite = True
    assert crossed.gpu.steps == crossed.cpu.steps == 3
    crossed.check()
    go(crossed, rng, 2)
    crossed.check()
    go(pair, rng, 2)
    pair.check()


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_files_are_the_same(
    lib: Library, rule: Rule, rng: np.random.Generator, tmp_path: Path
) -> None:
    pair = Pair(lib, rule.cls, some_params(rng), max_norm=1.0, **rule.options)
    go(pair, rng, 2)
    read = []
    for name, opt in (("cpu", pair.cpu), ("gpu", pair.gpu)):
        opt.save(tmp_path / name)
        with safetensors.safe_open(tmp_path / name, framework="numpy") as file:
            metadata = file.metadata()
        read.append((safetensors.numpy.load_file(tmp_path / name), metadata))
    np.testing.assert_equal(read[0], read[1])


@pytest.mark.parametrize("gpu", GPU_OPTIONS, ids=str)
def test_a_thousand_ages_are_loaded(
    lib: Library, gpu: dict[str, Any], rng: np.random.Generator
) -> None:
    """Progress goes to the GPU in several pieces."""
    params = {f"{i}": standard(rng, 3) for i in range(1000)}
    pair = Pair(lib, fs.NAdam, params, gpu=gpu)
    saved = pair.cpu.state_dict()
    for i, entry in enumerate(saved["state"].values()):
        entry.update(step=i % 77, mu_product=1 / (1 + i))
    pair.cpu.load_state_dict(saved)
    pair.gpu.load_state_dict({**saved, "fusestep": {}})
    if "skip_nonfinite" in gpu:
        pair.gpu.skip_nonfinite = True
    go(pair, rng, 2)
    assert pair.gpu.steps == 76 + 2
    pair.cpu.load_state_dict({**pair.cpu.state_dict(), "fusestep": {"steps": 78}})
    pair.check()


def test_a_state_dict_is_a_copy_and_state_is_live(lib: Library, rng: np.random.Generator) -> None:
    pair = Pair(lib, fs.Adam, some_params(rng))
    live = pair.gpu.state["layer.W"]["exp_avg"]
    go(pair, rng, 2)
    assert on_host(live).any()
    assert pair.gpu.state["layer.W"]["exp_avg"] is live
    saved = pair.gpu.state_dict()
    kept = {key: on_host(entry["exp_avg"]).copy() for key, entry in saved["state"].items()}
    assert all(lib.is_own(entry["exp_avg"]) for entry in saved["state"].values())
    go(pair, rng, 1)
    for key, old in kept.items():
        assert_same(on_host(saved["state"][key]["exp_avg"]), old)
    pair.gpu.load_state_dict(saved)
    assert pair.gpu.state["layer.W"]["exp_avg"] is live
    lib.fill(saved["state"]["layer.W"]["exp_avg"], 99)
    assert_same(on_host(live), kept["layer.W"])


def test_a_state_dict_of_other_libraries(lib: Library, rng: np.random.Generator) -> None:
    """NumPy's arrays, and torch.optim's tensors on the CPU."""
    torch = pytest.importorskip("torch")
    start, grads = standard(rng, (4, 5)), standard(rng, (3, 4, 5))
    tensor = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.Adam([tensor], lr=0.01, amsgrad=True)
    for g in grads:
        tensor.grad = torch.tensor(g)
        theirs.step()
    w = tensor.detach().numpy().copy()
    pair = Pair(lib, fs.Adam, {"w": w}, amsgrad=True)
    for saved in (theirs.state_dict(), None):
        pair.cpu.load_state_dict(saved or pair.cpu.state_dict())
        pair.gpu.load_state_dict(saved or pair.cpu.state_dict())
        go(pair, rng, 2)
        pair.check()


def test_widening_and_narrowing(lib: Library, rng: np.random.Generator) -> None:
    narrow, wide = (
        Pair(lib, fs.Adam, {"w": standard(rng, 5)}, state_dtype=dtype)
        for dtype in (None, "float64")
    )
    go(narrow, rng, 1)
    go(wide, rng, 1)
    saved = narrow.gpu.state_dict()
    wide.cpu.load_state_dict(saved)
    wide.gpu.load_state_dict(saved)
    go(wide, rng, 1)
    wide.check()
    refused(
        narrow.gpu,
        [narrow.gpu.params["w"]],
        lambda: narrow.gpu.load_state_dict(wide.gpu.state_dict()),
        TypeError,
        "float64, which would be rounded",
    )


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (lambda e: e.update(exp_avg=np.zeros(3)), ValueError, "shape (3,); expected (4,)"),
        (lambda e: e.update(exp_avg=np.zeros(4, "G")), TypeError, "complex"),
        (lambda e: e.update(exp_avg=np.zeros(4, int)), TypeError, "int64"),
        (lambda e: e.update(exp_avg="zeros"), TypeError, "expected"),
        (lambda e: e.pop("exp_avg_sq"), ValueError, "lacks 'exp_avg_sq'"),
        (lambda e: e.update(mu_product=1.0), ValueError, "unknown keys: 'mu_product'"),
    ],
    ids=["shape", "complex", "integers", "text", "missing", "unknown"],
)
@pytest.mark.parametrize("gpu", GPU_OPTIONS, ids=str)
def test_bad_state_dicts_change_nothing(
    lib: Library,
    edit: Any,
    error: type[Exception],
    words: str,
    gpu: dict[str, Any],
    rng: np.random.Generator,
) -> None:
    pair = Pair(lib, fs.Adam, some_params(rng), gpu=gpu)
    go(pair, rng, 2)
    arrays = [*pair.gpu.params.values()]
    bad = pair.gpu.state_dict()
    bad["param_groups"][0]["lr"] = 123.0
    for entry in bad["state"].values():
        entry["step"] += 10
        lib.fill(entry["exp_avg"], 5)
    edit(bad["state"]["layer.b"])
    refused(pair.gpu, arrays, lambda: pair.gpu.load_state_dict(bad), error, words, "layer.b")
    go(pair, rng, 1)
    pair.check()


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
def test_state_of_its_own_library_is_checked_too(lib: Library, dtype: str) -> None:
    w = lib.full(4, 0, "float32")
    opt = fs.Adam([w])
    saved = opt.state_dict()
    saved["state"][0]["exp_avg"] = lib.full(4, 1, dtype)
    if dtype == "float16":  # widened
        opt.load_state_dict(saved)
        assert_same(on_host(opt.state[0]["exp_avg"]), np.ones(4, f32))
    else:
        refused(opt, [w], lambda: opt.load_state_dict(saved), TypeError, "exp_avg", dtype)
    saved["state"][0]["exp_avg"] = lib.full((2, 2), 1, "float32")
    refused(opt, [w], lambda: opt.load_state_dict(saved), ValueError, "(2, 2); expected (4,)")


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("gpu", GPU_OPTIONS, ids=str)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(
    lib: Library, rule: Rule, gpu: dict[str, Any], how: str, rng: np.random.Generator
) -> None:
    pair = Pair(lib, rule.cls, some_params(rng), gpu=gpu, max_norm=5.0, **rule.options)
    go(pair, rng, 2)
    model = {"params": pair.gpu.params, "opt": pair.gpu}
    model = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    other = model["opt"]
    assert repr(other) == repr(pair.gpu)
    assert other.capturable == pair.gpu.capturable
    kept = {key: on_host(p).copy() for key, p in pair.gpu.params.items()}
    assert all(lib.is_own(p) and p is model["params"][k] for k, p in other.params.items())
    grads = {key: standard(rng, p.shape) for key, p in pair.cpu.params.items()}
    likes, _ = pair.mirrored(grads)
    other.step(likes)
    assert other.steps == 3
    assert pair.gpu.steps == 2
    for key, p in pair.gpu.params.items():
        assert_same(on_host(p), kept[key])
    pair.step(grads)
    pair.check()
    for key, p in other.params.items():
        assert_same(on_host(p), on_host(pair.gpu.params[key]))
        for name, value in pair.cpu.state[key].items():
            ours = other.state[key][name]
            if isinstance(value, np.ndarray):
                assert_same(on_host(ours), value)
            else:
                assert ours == value


def test_torch_or_cupy_keeps_the_state_of_others(lib: Library, rng: np.random.Generator) -> None:
    """A parameter that is nobody's array still has state on its GPU."""
    start, g = standard(rng, (2, 6))
    for wrap in (Interface, lambda array: Capsule(lib, array)):
        w, expected = lib.put(start), start.copy()
        gpu, cpu = fs.Adam([wrap(w)]), fs.Adam([expected])
        for _ in range(3):
            gpu.step([lib.put(g)])
            cpu.step([g])
        assert_same(on_host(w), expected)
        saved = gpu.state_dict()
        assert_same(on_host(saved["state"][0]["exp_avg"]), cpu.state[0]["exp_avg"])
        gpu.load_state_dict(saved)
        cpu.load_state_dict(saved)
        gpu.step([lib.put(g)])
        cpu.step([g])
        assert_same(on_host(w), expected)


@in_simulation
def test_state_needs_one_of_the_libraries(lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    w = Interface(lib.full(3, 1, "float32"))
    with pytest.raises(TypeError, match="needs CuPy or PyTorch"):
        fs.Adam([w])
    fs.SGD([w], lr=1.0).step([w.array.copy()])  # has none
    assert not on_host(w).any()


# ---- the bare functions -------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_functions(lib: Library, rule: Rule, dtype: str, rng: np.random.Generator) -> None:
    start = standard(rng, (35, 33), dtype)
    expected, w = start.copy(), lib.put(start)
    function = getattr(F, rule.cls.__name__.lower() + "_")
    options = dict(rule.options)
    initial = options.pop("initial_accumulator_value", 0.0)
    options.pop("amsgrad", None)
    state = {name: np.full_like(start, initial) for name in rule.states}
    likes = {name: lib.put(value) for name, value in state.items()}
    for step in range(1, 6):
        g = standard(rng, start.shape, dtype)
        both = {"step": step, "maximize": True, "grad_scale": 0.5, **options}
        products = []
        for p, gradient, states in ((expected, g, state), (w, lib.put(g), likes)):
            if rule.cls is fs.NAdam:
                both["mu_product"] = np.array(0.9**step)
                products.append(both["mu_product"])
            assert function(p, gradient, **states, **both) is None
        assert len(set(map(float, products))) <= 1
    assert_same(on_host(w), expected)
    for name, value in state.items():
        assert_same(on_host(likes[name]), value)


def test_functions_change_nothing_when_they_refuse(lib: Library) -> None:
    shared = lib.full(6, 1, "float32")
    for changes, error, *words in (
        ({"exp_avg": np.zeros(3, f32)}, ValueError, "exp_avg of the parameter", "cpu", "cuda:0"),
        ({"grad": np.zeros(3, f32)}, ValueError, "gradient of the parameter", "cpu", "cuda:0"),
        ({"param": np.zeros(3, f32)}, ValueError, "cuda:0", "cpu"),
        ({"exp_avg": lib.full(4, 1, "float32")}, ValueError, "shape (4,); expected (3,)"),
        ({"exp_avg": lib.full(3, 1, "float16")}, TypeError, "float16"),
        ({"grad": shared[:3], "exp_avg": shared[2:5]}, ValueError, "shares memory"),
        ({"param": shared[:3], "exp_avg_sq": shared[::2]}, ValueError, "share memory"),
    ):
        names = ("param", "grad", "exp_avg", "exp_avg_sq")
        call = {name: lib.full(3, 1, "float32") for name in names} | changes
        refused(None, [*call.values()], lambda call=call: F.adam_(step=1, **call), error, *words)


# ---- arrays of nobody's library -----------------------------------------------------------------

DESCRIPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("as it is", {}),
    ("version 2", {"version": 2, "stream": ...}),
    ("version 3 without a stream", {"version": 3, "stream": None}),
    ("the default stream", {"version": 3, "stream": 1}),
    ("the thread's stream", {"version": 3, "stream": 2}),
    ("strides", {"strides": (12, 4)}),
    ("no strides", {"strides": None}),
    ("strides left out", {"strides": ...}),
    ("lists", {"shape": [5, 3], "strides": [12, 4]}),
    ("read-only", {"read-only": True}),
    ("a mask of None", {"mask": None}),
]


@pytest.mark.parametrize("changes", [d[1] for d in DESCRIPTIONS], ids=[d[0] for d in DESCRIPTIONS])
@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_an_interface_is_enough(
    lib: Library, rule: Rule, changes: dict[str, Any], rng: np.random.Generator
) -> None:
    """For gradients, and for parameters, too."""
    start = standard(rng, (5, 3))
    w, v, expected = lib.put(start), lib.put(start), start.copy()
    opts = [rule.cls([p], **rule.options) for p in (w, Interface(v), expected)]
    for _ in range(3):
        g = standard(rng, (5, 3))
        array = lib.put(g)
        entries = {k: x for k, x in changes.items() if k != "read-only"}
        if "read-only" in changes:
            entries["data"] = (array.__cuda_array_interface__["data"][0], True)
        for opt, gradient in zip(opts, (Interface(array, **entries),) * 2 + (g,), strict=True):
            lib.synchronize()  # streams are not the point here
            opt.step([gradient])
        lib.synchronize()
    for p in (w, v):
        assert_same(on_host(p), expected)


def test_the_stream_of_an_interface(lib: Library, rng: np.random.Generator) -> None:
    g = standard(rng, 5)
    w, expected = lib.put(g), g.copy()
    context, number = lib.new_stream()
    opt = fs.Adam([w])
    opt.step([Interface(lib.put(g), stream=number)], zero_grad=True)
    with context:
        opt.step([lib.put(g)])
        opt.step([Interface(lib.put(g), stream=1)])
    lib.synchronize()
    cpu = fs.Adam([expected])
    for _ in range(3):
        cpu.step([g])
    assert_same(on_host(w), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_interfaces(lib: Library, dtype: np.dtype, rng: np.random.Generator) -> None:
    needs(lib, dtype)
    if dtype == bfloat16 and lib.name != "simulated":
        pytest.skip("bfloat16 has no agreed type string")
    start, gradient = standard(rng, (6, 10), dtype), standard(rng, (10, 6), dtype)
    views = [start[::2, 1::3], start[1::2, 1::3]]
    mirror, gradients = Mirror(lib), Mirror(lib)
    likes = [Interface(mirror.like(view)) for view in views]
    if dtype == bfloat16:
        for like in likes:
            like.dtype = "bfloat16"
    gpu, cpu = fs.Adagrad(likes), fs.Adagrad(views)
    for _ in range(2):
        g = [gradient.T[:3, :3], gradient.T[:3, 3:6]]
        wrapped = [Interface(gradients.like(x)) for x in g]
        if dtype == bfloat16:
            for like in wrapped:
                like.dtype = "bfloat16"
        gpu.step(wrapped)
        cpu.step(g)
    mirror.check()


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_dlpack_is_enough(lib: Library, rule: Rule, rng: np.random.Generator) -> None:
    start = standard(rng, (6, 5))
    w, v, expected = lib.put(start), lib.put(start), start.copy()
    opts = [rule.cls([p], **rule.options) for p in (w, Capsule(lib, v), expected)]
    for _ in range(3):
        g = standard(rng, (6, 10))
        like = Mirror(lib).like(g[:, ::2])
        for opt, gradient in zip(opts, (Capsule(lib, like),) * 2 + (g[:, ::2],), strict=True):
            opt.step([gradient])
    for p in (w, v):
        assert_same(on_host(p), expected)


def test_overlap_is_seen_across_libraries(lib: Library) -> None:
    block = lib.full(10, 1, "float32")
    for wrap in (Interface, lambda array: Capsule(lib, array)):
        with pytest.raises(ValueError, match="parameter 0 and parameter 1 share memory"):
            fs.SGD([block[:6], wrap(block[5:])])
        opt = fs.SGD([block])
        refused(
            opt, [block], lambda opt=opt, wrap=wrap: opt.step([wrap(block)]), ValueError, "shares"
        )


# ---- wrong calls --------------------------------------------------------------------------------


def _ending(array: Any, skipped: int) -> dict[str, Any]:
    """The interface's data, some bytes further on."""
    return {"data": (array.__cuda_array_interface__["data"][0] + skipped, False)}


BAD_INTERFACES: list[tuple[str, Any, type[Exception], str]] = [
    ("integers", {"typestr": "<i4"}, TypeError, "'<i4'"),
    ("booleans", {"typestr": "|b1"}, TypeError, "'|b1'"),
    ("complex", {"typestr": "<c8"}, TypeError, "'<c8'"),
    ("quadruple", {"typestr": "<f16"}, TypeError, "'<f16'"),
    ("big endian", {"typestr": ">f4"}, TypeError, "'>f4'"),
    ("big endian double", {"typestr": ">f8"}, TypeError, "'>f8'"),
    ("bytes of anything", {"typestr": "<V2"}, TypeError, "'<V2'"),
    ("no byte order", {"typestr": "f4"}, TypeError, "'f4'"),
    ("no type", {"typestr": ""}, TypeError, "''"),
    ("nonsense", {"typestr": "float32"}, TypeError, "'float32'"),
    ("type is a number", {"typestr": 4}, TypeError, "cannot be read"),
    ("type missing", {"typestr": ...}, TypeError, "'typestr'"),
    ("shape missing", {"shape": ...}, TypeError, "'shape'"),
    ("data missing", {"data": ...}, TypeError, "'data'"),
    ("shape is a number", {"shape": 6}, TypeError, "cannot be read"),
    ("shape is text", {"shape": ("6",)}, TypeError, "cannot be read"),
    ("shape is a fraction", {"shape": (6.5,)}, TypeError, "cannot be read"),
    ("strides is a number", {"strides": 4}, TypeError, "cannot be read"),
    ("strides is text", {"strides": ("4",)}, TypeError, "cannot be read"),
    ("data is None", {"data": None}, TypeError, "cannot be read"),
    ("pointer is None", {"data": (None, False)}, TypeError, "cannot be read"),
    ("pointer is negative", {"data": (-4, False)}, TypeError, "cannot be read"),
    ("stream is text", {"stream": "default"}, TypeError, "cannot be read"),
    ("stream is negative", {"stream": -1}, TypeError, "cannot be read"),
    ("a mask", {"mask": object()}, TypeError, "mask"),
    ("pointer alone", {"data": (1024,)}, TypeError, "contradicts itself"),
    ("too few strides", {"shape": (6, 1), "strides": (4,)}, TypeError, "contradicts itself"),
    ("too many strides", {"strides": (4, 4)}, TypeError, "contradicts itself"),
    ("negative shape", {"shape": (-6,)}, TypeError, "impossible shape or no data"),
    ("impossible shape", {"shape": (2**40, 2**40)}, TypeError, "impossible shape or no data"),
    ("no data", {"data": (0, False)}, TypeError, "impossible shape or no data"),
    ("misaligned", lambda array: _ending(array, 2), ValueError, "not aligned"),
    ("by one byte", lambda array: _ending(array, 1), ValueError, "not aligned"),
    ("misaligned strides", {"shape": (3,), "strides": (6,)}, ValueError, "not aligned"),
]


def _bad_interface(lib: Library, changes: Any) -> Interface:
    array = lib.full(6, 1, "float32")
    return Interface(array, **(changes(array) if callable(changes) else changes))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [bad[1:] for bad in BAD_INTERFACES],
    ids=[bad[0] for bad in BAD_INTERFACES],
)
def test_bad_interfaces(lib: Library, changes: Any, error: type[Exception], words: str) -> None:
    params = {"V": lib.full(6, 1, "float32"), "W": lib.full(6, 1, "float32")}
    good = lib.full(6, 1, "float32")
    opt = fs.SGD(params, momentum=0.9)
    opt.step({"V": good, "W": good})
    bad = _bad_interface(lib, changes)
    refused(
        opt,
        [*params.values(), bad],
        lambda: opt.step({"V": good, "W": bad}),
        error,
        "the gradient of parameter 'W'",
        words,
    )
    with pytest.raises(error) as caught:
        fs.SGD({"V": params["V"], "W": bad})
    assert "parameter 'W'" in str(caught.value)
    assert words in str(caught.value)
    opt.step({"V": good, "W": good})
    assert opt.steps == 2


def test_an_interface_that_raises(lib: Library) -> None:
    class Broken:
        @property
        def __cuda_array_interface__(self) -> Any:
            raise AttributeError("not today")

    w = lib.full(3, 1, "float32")
    opt = fs.SGD([w])
    refused(opt, [w], lambda: opt.step([Broken()]), TypeError, "gradient of parameter 0", "Broken")
    with pytest.raises(TypeError, match="parameter 1 is a Broken"):
        fs.SGD([w, Broken()])


@pytest.mark.parametrize("dtype", ["int32", "int64", "bool", "complex64"])
def test_dtypes_that_are_not_ours(lib: Library, dtype: str) -> None:
    w, bad = lib.full(3, 1, "float32"), lib.full(3, 1, dtype)
    with pytest.raises(TypeError, match="parameter 'b'"):
        fs.Adam({"a": w, "b": bad})
    opt = fs.Adam([w])
    refused(opt, [w], lambda: opt.step([bad]), TypeError, "the gradient of parameter 0")


def test_a_gradient_on_another_device(lib: Library) -> None:
    """The message names both."""
    ones = np.ones(3, f32)
    w, on_cpu = lib.put(ones), ones.copy()
    opt = fs.Adam({"gpu": w, "cpu": on_cpu})
    opt.step({"gpu": lib.put(ones), "cpu": ones})
    refused(
        opt,
        [w, on_cpu],
        lambda: opt.step({"gpu": ones, "cpu": ones}),
        ValueError,
        "the gradient of parameter 'gpu' is on cpu; expected cuda:0",
    )
    refused(
        opt,
        [w, on_cpu],
        lambda: opt.step({"gpu": lib.put(ones), "cpu": lib.put(ones)}),
        ValueError,
        "the gradient of parameter 'cpu' is on cuda:0; expected cpu",
    )
    if lib.devices() > 1:
        refused(
            opt,
            [w, on_cpu],
            lambda: opt.step({"gpu": lib.put(ones, 1)}),
            ValueError,
            "the gradient of parameter 'gpu' is on cuda:1; expected cuda:0",
        )


def test_shapes_and_counts(lib: Library) -> None:
    params = [lib.full((2, 3), 1, "float32"), lib.full(4, 1, "float32")]
    first, second = lib.full((2, 3), 1, "float32"), lib.full(4, 1, "float32")
    opt = fs.Adam(params, max_norm=1.0, skip_nonfinite=True)
    opt.step([first, second])
    bad = [
        ([first], ValueError, "1 gradients for 2 parameters"),
        ([first, second, second], ValueError, "3 gradients for 2 parameters"),
        ([first, lib.full(5, 1, "float32")], ValueError, "parameter 1 has shape (5,)"),
        ([lib.full((3, 2), 1, "float32"), second], ValueError, "expected (2, 3)"),
        ([lib.full(3, 1, "float32"), second], ValueError, "expected (2, 3)"),
        ([first, lib.full((), 1, "float32")], ValueError, "shape ()"),
        ([first, [1.0] * 4], TypeError, "parameter 1 is a list"),
        (first, TypeError, "expected a list or tuple"),
        ({"W": first}, TypeError, "dict"),
        (None, TypeError, "NoneType"),
    ]
    for grads, error, words in bad:
        refused(opt, params, lambda grads=grads: opt.step(grads), error, words)
    for arguments, error in (
        ({"lr": -1.0}, ValueError),
        ({"lr": "fast"}, TypeError),
        ({"grad_scale": math.nan}, ValueError),
        ({"zero_grad": 3}, TypeError),
    ):
        refused(
            opt,
            [*params, first, second],
            lambda arguments=arguments: opt.step([first, second], **arguments),
            error,
            next(iter(arguments)),
        )
    opt.step([first, second])
    assert opt.steps == 2


@pytest.mark.parametrize("common", [{}, {"skip_nonfinite": True}, {"capturable": True}], ids=str)
def test_memory_that_is_shared(lib: Library, common: dict[str, Any]) -> None:
    block = lib.full(100, 1, "float32")
    for params, words in (
        ([block, block], "parameter 0 and parameter 1 share memory"),
        ([block[:60], block[50:]], "share memory"),
        ([block[::2], block[::3]], "share memory"),
        ([block[10:20], block[:90]], "share memory"),
        ([lib.view(block, (5,), (0,), 0)], "parameter 0 overlaps itself"),
        ([lib.view(block, (3, 4), (4, 4), 0)], "parameter 0 overlaps itself"),
    ):
        with pytest.raises(ValueError, match=words):
            fs.Adam(params, **common)
    weights = [block[:30], block[30:60]]
    opt = fs.Adam(weights, **common)
    g = lib.full(30, 1, "float32")
    opt.step([g, g])
    state = opt.state[0]["exp_avg"]
    wide = lib.full(40, 1, "float32")
    for grads, arguments, words in (
        ([weights[1], g], {}, "the gradient of parameter 0 shares memory with parameter 1"),
        ([g, block[25:55]], {}, "the gradient of parameter 1 shares memory with parameter"),
        ([state, g], {}, "shares memory with the exp_avg of parameter 0"),
        ([wide[:30], wide[5:35]], {"zero_grad": True}, "two gradients share memory"),
        ([lib.view(g, (30,), (0,), 0), g], {"zero_grad": True}, "overlaps itself"),
        ([Interface(g, data=_read_only(g)), None], {"zero_grad": True}, "is read-only"),
    ):
        refused(
            opt,
            [block, g, wide],
            lambda grads=grads, arguments=arguments: opt.step(grads, **arguments),
            ValueError,
            words,
        )
    opt.step([block[60:90], wide[:30]])
    with pytest.raises(ValueError, match="parameter 0 is read-only"):
        fs.Adam([Interface(g, data=_read_only(g))], **common)


def _read_only(array: Any) -> tuple[int, bool]:
    return array.__cuda_array_interface__["data"][0], True


@in_simulation
@pytest.mark.parametrize("common", [{}, {"max_norm": 1.0, "skip_nonfinite": True}], ids=str)
def test_a_machine_without_a_driver(lib: Library, common: dict[str, Any]) -> None:
    """The first step says what is missing; those before and after are not harmed."""
    w, v, g = lib.full(3, 1, "float32"), np.ones(3, f32), lib.full(3, 1, "float32")
    opt = fs.Adam({"w": w, "v": v}, **common)
    words = "the simulated machine has no NVIDIA driver"
    with simulate("no driver"):
        grads = {"w": g, "v": np.ones(3, f32)}
        refused(opt, [w, v, g], lambda: opt.step(grads, zero_grad=True), RuntimeError, words)
        opt.step({"v": np.ones(3, f32)})
        with pytest.raises(RuntimeError, match=words):
            fs.Adam([w], capturable=True)
        refused(None, [w, g], lambda: F.sgd_(w, g, step=1), RuntimeError, words)
        nobodys = Interface(g)
        with pytest.raises(RuntimeError, match=words):
            fs.SGD([nobodys])
    opt.step(grads)
    assert opt.steps == 2


# ---- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("common", [{}, {"max_norm": 0.5, "skip_nonfinite": True}], ids=str)
def test_one_optimizer_in_many_threads(lib: Library, common: dict[str, Any]) -> None:
    """Steps wait for each other: with equal gradients any order gives the same bits."""
    g = np.linspace(-1, 1, 3000, dtype=f32)
    w, expected, gradient = lib.put(0 * g), 0 * g, lib.put(g)
    gpu, cpu = fs.NAdam([w], **common), fs.NAdam([expected], **common)
    lib.synchronize()

    def work(i: int) -> None:
        for k in range(15):
            gpu.step([gradient])
            if k % 5 == i:
                assert gpu.state_dict()["state"][0]["step"] <= gpu.steps

    in_threads(4, work)
    for _ in range(60):
        cpu.step([g])
    lib.synchronize()
    assert gpu.steps == 60
    assert_same(on_host(w), expected)


def test_many_optimizers_in_many_threads(lib: Library) -> None:
    """One of them on the CPU."""
    g = np.linspace(-1, 1, 100_000, dtype=f32)
    expected, gradient = 0 * g, lib.put(g)
    params = [expected, *(lib.put(0 * g) for _ in range(3))]
    opts = [fs.Adam([p], max_norm=1.0) for p in params]
    lib.synchronize()
    in_threads(4, lambda i: [opts[i].step([gradient if i else g]) for _ in range(10)])
    lib.synchronize()
    for p in params[1:]:
        assert_same(on_host(p), expected)


def test_devices_and_streams_of_the_caller_stay_as_they_are(lib: Library) -> None:
    needs_two(lib)
    params = [lib.full(5, 1, "float32"), lib.put(np.ones(5, f32), 1)]
    opt = fs.Adam(params, max_norm=1.0, skip_nonfinite=True)
    grads = [lib.full(5, 1, "float32"), lib.put(np.ones(5, f32), 1)]
    with lib.on(1):
        opt.step(grads)
        assert lib.device_of(lib.huge(1, 1, "float32")) == 1
    opt.step(grads)
    assert lib.device_of(lib.huge(1, 1, "float32")) == 0


# ---- with a GPU alone ---------------------------------------------------------------------------


@on_real_gpus
@pytest.mark.parametrize("common", [{}, {"max_norm": 100.0}, {"skip_nonfinite": True}], ids=str)
def test_a_step_is_put_into_the_current_stream(lib: Library, common: dict[str, Any]) -> None:
    """After what is still to be computed there, and before what comes later."""
    w, g = (lib.full(1000, 0, "float32") for _ in range(2))
    opt = fs.SGD([w], lr=1.0, **common)
    opt.step([g])
    with lib.stream():
        lib.spin()
        lib.fill(g, 1)
        opt.step([g])
        lib.fill(g, 5)
    assert_same(on_host(w), np.full(1000, -1, f32))


@on_real_gpus
def test_a_step_waits_for_the_stream_of_a_gradient(lib: Library) -> None:
    w, g = (lib.full(1000, 0, "float32") for _ in range(2))
    opt = fs.SGD([w], lr=1.0)
    context, number = lib.new_stream()
    opt.step([g])
    lib.synchronize()
    with context:
        lib.spin()
        lib.fill(g, 1)
    opt.step([Interface(g, version=3, stream=number)])
    assert_same(on_host(w), np.full(1000, -1, f32))


@on_real_gpus
def test_the_stream_of_a_gradient_waits_for_the_step(lib: Library) -> None:
    w, g = lib.full(1000, 0, "float32"), lib.full(1000, 1, "float32")
    opt = fs.SGD([w], lr=1.0)
    context, number = lib.new_stream()
    lib.synchronize()
    lib.spin()
    opt.step([Interface(g, version=3, stream=number)])
    with context:
        lib.fill(g, 99)
    lib.synchronize()
    assert_same(on_host(w), np.full(1000, -1, f32))


@on_real_gpus
def test_a_step_waits_for_the_stream_of_a_parameter(lib: Library) -> None:
    """Arrays of nobody's library say each for itself which stream they are used on."""
    w, g = lib.full(1000, 0, "float32"), lib.full(1000, 1, "float32")
    context, number = lib.new_stream()
    opt = fs.SGD([Interface(w, version=3, stream=number)], lr=1.0)
    lib.synchronize()
    with context:
        lib.spin()
        lib.fill(w, 5)
    opt.step([Interface(g, version=3, stream=1)])
    lib.synchronize()
    assert_same(on_host(w), np.full(1000, 4, f32))


@on_real_gpus
def test_a_step_does_not_wait_for_the_gpu(lib: Library) -> None:
    """It returns while the GPU is still busy with what was before."""
    w, g = (lib.full(1000, 1, "float32") for _ in range(2))
    for common in ({}, {"max_norm": 1.0, "skip_nonfinite": True}):
        opt = fs.Adam([w], **common)
        lib.spin()
        opt.step([g])
        lib.synchronize()
        start = time.perf_counter()
        lib.spin()
        spun = time.perf_counter()
        opt.step([g])
        stepped = time.perf_counter()
        lib.synchronize()
        done = time.perf_counter()
        assert spun - start < 0.02  # else the measurement means nothing
        assert stepped - spun < (done - start) / 4


@on_real_gpus
def test_gradients_of_the_other_library(lib: Library, rng: np.random.Generator) -> None:
    other = library("torch" if lib.name == "cupy" else "cupy")
    sizes = (5, 1500)
    params = [standard(rng, n) for n in sizes]
    mirror = Mirror(lib)
    gpu = fs.Adam([mirror.like(p) for p in params], max_norm=1.0, skip_nonfinite=True)
    cpu = fs.Adam(params, max_norm=1.0, skip_nonfinite=True)
    for _ in range(3):
        grads = [standard(rng, n) for n in sizes]
        gpu.step([lib.put(grads[0]), other.put(grads[1])])
        cpu.step(grads)
    mirror.check()
    mixed = [params[0].copy(), params[1].copy()]
    gpu = fs.Adam([lib.put(mixed[0]), other.put(mixed[1])])
    gpu.load_state_dict(cpu.state_dict())
    gpu.step([other.put(grads[0]), lib.put(grads[1])])
    cpu.step(grads)
    for p, expected in zip(gpu.params, params, strict=True):
        assert_same(on_host(p), expected)
    assert lib.is_own(gpu.state[0]["exp_avg"])
    assert other.is_own(gpu.state[1]["exp_avg"])


@with_torch
def test_torch_parameters_with_gradients(lib: Library, rng: np.random.Generator) -> None:
    """Leaves of a graph, their .grad after backward, and views that torch has not negated yet."""
    import torch

    start, x = standard(rng, (2, 4, 6))
    w = torch.nn.Parameter(lib.put(start))
    expected = start.copy()
    gpu, cpu = fs.Adam({"w": w}), fs.Adam({"w": expected})
    for _ in range(3):
        w.grad = None
        (w * lib.put(x)).sum().backward()
        gpu.step({"w": w.grad}, zero_grad=True)
        cpu.step({"w": x})
        assert not w.grad.any()
    assert_same(on_host(w), expected)
    assert w.requires_grad
    negated = torch.complex(torch.zeros(4, 6), torch.ones(4, 6)).cuda().conj().imag
    refused(gpu, [w], lambda: gpu.step({"w": negated}), ValueError, "resolve_neg")


@with_torch
def test_torch_parameters_that_get_other_memory(lib: Library) -> None:
    import torch

    g = lib.full(4, 1, "float32")
    changes: list[Callable[[Any], Any]] = [
        lambda t: setattr(t, "data", torch.full((4,), 5.0, device="cuda")),
        lambda t: setattr(t, "data", t.data.to(torch.float64)),
        lambda t: setattr(t, "data", t.data.cpu()),
        lambda t: t.data.resize_(1 << 20),
    ]
    for change in changes:
        w = torch.nn.Parameter(torch.zeros(4, device="cuda"))
        opt = fs.SGD([w], lr=1.0)
        opt.step([g])
        change(w)
        with pytest.raises(ValueError, match="other memory"):
            opt.step([g])


@with_torch
def test_state_of_torchs_own_optimizers(lib: Library, rng: np.random.Generator) -> None:
    """Their tensors, step counts among them, are on the GPU."""
    import torch

    start, grads = standard(rng, (4, 5)), standard(rng, (3, 4, 5))
    tensor = torch.nn.Parameter(lib.put(start))
    theirs = torch.optim.NAdam([tensor], capturable=True)
    for g in grads:
        tensor.grad = lib.put(g)
        theirs.step()
    pair = Pair(lib, fs.NAdam, [on_host(tensor)])
    pair.cpu.load_state_dict(theirs.state_dict())
    pair.gpu.load_state_dict(theirs.state_dict())
    assert pair.gpu.state[0]["step"] == 3
    pair.step([grads[0]])
    pair.check()


@on_real_gpus
def test_numbas_arrays(lib: Library, rng: np.random.Generator) -> None:
    cuda = pytest.importorskip("numba.cuda")
    start, g = standard(rng, (2, 9, 5))
    w, expected = cuda.to_device(start), start.copy()
    gpu, cpu = fs.Adam([w]), fs.Adam([expected])
    for _ in range(3):
        gpu.step([cuda.to_device(g)])
        cpu.step([g])
    lib.synchronize()
    assert_same(w.copy_to_host(), expected)
    theirs = cuda.to_device(np.asfortranarray(g))
    other = lib.put(start)
    fs.SGD([other], lr=1.0).step([theirs])
    assert_same(on_host(other), start - g)


@with_cupy
def test_a_step_beside_a_graph_is_refused(lib: Library) -> None:
    """The default stream must not be used while a stream that it waits for is captured."""
    w, g = (lib.full(5, 1, "float32") for _ in range(2))
    opt = fs.Adam([w])
    opt.step([g])
    cuda = lib.module.cuda
    with cuda.Stream() as stream:
        stream.begin_capture()
        try:
            with cuda.Stream.null, pytest.raises(RuntimeError, match="captured on another stream"):
                opt.step([g])
        finally:
            stream.end_capture()
    opt.step([g])
    assert opt.state[0]["step"] == 2


@with_cupy
def test_a_stream_that_is_gone(lib: Library) -> None:
    """CuPy destroys a stream with its last reference; who asks for the steps later must not use it.

    In a process of its own: a stream that is gone may be the end of it.
    """
    code = inspect.cleandoc(
        """
        import gc, cupy, fusestep as fs
        w, g = cupy.zeros(5, "float32"), cupy.ones(5, "float32")
        opt = fs.Adam([w], skip_nonfinite=True)
        cupy.cuda.runtime.deviceSynchronize()
        with cupy.cuda.Stream(non_blocking=True) as stream:
            opt.step([g])
            stream.synchronize()
        del stream
        gc.collect()
        assert (opt.steps, opt.skipped_steps, opt.state[0]["step"]) == (1, 0, 1)
        opt.step([g])
        assert opt.state_dict()["state"][0]["step"] == 2
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@on_real_gpus
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_forked_child(lib: Library, rng: np.random.Generator) -> None:
    """It cannot use the GPU, but steps on the CPU and lets go of the parent's optimizer."""
    start, g = standard(rng, (2, 2000))
    w, expected = lib.put(start), start.copy()
    opt, on_cpu = fs.Adam([w], max_norm=1.0), fs.Adam([expected], max_norm=1.0)
    opt.step([lib.put(g)])
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            on_cpu.step([g])
            del opt
            gc.collect()
            status = 0
        finally:
            os._exit(status)
    ended, status = 0, 0
    for _ in range(300):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        pytest.fail("the child hangs")
    assert status == 0
    opt.step([lib.put(g)])
    for _ in range(2):
        on_cpu.step([g])
    assert_same(on_host(w), expected)


BEYOND = 2**31 + 12_345


def _needs_memory(lib: Library, gigabytes: int) -> None:
    cuda = lib.module.cuda
    free = cuda.mem_get_info()[0] if lib.name == "torch" else cuda.Device().mem_info[0]
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GB on the GPU")


@pytest.mark.slow
@on_real_gpus
def test_one_array_beyond_31_bits(lib: Library) -> None:
    """float16, SGD without momentum. Every element must move, and only once."""
    _needs_memory(lib, 12)
    w, g = lib.huge(BEYOND, 0, "float16"), lib.huge(BEYOND, 1, "float16")
    special = {0: 2, 2**31 - 1: 3, 2**31: 4, BEYOND - 1: 5}
    for place, value in special.items():
        lib.fill(g[place : place + 1], value)
    opt = fs.SGD([w], lr=1.0, skip_nonfinite=True)  # which takes a norm of three levels
    opt.step([g], zero_grad=True)
    assert opt.steps == 1
    for place, value in special.items():
        assert on_host(w[place : place + 1])[0] == -value
        lib.fill(w[place : place + 1], -1)
    for first in range(0, BEYOND, 2**28):
        assert bool((w[first : first + 2**28] == -1).all())
        assert bool((g[first : first + 2**28] == 0).all())

    lib.fill(g, 1)
    opt.max_norm = 1.0
    opt.step([g])
    tail, gradient = np.full(5, -1, np.float16), np.ones(5, np.float16)
    clip = 1.0 / (math.sqrt(BEYOND) + 1e-6)
    fs.SGD([tail], lr=1.0).step([gradient], grad_scale=clip)
    for part in (w[:5], w[-5:], w[2**31 - 2 : 2**31 + 3]):
        assert_same(on_host(part), tail)


@pytest.mark.slow
@on_real_gpus
def test_a_strided_view_beyond_31_bits(lib: Library) -> None:
    """Two columns of a wide array: offsets beyond 31 bits on the strided path."""
    _needs_memory(lib, 12)
    rows = 2**21 + 17
    wide = lib.huge((rows, 2048), 0, "float16")
    g = (np.arange(rows * 2) % 1000).reshape(2, rows).astype(np.float16)
    fs.SGD([wide[:, ::1024]], lr=1.0).step([lib.put(g).T])
    assert_same(on_host(wide[:, ::1024]), (0 - g).T)
    assert int((wide != 0).sum()) == np.count_nonzero(g)
