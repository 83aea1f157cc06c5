"""State of 16 and 8 bits, and parameters of 16, rounded at random."""

from __future__ import annotations

import copy
import hashlib
import pickle
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
from conftest import AVAILABLE
from fusestep import _cpu, _narrow
from rules import ROWWISE, RULES, Rule

if TYPE_CHECKING:
    from pathlib import Path

f32, f64 = np.float32, np.float64
bfloat16 = np.dtype(ml_dtypes.bfloat16)
NARROW = ["bfloat16", "int8"]
WITH_STATE = [rule for rule in RULES if rule.states]
BLOCK = _cpu.elements_of_block


def draw(rng: np.random.Generator, shape: Any, dtype: Any = f32) -> np.ndarray:
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def state_of(opt: fs.Optimizer, name: str, key: Any = 0) -> np.ndarray:
    """A piece of state as float64."""
    entry = opt.state[key]
    if name + "_powers" not in entry:
        return np.asarray(entry[name]).astype(f64)
    is_signed = name in ("exp_avg", "momentum_buffer")
    blocks = _narrow.Blocks(entry[name], entry[name + "_powers"])
    return _narrow.decode(blocks, is_signed).astype(f64)


def digest(opt: fs.Optimizer) -> str:
    result = hashlib.sha256()
    for parameter, entry in zip(opt._parameters.arrays, opt.state.values(), strict=True):
        result.update(np.asarray(parameter).tobytes("C"))
        for value in entry.values():
            result.update(np.asarray(value).tobytes("C"))
    return result.hexdigest()


# ---- codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_signed", [True, False])
def test_every_code_is_encoded_to_itself(is_signed: bool) -> None:
    most = 128 if is_signed else 256
    codes = np.arange(most, dtype=np.uint8)
    if is_signed:
        codes = np.concatenate([codes, codes + 128])
    powers = np.full(-(-codes.size // BLOCK), 130, np.uint8)
    values = _narrow.decode(_narrow.Blocks(codes, powers), is_signed)
    magnitudes = values[: most - 2]
    assert (np.diff(magnitudes) > 0).all()
    assert np.isinf(values[most - 2])
    assert np.isnan(values[most - 1])
    regular = values[: 121 if is_signed else 249]  # up to 1, times the power
    for first in range(0, regular.size - 1, BLOCK - 1):
        some = np.append(regular[first : first + BLOCK - 1], f32(8))  # of the same power
        again = _narrow.encode(some, is_signed)
        assert again.powers == [130]
        np.testing.assert_array_equal(again.codes[:-1], codes[first : first + some.size - 1])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_round_trips(data: st.DataObject) -> None:
    """What is not finite, 0 and tiny survives; the rest is near; twice is once."""
    is_signed = data.draw(st.booleans())
    size = data.draw(st.sampled_from([1, 3, 63, 64, 65, 200]))
    floats = st.floats(width=32, min_value=None if is_signed else 0.0)
    values = np.array(data.draw(st.lists(floats, min_size=size, max_size=size)), f32)
    blocks = _narrow.encode(values, is_signed)
    decoded = _narrow.decode(blocks, is_signed)
    np.testing.assert_array_equal(np.isnan(decoded), np.isnan(values))
    infinite = np.isinf(values)
    np.testing.assert_array_equal(decoded[infinite], values[infinite])
    np.testing.assert_array_equal(np.isinf(decoded), infinite)
    for begin in range(0, size, BLOCK):
        given_, found = values[begin : begin + BLOCK], decoded[begin : begin + BLOCK]
        finite = np.isfinite(given_)
        if not finite.any():
            continue
        largest = np.abs(given_[finite]).max()
        if largest == 0 and finite.all():
            np.testing.assert_array_equal(found, 0)
        # Half of the last of 4 digits, or of the least step; powers stop at 2^-109, and at 2^126.
        least = max(float(largest), 2.0**-126) * (2.0**-16 if is_signed else 2.0**-30)
        least = max(least, 2.0**-126)
        wanted = np.clip(given_[finite].astype(f64), -1.625 * 2.0**126, 1.625 * 2.0**126)
        error = np.abs(found[finite] - wanted)
        assert (error <= np.maximum(np.abs(wanted) / 16, 2 * least)).all()
    again = _narrow.decode(_narrow.encode(decoded, is_signed), is_signed)
    np.testing.assert_array_equal(again, decoded)


@pytest.mark.parametrize("shape", [(), (0, 3), (7, 11)])
def test_round_trips_keep_the_shape(shape: tuple[int, ...]) -> None:
    blocks = _narrow.encode(np.ones(shape, f32), True)
    assert blocks.codes.shape == shape
    np.testing.assert_array_equal(_narrow.decode(blocks, True), np.ones(shape))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 2"):
        _cpu.decode_state(np.zeros(65, np.uint8), np.zeros(1, np.uint8), True)


# ---- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", WITH_STATE, ids=str)
@pytest.mark.parametrize("dtype", NARROW)
def test_state_is_that_of_float32_on_the_average(rule: Rule, dtype: str, tier: str) -> None:
    """Unbiased: the mean over many elements with the same gradients is what float32 has."""
    rng = np.random.default_rng(0)
    size, steps = 6400, 40
    narrow, wide = np.zeros(size, f32), np.zeros(1, f32)
    opt = rule.cls(narrow, **rule.options, state_dtype=dtype)
    reference = rule.cls(wide, **rule.options)
    for _ in range(steps):
        gradient = f32(1 + 0.3 * rng.standard_normal())
        opt.step(np.full(size, gradient))
        reference.step(np.full(1, gradient))
        narrow[...] = wide[...] = 0  # with weight decay, the same gradients
    for name in rule.states:
        found = state_of(opt, name)
        expected = state_of(reference, name)[0]
        spread = found.std() / np.sqrt(size)
        if name != "max_exp_avg_sq":  # a maximum of what is noisy is larger
            assert abs(found.mean() - expected) <= 6 * spread + 1e-6 * abs(expected), name
        assert found.std() <= (0.3 if dtype == "int8" else 0.06) * abs(expected), name


@pytest.mark.parametrize("dtype", NARROW)
def test_moments_do_not_stall(dtype: str) -> None:
    """beta2 = 0.999 moves a mean square by less than its last place; rounding to nearest stalls."""
    opt = fs.Adam(np.zeros(6400, f32), lr=1e-3, state_dtype=dtype)
    for size, steps in ((10.0, 200), (1.0, 3000)):
        for _ in range(steps):
            opt.step(np.full(6400, size, f32))
    exact = 1 - 0.999**3000 + (1 - 0.999**200) * 100 * 0.999**3000
    assert abs(state_of(opt, "exp_avg_sq").mean() / exact - 1) < 0.02
    as_bfloat16 = bfloat16.type(18.0)  # what the first steps lead to, rounded to nearest
    assert bfloat16.type(f32(0.999) * f32(as_bfloat16) + f32(0.001)) == as_bfloat16


@pytest.mark.parametrize("rule", WITH_STATE, ids=str)
@pytest.mark.parametrize("dtype", NARROW)
def test_the_same_bits_over_tiers_threads_and_layouts(rule: Rule, dtype: str) -> None:
    found = set()
    for tier in AVAILABLE:
        for threads, order in ((1, "C"), (2, "C"), (3, "F")):
            if order == "F" and dtype == "bfloat16":
                continue  # its tiles are those of another layout: so are its random numbers
            _cpu.use_tier(tier)
            fs.set_num_threads(threads)
            rng = np.random.default_rng(1)
            params = [draw(rng, n) for n in (1, 5, 63, 64, 65, 1000, 1024, 4097)]
            params.append(np.array(draw(rng, (300, 500)), order=order))
            opt = rule.cls(params, **rule.options, state_dtype=dtype, seed=3)
            for _ in range(3):
                opt.step([np.array(draw(rng, p.shape), order=order) for p in params])
            found.add(digest(opt))
    assert len(found) == 1


STRANGE = [0.0, 1e-42, 1e-30, 1e18, 1e38, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("rule", WITH_STATE, ids=str)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("more", [{}, {"clip_value": 0.5}, {"ema_decay": 0.9}], ids=str)
def test_one_pass_over_state_gives_the_bits_of_three(
    rule: Rule, dtype: str, more: dict[str, Any], tier: str
) -> None:
    """Rows are made into floats, moved and stored one after the other; what is dense at once."""
    rng = np.random.default_rng(11)
    table = draw(rng, (12, 1024))
    whole = table.copy()
    rows = rule.cls(table, **rule.options, state_dtype=dtype, **more)
    dense = rule.cls(whole, **rule.options, state_dtype=dtype, **more)
    for step in range(4):
        gradient = draw(rng, table.shape)
        gradient *= 10.0 ** rng.integers(-12, 6, gradient.shape).astype(f32)
        for row, value in enumerate(STRANGE[: 8 if step else 3], start=1):
            gradient[row, rng.integers(0, 1024, 5)] = value
        rows.step(fs.Rows(np.arange(12), gradient))
        dense.step(gradient)
        assert digest(rows) == digest(dense)


@pytest.mark.parametrize("dtype", NARROW)
def test_any_layout(dtype: str) -> None:
    rng = np.random.default_rng(2)
    memory = draw(rng, (40, 3, 50))
    for w in (memory[:, 1, :], memory[::2, :, ::-1], memory.transpose(2, 0, 1), memory[0, 0, :1]):
        other = w.copy()
        opt = fs.Adam(w, lr=0.1, state_dtype=dtype)
        plain = fs.Adam(other, lr=0.1)
        for _ in range(3):
            gradient = draw(rng, (2, *w.shape))[1]
            opt.step(gradient)
            plain.step(gradient)
        assert np.abs(w - other).max() < 0.2
        assert np.abs(state_of(opt, "exp_avg") - state_of(plain, "exp_avg")).mean() < 0.05


def test_random_numbers_depend_on_the_seed_alone() -> None:
    def run(seed: int, dtype: str) -> str:
        rng = np.random.default_rng(3)
        opt = fs.Adam([draw(rng, 5000), draw(rng, 70)], state_dtype=dtype, seed=seed)
        for _ in range(4):
            opt.step([draw(rng, 5000), draw(rng, 70)])
        return digest(opt)

    for dtype in NARROW:
        assert run(0, dtype) == run(0, dtype)
        assert run(0, dtype) != run(1, dtype)


def test_rounding_differs_from_step_to_step_and_between_parameters() -> None:
    params = [np.full(4096, 1, bfloat16) for _ in range(2)]
    opt = fs.SGD(params, lr=2.0**-9, stochastic_rounding=True)
    seen = []
    for _ in range(3):
        for p in params:
            p[...] = 1
        opt.step([np.full(4096, 0.5, f32)] * 2)
        seen += [p == 1 for p in params]
    for i, one in enumerate(seen):
        assert 0.7 < one.mean() < 0.8  # 1/4 of the last place below 1
        for other in seen[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.08


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_rounded_at_random_move_as_far_as_float32(dtype: str, tier: str) -> None:
    kind = bfloat16 if dtype == "bfloat16" else np.dtype("f2")
    for start, lr in ((1.0, 1e-4), (-3.0, 1e-4), (2.0**-20, 1e-9), (100.0, 1e-3)):
        for is_random in (False, True):
            w = np.full(20_000, start, kind)
            first = float(w[0])
            opt = fs.SGD(w, lr=lr, stochastic_rounding=is_random)
            for _ in range(50):
                opt.step(np.full(w.shape, 1, f32))
            moved = first - w.astype(f64).mean()
            if is_random:
                assert abs(moved / (50 * lr) - 1) < 0.1, (start, moved)
            elif not (kind == bfloat16 and start == 2.0**-20):
                assert moved == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_need_not_be_rounded_is_not(dtype: str) -> None:
    kind = bfloat16 if dtype == "bfloat16" else np.dtype("f2")
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, float(np.finfo(f32).tiny), 1.0, -1.5]
    largest = float(ml_dtypes.finfo(kind).max)
    w = np.array([*special, largest, -largest], kind)
    before = w.copy()
    opt = fs.SGD(w, lr=0.0, stochastic_rounding=True)
    for _ in range(20):
        opt.step(np.zeros(w.shape, f32))
    np.testing.assert_array_equal(w.view(np.uint16), before.view(np.uint16))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1e-42, 1e10])
def test_strange_gradients_reach_the_state_of_their_elements_only(dtype: str, value: float) -> None:
    w = np.zeros(256, f32)
    opt = fs.Adam(w, state_dtype=dtype)
    gradient = np.ones(256, f32)
    for _ in range(5):
        opt.step(gradient)
    gradient[70] = value
    opt.step(gradient)
    others = np.arange(256) != 70
    assert np.isfinite(w[others]).all()
    for name in ("exp_avg", "exp_avg_sq"):
        state = state_of(opt, name)
        assert np.isfinite(state[others]).all()
        assert np.isfinite(state[70]) == np.isfinite(value), name


# ---- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    "where",
    [fs.RandomBlocks(0.3, block=128), fs.CyclicBlocks(4), fs.Mask(np.arange(64) % 3 == 0)],
    ids=repr,
)
def test_blocks_that_are_not_selected_keep_their_bits(dtype: str, where: Any) -> None:
    rng = np.random.default_rng(4)
    w = draw(rng, (64, 256))
    opt = fs.Adam(w, state_dtype=dtype)
    opt.step(draw(rng, w.shape))
    for _ in range(6):
        before = (w.copy(), copy.deepcopy(opt.state[0]))
        opt.step(draw(rng, w.shape), where=where)
        moved = (w != before[0]).reshape(-1, BLOCK).any(axis=1)
        assert 0 < moved.sum() < moved.size
        for name, now in opt.state[0].items():
            if name == "step":
                continue
            same = (now == before[1][name]).reshape(moved.size, -1).all(axis=1)
            assert same[~moved].all(), name


@pytest.mark.parametrize("size", [0, 1, 63, 65, 1000])
def test_all_of_a_short_parameter_may_be_one_block(size: int) -> None:
    rng = np.random.default_rng(12)
    w = draw(rng, size)
    opt = fs.Adam({"w": w, "W": draw(rng, (30, 100))}, state_dtype="int8")
    moved = []
    for _ in range(30):
        before = w.copy()
        gradients = {"w": draw(rng, size), "W": draw(rng, (30, 100))}
        opt.step(gradients, where=fs.RandomBlocks(0.3))
        moved.append((before != w).mean() if size else 0.0)
    assert all(share == 0 or share > 0.99 for share in moved)
    assert size == 0 or (0 in moved and any(moved))


def test_tracking_moves_all_state() -> None:
    rng = np.random.default_rng(5)
    w = draw(rng, 1000)
    opt = fs.Adam(w, state_dtype="int8")
    before = w.copy()
    selected = rng.random(1000) < 0.3
    opt.step(draw(rng, 1000), where=fs.Mask(selected, frozen="track"))
    np.testing.assert_array_equal(w != before, selected)
    assert (state_of(opt, "exp_avg") != 0).mean() > 0.99


@pytest.mark.parametrize("dtype", [*NARROW, None])
def test_the_largest_updates_of_blocks_that_have_come_differently_far(dtype: str | None) -> None:
    """How far elements would move depends on how often their block has moved."""
    rng = np.random.default_rng(14)
    w = draw(rng, (30, 64))
    opt = fs.Adam(w, lr=1.0, state_dtype=dtype)
    opt.step(draw(rng, w.shape), where=np.arange(30) < 10)
    before = w.copy()
    opt.step(draw(rng, w.shape), where=fs.TopK(0.25, by="update", frozen="track"))
    moved = np.abs(w - before)
    assert np.count_nonzero(moved) == 480
    assert moved[moved > 0].min() > 0.5


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("columns", [64, 320])
def test_rows(dtype: str, columns: int) -> None:
    rng = np.random.default_rng(6)
    table, plain = draw(rng, (30, columns)), None
    plain = table.copy()
    opt, reference = fs.Adam(table, lr=0.1, state_dtype=dtype), fs.Adam(plain, lr=0.1)
    for _ in range(5):
        rows = rng.permutation(30)[:4]
        before, state = table.copy(), state_of(opt, "exp_avg")
        gradient = fs.Rows(rows, draw(rng, (4, columns)))
        opt.step(gradient)
        reference.step(gradient)
        others = ~np.isin(np.arange(30), rows)
        np.testing.assert_array_equal(table[others], before[others])
        np.testing.assert_array_equal(state_of(opt, "exp_avg")[others], state[others])
    assert np.abs(table - plain).mean() < 0.02


def test_parts_of_blocks_are_refused_and_nothing_has_changed() -> None:
    rng = np.random.default_rng(7)
    opt = fs.Adam(draw(rng, (20, 60)), state_dtype="int8")
    opt.step(draw(rng, (20, 60)))
    before = digest(opt)
    for where in (
        rng.random((20, 60)) < 0.5,
        np.arange(20) < 3,
        fs.TopK(0.1),
        fs.RandomBlocks(0.5, block=100),
    ):
        with pytest.raises(ValueError, match="in blocks of 64 elements"):
            opt.step(draw(rng, (20, 60)), where=where)
    for frozen in (None, fs.Mask(np.arange(20) < 3, frozen="track")):
        with pytest.raises(ValueError, match="rows of a multiple of 64"):
            opt.step(fs.Rows([1], draw(rng, (1, 60))), where=frozen)
    assert digest(opt) == before
    with pytest.raises(ValueError, match="rows='exact'"):
        fs.Adam(np.zeros((3, 64), f32), state_dtype="int8", rows="exact")


def test_blocks_of_which_elements_have_come_differently_far_are_refused() -> None:
    """As they have where state was wider, and elements were selected one by one."""
    rng = np.random.default_rng(13)
    w = draw(rng, (10, 64))
    wide = fs.NAdam(w.copy(), state_dtype="bfloat16")
    wide.step(draw(rng, w.shape), where=np.arange(10) % 3 == 0)
    narrow = fs.NAdam(w, state_dtype="int8")
    with pytest.warns(UserWarning, match="from bfloat16 to int8"):
        narrow.load_state_dict(wide.state_dict())
    narrow.step(draw(rng, w.shape))
    wide.step(draw(rng, w.shape), where=rng.random(w.shape) < 0.5)
    before = digest(narrow)
    with pytest.raises(ValueError, match="have had more updates than others"):
        narrow.load_state_dict(wide.state_dict())
    assert digest(narrow) == before


# ---- memory, checkpoints ------------------------------------------------------------------------


def test_bytes() -> None:
    w = np.zeros(1_000_000, f32)
    sizes = {dtype: fs.memory(w, fs.Adam, state_dtype=dtype).state for dtype in (None, *NARROW)}
    assert sizes[None] == 8_000_000
    assert sizes["bfloat16"] == 4_000_000
    assert sizes["int8"] <= 2.06e6
    for dtype, size in sizes.items():
        entry = fs.Adam(w, state_dtype=dtype).state[0]
        assert sum(x.nbytes for x in entry.values() if isinstance(x, np.ndarray)) == size


def test_rules_with_state_of_rows_keep_it_in_float32() -> None:
    for rule in ROWWISE:
        for dtype in NARROW:
            opt = rule.cls(np.ones((3, 4), f32), **rule.options, state_dtype=dtype)
            opt.step(np.ones((3, 4), f32))
            assert opt.state[0]["sum"].dtype == f32


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rule", WITH_STATE, ids=str)
def test_training_goes_on_from_a_checkpoint(rule: Rule, dtype: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    params = [draw(rng, (7, 11)), draw(rng, 2000)]
    opt = rule.cls(params, **rule.options, state_dtype=dtype, seed=5)
    gradients = [[draw(rng, p.shape) for p in params] for _ in range(4)]
    for some in gradients[:2]:
        opt.step(some)
    opt.save(tmp_path / "state")
    others = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    loaded = rule.cls([p.copy() for p in params], state_dtype=dtype, **_kept(rule))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.load(tmp_path / "state")
    others.append(loaded)
    for some in gradients[2:]:
        for one in (opt, *others):
            one.step(some)
    assert {digest(one) for one in others} == {digest(opt)}


def _kept(rule: Rule) -> dict[str, Any]:
    """Options that decide which state there is."""
    return {k: v for k, v in rule.options.items() if k in ("momentum", "amsgrad", "nesterov")}


@pytest.mark.parametrize("source", [None, *NARROW])
@pytest.mark.parametrize("target", [None, *NARROW])
def test_state_is_converted_and_says_so(source: str | None, target: str | None) -> None:
    rng = np.random.default_rng(9)
    w = draw(rng, (30, 50))
    opt = fs.Adam(w, amsgrad=True, state_dtype=source)
    for _ in range(3):
        opt.step(draw(rng, w.shape))
    other = fs.Adam(w.copy(), amsgrad=True, state_dtype=target)
    if source == target:
        other.load_state_dict(opt.state_dict())
    else:
        names = [dtype or "float32" for dtype in (source, target)]
        with pytest.warns(UserWarning, match=f"from {names[0]} to {names[1]}") as caught:
            other.load_state_dict(opt.state_dict())
        assert len(caught) == 1
    tolerance = 1 / 16 if target == "int8" else 2**-8 if target == "bfloat16" else 0
    if source == "int8" and target is not None:
        tolerance = 0  # what 8 bits can say, these can, too
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        found, given_ = state_of(other, name), state_of(opt, name)
        largest = np.abs(given_).max()
        np.testing.assert_allclose(found, given_, rtol=tolerance, atol=tolerance * largest / 2**9)
    assert other.state[0]["step"] == 3


@pytest.mark.parametrize("dtype", NARROW)
def test_torch_reads_and_writes_it(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    w = np.ones(100, f32)
    opt = fs.Adam(w, state_dtype=dtype)
    opt.step(np.linspace(-1, 1, 100, dtype=f32))
    theirs = torch.optim.Adam([torch.nn.Parameter(torch.ones(100))])
    saved = opt.state_dict(state_dtype="float32")
    for name, value in saved["state"][0].items():
        saved["state"][0][name] = torch.as_tensor(value)
    theirs.load_state_dict(saved)
    loaded = theirs.state_dict()["state"][0]
    np.testing.assert_array_equal(np.asarray(loaded["exp_avg"]), state_of(opt, "exp_avg"))
    assert "exp_avg_powers" not in loaded
    with pytest.warns(UserWarning, match=f"from float32 to {dtype}"):
        opt.load_state_dict(theirs.state_dict())


def test_damaged_state_is_refused() -> None:
    opt = fs.Adam(np.ones(100, f32), state_dtype="int8")
    opt.step(np.ones(100, f32))
    good = opt.state_dict()
    before = digest(opt)
    for name, value, error in (
        ("exp_avg_powers", np.zeros(1, np.uint8), ValueError),
        ("exp_avg_powers", np.zeros(2, f32), TypeError),
        ("exp_avg", np.zeros(99, np.uint8), ValueError),
        ("exp_avg", np.zeros(100, np.int32), TypeError),
    ):
        bad = copy.deepcopy(good)
        bad["state"][0][name] = value
        with pytest.raises(error, match="exp_avg of the parameter"):
            opt.load_state_dict(bad)
    for spoil, message in (
        (lambda entry: entry.pop("exp_avg_powers"), "uint8, .*; 'exp_avg_powers' is missing"),
        (lambda entry: entry.update(exp_avg_powers=None), "'exp_avg_powers' is missing"),
        (lambda entry: entry.pop("exp_avg"), "exp_avg of the parameter is missing; its 'exp_avg_"),
    ):
        bad = copy.deepcopy(good)
        spoil(bad["state"][0])
        with pytest.raises(TypeError, match=message):
            opt.load_state_dict(bad)
    assert digest(opt) == before


def test_tables_grow() -> None:
    rng = np.random.default_rng(10)
    for rule, options in ((fs.Adam, {}), (fs.Adagrad, {"initial_accumulator_value": 0.5})):
        opt = rule(draw(rng, (10, 20)), state_dtype="int8", **options)
        opt.step(draw(rng, (10, 20)))
        names = [n for n in opt.state[0] if n not in ("step",) and not n.endswith("_powers")]
        before = {name: state_of(opt, name) for name in names}
        opt.resize(0, 25)
        for name in names:
            now = state_of(opt, name)
            np.testing.assert_array_equal(now[:9], before[name][:9])
            # In a block that is not empty, the least number stands for a mean square of 0.
            np.testing.assert_allclose(now[10:], 0.5 if options else 0, rtol=0, atol=1e-9)
        opt.step(draw(rng, (25, 20)))


@pytest.mark.parametrize("wrong", ["int4", "float16", np.int8, "fp8", 8])
def test_other_dtypes_are_refused(wrong: Any) -> None:
    if wrong is np.int8:
        return
    with pytest.raises(ValueError, match="state_dtype"):
        fs.Adam(np.ones(3, f32), state_dtype=wrong)


@pytest.mark.parametrize("given_", ["bfloat16", bfloat16, ml_dtypes.bfloat16])
def test_bfloat16_has_many_names(given_: Any) -> None:
    assert fs.Adam(np.ones(3, f32), state_dtype=given_).state[0]["exp_avg"].dtype == bfloat16


def test_ml_dtypes_is_imported_when_it_is_needed() -> None:
    code = """
import sys
import numpy as np, fusestep as fs
w = np.ones(3, np.float32)
fs.Adam(w, state_dtype="int8").step(w.copy())
assert "ml_dtypes" not in sys.modules
if sys.argv[1:]:
    sys.modules["ml_dtypes"] = None
try:
    fs.Adam(w, state_dtype="bfloat16").step(w.copy())
except ImportError as error:
    assert sys.argv[1:] and "pip install ml_dtypes" in str(error), error
else:
    assert not sys.argv[1:]
"""
    for arguments in ([], ["hidden"]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True)


def test_anchors_and_averages_stay_wide() -> None:
    rng = np.random.default_rng(11)
    for dtype in NARROW:
        w = draw(rng, 500)
        opt = fs.Adam(w, lr=0.1, state_dtype=dtype, ema_decay=0.9)
        opt.anchor(10.0)
        opt.step(draw(rng, 500))
        assert opt.anchors[0]["reference"].dtype == f32
        assert opt.averages.dtype == f32
