"""What users call: forms of params and gradients, schedules, clipping, skipping, scaling."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
from rules import PLAIN, RULES, Rule
from strategies import GRAD_SCALES, MAX_NORMS, ORDERS, SHAPE_LISTS, dtype_lists

f32 = np.float32


def test_one_array_list_and_dict_are_the_same_step(rng: np.random.Generator) -> None:
    start, g = rng.standard_normal((2, 5, 3)).astype(f32)
    one, listed, generated, named = (start.copy() for _ in range(4))
    fs.Adam(one).step(g)
    fs.Adam([listed]).step((g,))
    fs.Adam(x for x in [generated]).step([g])
    fs.Adam({"W": named}).step({"W": g})
    for other in (listed, generated, named):
        np.testing.assert_array_equal(one, other)
    assert fs.Adam(one).step([g]) is None


def test_zero_dimensional_and_empty_arrays(tier: str) -> None:
    scalar, empty, odd = np.array(1.0), np.zeros((3, 0, 2), f32), np.zeros((0,), np.float16)
    opt = fs.SGD([scalar, empty, odd], lr=0.5, momentum=0.9, max_norm=10.0, skip_nonfinite=True)
    opt.step([np.array(1.0), np.zeros((3, 0, 2), f32), np.zeros(0, np.float16)])
    assert scalar == 0.5
    assert [opt.state[i]["step"] for i in range(3)] == [1, 1, 1]
    only_empty = fs.Adam([empty], max_norm=1.0, skip_nonfinite=True)
    only_empty.step([empty.copy()], zero_grad=True)
    assert only_empty.steps == 1


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_none_leaves_parameter_and_state_and_age(rule: Rule, rng: np.random.Generator) -> None:
    params = {k: rng.standard_normal(7).astype(f32) for k in "abc"}
    alone = params["b"].copy()
    opt, alone_opt = rule.cls(params, **rule.options), rule.cls(alone, **rule.options)
    frozen = params["c"].copy()
    for i in range(6):
        g = {k: rng.standard_normal(7).astype(f32) for k in "ab"}
        if i % 2:
            opt.step({"a": g["a"]} if i % 3 else {"a": g["a"], "b": None})
        else:
            opt.step(g)
            alone_opt.step(g["b"])
    np.testing.assert_array_equal(params["b"], alone)
    np.testing.assert_array_equal(params["c"], frozen)
    assert [opt.state[k]["step"] for k in "abc"] == [6, 3, 0]
    for name in rule.states:
        np.testing.assert_array_equal(opt.state["b"][name], alone_opt.state[0][name])


def test_a_step_of_nothing_is_no_step() -> None:
    w = np.ones(3)
    opt = fs.SGD({"a": w}, lr=lambda step: [0.5, 0.25][step])
    opt.step({})
    opt.step({"a": None})
    assert opt.steps == 0
    opt.step({"a": np.ones(3)})
    opt.step({"a": np.ones(3)})
    assert opt.steps == 2
    assert (w == 0.25).all()


def test_unknown_name() -> None:
    opt = fs.SGD({"W": np.ones(3), "b": np.ones(1)})
    with pytest.raises(ValueError, match=r"'w'.*'W', 'b'"):
        opt.step({"w": np.ones(3)})
    with pytest.raises(TypeError, match="expected a dict"):
        opt.step([np.ones(3), np.ones(1)])


def test_a_name_added_to_the_dict_later_is_unknown() -> None:
    params = {"W": np.ones(3)}
    opt = fs.SGD(params)
    params["b"] = np.ones(1)
    with pytest.raises(ValueError, match=r"'b'.*not a parameter"):
        opt.step({"b": np.ones(1)})


def test_learning_rates() -> None:
    w, one = np.zeros(1), np.ones(1)
    opt = fs.SGD(w, lr=0.5)
    opt.step(one, lr=0.125)
    assert w[0] == -0.125
    opt.lr = 1.0
    opt.step(one)
    assert w[0] == -1.125
    seen: list[int] = []
    opt.lr = lambda step: seen.append(step) or 0.0  # type: ignore[func-returns-value]
    opt.step(one)
    opt.step(one, lr=1.0)
    opt.step(one)
    assert seen == [2, 4]
    opt.step(one, lr=0)
    assert w[0] == -2.125


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_maximize_is_a_negated_gradient(rule: Rule, rng: np.random.Generator) -> None:
    up, down = (np.ones(50, f32) for _ in range(2))
    maximizer = rule.cls(up, maximize=True, **rule.options)
    minimizer = rule.cls(down, **rule.options)
    for _ in range(5):
        g = rng.standard_normal(50).astype(f32)
        maximizer.step(g)
        minimizer.step(-g)
    np.testing.assert_array_equal(up, down)


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_grad_scale_and_zero_grad(rule: Rule, tier: str, rng: np.random.Generator) -> None:
    params = [rng.standard_normal(n).astype(f32) for n in (3, 5000, 70_000)]
    expected = [p.copy() for p in params]
    opt, plain = rule.cls(params, **rule.options), rule.cls(expected, **rule.options)
    for _ in range(3):
        grads = [rng.standard_normal(p.shape).astype(f32) for p in params]
        plain.step(grads)
        scaled = [g * f32(1024) for g in grads]
        opt.step(scaled, grad_scale=1 / 1024, zero_grad=True)
        assert not any(g.any() for g in scaled)
    for ours, theirs in zip(params, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_one_gradient_for_two_parameters() -> None:
    g = np.ones(4)
    params = [np.zeros(4), np.zeros(4)]
    fs.SGD(params, lr=1.0).step([g, g])
    assert (params[0] == -1).all()
    assert (params[1] == -1).all()


# ---- clipping and skipping ----------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(PLAIN),
    shapes=SHAPE_LISTS,
    dtypes=dtype_lists(4),
    max_norm=st.sampled_from(MAX_NORMS),
    grad_scale=st.sampled_from(GRAD_SCALES),
    order=ORDERS,
)
def test_clipping_is_torchs(
    rule: Rule,
    shapes: list[tuple[int, ...]],
    dtypes: list[str],
    max_norm: float,
    grad_scale: float,
    order: Any,
) -> None:
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(s).astype(d) for s, d in zip(shapes, dtypes, strict=False)]
    grads = [np.asarray(rng.standard_normal(p.shape), p.dtype, order=order) for p in params]
    kept = [g.copy() for g in grads]
    norm = math.sqrt(sum(float((g.astype("f8") ** 2).sum()) for g in grads)) * abs(grad_scale)
    clip = min(1.0, max_norm / (norm + 1e-6))

    expected = [p.copy() for p in params]
    rule.cls(expected, **rule.options).step(grads, grad_scale=grad_scale * clip)
    rule.cls(params, max_norm=max_norm, **rule.options).step(grads, grad_scale=grad_scale)
    for ours, theirs in zip(params, expected, strict=True):
        eps = np.finfo(ours.dtype).eps
        np.testing.assert_allclose(ours, theirs, rtol=4 * eps, atol=4 * eps)
    for g, was in zip(grads, kept, strict=True):
        np.testing.assert_array_equal(g, was)


@pytest.mark.parametrize(("dtype", "value"), [("f4", 3e38), ("f8", 1e300), ("f4", 1e-42)])
def test_norms_neither_overflow_nor_vanish(dtype: str, value: float, tier: str) -> None:
    w = np.zeros(4, dtype)
    opt = fs.SGD(w, lr=1.0, max_norm=1e3, skip_nonfinite=True)
    opt.step(np.full(4, value, dtype))
    assert opt.skipped_steps == 0
    np.testing.assert_allclose(-w, min(np.asarray(value, dtype), 500.0), rtol=1e-6)


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["f8", "f4", "f2"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_nonfinite_gradients_are_skipped_whole(
    rule: Rule, bad: float, dtype: str, max_norm: float | None, tier: str
) -> None:
    params = {"a": np.ones(3, dtype), "b": np.ones(1500, dtype)}
    opt = rule.cls(params, skip_nonfinite=True, max_norm=max_norm, **rule.options)
    good = {k: np.full_like(p, 0.5) for k, p in params.items()}
    opt.step(good)
    before, state = copy.deepcopy(params), opt.state_dict()
    for where in (0, 1023, 1024, 1499):
        grads = copy.deepcopy(good)
        grads["b"][where] = bad
        opt.step(grads)
    after = opt.state_dict()
    assert after["fusestep"].pop("skipped_steps") == 4
    assert state["fusestep"].pop("skipped_steps") == 0
    np.testing.assert_equal(after, state)
    np.testing.assert_equal(params, before)
    assert (opt.steps, opt.skipped_steps) == (1, 4)

    grads = copy.deepcopy(good)
    grads["a"][0] = bad
    opt.step(grads, zero_grad=True)  # what it was asked to clear, it clears
    assert not grads["a"].any()
    assert not grads["b"].any()
    np.testing.assert_equal(params, before)


def test_without_skipping_nan_spreads_as_in_torch() -> None:
    w = np.ones(2, f32)
    fs.SGD(w, lr=1.0, max_norm=1.0).step(np.array([np.nan, 1.0], f32))
    assert np.isnan(w).all()


# ---- Python's protocols -------------------------------------------------------------------------


def test_repr_says_everything() -> None:
    opt = fs.NAG([np.ones((2, 3)), np.ones(4, f32)], lr=0.5, max_norm=2.0)
    assert repr(opt) == (
        "NAG(2 parameters, 10 elements; lr=0.5, momentum=0.9, weight_decay=0.0, maximize=False, "
        "max_norm=2.0, skip_nonfinite=False, dampening=0.0, nesterov=True, state_dtype=None)"
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_by_themselves(rule: Rule, how: Any, rng: np.random.Generator) -> None:
    params = {"W": rng.standard_normal((3, 4)).astype(f32).T, "b": rng.standard_normal(5)}
    opt = rule.cls(params, max_norm=5.0, **rule.options)
    grads = [{k: rng.standard_normal(p.shape) for k, p in params.items()} for _ in range(6)]
    for g in grads[:3]:
        opt.step(g)
    model = how({"params": params, "opt": opt})  # together, so that they stay together
    assert repr(model["opt"]) == repr(opt)
    assert model["opt"].params["W"] is model["params"]["W"]
    for g in grads[3:]:
        model["opt"].step(g)
    np.testing.assert_equal(opt.steps, 3)
    for g in grads[3:]:
        opt.step(g)
    np.testing.assert_equal(model["params"], params)
    np.testing.assert_equal(model["opt"].state_dict(), opt.state_dict())


def test_subclass_with_its_own_constructor_is_copied() -> None:
    class Mine(fs.Adam):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.25)
            self.extra = [1, 2]

    opt = copy.deepcopy(Mine([np.ones(3)]))
    assert isinstance(opt, Mine)
    assert opt.lr == 0.25
    assert opt.extra == [1, 2]
    opt.load_state_dict(fs.Adam([np.ones(3)], lr=0.5).state_dict())
    assert opt.lr == 0.5


def test_a_list_that_grows_later_is_not_ours() -> None:
    params = [np.ones(3)]
    opt = fs.Adam(params)
    params.append(np.ones(4))
    assert len(copy.deepcopy(opt).params) == 1


def test_parameters_may_be_given_up() -> None:
    """An optimizer that goes away takes nothing with it, and leaves nothing behind."""
    import gc
    import sys
    import weakref

    w = np.ones(1000)
    count = sys.getrefcount(w)
    opt = fs.Adam([w])
    opt.step([np.ones(1000)])
    alive = weakref.ref(opt)
    del opt
    gc.collect()
    assert alive() is None
    assert sys.getrefcount(w) == count


@pytest.mark.parametrize("rule", PLAIN, ids=str)
def test_memory_mapped_parameters(rule: Rule, tmp_path: Any) -> None:
    w = np.memmap(tmp_path / "w.bin", dtype="f4", mode="w+", shape=(50,))
    expected = np.zeros(50, f32)
    g = np.linspace(-1, 1, 50, dtype=f32)
    rule.cls([w], **rule.options).step([g])
    rule.cls([expected], **rule.options).step([g])
    w.flush()
    np.testing.assert_array_equal(np.fromfile(tmp_path / "w.bin", "f4"), expected)
