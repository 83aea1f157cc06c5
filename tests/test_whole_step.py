"""What a step does besides the rule, in the same pass: averages, copies, clipped values, decay."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import time
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
from conftest import AVAILABLE
from fusestep import _cpu
from rules import PLAIN, ROWWISE, RULES, Rule

if TYPE_CHECKING:
    from pathlib import Path

f32, f64 = np.float32, np.float64
bfloat16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(name) for name in ("f4", "f8", "f2")] + [bfloat16]
EVERY = [*RULES, *ROWWISE]
SOME = [*PLAIN, ROWWISE[0]]

SHAPES = [(), (0,), (1,), (63,), (1023,), (1024,), (1025,), (5, 7), (130, 64), (70_001,)]


def draw(rng: np.random.Generator, shape: Any, dtype: Any = f32) -> np.ndarray:
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def shaped(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that the rule can move: with rows, where its state has one element for each."""
    return shape or (1,) if rule in ROWWISE else shape


# ---- averages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", EVERY, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999, 1.0])
def test_averages_are_those_of_the_parameters(rule: Rule, decay: float, tier: str) -> None:
    rng = np.random.default_rng(0)
    params = [draw(rng, shaped(rule, shape)) for shape in SHAPES]
    plain = [p.copy() for p in params]
    opt = rule.cls(params, **rule.options, ema_decay=decay)
    without = rule.cls(plain, **rule.options)
    expected = [p.astype(f64) for p in params]
    for _ in range(6):
        gradients = [draw(rng, p.shape) for p in params]
        opt.step(gradients)
        without.step(gradients)
        expected = [decay * a + (1 - decay) * p for a, p in zip(expected, params, strict=True)]
    for average, wanted, p, q in zip(opt.averages, expected, params, plain, strict=True):
        assert average.dtype == f32
        np.testing.assert_allclose(average, wanted, rtol=2e-6, atol=1e-6)
        np.testing.assert_array_equal(p, q)  # the parameter itself is what it was without


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("size", [1, 1000, 4096, 4097, 50_003])
@pytest.mark.parametrize("decay", [0.3, 0.999])
@pytest.mark.parametrize("clip_value", [None, 0.5])
def test_one_loop_and_tiles_give_the_same_averages(
    rule: Rule, size: int, decay: float, clip_value: float | None, tier: str
) -> None:
    """A copy has the step go tile by tile; without one it goes through memory at once."""
    rng = np.random.default_rng(9)
    begin = 3  # so that nothing begins at a cache line
    one = draw(rng, size + begin)[begin:]
    tiled = one.copy()
    options = {**rule.options, "ema_decay": decay, "clip_value": clip_value}
    at_once = rule.cls(one, **options)
    in_tiles = rule.cls(tiled, **options, copies=np.empty(size, bfloat16))
    for threads in (1, 2, 3):
        fs.set_num_threads(threads)
        gradient = draw(rng, size + 1)[1:]
        in_tiles.step(gradient)
        at_once.step(gradient, zero_grad=True)
        assert not gradient.any()
        np.testing.assert_array_equal(one, tiled)
        np.testing.assert_array_equal(at_once.averages, in_tiles.averages)
        for name, value in in_tiles.state[0].items():
            np.testing.assert_array_equal(at_once.state[0][name], value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages_of_other_dtypes_follow_what_is_kept_of_the_parameter(dtype: np.dtype) -> None:
    rng = np.random.default_rng(1)
    w = draw(rng, 3000, dtype)
    opt = fs.Adam(w, lr=0.1, ema_decay=0.5)
    expected = w.astype(f64)
    for _ in range(4):
        opt.step(draw(rng, 3000))
        expected = (expected + w.astype(f64)) / 2
    assert opt.averages.dtype == (f64 if dtype == f64 else f32)
    np.testing.assert_allclose(opt.averages, expected, rtol=1e-6, atol=1e-7)


def test_averages_are_the_same_over_tiers_threads_and_layouts() -> None:
    found = set()
    for tier in AVAILABLE:
        for threads in (1, 2, 5):
            for order in "CF":
                _cpu.use_tier(tier)
                fs.set_num_threads(threads)
                rng = np.random.default_rng(2)
                w = np.array(draw(rng, (500, 400)), order=order)
                copied = np.zeros((500, 400), bfloat16, order="F")
                opt = fs.AdamW(w, ema_decay=0.9, copies=copied, clip_value=0.5, max_norm=50.0)
                for _ in range(3):
                    opt.step(np.array(draw(rng, (500, 400)), order="F"), zero_grad=True)
                found.add((w.tobytes("C"), opt.averages.tobytes("C"), copied.tobytes("C")))
    assert len(found) == 1


def test_elements_that_do_not_move_leave_their_averages() -> None:
    rng = np.random.default_rng(3)
    table, w = draw(rng, (50, 8)), draw(rng, 4000)
    opt = fs.Adam({"table": table, "w": w, "other": np.ones(3, f32)}, ema_decay=0.5)
    opt.step({"w": draw(rng, 4000)})
    before = copy.deepcopy(opt.averages)
    moved = rng.random(4000) < 0.2
    rows = fs.Rows([3, 3, 41], draw(rng, (3, 8)))
    opt.step({"table": rows, "w": draw(rng, 4000)}, where={"w": moved})
    for name, present, which in (
        ("table", table, np.isin(np.arange(50), [3, 41])),
        ("w", w, moved),
    ):
        after = opt.averages[name]
        np.testing.assert_array_equal(after[~which], before[name][~which])
        expected = (before[name][which].astype(f64) + present[which]) / 2
        np.testing.assert_allclose(after[which], expected, rtol=1e-6)
    np.testing.assert_array_equal(opt.averages["other"], before["other"])


SELECTIONS = [
    None,
    fs.RandomBlocks(0.3, block=100),
    fs.CyclicBlocks(7),
    fs.TopK(0.1),
    fs.RandomBlocks(0.2, block=3, frozen="track"),
]


@pytest.mark.parametrize("where", SELECTIONS, ids=repr)
@pytest.mark.parametrize("kind", ["dense", "samples", "outer", "rows"])
def test_every_gradient_and_selection(where: Any, kind: str) -> None:
    """Averages and copies follow; what moves is what moves without them."""
    if kind == "rows" and isinstance(where, fs.TopK):
        pytest.skip("refused")
    rng = np.random.default_rng(4)
    shape = (60, 40)
    ours, plain = draw(rng, shape), None
    plain = ours.copy()
    copied = np.zeros(shape, np.float16).T.copy().T
    opt = fs.NAdam(ours, ema_decay=0.7, copies=copied)
    without = fs.NAdam(plain)
    expected = ours.astype(f64)
    for _ in range(4):
        before = ours.copy()
        gradient = {
            "dense": lambda: draw(rng, shape),
            "samples": lambda: fs.Samples(draw(rng, (3, *shape)), [1.0, 0.5, 2.0]),
            "outer": lambda: fs.Outer(draw(rng, (5, 40)), draw(rng, (5, 60))),
            "rows": lambda: fs.Rows(rng.permutation(60)[:9], draw(rng, (9, 40))),
        }[kind]()
        opt.step(gradient, where=where)
        without.step(gradient, where=where)
        moved = before != ours  # where the gradient is not 0, which has probability 0
        expected = np.where(moved, 0.7 * expected + 0.3 * ours, expected)
    np.testing.assert_array_equal(ours, plain)
    np.testing.assert_array_equal(copied, ours.astype(np.float16))
    np.testing.assert_allclose(opt.averages, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [0, 1, 2, 10, 1000, 10**6])
@pytest.mark.parametrize("after", [0, 5])
def test_warm_up_is_timms(step: int, after: int) -> None:
    """ModelEmaV3.get_decay, whose steps count from 1."""
    warmup = fs.EmaWarmup(0.9998, 0.1, after, warmup_gamma=2.0, warmup_power=0.75)
    counted = max(0, (step + 1) - after - 1)
    expected = max(min(1 - (1 + counted / 2.0) ** -0.75, 0.9998), 0.1) if counted > 0 else 0.0
    assert warmup(step) == expected
    assert pickle.loads(pickle.dumps(warmup)) == warmup


def test_a_schedule_of_the_decay() -> None:
    rng = np.random.default_rng(5)
    w = draw(rng, 10)
    asked = []

    def decay(step: int) -> float:
        asked.append(step)
        return 1 - 1 / (step + 1)

    opt = fs.SGD(w, lr=0.1, ema_decay=decay)
    values = []
    for _ in range(5):
        opt.step(draw(rng, 10))
        values.append(w.copy())
    assert asked == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(opt.averages, np.mean(values, 0), rtol=1e-5)  # Polyak's
    opt.ema_decay = lambda step: 2.0
    before = w.copy()
    with pytest.raises(ValueError, match=r"ema_decay\(step\) is 2.0"):
        opt.step(np.ones(10, f32))
    np.testing.assert_array_equal(w, before)


def test_a_step_that_is_left_out_moves_no_average() -> None:
    opt = fs.Adam(np.ones(3, f32), ema_decay=0.5, skip_nonfinite=True, copies=np.ones(3, f64))
    opt.step(np.array([1, np.nan, 1], f32))
    np.testing.assert_array_equal(opt.averages, 1)
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swapping(dtype: np.dtype) -> None:
    rng = np.random.default_rng(6)
    w, copied = draw(rng, (4, 5), dtype), np.zeros((4, 5), f32)
    opt = fs.Adam({"w": w}, ema_decay=0.9, copies={"w": copied})
    opt.step({"w": draw(rng, (4, 5))})
    before, average = w.copy(), opt.averages["w"].copy()
    with opt.swap_averages():
        np.testing.assert_array_equal(w, average.astype(dtype))
        np.testing.assert_array_equal(copied, w.astype(f32))
        np.testing.assert_array_equal(opt.averages["w"], average)
        for forbidden in (
            lambda: opt.step({"w": before}),
            opt.state_dict,
            lambda: opt.load_state_dict({}),
            lambda: opt.save("x"),
            lambda: opt.resize("w", 9),
            lambda: opt.anchor(1.0),
            lambda: opt.swap_averages().__enter__(),
        ):
            with pytest.raises(RuntimeError, match="in the parameters' place"):
                forbidden()
    np.testing.assert_array_equal(w, before)
    np.testing.assert_array_equal(copied, before.astype(f32))
    with pytest.raises(ZeroDivisionError), opt.swap_averages():
        raise ZeroDivisionError
    np.testing.assert_array_equal(w, before)
    opt.step({"w": draw(rng, (4, 5))})


def test_what_can_be_put_back_is_put_back() -> None:
    first, second = np.zeros(3, f32), np.zeros(3, f32)
    opt = fs.SGD([first, second], lr=1.0, ema_decay=0.5)
    opt.step([np.ones(3, f32)] * 2)
    with pytest.raises(ValueError, match="read-only"), opt.swap_averages():  # noqa: PT012
        np.testing.assert_array_equal(second, -0.5)
        first.flags.writeable = False
    np.testing.assert_array_equal(second, -1)
    first.flags.writeable = True
    opt.state_dict()  # nothing is swapped any more
    second.flags.writeable = False
    first[...] = -1
    with pytest.raises(ValueError, match="read-only"), opt.swap_averages():
        pass
    np.testing.assert_array_equal(first, -1)


def test_no_step_of_another_thread_meets_the_averages() -> None:
    opt = fs.SGD([np.zeros(1, f32) for _ in range(50)], lr=1.0, ema_decay=0.5)
    gradients = [np.ones(1, f32)] * 50
    over = threading.Event()

    def step() -> None:
        while not over.is_set():
            with contextlib.suppress(RuntimeError):
                opt.step(gradients)

    thread = threading.Thread(target=step)
    thread.start()
    for _ in range(100):
        with opt.swap_averages():
            before = [p.copy() for p in opt.params]
            time.sleep(1e-4)
            np.testing.assert_array_equal(opt.params, before)
    over.set()
    thread.join()
    np.testing.assert_array_equal(opt.params, -float(opt.steps))


def test_averages_are_part_of_the_state(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    w = draw(rng, (6, 3))
    opt = fs.Adam({"w": w}, ema_decay=0.8)
    other = fs.Adam({"w": w.copy()}, ema_decay=0.8)
    opt.step({"w": draw(rng, w.shape)})
    opt.save(tmp_path / "state")
    other.params["w"][...] = w
    other.load(tmp_path / "state")
    clone = pickle.loads(pickle.dumps(opt))
    gradient = {"w": draw(rng, w.shape)}
    for one in (opt, other, clone, copy.deepcopy(opt)):
        one.step(gradient) if one is not opt else None
    opt.step(gradient)
    np.testing.assert_array_equal(opt.averages["w"], other.averages["w"])
    np.testing.assert_array_equal(opt.averages["w"], clone.averages["w"])

    plain = fs.Adam({"w": w.copy()})
    plain.step(gradient)
    opt.load_state_dict(plain.state_dict())  # without averages: they begin anew
    np.testing.assert_array_equal(opt.averages["w"], w)
    plain.load_state_dict(opt.state_dict())  # where there are none, they are left out
    assert plain.ema_decay is None
    broken = opt.state_dict()
    broken["state"]["w"]["average"] = np.ones(3, f32)
    before = opt.state_dict()
    with pytest.raises(ValueError, match="average of parameter 'w' has shape"):
        opt.load_state_dict(broken)
    np.testing.assert_equal(opt.state_dict(), before)


def test_tables_with_averages_grow() -> None:
    rng = np.random.default_rng(8)
    opt = fs.Adam(draw(rng, (4, 3)), ema_decay=0.9)
    opt.step(draw(rng, (4, 3)))
    before = opt.averages.copy()
    opt.resize(0, 7, init=0.25)
    np.testing.assert_array_equal(opt.averages[:4], before)
    np.testing.assert_array_equal(opt.averages[4:], f32(0.25))
    opt.step(draw(rng, (7, 3)))
    assert (opt.averages[4:] != 0.25).all()
    with pytest.raises(ValueError, match="has a copy"):
        fs.Adam(draw(rng, (4, 3)), copies=np.zeros((4, 3))).resize(0, 5)


def test_what_averages_refuse() -> None:
    w = np.ones((3, 2), f32)
    with pytest.raises(AttributeError, match="ema_decay"):
        fs.Adam(w).averages  # noqa: B018
    with pytest.raises(AttributeError, match="ema_decay"), fs.Adam(w).swap_averages():
        pass
    for wrong, error in ((1.5, ValueError), (-0.1, ValueError), ("x", TypeError)):
        with pytest.raises(error, match="ema_decay"):
            fs.Adam(w, ema_decay=wrong)
    with pytest.raises(ValueError, match="rows='exact'"):
        fs.Adam(w, ema_decay=0.9, rows="exact")
    opt = fs.Adam(w)
    with pytest.raises(ValueError, match="created with None"):
        opt.ema_decay = 0.9
    with pytest.raises(ValueError, match="warmup_gamma"):
        fs.EmaWarmup(warmup_gamma=0)
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        fs.EmaWarmup(1.1)


# ---- copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", SOME, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_are_the_parameters_rounded(rule: Rule, dtype: np.dtype, tier: str) -> None:
    rng = np.random.default_rng(9)
    params = [draw(rng, shaped(rule, shape)) for shape in SHAPES]
    copies: list[Any] = [np.full(p.shape, 7, dtype) for p in params]
    copies[3] = None
    opt = rule.cls(params, **rule.options, copies=copies)
    for i in range(4):
        for p, c in zip(params, copies, strict=True):
            assert c is None or c.tobytes() == p.astype(dtype).tobytes()
        opt.step([None if i == 2 else draw(rng, p.shape) for p in params])
    assert set(opt.copies) == {i for i in range(len(params)) if i != 3}


def test_copies_follow_rows_that_are_caught_up() -> None:
    rng = np.random.default_rng(10)
    for rule in (fs.Adam, fs.RowwiseAdagrad):
        table, copied = draw(rng, (20, 300)), np.zeros((20, 300), bfloat16)
        opt = rule(table, rows="exact", weight_decay=0.1, copies=copied)
        for _ in range(5):
            opt.step(fs.Rows(rng.permutation(20)[:4], draw(rng, (4, 300))))
            np.testing.assert_array_equal(copied, table.astype(bfloat16))
        opt.catch_up([1, 2])
        opt.flush()
        np.testing.assert_array_equal(copied, table.astype(bfloat16))


def test_what_copies_refuse() -> None:
    w = np.ones((3, 2), f32)
    for wrong, error, text in (
        (np.ones(3, f32), ValueError, r"the copy of the parameter has shape \(3,\)"),
        (np.ones((3, 2), np.int32), TypeError, "dtype int32"),
        (np.broadcast_to(f32(1), (3, 2)), ValueError, "read-only"),
        (w[::-1], ValueError, "overlap|share"),
        ([w, w], TypeError, "list"),
    ):
        with pytest.raises(error, match=text):
            fs.Adam(w, copies=wrong)
    with pytest.raises(ValueError, match="2 entries for 1"):
        fs.Adam([w], copies=[None, None])
    with pytest.raises(ValueError, match="not parameters"):
        fs.Adam({"w": w}, copies={"v": w.copy()})
    copied = np.zeros((3, 2), f32)
    opt = fs.Adam([w], copies=[copied])
    with pytest.raises(ValueError, match="shares memory with the copy of parameter 0"):
        opt.step([copied])
    np.testing.assert_array_equal(w, 1)
    copied.resize((6,), refcheck=False)
    with pytest.raises(ValueError, match="the copy of parameter 0 has been given"):
        opt.step([np.ones((3, 2), f32)])
    np.testing.assert_array_equal(w, 1)


def test_copies_of_float64_are_rounded_once() -> None:
    tie = 1 + 2.0**-8
    w = np.array([tie + 2.0**-40, tie, np.nan, np.inf, 1e300, -tie + 2.0**-40])
    copied = np.zeros(w.shape, bfloat16)
    opt = fs.SGD(w, lr=0.0, copies=copied)
    at_first = copied.copy()
    opt.step(np.zeros(w.shape))
    np.testing.assert_array_equal(at_first.astype(f64), copied.astype(f64))
    assert at_first[0] == 1 + 2.0**-7
    assert at_first[1] == 1
    average = fs.SGD(w.copy(), ema_decay=0.5, state_dtype="float32").averages
    assert average.dtype == f64


# ---- clipped values -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", EVERY, ids=str)
def test_clip_value_is_that_of_clipped_gradients(rule: Rule, tier: str) -> None:
    rng = np.random.default_rng(11)
    shape = (33, 40)
    ours, theirs = draw(rng, shape), None
    theirs = ours.copy()
    opt = rule.cls(ours, **rule.options, clip_value=0.25)
    reference = rule.cls(theirs, **rule.options)
    for _ in range(5):
        gradient = draw(rng, shape)
        kept = gradient.copy()
        opt.step(gradient, grad_scale=0.5)
        reference.step(np.clip(f32(0.5) * gradient, -0.25, 0.25))
        np.testing.assert_array_equal(gradient, kept)
        np.testing.assert_array_equal(ours, theirs)


def test_clip_value_comes_after_max_norm() -> None:
    rng = np.random.default_rng(12)
    w, v = draw(rng, 500), None
    v = w.copy()
    gradient = draw(rng, 500)
    gradient[0] = 1000
    norm = np.sqrt((gradient.astype(f64) ** 2).sum())
    fs.SGD(w, lr=1.0, max_norm=10.0, clip_value=0.125).step(gradient)
    fs.SGD(v, lr=1.0).step(np.clip(f32(10.0 / (norm + 1e-6)) * gradient, -0.125, 0.125))
    np.testing.assert_array_equal(w, v)


def test_clip_value_keeps_nan_and_bounds_infinities() -> None:
    w = np.zeros(4, f32)
    opt = fs.SGD(w, lr=1.0, clip_value=2.0)
    opt.step(np.array([np.nan, np.inf, -np.inf, 1], f32))
    np.testing.assert_array_equal(w, np.array([np.nan, -2, 2, -1], f32))
    opt.clip_value = 0.0
    opt.step(np.ones(4, f32))
    np.testing.assert_array_equal(w[1:], np.array([-2, 2, -1], f32))
    opt.clip_value = None
    opt.step(np.full(4, 8, f32))
    np.testing.assert_array_equal(w[1:], np.array([-10, -6, -9], f32))
    for wrong, error in ((-1.0, ValueError), (np.nan, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="clip_value"):
            fs.SGD(w, clip_value=wrong)


# ---- weight decay of some -----------------------------------------------------------------------


@pytest.mark.parametrize("rule", [fs.SGD, fs.AdamW, fs.NAdam, fs.Adagrad, fs.RowwiseAdagrad])
def test_decay_mask_is_two_optimizers(rule: Any) -> None:
    rng = np.random.default_rng(13)
    params = [draw(rng, shape) for shape in ((7, 5), (5,), (9, 2, 2), (3,))]
    for mask in (lambda p: p.ndim > 1, [True, False, True, False], [None, False, True, False]):
        ours = [p.copy() for p in params]
        theirs = [p.copy() for p in params]
        opt = rule(ours, lr=0.1, weight_decay=0.3, decay_mask=mask)
        decayed = rule(theirs[::2], lr=0.1, weight_decay=0.3)
        others = rule(theirs[1::2], lr=0.1, weight_decay=0.0)
        for step in range(4):
            gradients = [draw(rng, p.shape) for p in params]
            if step == 2:
                opt.lr = decayed.lr = others.lr = 0.01
                opt.weight_decay = decayed.weight_decay = 0.1
            opt.step(gradients, lr=0.5 if step == 1 else None)
            decayed.step(gradients[::2], lr=0.5 if step == 1 else None)
            others.step(gradients[1::2], lr=0.5 if step == 1 else None)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other)
        assert pickle.loads(pickle.dumps(opt)).decay_mask == [True, False, True, False]


def test_what_a_decay_mask_refuses() -> None:
    w = np.ones(3, f32)
    with pytest.raises(TypeError, match="decay_mask"):
        fs.AdamW([w], decay_mask=["yes"])
    with pytest.raises(ValueError, match="2 entries"):
        fs.AdamW([w], decay_mask=[True, False])
    with pytest.raises(TypeError, match="decay_mask"):
        fs.AdamW({"w": w}, decay_mask=lambda p: 1)
    assert fs.AdamW({"w": w}, decay_mask=lambda p: p.ndim > 1).decay_mask == {"w": False}
    assert fs.AdamW(w).decay_mask is None


# ---- all of it ----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_everything_at_once_is_everything_in_turn(data: st.DataObject) -> None:
    """Against the same step taken with separate calls, as torch's users do it."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    shape = data.draw(st.sampled_from([(5,), (40, 50), (1024,), (1025, 3), ()]), "shape")
    rule = data.draw(st.sampled_from(PLAIN), "rule")
    dtype = np.dtype(data.draw(st.sampled_from(["f4", "f8"]), "dtype"))
    decay = data.draw(st.sampled_from([None, 0.0, 0.5, 0.99]), "decay")
    bound = data.draw(st.sampled_from([None, 0.0, 0.1, 1e9]), "clip_value")
    most = data.draw(st.sampled_from([None, 0.5, 1e9]), "max_norm")
    scale = data.draw(st.sampled_from([1.0, 0.5, -2.0]), "grad_scale")
    zero = data.draw(st.booleans(), "zero_grad")
    copy_dtype = data.draw(st.sampled_from([None, *DTYPES]), "copy")
    order = data.draw(st.sampled_from("CF"), "order")

    w = np.array(draw(rng, shape, dtype), order=order)
    v = w.copy()
    copied = None if copy_dtype is None else np.zeros(shape, copy_dtype)
    opt = rule.cls(
        w, **rule.options, ema_decay=decay, clip_value=bound, max_norm=most, copies=copied
    )
    plain = rule.cls(v, **rule.options)
    average = w.astype(f64)
    for _ in range(3):
        gradient = np.array(draw(rng, shape, dtype))
        by_hand = gradient * dtype.type(scale)
        if most is not None:
            norm = np.sqrt((by_hand.astype(f64) ** 2).sum())
            by_hand = gradient * dtype.type(scale * min(1.0, most / (norm + 1e-6)))
        if bound is not None:
            by_hand = np.clip(by_hand, -bound, bound).astype(dtype)
        opt.step(gradient, grad_scale=scale, zero_grad=zero)
        plain.step(by_hand)
        average = average if decay is None else decay * average + (1 - decay) * w
        assert not zero or not gradient.any()
        np.testing.assert_allclose(w, v, rtol=1e-6, atol=1e-7)
        v[...] = w
    if decay is not None:
        np.testing.assert_allclose(opt.averages, average, rtol=1e-5, atol=1e-6)
    if copied is not None:  # ml_dtypes rounds float64 twice
        through = w if copy_dtype == bfloat16 and dtype == f64 else w.astype(copy_dtype)
        np.testing.assert_allclose(copied.astype(f64), through.astype(f64), rtol=2**-8)
        assert through is w or (copied == through).all()
