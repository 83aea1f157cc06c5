"""How long `fusestep.linear` takes to learn from a sample, beside others who learn one by one.

``python bench/linear.py [--json FILE]`` prints one table. Everybody has 100 features a sample, two
classes, logistic loss, one thread, no penalty and, where nothing else is said, plain SGD with the
same constant learning rate; that the weights then are the same is checked first. A tenth of the
labels are wrong, so that there is something to learn however often the samples come by.

scikit-learn gets whole batches or single rows, as fusestep does. Vowpal Wabbit gets examples that
have been parsed before, and river dictionaries that have been made before: what they learn from.
Peers take turns in rounds, see `interleave.py`; ratios are medians of the ratios within the rounds.
A peer that is not installed is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import sparse

from company import Patience
from fusestep.linear import Classifier
from interleave import Budget, measure
from machine import describe
from results import three_digits

if TYPE_CHECKING:
    from collections.abc import Callable

FEATURES, WIDTH = 100, 10_000  # of a dense sample; of a sparse one, of which 100 are not 0
SAMPLES = 20_000
FEW = {"Vowpal Wabbit": 2_000, "river": 200, "one": 200}  # samples of a call
LEARNING_RATE = 0.01
NEXT_TO_NOTHING = 1e-12  # the weight of a sample that only tells what the classes are
BUDGET = Budget(turn=0.02, min_rounds=7, max_rounds=31, group=40)
PATIENCE = 90  # seconds for what others on the machine disturb
TOLERANCE = 1e-3  # relative to the largest weight: some compute in float32, and in other orders


class Learner(NamedTuple):
    """Somebody who learns.

    Parameters
    ----------
    learn
        Learns from some samples.
    samples
        How many these are.
    weights
        Returns those of the features.
    """

    learn: Callable[[], object]
    samples: int
    weights: Callable[[], np.ndarray[Any, Any]]


Learners = dict[str, Learner]


# ---- samples -------------------------------------------------------------------------------------


def labels_of(X: Any) -> np.ndarray[Any, Any]:
    """Return labels 0 and 1 that a linear model can learn, but for a tenth."""
    rng = np.random.default_rng(1)
    scores = X @ rng.standard_normal(X.shape[1])
    return ((scores > 0) ^ (rng.random(len(scores)) < 0.1)).astype(np.int64)


def dense_samples() -> np.ndarray[Any, Any]:
    """Return an array of float32."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((SAMPLES, FEATURES), dtype=np.float32)


def sparse_samples() -> sparse.csr_matrix:
    """Return a CSR matrix of float32 with 100 numbers in each row, in columns drawn at random."""
    rng = np.random.default_rng(0)
    step = WIDTH // FEATURES
    columns = np.arange(FEATURES) * step + rng.integers(0, step, (SAMPLES, FEATURES))
    values = rng.standard_normal(columns.size, dtype=np.float32)
    starts = np.arange(0, columns.size + 1, FEATURES, dtype=np.int32)
    return sparse.csr_matrix(
        (values, columns.ravel().astype(np.int32), starts), shape=(SAMPLES, WIDTH)
    )


# ---- who learns ----------------------------------------------------------------------------------


def own(X: Any, y: Any, one_by_one: bool = False, **options: Any) -> Learner:
    """Return our own estimator."""
    model = Classifier(learning_rate=LEARNING_RATE, fit_intercept=has_intercept(X), **options)
    return of_estimator(model, X, y, one_by_one)


def scikit_learn(X: Any, y: Any, one_by_one: bool = False) -> Learner:
    """Return scikit-learn's estimator."""
    from sklearn.linear_model import SGDClassifier

    model = SGDClassifier(
        "log_loss",
        penalty=None,
        learning_rate="constant",
        eta0=LEARNING_RATE,
        shuffle=False,
        fit_intercept=has_intercept(X),
    )
    return of_estimator(model, X, y, one_by_one)


def of_estimator(model: Any, X: Any, y: Any, one_by_one: bool) -> Learner:
    """Return a learner from what has ``partial_fit``."""
    model.partial_fit(X[:1], y[:1], classes=[0, 1], sample_weight=[NEXT_TO_NOTHING])

    def weights() -> np.ndarray[Any, Any]:
        return np.array(model.coef_[0])

    if not one_by_one:
        return Learner(lambda: model.partial_fit(X, y), len(y), weights)
    rows = [(X[i : i + 1], y[i : i + 1]) for i in range(FEW["one"])]

    def learn() -> None:
        for x, label in rows:
            model.partial_fit(x, label)

    return Learner(learn, len(rows), weights)


def vowpal_wabbit(X: Any, y: Any) -> Learner:
    """Return Vowpal Wabbit, without the extras of its default: they are more work."""
    from vowpalwabbit import Workspace

    workspace = Workspace(
        f"--loss_function logistic --sgd --learning_rate {LEARNING_RATE} --power_t 0 "
        "--initial_t 0 --bit_precision 18 --quiet --no_stdin"
        + ("" if has_intercept(X) else " --noconstant")
    )
    examples = [
        workspace.parse(
            f"{2 * label - 1} | " + " ".join(f"{j}:{x!r}" for j, x in features_of(X, i).items())
        )
        for i, label in enumerate(y[: FEW["Vowpal Wabbit"]].tolist())
    ]

    def learn() -> None:
        step = workspace.learn
        for example in examples:
            step(example)

    return Learner(
        learn, len(examples), lambda: np.array([workspace.get_weight(j) for j in range(X.shape[1])])
    )


def river(X: Any, y: Any) -> Learner:
    """Return river's logistic regression."""
    from river import linear_model, optim

    model = linear_model.LogisticRegression(
        optim.SGD(LEARNING_RATE), intercept_lr=LEARNING_RATE if has_intercept(X) else 0.0
    )
    samples = [
        (features_of(X, i), bool(label)) for i, label in enumerate(y[: FEW["river"]].tolist())
    ]

    def learn() -> None:
        for features, label in samples:
            model.learn_one(features, label)

    return Learner(
        learn, len(samples), lambda: np.array([model.weights.get(j, 0) for j in range(X.shape[1])])
    )


def has_intercept(X: Any) -> bool:
    """Return whether there is to be one: scikit-learn's learns otherwise where X is sparse."""
    return not sparse.issparse(X)


def features_of(X: Any, i: int) -> dict[int, float]:
    """Return the features of a sample that are not 0, by number."""
    if not sparse.issparse(X):
        return dict(enumerate(X[i].tolist()))
    stored = slice(X.indptr[i], X.indptr[i + 1])
    return dict(zip(X.indices[stored].tolist(), X.data[stored].tolist(), strict=True))


def installed(learners: dict[str, Callable[[], Learner]]) -> Learners:
    """Return the learners whose packages are there, and say which are not."""
    packages = {"Vowpal Wabbit": "vowpalwabbit", "river": "river"}
    missing = [
        name for name in learners if not importlib.util.find_spec(packages.get(name, "sklearn"))
    ]
    for name in missing:
        print(f"  {name} is left out: {packages[name]} is not installed")
    return {name: make() for name, make in learners.items() if name not in missing}


# ---- what is compared ----------------------------------------------------------------------------


def learners_of(X: Any, y: Any, *, one_by_one: bool = False) -> dict[str, Callable[[], Learner]]:
    """Return who learns by plain SGD, to be made when it is needed."""
    learners: dict[str, Callable[[], Learner]] = {
        "fusestep": lambda: own(X, y, one_by_one, optimizer="sgd", importance_aware=False),
        "scikit-learn": lambda: scikit_learn(X, y, one_by_one),
    }
    if one_by_one:
        return learners
    return learners | {
        "Vowpal Wabbit": lambda: vowpal_wabbit(X, y),
        "river": lambda: river(X, y),
    }


def variants_of(X: Any, y: Any, *, one_by_one: bool = False) -> dict[str, Callable[[], Learner]]:
    """Return our other ways to learn."""
    return {
        "fusestep, importance-aware": lambda: own(X, y, one_by_one, optimizer="sgd"),
        "fusestep, Adagrad": lambda: own(X, y, one_by_one, importance_aware=False),
        "fusestep, by default": lambda: own(X, y, one_by_one),
    }


def check_weights(X: Any, y: Any) -> None:
    """Raise where plain SGD does not give everybody the same weights."""
    count = FEW["river"]
    learners = installed(learners_of(X[:count], y[:count]))
    for learner in learners.values():
        learner.learn()
    expected = learners["fusestep"].weights()
    for name, learner in learners.items():
        difference = np.abs(learner.weights() - expected).max() / np.abs(expected).max()
        if not difference < TOLERANCE:
            raise AssertionError(f"the weights of {name} differ by {difference:.1e}")


def seconds_of_samples(learners: Learners, patience: Patience) -> dict[str, list[float]]:
    """Return the seconds that a sample takes each learner, one number a round."""
    measured = measure(
        {name: learner.learn for name, learner in learners.items()}, BUDGET, patience
    )
    return {
        name: [seconds / learners[name].samples for seconds in samples.seconds]
        for name, samples in measured.items()
    }


def table(title: str, seconds: dict[str, list[float]]) -> str:
    """Return the medians, and how many times longer than the first."""
    first = next(iter(seconds.values()))
    lines = [title]
    for name, samples in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(samples, first, strict=False))
        nanoseconds = statistics.median(samples) * 1e9
        lines.append(f"  {name:<28}{nanoseconds:>12,.0f} ns{three_digits(ratio):>10}x")
    return "\n".join(lines)


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write all samples there")
    options = parser.parse_args()

    machine = describe()
    print(f"{machine['processor']['model']}, 1 thread, float32; nanoseconds a sample")
    dense, compressed = dense_samples(), sparse_samples()
    groups: dict[str, tuple[Any, bool]] = {
        f"{SAMPLES:,} dense samples of {FEATURES} a call": (dense, False),
        f"one dense sample of {FEATURES} a call": (dense, True),
        f"{SAMPLES:,} CSR samples of {FEATURES} of {WIDTH:,} a call": (compressed, False),
    }
    results: dict[str, dict[str, list[float]]] = {}
    patience = Patience(PATIENCE)
    for title, (X, one_by_one) in groups.items():
        y = labels_of(X)
        check_weights(X, y)
        learners = learners_of(X, y, one_by_one=one_by_one)
        learners |= variants_of(X, y, one_by_one=one_by_one)
        results[title] = seconds_of_samples(installed(learners), patience)
        print(table(title, results[title]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "seconds": results}, indent=1))


if __name__ == "__main__":
    main()
