"""Every rule against float64 NumPy written from the paper, over hundreds of steps."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusestep as fs
from rules import PLAIN, RULES, Rule

STEPS = 300

# Rounding per step, times steps, with room; relative to the size of the parameters (about 1).
TOLERANCE = {"float64": 1e-12, "float32": 2e-4}


def trajectory(rule: Rule, start: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """The reference's last parameter, from float64 copies."""
    w, state = start.astype(np.float64), {}
    for g in gradients:
        w = rule.reference(w, g.astype(np.float64), state, **rule.options)
    return w


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_hundreds_of_steps(rule: Rule, dtype: str, tier: str, rng: np.random.Generator) -> None:
    w = rng.standard_normal((37, 3)).astype(dtype)
    gradients = [rng.standard_normal(w.shape).astype(dtype) for _ in range(STEPS)]
    expected = trajectory(rule, w, gradients)

    opt = rule.cls([w], **rule.options)
    for g in gradients:
        opt.step([g])

    assert tuple(opt._state_names) == rule.states
    np.testing.assert_allclose(w, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_float32_rounds_no_more_than_numpy_would(rule: Rule, rng: np.random.Generator) -> None:
    """Against the same formulas in float32 NumPy: our error is of the same size."""
    start = rng.standard_normal(500).astype(np.float32)
    gradients = [rng.standard_normal(500).astype(np.float32) for _ in range(STEPS)]
    truth = trajectory(rule, start, gradients)

    w, state = start.copy(), {}
    for g in gradients:
        w = rule.reference(w, g, state, **rule.options).astype(np.float32)
        state = {k: v.astype(np.float32) if np.ndim(v) else v for k, v in state.items()}
    ours = start.copy()
    opt = rule.cls([ours], **rule.options)
    for g in gradients:
        opt.step([g])

    assert np.abs(ours - truth).mean() <= 2 * np.abs(w - truth).mean() + 1e-7


@pytest.mark.parametrize("rule", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bit_parameters_round_once_a_step(
    rule: Rule, dtype: type, tier: str, rng: np.random.Generator
) -> None:
    """State stays float32, so each step is the exact one, rounded to the parameter's dtype."""
    w = rng.standard_normal(301).astype(dtype)
    opt = rule.cls([w], **rule.options)
    state: dict = {}
    for _ in range(50):
        g = rng.standard_normal(301).astype(dtype)
        exact = rule.reference(w.astype(np.float64), g.astype(np.float64), state, **rule.options)
        opt.step([g])
        # The exact result may lie on the other side of a rounding boundary by float32's error.
        low, high = (exact - 1e-4).astype(dtype), (exact + 1e-4).astype(dtype)
        assert np.all((w >= low) & (w <= high))


@pytest.mark.parametrize("parameter", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("gradient", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("state", [None, "float32", "float64"])
def test_any_mix_of_dtypes(
    parameter: str, gradient: str, state: str | None, tier: str, rng: np.random.Generator
) -> None:
    dtype = {"bfloat16": ml_dtypes.bfloat16}
    start = rng.standard_normal(77).astype(dtype.get(parameter, parameter))
    gradients = [rng.standard_normal(77).astype(dtype.get(gradient, gradient)) for _ in range(20)]
    w = start.copy()
    opt = fs.Adam([w], lr=0.01, state_dtype=state)
    for g in gradients:
        opt.step([g])
    expected_state = state or ("float64" if parameter == "float64" else "float32")
    assert opt.state[0]["exp_avg"].dtype == expected_state

    rule = next(r for r in RULES if r.cls is fs.Adam)
    expected = trajectory(Rule(fs.Adam, rule.reference, {"lr": 0.01}), start, gradients)
    step = {"float64": 1e-6, "float32": 1e-6, "float16": 0.002, "bfloat16": 0.016}[parameter]
    np.testing.assert_allclose(w.astype(float), expected, rtol=0, atol=20 * step / 2)


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    size=st.one_of(st.integers(0, 70), st.integers(1000, 1050), st.integers(4090, 4200)),
    steps=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-20, 1e-4, 1.0, 1e4, 1e15]),
)
def test_lengths_around_vectors_and_tiles(
    rule: Rule, size: int, steps: int, seed: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(size)
    gradients = [scale * rng.standard_normal(size) for _ in range(steps)]
    expected = trajectory(rule, w, gradients)
    opt = rule.cls([w], **rule.options)
    for g in gradients:
        opt.step([g])
    np.testing.assert_allclose(
        w, expected, rtol=1e-11, atol=1e-13 * max(1.0, np.abs(w).max(initial=0))
    )


def test_infinite_weight_without_decay_stays_infinite() -> None:
    """0 * inf must not appear where weight_decay is 0 (a masked logit kept as a parameter)."""
    w = np.array([-np.inf, 1.0], np.float32)
    opt = fs.Adam([w], lr=0.1)
    opt.step([np.zeros(2, np.float32)])
    assert w[0] == -np.inf
    assert np.all(np.isfinite(opt.state[0]["exp_avg"]))


@pytest.mark.parametrize(
    ("dtype", "huge"),
    [("f4", 1e18), ("f4", 1e20), ("f4", 1e22), ("f4", 3e38), ("f8", 1e153), ("f8", 1e200)],
)
@pytest.mark.parametrize("cls", [fs.Adam, fs.AdamW, fs.NAdam])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_huge_gradient_does_not_make_nan(dtype: str, huge: float, cls: type, sign: int) -> None:
    """As torch: where g^2 overflows for good, the weight stands still; it never becomes NaN."""
    torch = pytest.importorskip("torch")
    w = np.ones(5, dtype)
    theirs = torch.nn.Parameter(torch.tensor(w))
    opt = cls(w, lr=0.1)
    other = getattr(torch.optim, cls.__name__)([theirs], lr=0.1)
    for value in (1.0, huge, sign * huge, 1.0, 1.0):
        g = np.full(5, value, dtype)
        theirs.grad = torch.tensor(g)
        opt.step(g)
        other.step()
    assert np.isfinite(w).all()
    if cls is not fs.NAdam:  # whose v / (1 - beta2^t) overflows in torch before v does
        np.testing.assert_allclose(w, theirs.detach().numpy(), rtol=2e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 10**6, 10**12])
def test_bias_correction_of_any_step(n: int) -> None:
    """The kernels' own power function, seen through a step whose state makes it visible."""
    w, m, v = np.zeros(1), np.zeros(1), np.zeros(1)
    fs.functional.adam_(w, np.ones(1), m, v, step=n, lr=1.0, eps=0.0)
    expected = -(0.1 / -np.expm1(n * np.log(0.9))) / np.sqrt(
        (1 - 0.999) / -np.expm1(n * np.log(0.999))
    )
    np.testing.assert_allclose(w, expected, rtol=1e-12)
