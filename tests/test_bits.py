"""The same bits over instruction sets, threads, alignment, layout and floating-point modes."""

from __future__ import annotations

import ctypes
import hashlib
import platform
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
from conftest import AVAILABLE
from fusestep import _cpu
from rules import PLAIN, RULES, Rule

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = [1, 5, 16, 33, 1000, 4097, 70_001]  # the last one is spread over threads


def at_offset(array: np.ndarray, nbytes: int) -> np.ndarray:
    """A copy of `array` that starts `nbytes` past a 64-byte boundary."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + nbytes
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run(rule: Rule, dtype: type, *, steps: int, offset: int = 0, **common: object) -> bytes:
    """Parameters and state after `steps` steps, as one digest."""
    rng = np.random.default_rng(1)
    params = [at_offset(rng.standard_normal(n).astype(dtype), offset) for n in SIZES]
    opt = rule.cls(params, **rule.options, **common)
    for _ in range(steps):
        opt.step([at_offset(rng.standard_normal(n).astype(dtype), offset) for n in SIZES])
    digest = hashlib.sha256()
    for p, state in zip(params, opt.state.values(), strict=True):
        digest.update(p.tobytes())
        for value in state.values():
            digest.update(np.asarray(value).tobytes())
    return digest.digest()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_tiers_threads_and_alignment(rule: Rule, dtype: type) -> None:
    digests = set()
    for tier in AVAILABLE:
        for threads, offset in [(1, 0), (2, 0), (7, 0), (1, np.dtype(dtype).itemsize), (2, 24)]:
            _cpu.use_tier(tier)
            fs.set_num_threads(threads)
            digests.add(run(rule, dtype, steps=5, offset=offset))
    assert len(digests) == 1


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_thousand_steps(rule: Rule) -> None:
    """One checksum for every tier and thread count."""
    digests = set()
    for tier in AVAILABLE:
        for threads in (1, 2):
            _cpu.use_tier(tier)
            fs.set_num_threads(threads)
            rng = np.random.default_rng(2)
            w = rng.standard_normal(2**16 + 3).astype(np.float32)
            gradients = rng.standard_normal((4, w.size)).astype(np.float32)
            opt = rule.cls([w], **rule.options)
            for step in range(1000):
                opt.step([gradients[step % 4]])
            digests.add(hashlib.sha256(w.tobytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_clipping_sums_in_a_fixed_order(rule: Rule) -> None:
    """The norm decides every bit, so its own must not depend on threads, tier or alignment."""
    digests = set()
    for tier in AVAILABLE:
        for threads, offset in [(1, 0), (2, 4), (5, 8)]:
            _cpu.use_tier(tier)
            fs.set_num_threads(threads)
            digests.add(run(rule, np.float32, steps=5, offset=offset, max_norm=0.37))
    assert len(digests) == 1


def _transposed(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a.T).T


def _gappy(a: np.ndarray) -> np.ndarray:
    wide = np.zeros(tuple(2 * n for n in a.shape), a.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def _reversed(a: np.ndarray) -> np.ndarray:
    backwards = (slice(None, None, -1),) * a.ndim
    return np.ascontiguousarray(a[backwards])[backwards]


def _packed(a: np.ndarray) -> np.ndarray:
    """Elements off their own alignment, as a field of a packed record."""
    record = np.zeros(a.shape, np.dtype([("tag", "u1"), ("value", a.dtype)]))
    record["value"] = a
    return record["value"]


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "c": np.ascontiguousarray,
    "transposed": _transposed,
    "gappy": _gappy,
    "reversed": _reversed,
    "packed": _packed,
    "middle axis first": lambda a: np.moveaxis(
        np.ascontiguousarray(np.moveaxis(a, a.ndim // 2, 0)), 0, a.ndim // 2
    ),
}


@settings(max_examples=150, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    tier=st.sampled_from(AVAILABLE),
    threads=st.integers(1, 3),
    shape=st.one_of(
        st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple),
        st.tuples(st.integers(30, 70), st.integers(30, 70)),
        st.just((3, 5, 64, 80)),
        st.just((270, 260)),
    ),
    parameter=st.sampled_from(sorted(LAYOUTS)),
    gradients=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=2, max_size=3),
    dtype=st.sampled_from([np.float64, np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_layout_changes_nothing(
    rule: Rule,
    tier: str,
    threads: int,
    shape: tuple[int, ...],
    parameter: str,
    gradients: list[str],
    dtype: type,
) -> None:
    """Any strides of parameter and gradient give the bits of contiguous arrays."""
    rng = np.random.default_rng(3)
    start = rng.standard_normal(shape).astype(dtype)
    plain, odd = start.copy(), LAYOUTS[parameter](start)
    if dtype is ml_dtypes.bfloat16 and parameter == "packed":
        odd = _gappy(start)
    plain_opt, odd_opt = (rule.cls([w], **rule.options) for w in (plain, odd))
    before = _cpu.active_tier()
    for layout in gradients:
        g = rng.standard_normal(shape).astype(dtype)
        strided = LAYOUTS[layout](g) if dtype is not ml_dtypes.bfloat16 else _transposed(g)
        _cpu.use_tier(before)
        fs.set_num_threads(1)
        plain_opt.step([g])
        _cpu.use_tier(tier)
        fs.set_num_threads(threads)
        odd_opt.step([strided], zero_grad=True)
        assert not strided.astype(float).any()
    np.testing.assert_array_equal(
        plain.view(f"u{plain.itemsize}"), odd.copy().view(f"u{odd.itemsize}")
    )
    for ours, theirs in zip(plain_opt.state[0].values(), odd_opt.state[0].values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_layout_leaves_the_gaps_alone(tier: str) -> None:
    wide = np.full((50, 60), 7.0, np.float32)
    g = np.ones((25, 20), np.float32)
    fs.Adam([wide[::2, ::3]], lr=1.0).step([g])
    touched = np.zeros_like(wide, bool)
    touched[::2, ::3] = True
    assert (wide[~touched] == 7).all()
    assert (wide[touched] == 6).all()


def test_state_has_the_layout_of_the_parameter() -> None:
    """So that a transposed parameter with a transposed gradient is one dense run."""
    w = np.zeros((4, 3, 5), np.float32).transpose(2, 0, 1)
    state = fs.Adam([w]).state[0]
    assert state["exp_avg"].strides == w.strides
    assert (state["exp_avg"].ctypes.data - w.ctypes.data) % 64 == 0


def test_broadcast_gradient() -> None:
    w, expected = np.zeros((40, 50)), np.zeros((40, 50))
    row = np.random.default_rng(0).standard_normal(50)
    fs.Adagrad([w]).step([np.broadcast_to(row, (40, 50))])
    fs.Adagrad([expected]).step([np.tile(row, (40, 1))])
    np.testing.assert_array_equal(w, expected)


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_flush_to_zero_in_the_calling_thread_changes_nothing(rule: Rule, tier: str) -> None:
    """A library linked with -ffast-math sets it for the whole thread."""
    torch = pytest.importorskip("torch")
    start, gradient = np.full(2**17, 1e-38, np.float32), np.full(2**17, 1e-41, np.float32)
    digests = []
    for flush in (False, True):
        w = start.copy()
        opt = rule.cls([w], **{**rule.options, "lr": 1e-3})
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor cannot flush denormals")
        try:
            for _ in range(3):
                opt.step([gradient])
            tiny = torch.tensor([1e-38]) * 0.01  # the caller's mode is what it was
            assert (tiny.item() == 0) == flush
        finally:
            torch.set_flush_denormal(False)
        digest = hashlib.sha256(w.tobytes())
        for name in rule.states:
            digest.update(opt.state[0][name].tobytes())
        digests.append(digest.hexdigest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_callers_rounding_mode_changes_nothing(rule: Rule) -> None:
    try:
        libm = ctypes.CDLL("libm.so.6")
    except OSError:
        pytest.skip("no libm.so.6 to set the rounding mode with")
    modes = {"x86_64": (0, 0x400, 0x800, 0xC00), "aarch64": (0, 0x400000, 0x800000, 0xC00000)}
    digests = set()
    for mode in modes[platform.machine()]:
        rng = np.random.default_rng(4)
        w = rng.standard_normal(1000).astype(np.float32)
        gradients = rng.standard_normal((20, w.size)).astype(np.float32)
        opt = rule.cls([w], max_norm=5.0, **rule.options)
        try:
            assert libm.fesetround(mode) == 0
            for g in gradients:
                opt.step([g])
            assert libm.fegetround() == mode
        finally:
            libm.fesetround(0)
        digest = hashlib.sha256(w.tobytes())
        for value in opt.state[0].values():
            digest.update(np.asarray(value).tobytes())
        digests.add(digest.digest())
    assert len(digests) == 1


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_every_sixteen_bit_value_goes_in_and_out(stored: type, tier: str) -> None:
    """SGD with lr 0 reads and writes each of the 65,536 values: no bit may change but a NaN's."""
    every = np.arange(2**16, dtype=np.uint16).view(stored)
    w = every.copy()
    opt = fs.SGD([w], lr=0.0)
    opt.step([np.zeros(w.size, stored)])
    with np.errstate(invalid="ignore"):  # signalling NaNs among them
        numbers = ~np.isnan(every.astype(np.float32))
    np.testing.assert_array_equal(w.view(np.uint16)[numbers], every.view(np.uint16)[numbers])
    assert np.isnan(w.astype(np.float32)[~numbers]).all()


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("computed", [np.float32, np.float64])
def test_rounding_to_sixteen_bits(
    stored: type, computed: type, tier: str, rng: np.random.Generator
) -> None:
    """w - 1 * g from w = 0 rounds -g: exact ties, neighbours of ties, subnormals, overflow."""
    with np.errstate(invalid="ignore"):  # signalling NaNs among them
        grid = np.arange(2**16, dtype=np.uint16).view(stored).astype(np.float64)
    grid = np.unique(grid[np.isfinite(grid)])
    ties = (grid[1:] + grid[:-1]) / 2
    values = np.concatenate(
        [grid, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), 2 * grid[[0, -1]]]
    )
    with np.errstate(over="ignore"):
        values = values.astype(computed)
    values = values[np.isfinite(values)]
    w = np.zeros(values.size, stored)
    state = "float64" if computed is np.float64 else None
    opt = fs.SGD([w], lr=1.0, momentum=0.5, state_dtype=state)
    opt.step([-values])
    with np.errstate(over="ignore", invalid="ignore"):
        if stored is np.float16 or computed is np.float32:
            expected = values.astype(stored)
        else:  # ml_dtypes rounds twice from float64: nearest of the grid, by hand
            expected = _round_once(values, grid).astype(stored)
    differs = w.view(np.uint16) != expected.view(np.uint16)
    zero = (w.astype(float) == 0) & (expected.astype(float) == 0)  # 0 - (-0) is +0
    assert not (differs & ~zero).any()


def _round_once(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Nearest element of `grid`, ties to the one with an even last bit; overflow to infinity."""
    largest = grid[-1] + (grid[-1] - grid[-2]) / 2
    at = np.clip(np.searchsorted(grid, values), 1, grid.size - 1)
    low, high = grid[at - 1], grid[at]
    even_high = (high.astype(ml_dtypes.bfloat16).view(np.uint16) & 1) == 0
    up = (values - low > high - values) | ((values - low == high - values) & even_high)
    nearest = np.where(up, high, low)
    return np.where(np.abs(values) >= largest, np.copysign(np.inf, values), nearest)
