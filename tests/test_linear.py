"""fusestep.linear: the truths of importance-aware steps, layouts, classes, scikit-learn's rules."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
import threading
import warnings
from collections import Counter
from typing import Any

import joblib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.integrate import solve_ivp
from scipy.special import log_softmax, softmax
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.linear_model import SGDClassifier, SGDRegressor
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from conftest import AVAILABLE
from fusestep import _cpu
from fusestep.linear import Classifier, Regressor

OPTIMIZERS = ["sgd", "nag", "adam", "adagrad"]
LOSSES = ["squared", "logistic", "hinge", "softmax"]
ONE_OUTPUT = ["squared", "logistic", "hinge"]

DERIVATIVES = {
    "squared": lambda p, y: p - y,
    "logistic": lambda p, y: -y / (1 + np.exp(np.minimum(y * p, 700))),
    "hinge": lambda p, y: np.where(y * p < 1, -y, 0.0),
}


def data(n: int = 60, features: int = 7, classes: int = 2, dtype: Any = np.float64, seed: int = 0):
    """Samples with a part of the features at zero, and labels 0, 1, ..."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, features)) * (rng.random((n, features)) < 0.6)
    y = (X @ rng.standard_normal((features, classes))).argmax(axis=1)
    y[:classes] = np.arange(classes)
    return X.astype(dtype), y


def bits(model: Any) -> tuple[bytes, ...]:
    arrays = (model._model.weights, *model._model.states)
    return (str(model.t_).encode(), *(array.tobytes() for array in arrays))


def seeded(loss: str, weights: list[float], **options: Any) -> Any:
    """A model without intercept whose weights are these."""
    options = {"optimizer": "sgd", "fit_intercept": False, **options}
    zero = np.zeros((1, len(weights)))
    if loss == "squared":
        model = Regressor(**options).partial_fit(zero, [0.0])
        model.coef_[:] = weights
    else:
        model = Classifier(loss, **options).partial_fit(zero, [0], classes=[0, 1])
        model.coef_[0] = weights
    return model


def target(loss: str, y: float) -> Any:
    return y if loss == "squared" else int(y > 0)


# ---- truths --------------------------------------------------------------------------------------

CASES = st.tuples(
    st.sampled_from(ONE_OUTPUT),
    st.sampled_from([-1.0, 1.0]),
    st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    st.lists(st.floats(-2, 2), min_size=3, max_size=3).filter(lambda x: np.dot(x, x) > 1e-3),
    st.floats(1e-3, 30),
)


@given(CASES)
@settings(max_examples=150, deadline=None)
def test_the_step_is_the_differential_equations(case: tuple) -> None:
    loss, y, w, x, h = case
    x = np.array(x)
    model = seeded(loss, w, learning_rate=h).partial_fit([x], [target(loss, y)])

    p0, q = np.dot(w, x), x @ x
    if loss == "hinge":  # its derivative jumps where the margin is reached, and stays 0
        p = p0 + y * min(h * q, max(0.0, 1 - y * p0))
    else:
        path = solve_ivp(
            lambda _, p: -q * DERIVATIVES[loss](p, y),
            (0, h),
            [p0],
            rtol=1e-12,
            atol=1e-13,
            method="DOP853",
        )
        p = path.y[0, -1]
    s = (p0 - p) / q
    np.testing.assert_allclose(np.ravel(model.coef_), w - s * x, rtol=1e-10, atol=1e-10)


@given(CASES, st.floats(1e-3, 1e6))
@settings(max_examples=150, deadline=None)
def test_two_halves_are_one(case: tuple, weight: float) -> None:
    loss, y, w, x, h = case
    once, twice = (seeded(loss, w, learning_rate=h) for _ in range(2))
    once.partial_fit([x], [target(loss, y)], sample_weight=[weight])
    for _ in range(2):
        twice.partial_fit([x], [target(loss, y)], sample_weight=[weight / 2])
    np.testing.assert_allclose(once.coef_, twice.coef_, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weight", [1e12, 1e30, 1e300])
def test_huge_weights_do_not_overshoot(
    loss: str, optimizer: str, dtype: Any, weight: float
) -> None:
    X, y = data(dtype=dtype)
    model = Classifier(loss, optimizer=optimizer, learning_rate=0.5)
    model.partial_fit(X, y, classes=[0, 1])
    for i in range(5):
        before = model.decision_function(X[[i]])[0]
        model.partial_fit(X[[i]], y[[i]], sample_weight=[weight])
        after = model.decision_function(X[[i]])[0]
        assert np.isfinite(model.coef_).all()
        if loss == "softmax":  # there is no end to the way to the label
            assert abs(after) < 1e4
        elif optimizer in ("sgd", "adagrad"):
            label = 2 * y[i] - 1
            end = max(before * label, {"squared": 1, "hinge": 1, "logistic": 1000}[loss])
            if loss == "squared":
                end = max(abs(before), 1)
            assert min(before * label, 1) - 1e-3 <= after * label <= end + 1e-3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("loss", ["logistic", "hinge", "softmax"])
@pytest.mark.parametrize("margin", [1.0, 340.0, 360.0, 690.0, 720.0, 1e4, 1e9])
def test_certain_predictions_stay_finite(loss: str, margin: float, dtype: Any) -> None:
    """Right or wrong, with any weight and learning rate: they move towards the label, if at all."""
    x = np.array([[200.0]], dtype)
    for lr, weight, label in itertools.product((1e-3, 1.0, 1e6), (1.0, 1e12, 1e300), (0, 1)):
        model = Classifier(loss, optimizer="sgd", learning_rate=lr, fit_intercept=False)
        model.partial_fit(x, [1], classes=[0, 1])
        model.coef_[:] = margin / 200
        before = float(model.decision_function(x)[0])
        model.partial_fit(x, [label], sample_weight=[weight])
        after = float(model.decision_function(x)[0])
        assert np.isfinite(after)
        assert (after - before) * (2 * label - 1) >= -1e-6 * abs(before)


def test_extreme_logistic_steps() -> None:
    """Against the equation in 60 digits."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 60
    for margin in (-1e4, -740.0, -50.0, *np.arange(-35.0, -10), -3.0, 0.0, 1e-3, 4.0, 40.0, 600.0):
        for h in (1e-12, 1e-4, 1.0, 1.3, 2.5, 50.0, 701.0, 1e6, 1e12):
            m, length = mpmath.mpf(margin), mpmath.mpf(h)
            total = m + mpmath.exp(m) + length
            low, high = m, m + length
            for _ in range(400):  # bisection: nothing to go wrong
                middle = (low + high) / 2
                low, high = (middle, high) if middle + mpmath.exp(middle) < total else (low, middle)
            model = seeded("logistic", [margin], learning_rate=h).partial_fit([[1.0]], [1])
            moved = float(model.coef_[0, 0])
            assert moved == pytest.approx(float(low), rel=1e-13, abs=1e-13), (margin, h)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("optimizer", "aware"), [("sgd", True), ("sgd", False), ("adagrad", True)])
def test_weight_is_repetition_at_small_rates(loss: str, optimizer: str, aware: bool) -> None:
    X, y = data(classes=3)
    weight = np.random.default_rng(1).integers(0, 5, len(X)).astype(float)
    # Adagrad's sums are large to begin with, so that its metric hardly changes meanwhile.
    model = Classifier(loss, optimizer=optimizer, importance_aware=aware, learning_rate=0.0)
    model.partial_fit(X, y, [0, 1, 2], np.full(len(X), 1e8))
    model.set_params(learning_rate=1e-5 if optimizer == "sgd" else 1.0)
    weighted, repeated = copy.deepcopy(model), copy.deepcopy(model)
    weighted.partial_fit(X, y, sample_weight=weight)
    repeats = weight.astype(int)
    repeated.partial_fit(X.repeat(repeats, axis=0), y.repeat(repeats))
    assert abs(repeated.coef_).max() > 1e-5
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("importance_aware", [True, False])
@pytest.mark.parametrize("loss", ONE_OUTPUT)
@pytest.mark.parametrize("width", [31, 32, 63, 64, 127, 128, 255, 256, 1023, 1024])
def test_widths_around_those_with_code_of_their_own(
    width: int, loss: str, importance_aware: bool
) -> None:
    """With the intercept whole lanes, or one less or more: the same bits on every tier."""
    X, y = data(40, width, dtype=np.float32)
    results = set()
    for intercept in (True, False):
        options: dict[str, Any] = {"optimizer": "sgd", "importance_aware": importance_aware}
        model = Classifier(loss, fit_intercept=intercept, learning_rate=1e-3, **options)
        for tier in AVAILABLE:
            _cpu.use_tier(tier)
            batch = clone(model).partial_fit(X, y, [0, 1])
            rows = clone(model)
            for i in range(len(X)):
                rows.partial_fit(X[[i]], y[[i]], [0, 1])
            thin = clone(model).partial_fit(sparse.csr_matrix(X), y, [0, 1])
            results.update((intercept, bits(each)) for each in (batch, rows, thin))
        w = np.append(batch.coef_[0], batch.intercept_).astype(np.float64)
        expected = X.astype(np.float64) @ w[:-1] + w[-1]
        np.testing.assert_allclose(batch.decision_function(X), expected, rtol=1e-9, atol=1e-12)
    assert len(results) == 2


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("importance_aware", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("classes", [2, 3])
def test_rows_one_by_one_and_sparse_and_tiers(
    loss: str, optimizer: str, importance_aware: bool, dtype: Any, classes: int
) -> None:
    """One call, a call for each row, CSR, CSC and every instruction set: the same bits."""
    X, y = data(40, 37, classes, dtype)
    weight = np.random.default_rng(1).choice([0.0, 0.5, 1, 3], len(X))
    model = Classifier(
        loss,
        optimizer=optimizer,
        importance_aware=importance_aware,
        learning_rate=lambda step: 0.05 / (1 + step) ** 0.5,
        l2=1e-3 if classes == 3 else 0.0,
    )
    labels = np.arange(classes)
    results = set()
    for tier in AVAILABLE:
        _cpu.use_tier(tier)
        results.add(bits(clone(model).partial_fit(X, y, labels, weight)))
        for layout in (sparse.csr_matrix, sparse.csc_array):
            results.add(bits(clone(model).partial_fit(layout(X), y, labels, weight)))
        results.add(bits(clone(model).partial_fit(np.asfortranarray(X), y, labels, weight)))
    rows = clone(model)
    for i in range(len(X)):
        rows.partial_fit(X[[i]], y[[i]], labels, weight[[i]])
    results.add(bits(rows))
    assert len(results) == 1
    assert rows.t_ == np.count_nonzero(weight)


@given(
    st.integers(1, 2100), st.floats(0, 1), st.sampled_from([np.float32, np.float64]), st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_sparse_rows_of_any_width(width: int, share: float, dtype: Any, wide: bool) -> None:
    rng = np.random.default_rng(width)
    X = (rng.standard_normal((5, width)) * (rng.random((5, width)) < share)).astype(dtype)
    y = rng.standard_normal(5)
    compressed = sparse.csr_array(X)
    if wide:
        compressed.indices = compressed.indices.astype(np.int64)
        compressed.indptr = compressed.indptr.astype(np.int64)
    dense, thin = (Regressor(learning_rate=0.1).partial_fit(rows, y) for rows in (X, compressed))
    assert bits(dense) == bits(thin)
    np.testing.assert_array_equal(dense.predict(X), thin.predict(compressed))
    expected = X.astype(np.float64) @ dense.coef_.astype(np.float64) + dense.intercept_
    np.testing.assert_allclose(dense.predict(X), expected, rtol=1e-9, atol=1e-9)


def test_sparse_in_any_order_and_with_duplicates() -> None:
    values, columns = np.array([1.0, 2.0, 0.5, 0.5]), np.array([3, 0, 1, 1])
    X = sparse.csr_matrix((values, columns, [0, 4]), shape=(1, 4))
    kept = X.copy()
    model = Regressor().partial_fit(X, [1.0])
    assert bits(model) == bits(Regressor().partial_fit(X.toarray(), [1.0]))
    np.testing.assert_array_equal(X.indices, kept.indices)  # the caller's is as it was


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix])
def test_weight_zero_leaves_the_bits(optimizer: str, loss: str, layout: Any) -> None:
    X, y = data()
    rates: list[int] = []

    def rate(step: int) -> float:
        rates.append(step)
        return 0.1

    model = Classifier(loss, optimizer=optimizer, learning_rate=rate, l2=0.1)
    model.partial_fit(layout(X), y, classes=[0, 1]).anchor(1.0)
    before = bits(model)
    model.partial_fit(layout(X), y, sample_weight=np.zeros(len(X)))
    assert bits(model) == before
    model.partial_fit(layout(X[:2]), y[:2], sample_weight=[0.0, 1.0])
    assert model.t_ == len(X) + 1


@pytest.mark.parametrize("alpha", [0.0, 1e-2])
@pytest.mark.parametrize(("loss", "theirs"), [("logistic", "log_loss"), ("hinge", "hinge")])
def test_plain_sgd_is_scikit_learns(loss: str, theirs: str, alpha: float) -> None:
    X, y = data(200)
    model = Classifier(
        loss,
        optimizer="sgd",
        importance_aware=False,
        l2=alpha,
        learning_rate=lambda step: 0.1 / (1 + step) ** 0.25,
    )
    peer = SGDClassifier(
        theirs,
        penalty="l2",
        alpha=alpha,
        learning_rate="invscaling",
        eta0=0.1,
        power_t=0.25,
        shuffle=False,
    )
    for _ in range(3):
        model.partial_fit(X, y, classes=[0, 1])
        peer.partial_fit(X, y, classes=[0, 1])
    np.testing.assert_allclose(model.coef_, peer.coef_, atol=1e-6)
    np.testing.assert_allclose(model.intercept_, peer.intercept_, atol=1e-6)
    np.testing.assert_array_equal(model.predict(X), peer.predict(X))
    if loss == "logistic":
        np.testing.assert_allclose(model.predict_proba(X), peer.predict_proba(X), atol=1e-6)


def test_plain_sgd_is_scikit_learns_for_regression_and_three_classes() -> None:
    X, y = data(200, classes=3)
    common = {"learning_rate": "constant", "eta0": 0.01, "alpha": 0, "shuffle": False}
    value = X @ np.arange(7.0)
    weight = np.random.default_rng(2).random(200)
    model = Regressor(optimizer="sgd", importance_aware=False, learning_rate=0.01)
    model.partial_fit(X, value, weight)
    peer = SGDRegressor(**common).partial_fit(X, value, weight)
    np.testing.assert_allclose(model.coef_, peer.coef_, atol=1e-6)
    assert model.coef_.shape == peer.coef_.shape
    assert model.intercept_.shape == peer.intercept_.shape
    model = Classifier(optimizer="sgd", importance_aware=False, learning_rate=0.01)
    model.partial_fit(X, y, [0, 1, 2], weight)
    peer = SGDClassifier("log_loss", **common).partial_fit(X, y, [0, 1, 2], weight)
    np.testing.assert_allclose(model.coef_, peer.coef_, atol=1e-6)
    np.testing.assert_allclose(model.predict_proba(X), peer.predict_proba(X), atol=1e-6)


class Reference:
    """One output in float64 NumPy, from the papers: gradients, moments and paths."""

    def __init__(self, optimizer: str, width: int, lr: float) -> None:
        self.optimizer, self.lr, self.t = optimizer, lr, 0
        self.w, self.m, self.v = (np.zeros(width) for _ in range(3))

    def step(self, loss: str, x: np.ndarray, y: float, h: float, aware: bool) -> None:
        self.t += 1
        slope = float(DERIVATIVES[loss](self.w @ x, y))
        if not aware:
            return self.move(h * slope * x, h * slope * x)
        seen = slope * (np.sqrt(h) if self.optimizer == "adagrad" else 1) * x
        a = self.metric(seen)
        q, p0 = (a * x) @ x, self.w @ x
        path = solve_ivp(
            lambda _, p: -q * DERIVATIVES[loss](p, y), (0, h), [p0], rtol=1e-11, atol=1e-12
        )
        return self.move((p0 - path.y[0, -1]) / q * x, seen)

    def metric(self, seen: np.ndarray) -> np.ndarray:
        """What, in the end, a gradient of 1 takes from each weight."""
        if self.optimizer == "sgd":
            return np.full_like(self.w, self.lr)
        if self.optimizer == "nag":
            return np.full_like(self.w, self.lr / (1 - 0.9))
        if self.optimizer == "adagrad":
            return self.lr / (np.sqrt(self.v + seen**2) + 1e-10)
        v = (0.999 * self.v + 0.001 * seen**2) / (1 - 0.999**self.t)
        return self.lr / (1 - 0.9**self.t) / (np.sqrt(v) + 1e-8)

    def move(self, g: np.ndarray, seen: np.ndarray) -> None:
        a = self.metric(seen)
        if self.optimizer == "nag":
            self.m = 0.9 * self.m + g
            self.w = self.w - self.lr * (g + 0.9 * self.m)
        elif self.optimizer == "adam":
            self.m = 0.9 * self.m + 0.1 * g
            self.v = 0.999 * self.v + 0.001 * seen**2
            self.w = self.w - a * self.m
        else:
            self.v = self.v + seen**2
            self.w = self.w - a * g


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("aware", [True, False])
def test_every_optimizer_against_numpy(optimizer: str, loss: str, aware: bool) -> None:
    rng = np.random.default_rng(3)
    X = rng.standard_normal((25, 4))
    labels, weight = rng.integers(0, 2, 25), rng.choice([0.5, 1.0, 2.0], 25)
    model = Classifier(loss, optimizer=optimizer, importance_aware=aware, learning_rate=0.02)
    model.partial_fit(X, labels, [0, 1], weight)
    reference = Reference(optimizer, 5, 0.02)
    for x, label, h in zip(X, labels, weight, strict=True):
        reference.step(loss, np.append(x, 1.0), 2.0 * label - 1, h, aware)
    np.testing.assert_allclose(model.coef_[0], reference.w[:4], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(model.intercept_, reference.w[4:], rtol=1e-7, atol=1e-9)


@given(st.integers(2, 6), st.floats(-6, 12), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_softmax_takes_the_implicit_step(classes: int, exponent: float, seed: int) -> None:
    """The gradient is the one at the weights after the step."""
    rng = np.random.default_rng(seed)
    h, x = 10.0**exponent, rng.standard_normal(4)
    labels = np.arange(classes)
    model = Classifier("softmax", optimizer="sgd", learning_rate=1.0)
    model.partial_fit([x], [0], labels, [0.0])
    model.coef_[:] = before = rng.standard_normal((classes, 4))
    model.partial_fit([x], [0], sample_weight=[h])
    p = model.coef_ @ x + model.intercept_
    moved = (before - model.coef_) @ x / (x @ x)
    logs = log_softmax(p)
    # h (pi - 1) is too rough where pi is nearly 1: compare what the label gained with the others.
    expected = np.exp(np.log(h) + logs)
    expected[0] = -expected[1:].sum()
    np.testing.assert_allclose(moved, expected, rtol=1e-6, atol=1e-9)
    assert softmax(p)[0] >= softmax(before @ x)[0]


# ---- test, then train ----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [2, 3])
def test_predictions_before_each_update(loss: str, classes: int) -> None:
    X, y = data(classes=classes)
    names = np.array(["red", "green", "blue"])[y]
    labels = np.unique(names)
    model, rows = (Classifier(loss).partial_fit(X[:3], names[:3], classes=labels) for _ in range(2))
    predicted = model.partial_fit_predict(X, names)
    expected = []
    for i in range(len(X)):
        expected.append(rows.predict(X[[i]])[0])
        rows.partial_fit(X[[i]], names[[i]])
    np.testing.assert_array_equal(predicted, expected)
    assert bits(model) == bits(rows)


def test_regressor_predicts_before_each_update() -> None:
    X, _ = data()
    y = X @ np.arange(7.0)
    predicted = Regressor().partial_fit_predict(X, y)
    rows, expected = Regressor().partial_fit(X[:1], y[:1]), [0.0]
    for i in range(1, len(X)):
        expected.append(rows.predict(X[[i]])[0])
        rows.partial_fit(X[[i]], y[[i]])
    np.testing.assert_array_equal(predicted, expected)


# ---- classes that appear -------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix])
def test_classes_appear_mid_stream(loss: str, optimizer: str, layout: Any) -> None:
    """All at once is one by one, and what was there before predicts as before."""
    X, y = data(classes=4)
    names = np.array(["c", "a", "d", "b"])[y]
    batch = Classifier(loss, optimizer=optimizer, allow_new_classes=True, learning_rate=0.01)
    rows = clone(batch)
    batch.partial_fit(layout(X[:20]), names[:20])
    predicted = batch.partial_fit_predict(layout(X[20:]), names[20:])
    assert predicted.shape == (40,)
    for i in range(len(X)):
        rows.partial_fit(X[[i]], names[[i]])
    assert batch.classes_.tolist() == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(batch.classes_, rows.classes_)
    assert bits(batch) == bits(rows)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("old", "new"), [(["b", "c"], "a"), (["a", "c"], "b"), (["a", "b"], "c")])
def test_a_new_class_leaves_what_the_others_say(loss: str, old: list[str], new: str) -> None:
    X, y = data()
    model = Classifier(loss, allow_new_classes=True).partial_fit(X, np.array(old)[y])
    before = model.decision_function(X)
    model.partial_fit(X[:1], [new], sample_weight=[0.0])
    after = model.decision_function(X)
    first, second, third = (model.classes_.tolist().index(name) for name in (*old, new))
    if loss == "softmax":
        np.testing.assert_array_equal(after[:, second] - after[:, first], before)
    else:
        np.testing.assert_array_equal(after[:, second], before)
        np.testing.assert_array_equal(after[:, first], -before)
    assert not after[:, third].any()


def test_new_classes_are_refused_unless_allowed() -> None:
    X, y = data()
    model = Classifier().partial_fit(X, y, classes=[0, 1])
    before = bits(model)
    with pytest.raises(ValueError, match=r"labels \[7\] that are not in classes_"):
        model.partial_fit(X[:2], [0, 7])
    with pytest.raises(ValueError, match="expected the same"):
        model.partial_fit(X, y, classes=[0, 1, 2])
    assert bits(model) == before
    with pytest.raises(ValueError, match="classes must be passed"):
        Classifier().partial_fit(X, y)
    with pytest.raises(ValueError, match="two or more classes"):
        Classifier().fit(X, np.zeros(len(X)))
    assert model.set_params(allow_new_classes=True).partial_fit(X[:1], [7]).classes_.tolist() == [
        0, 1, 7,
    ]  # fmt: skip


KINDS = [
    [0, 1], [-1, 1], [False, True], [0.0, 1.0], ["ham", "spam"],
    np.array(["ham", "spam"], object),
]  # fmt: skip


@pytest.mark.parametrize("kinds", KINDS)
def test_labels_of_every_kind(kinds: Any) -> None:
    """Labels of a batch are compared as arrays, those of a few samples one by one."""
    X, y = data(100)
    names = np.asarray(kinds)
    batch, few = (Classifier().partial_fit(X[:1], names[y[:1]], classes=names) for _ in range(2))
    batch.partial_fit(X, names[y])
    for part in np.split(np.arange(len(y)), 10):
        few.partial_fit(X[part], names[y[part]])
    assert bits(batch) == bits(few)
    assert set(batch.predict(X).tolist()) == set(names.tolist())


@pytest.mark.parametrize(("known", "unknown"), [([0, 1], 7), ([0.0, 1.0], 2.0), (["a", "b"], "c")])
@pytest.mark.parametrize("n", [3, 100])
def test_one_unknown_label_among_many(known: list[Any], unknown: Any, n: int) -> None:
    X, y = data(n)
    model = Classifier().partial_fit(X, np.array(known)[y], classes=known)
    before = bits(model)
    labels = np.array(known)[y]
    labels[-1] = unknown
    with pytest.raises(ValueError, match="labels"):
        model.partial_fit(X, labels)
    assert bits(model) == before


# ---- penalties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_anchor_holds(optimizer: str) -> None:
    X, y = data()
    model = Classifier(optimizer=optimizer, learning_rate=0.1).partial_fit(X, y, classes=[0, 1])
    held = model.coef_.copy()
    strong = copy.deepcopy(model).anchor(1e30).partial_fit(X, 1 - y)
    np.testing.assert_allclose(strong.coef_, held, atol=1e-12)
    assert not np.array_equal(strong.intercept_, model.intercept_)  # it is free

    importance = np.zeros(held.shape)
    importance[0, 2] = 1e30
    one = copy.deepcopy(model).anchor(1.0, importance=importance).partial_fit(X, 1 - y)
    assert one.coef_[0, 2] == pytest.approx(held[0, 2], abs=1e-12)
    free = copy.deepcopy(model).partial_fit(X, 1 - y)
    assert abs(one.coef_[0, 3] - held[0, 3]) > 1e-3
    released = copy.deepcopy(model).anchor(1e30).release_anchor().partial_fit(X, 1 - y)
    assert bits(released) == bits(free)


def test_the_anchor_is_the_proximal_step() -> None:
    model = seeded("squared", [1.0, 2.0], learning_rate=0.1, importance_aware=False)
    model.anchor(5.0, reference=[0.5, 0.5], importance=[1.0, 0.0])
    model.partial_fit([[1.0, 1.0]], [0.0])
    w = np.array([1.0, 2.0]) - 0.1 * 3.0
    np.testing.assert_allclose(model.coef_, [(w[0] + 0.5 * 0.5) / 1.5, w[1]], rtol=1e-12)


def test_l2_decays_the_weights_and_not_the_intercept() -> None:
    model = Regressor(optimizer="sgd", learning_rate=0.1, l2=0.5).partial_fit([[0.0]], [0.0])
    model.coef_[:], model.intercept_[:] = 2.0, 0.0
    model.partial_fit([[0.0]], [0.0])
    assert model.coef_[0] == pytest.approx(2.0 * (1 - 0.05), rel=1e-12)
    model.set_params(l2=1e9).partial_fit([[0.0]], [0.0])
    assert model.coef_[0] == 0  # no further than that


# ---- all or nothing ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [1, 5])
def test_what_is_not_finite_changes_nothing(
    layout: Any, optimizer: str, bad: float, n: int
) -> None:
    X, y = data()
    model = Classifier(optimizer=optimizer).partial_fit(X, y, classes=[0, 1])
    before = bits(model)
    wrong = X[:n].copy()
    wrong[-1, 3] = bad
    for call in (model.partial_fit, model.partial_fit_predict, model.fit):
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            call(layout(wrong), np.resize([0, 1], n))
    for call in (model.predict, model.decision_function, model.predict_proba):
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            call(layout(wrong))
    assert bits(model) == before


def test_bad_arguments_change_nothing() -> None:
    X, y = data()
    model = Regressor().partial_fit(X, y.astype(float))
    before = bits(model)
    wrong: list[tuple[tuple, type, str]] = [
        ((X[:, :3], y), ValueError, "features"),
        ((X, y[:-1]), ValueError, "inconsistent numbers of samples"),
        ((X[0], y[:1]), ValueError, "2D array"),
        ((X, np.full(len(y), np.nan)), ValueError, "y contains NaN"),
        ((X, None), ValueError, "y"),
        ((X, y, -np.ones(len(y))), ValueError, r"sample_weight\[0\] is -1"),
        ((X, y, np.full(len(y), np.nan)), ValueError, "sample_weight"),
        ((X, y, np.ones(3)), ValueError, "sample_weight"),
        ((X[:0], y[:0]), ValueError, "0 sample"),
        ((X + 1j, y), ValueError, "Complex"),
    ]
    for arguments, error, match in wrong:
        with pytest.raises(error, match=match):
            model.partial_fit(*arguments)
        assert bits(model) == before
    assert bits(model.partial_fit(X, y.astype(float))) != before


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"loss": "absolute"}, ValueError),
        ({"optimizer": "lbfgs"}, ValueError),
        ({"learning_rate": -1.0}, ValueError),
        ({"learning_rate": "constant"}, TypeError),
        ({"learning_rate": lambda _: np.nan}, ValueError),
        ({"l2": -1.0}, ValueError),
        ({"importance_aware": "yes"}, TypeError),
        ({"fit_intercept": None}, TypeError),
        ({"momentum": 1.0, "optimizer": "nag"}, ValueError),
        ({"betas": (0.9, 1.0), "optimizer": "adam"}, ValueError),
        ({"eps": 0.0}, ValueError),
        ({"epochs": 0}, ValueError),
        ({"shuffle": 3}, TypeError),
        ({"warm_start": 3}, TypeError),
    ],
)
def test_bad_hyperparameters_name_themselves(options: dict, error: type) -> None:
    X, y = data()
    (name, *_) = options
    model = Classifier(**options)
    with pytest.raises(error, match=name):
        model.fit(X, y)
    assert not hasattr(model, "classes_")
    with pytest.raises(NotFittedError):
        model.predict(X)


def test_a_model_that_diverges_says_so_and_stays() -> None:
    X, y = data()
    model = Regressor(optimizer="sgd", learning_rate=1e6, importance_aware=False)
    model.partial_fit(X[:1], y[:1])
    before = bits(model)
    with pytest.raises(ValueError, match="overflows"):
        model.partial_fit(np.tile(X, (20, 1)), np.tile(y, 20))
    assert bits(model) == before


def test_what_decides_the_state_is_fixed() -> None:
    X, y = data()
    model = Classifier().partial_fit(X, y, classes=[0, 1])
    before = bits(model)
    for changed in ({"loss": "hinge"}, {"optimizer": "sgd"}, {"fit_intercept": False}):
        with pytest.raises(ValueError, match=next(iter(changed))):
            clone(model).set_params(warm_start=True).fit(X, y).set_params(**changed).fit(X, y)
        with pytest.raises(ValueError, match=next(iter(changed))):
            copy.deepcopy(model).set_params(**changed).partial_fit(X, y)
    assert bits(model) == before
    model.set_params(l2=0.1, learning_rate=0.5).partial_fit(X, y)  # the rest may change
    assert bits(model) != before
    model.set_params(loss="hinge", optimizer="adam").fit(X, y)  # from the beginning


# ---- arrays and threads --------------------------------------------------------------------------


@given(
    st.integers(1, 5), st.integers(1, 40), st.sampled_from([np.float32, np.float64]),
    st.sampled_from([1, 2, -1]), st.sampled_from([1, 3, -1]), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_layout(n: int, width: int, dtype: Any, down: int, across: int, turned: bool) -> None:
    rng = np.random.default_rng(n * 100 + width)
    shape = (n * abs(down), width * abs(across))
    X = (
        rng.standard_normal(shape[::-1]).astype(dtype).T
        if turned
        else (rng.standard_normal(shape).astype(dtype))
    )
    X = X[::down, ::across]
    y = rng.standard_normal(n)
    strided, plain = (Regressor().partial_fit(rows, y) for rows in (X, np.ascontiguousarray(X)))
    again = strided.partial_fit(X, y)  # no longer the first call
    assert bits(again) == bits(plain.partial_fit(np.ascontiguousarray(X), y))


def test_misaligned_and_foreign_byte_order() -> None:
    X, y = data()
    y = y.astype(float)
    memory = np.zeros(X.nbytes + 1, np.uint8)
    shifted = memory[1:].view(np.float64).reshape(X.shape)
    shifted[...] = X
    model = Regressor().partial_fit(X[:1], y[:1])
    copies = [copy.deepcopy(model).partial_fit(rows, y) for rows in (X, shifted, X.astype(">f8"))]
    assert len({bits(each) for each in copies}) == 1


def test_dtype_is_that_of_the_first_samples() -> None:
    X, y = data(dtype=np.float32)
    model = Classifier().partial_fit(X, y, classes=[0, 1])
    assert model.coef_.dtype == np.float32
    both = copy.deepcopy(model).partial_fit(X.astype(np.float64), y)
    assert both.coef_.dtype == np.float32
    assert bits(both) == bits(model.partial_fit(X, y))
    assert Classifier().fit(X.astype(int), y).coef_.dtype == np.float64


def test_threads_learn_at_once() -> None:
    """One model by four threads, and four models by four: all samples count, nothing is torn."""
    X, y = data(2000, 50)
    shared = Classifier().partial_fit(X[:1], y[:1], classes=[0, 1])
    own = [Classifier().partial_fit(X[:1], y[:1], classes=[0, 1]) for _ in range(4)]

    def learn(model: Classifier) -> None:
        for _ in range(5):
            shared.partial_fit(X, y)
            model.partial_fit(X, y)

    threads = [threading.Thread(target=learn, args=(model,)) for model in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shared.t_ == 1 + 4 * 5 * len(X)
    assert len({bits(model) for model in own}) == 1
    assert np.isfinite(shared.coef_).all()


# ---- scikit-learn --------------------------------------------------------------------------------

ORDER_MATTERS = (
    "an online model depends on the order of its samples, which fit shuffles; what holds of "
    "weights and repetitions is tested above"
)


@parametrize_with_checks(
    [
        Classifier(),
        Classifier("softmax", optimizer="sgd", importance_aware=False, learning_rate=0.05),
        Classifier("hinge", optimizer="adam", allow_new_classes=True),
        Classifier("squared", optimizer="nag", learning_rate=0.01),
        Regressor(),
        Regressor(optimizer="adam", l2=1e-4),
    ],
    expected_failed_checks=lambda _: {
        "check_sample_weight_equivalence_on_dense_data": ORDER_MATTERS,
        "check_sample_weight_equivalence_on_sparse_data": ORDER_MATTERS,
    },
)
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks provoke some
        check(estimator)


def test_inside_scikit_learns_tools() -> None:
    X, y = data(150, classes=3)
    pipeline = make_pipeline(StandardScaler(), Classifier(random_state=0)).fit(X, y)
    assert pipeline.score(X, y) > 0.9
    search = GridSearchCV(
        Classifier(random_state=0), {"loss": LOSSES, "optimizer": OPTIMIZERS}, cv=2
    ).fit(X, y)
    assert search.best_score_ > 0.85
    assert OneVsRestClassifier(Classifier(random_state=0)).fit(X, y).score(X, y) > 0.9
    calibrated = CalibratedClassifierCV(Classifier("hinge", random_state=0), cv=3).fit(X, y)
    assert calibrated.predict_proba(X).shape == (150, 3)
    values = X @ np.arange(7.0)
    assert Regressor(random_state=0, epochs=30).fit(X, values).score(X, values) > 0.95


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [2, 3])
def test_probabilities(loss: str, classes: int) -> None:
    X, y = data(classes=classes)
    model = Classifier(loss, random_state=0).fit(X, y)
    if loss in ("hinge", "squared"):
        assert not hasattr(model, "predict_proba")
        return
    probabilities = model.predict_proba(X)
    assert probabilities.shape == (len(X), classes)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_array_equal(model.classes_[probabilities.argmax(axis=1)], model.predict(X))
    np.testing.assert_allclose(np.exp(model.predict_log_proba(X)), probabilities)
    far = model.predict_proba(1e5 * X)  # no overflow, no division by zero
    np.testing.assert_allclose(far.sum(axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pickles_and_copies_go_on(optimizer: str, tmp_path: Any) -> None:
    X, y = data()
    model = Classifier(optimizer=optimizer).partial_fit(X, y, classes=[0, 1]).anchor(0.1)
    path = tmp_path / "model.joblib"
    joblib.dump(model, path)
    copies = [
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        joblib.load(path),
        joblib.load(path, mmap_mode="r"),  # its memory cannot be written
    ]
    model.partial_fit(X, y)
    for each in copies:
        assert bits(each.partial_fit(X, y)) == bits(model)
    assert bits(joblib.load(path)) != bits(model)
    assert clone(model).get_params() == model.get_params()


def test_fit_begins_anew_unless_warm() -> None:
    X, y = data()
    once = Classifier(random_state=0).fit(X, y)
    assert bits(clone(once).fit(X, y)) == bits(once)
    assert bits(copy.deepcopy(once).fit(X, y)) == bits(once)
    warm = clone(once).set_params(warm_start=True).fit(X, y).fit(X, y)
    assert warm.t_ == 2 * once.t_
    assert once.t_ == 10 * len(X)


def test_shuffle_is_the_seeds() -> None:
    X, y = data()
    fits = Counter(bits(Classifier(random_state=seed).fit(X, y)) for seed in (0, 0, 1))
    assert sorted(fits.values()) == [1, 2]
    in_order = Classifier(shuffle=False, epochs=2).fit(X, y)
    passes = Classifier().partial_fit(X, y, [0, 1]).partial_fit(X, y)
    assert bits(in_order) == bits(passes)


def test_a_column_of_labels_is_warned_of() -> None:
    X, y = data()
    with pytest.warns(DataConversionWarning):
        Classifier().fit(X, y[:, None])


def test_import_is_lazy() -> None:
    code = (
        "import sys, fusestep; assert 'sklearn' not in sys.modules; "
        "fusestep.linear.Classifier(); assert 'sklearn' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
