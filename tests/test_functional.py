"""The bare kernels give the bits of the classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import fusestep as fs
from fusestep import functional as F  # noqa: N812
from rules import RULES, Rule

f32 = np.float32


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_functions_are_the_classes(rule: Rule, dtype: str, rng: np.random.Generator) -> None:
    start = rng.standard_normal((5, 3)).astype(dtype)
    ours, bare = start.copy(), start.copy()
    opt = rule.cls([ours], maximize=True, **rule.options)
    function = getattr(F, rule.cls.__name__.lower() + "_")
    options = dict(rule.options)
    initial = options.pop("initial_accumulator_value", 0.0)
    options.pop("amsgrad", None)
    state = {name: np.full_like(bare, initial) for name in rule.states}
    if rule.cls is fs.NAdam:
        state["mu_product"] = np.ones(())
    for step in range(1, 8):
        g = rng.standard_normal((5, 3)).astype(dtype)
        opt.step([g], grad_scale=0.5)
        assert (
            function(bare, g, **state, step=step, maximize=True, grad_scale=0.5, **options) is None
        )
    np.testing.assert_array_equal(ours, bare)
    for name, value in state.items():
        np.testing.assert_array_equal(opt.state[0][name], value)


def test_first_momentum_buffer_need_not_be_cleared() -> None:
    """As torch's, it starts as a copy of the gradient, whatever was in memory."""
    w, buffer = np.ones(3, f32), np.full(3, np.nan, f32)
    F.sgd_(w, np.ones(3, f32), buffer, step=1, lr=0.5, momentum=0.9)
    np.testing.assert_array_equal(w, 0.5)
    np.testing.assert_array_equal(buffer, 1)


def arrays(**changes: Any) -> dict[str, Any]:
    call = {
        "param": np.ones(3, f32),
        "grad": np.ones(3, f32),
        "exp_avg": np.zeros(3, f32),
        "exp_avg_sq": np.zeros(3, f32),
        "step": 1,
    }
    return {**call, **changes}


W = np.ones(6, f32)

BAD_CALLS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("step 0", {"step": 0}, ValueError, "step is 0"),
    ("step -1", {"step": -1}, ValueError, "step is -1"),
    ("step 1.5", {"step": 1.5}, ValueError, "step is 1.5"),
    ("step None", {"step": None}, TypeError, "step is None"),
    ("lr", {"lr": -1}, ValueError, "lr"),
    ("callable lr", {"lr": lambda step: 1.0}, TypeError, "callable"),
    ("grad_scale", {"grad_scale": math.nan}, ValueError, "grad_scale"),
    ("maximize", {"maximize": 2}, TypeError, "maximize"),
    ("no state", {"exp_avg": None}, ValueError, "exp_avg is needed"),
    ("state shape", {"exp_avg": np.zeros(4, f32)}, ValueError, "exp_avg of the parameter"),
    ("state dtype", {"exp_avg": np.zeros(3, np.float16)}, TypeError, "float16"),
    ("state list", {"exp_avg": [0.0] * 3}, TypeError, "list"),
    ("gradient is state", {"grad": W[:3], "exp_avg": W[:3]}, ValueError, "shares memory"),
    ("gradient is parameter", {"grad": W[:3], "param": W[1:4]}, ValueError, "shares memory"),
    ("states share", {"exp_avg": W[:3], "exp_avg_sq": W[2:5]}, ValueError, "share memory"),
    ("parameter is state", {"param": W[:3], "exp_avg_sq": W[::2]}, ValueError, "share memory"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), [b[1:] for b in BAD_CALLS], ids=[b[0] for b in BAD_CALLS]
)
def test_bad_calls_change_nothing(changes: Any, error: type[Exception], message: str) -> None:
    call = arrays(**changes)
    before = {k: np.copy(v) for k, v in call.items() if isinstance(v, np.ndarray)}
    with pytest.raises(error) as caught:
        F.adam_(**call)
    assert message in str(caught.value)
    for name, value in before.items():
        np.testing.assert_array_equal(call[name], value)


def test_state_that_the_options_do_not_use() -> None:
    with pytest.raises(ValueError, match="momentum_buffer has no use"):
        F.sgd_(np.ones(3), np.ones(3), np.ones(3), step=1)
    with pytest.raises(ValueError, match="momentum_buffer is needed"):
        F.sgd_(np.ones(3), np.ones(3), step=1, momentum=0.9)


@pytest.mark.parametrize("product", [1.0, np.ones(2), np.ones((), f32), None])
def test_mu_product_is_an_array_that_can_change(product: Any) -> None:
    w, m, v = np.ones(3), np.zeros(3), np.zeros(3)
    with pytest.raises(TypeError, match="mu_product"):
        F.nadam_(w, np.ones(3), m, v, product, step=1)
    assert (w == 1).all()


def test_read_only_mu_product_changes_nothing() -> None:
    w, m, v, product = np.ones(3), np.zeros(3), np.zeros(3), np.ones(())
    product.flags.writeable = False
    with pytest.raises(ValueError, match="mu_product is read-only"):
        F.nadam_(w, np.ones(3), m, v, product, step=1)
    assert (w == 1).all()
