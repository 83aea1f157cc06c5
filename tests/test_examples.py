"""continual_digits.py and feedback.py in docs/examples: their parts, and what their pages claim."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from types import ModuleType

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def load(name: str) -> ModuleType:
    program = EXAMPLES / f"{name}.py"
    if not program.exists():
        pytest.skip("not in a source tree", allow_module_level=True)
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, program)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look types up
    spec.loader.exec_module(module)
    return module


digits = load("continual_digits")
feedback = load("feedback")


def run(directory: Path, *arguments: str, program: ModuleType = digits) -> dict[str, Any]:
    results = directory / "results.json"
    assert program.main([*arguments, "--json", str(results)]) == 0
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def tasks() -> list[Any]:
    return digits.permuted_digits(np.random.default_rng(0), 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("small")
    return run(directory, "--tasks", "2", "--epochs", "10", "--seeds", "0", "1")


@pytest.fixture
def layers(tasks: list[Any]) -> list[Any]:
    params = digits.initial_parameters(np.random.default_rng(1))
    return digits.backpropagate(params, tasks[0].images[:8], tasks[0].labels[:8])


# ---- continual_digits.py: the parts -------------------------------------------------------------


def test_tasks_are_the_same_digits_with_other_pixels(tasks: list[Any]) -> None:
    first, second = tasks
    np.testing.assert_array_equal(first.labels, second.labels)
    assert not np.array_equal(first.images, second.images)
    np.testing.assert_array_equal(np.sort(first.images), np.sort(second.images))
    assert len(first.test_images) == digits.TEST_SIZE
    assert len(first.images) + len(first.test_images) == 1797


def test_a_batch_is_no_larger_than_it_should_be_and_all_are_used() -> None:
    positions = list(digits.batches(100, np.random.default_rng(0)))
    assert [len(batch) for batch in positions] == [32, 32, 32, 4]
    assert sorted(np.concatenate(positions)) == list(range(100))


def test_gradients_are_those_of_the_cross_entropy(tasks: list[Any], layers: list[Any]) -> None:
    """By differences in float64."""
    images, labels = tasks[0].images[:8], tasks[0].labels[:8]
    params = digits.initial_parameters(np.random.default_rng(1))
    params = {name: array.astype(np.float64) for name, array in params.items()}

    def loss() -> float:
        _, probabilities = digits.forward(params, images)
        return -np.log(probabilities[np.arange(8), labels]).mean()

    for name, gradient in digits.mean_gradients(layers).items():
        assert gradient.dtype == np.float32
        for index in np.argsort(np.abs(gradient), axis=None)[-5:]:
            value = params[name].flat[index]
            params[name].flat[index] = value + 1e-6
            above = loss()
            params[name].flat[index] = value - 1e-6
            below = loss()
            params[name].flat[index] = value
            assert gradient.flat[index] == pytest.approx((above - below) / 2e-6, rel=1e-3)


def test_the_gradients_of_samples_have_the_mean_of_the_batch(layers: list[Any]) -> None:
    mean = digits.mean_gradients(layers)
    for name, gradients in digits.sample_gradients(layers).items():
        assert gradients.shape == (8, *mean[name].shape)
        np.testing.assert_allclose(gradients.mean(axis=0), mean[name], atol=1e-6)


def test_labels_are_drawn_as_often_as_they_are_probable() -> None:
    wanted = np.array([0.5, 0, 0.3, 0.2, 0], np.float32)
    labels = digits.drawn(np.tile(wanted, (100_000, 1)), np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(labels, minlength=5) / 100_000, wanted, atol=0.01)
    assert not np.isin(labels, [1, 4]).any()


def test_the_fisher_information_is_that_of_the_models_own_labels(tasks: list[Any]) -> None:
    """Against the expectation over all labels."""
    params = digits.initial_parameters(np.random.default_rng(1))
    images = np.tile(tasks[0].images[:4], (400, 1))
    found = digits.fisher_information(params, images, np.random.default_rng(0))
    _, probabilities = digits.forward(params, images[:4])
    for name in ("W2", "b2"):
        expected = 0
        for label in range(digits.CLASSES):
            layers = digits.backpropagate(params, images[:4], np.full(4, label))
            squares = digits.sample_gradients(layers)[name] ** 2
            weights = probabilities[:, label].reshape(4, *[1] * (squares.ndim - 1))
            expected = expected + (weights * squares).mean(axis=0)
        np.testing.assert_allclose(found[name], expected, rtol=0.2, atol=0.05 * expected.max())


# ---- continual_digits.py: the results -----------------------------------------------------------


def test_the_accuracy_is_of_every_task_so_far(small: dict[str, Any]) -> None:
    assert small["seeds"] == [0, 1]
    assert list(small["accuracy"]) == list(digits.LEARNERS)
    for histories in small["accuracy"].values():
        assert [[len(stage) for stage in history] for history in histories] == [[1, 2]] * 2
        assert np.min([history[0][0] for history in histories]) > 0.9


def test_learners_are_the_same_until_there_is_an_anchor(small: dict[str, Any]) -> None:
    firsts = [[h[0] for h in histories] for histories in small["accuracy"].values()]
    assert firsts[0] == firsts[1] == firsts[2]


def test_ewc_keeps_more_and_learns_as_well(small: dict[str, Any]) -> None:
    kept, learned = digits.earlier_and_last(small["accuracy"]["plain"])
    kept_ewc, learned_ewc = digits.earlier_and_last(small["accuracy"]["EWC"])
    assert kept_ewc > kept + 0.05
    assert learned_ewc > learned - 0.05


def test_anchors_without_strength_are_none(tmp_path: Path) -> None:
    arguments = ["--tasks", "2", "--epochs", "1", "--seeds", "4"]
    found = run(tmp_path, *arguments, "--l2sp", "0", "--ewc", "0")["accuracy"]
    assert found["plain"] == found["L2-SP"] == found["EWC"]


def test_the_table_and_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.png"
    found = run(tmp_path, "--tasks", "2", "--epochs", "1", "--seeds", "3", "--plot", str(plot))
    printed = capsys.readouterr().out
    for learner, (history,) in found["accuracy"].items():
        earlier, last = history[-1]
        assert f"{learner:6} earlier tasks {earlier:.1%}, last task {last:.1%}" in printed
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("arguments", [["--tasks", "1"], ["--epochs", "0"], ["--seeds"]])
def test_a_wrong_option_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        digits.main(arguments)
    assert exit_.value.code == 2


@pytest.mark.slow
def test_what_the_page_promises(tmp_path: Path, thorough: bool) -> None:
    found = run(tmp_path, *([] if thorough else ["--seeds", "0", "1"]))["accuracy"]
    kept, learned = digits.earlier_and_last(found["plain"])
    kept_ewc, learned_ewc = digits.earlier_and_last(found["EWC"])
    assert kept_ewc >= kept + 0.15
    assert learned_ewc >= learned - 0.05


# ---- feedback.py: the parts --------------------------------------------------------------------


class Recorder:
    """Always answers 1; remembers what it was shown and taught."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[float], list[int], list[float]]] = []

    def predict(self, samples: Any) -> Any:
        self.calls.append(("predict", samples[:, 0].tolist(), [], []))
        return np.ones(len(samples), np.int64)

    def partial_fit(self, samples: Any, labels: Any, classes: Any, sample_weight: Any) -> None:
        row = samples[:, 0].tolist(), labels.tolist(), sample_weight.tolist()
        self.calls.append(("partial_fit", *row))


@pytest.fixture(scope="module")
def cancer() -> Any:
    return feedback.breast_cancer(7)


def accuracy_of(results: dict[str, Any], contender: str) -> float:
    return np.mean(results[contender]["whole"]["accuracy"])


def test_a_stream_is_its_seeds() -> None:
    for kind in feedback.KINDS.values():
        first, again, other = kind.new(3), kind.new(3), kind.new(4)
        for name in ("samples", "labels", "consents"):
            np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
            assert not np.array_equal(getattr(first, name), getattr(other, name))


def test_instruments_change_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "standardized", lambda samples: samples)
    data = feedback.load_breast_cancer()
    order = np.random.default_rng(7).permutation(569)
    stream = feedback.breast_cancer(7)
    np.testing.assert_array_equal(
        data.target_names[1 - stream.labels], data.target_names[data.target[order]]
    )
    ratio = np.divide(
        stream.samples, data.data[order], out=np.ones((569, 30)), where=data.data[order] > 0
    )
    changed = {"radius": (1, 1.5, 1.5), "perimeter": (1, 1.5, 1.5)}
    changed |= {"area": (1, 2.25, 2.25), "texture": (1, 1, 0.6)}
    for column, name in enumerate(data.feature_names):
        words = set(str(name).split()) & set(changed)
        expected = changed[words.pop()] if words else (1, 1, 1)
        found = np.split(ratio[:, column], [569 // 3, 2 * 569 // 3])
        for part, factor in zip(found, expected, strict=True):
            np.testing.assert_allclose(part, factor, err_msg=name)


def test_the_camera_turns_in_the_middle_third(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "standardized", lambda samples: samples)
    data = feedback.load_digits()
    order = np.random.default_rng(7).permutation(1797)
    images = feedback.digits(7).samples.reshape(-1, 8, 8)
    np.testing.assert_allclose(images[:600], data.images[order[:600]])
    for number, angle in ((898, 30), (1200, 60), (1796, 60)):
        turned = feedback.rotate(data.images[order[number]], angle, reshape=False, order=1)
        np.testing.assert_allclose(images[number], turned, atol=0.5)


def test_samples_are_standardised_by_what_is_known() -> None:
    samples = np.random.default_rng(0).normal(5, 3, (45, 4))
    found = feedback.standardized(samples)
    for part in feedback.parts(45):
        known = samples[: part.stop]
        expected = (samples[part] - known.mean(axis=0)) / known.std(axis=0)
        np.testing.assert_allclose(found[part], expected)


def test_users_correct_consent_or_say_nothing() -> None:
    samples = np.arange(25.0)[:, None]
    labels = np.ones(25, np.int64)
    labels[[3, 12]] = 0
    consents = np.arange(25) % 2 == 0
    consents[20:] = False
    model = Recorder()
    answers = feedback.from_feedback(model, feedback.Stream(samples, labels, consents), 5)

    # The first answers are those of nobody, which is class 0; the last ones nobody reacts to.
    assert answers.tolist() == [0] * 10 + [1] * 15
    assert [name for name, *_ in model.calls] == [
        "partial_fit",
        "predict",
        "partial_fit",
        "predict",
    ]
    weights = [5.0] * 10
    weights[3] = 0.0
    assert model.calls[0][3] == weights
    assert model.calls[1][1] == model.calls[2][1] == samples[10:20, 0].tolist()
    assert model.calls[2][2] == labels[10:20].tolist()
    assert model.calls[2][3] == [1, 0, 5, 0, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("name", feedback.EVERYBODY)
def test_nobody_knows_a_label_before_the_answer(name: str, cancer: Any) -> None:
    contender = feedback.EVERYBODY[name]
    other = feedback.Stream(cancer.samples, cancer.labels.copy(), cancer.consents)
    other.labels[300:] = 1 - other.labels[300:]
    a, b = (contender.learn(contender.new("logistic", 0.1), one, 5.0) for one in (cancer, other))
    np.testing.assert_array_equal(a[:301], b[:301])
    assert not np.array_equal(a[301:], b[301:])


def test_every_label_at_once_is_one_sample_after_another(cancer: Any) -> None:
    found, model = (feedback.new_fusestep("logistic", 0.1) for _ in range(2))
    answers = feedback.from_every_label(found, cancer, 5.0)
    model.partial_fit(cancer.samples[:1], cancer.labels[:1], classes=[0, 1])
    for i in range(1, len(answers)):
        assert model.predict(cancer.samples[i : i + 1]) == answers[i]
        model.partial_fit(cancer.samples[i : i + 1], cancer.labels[i : i + 1])
    np.testing.assert_array_equal(model.coef_, found.coef_)


def test_plain_sgd_answers_as_scikit_learn_does(cancer: Any) -> None:
    plain, peer = (feedback.CONTENDERS[name] for name in ("plain SGD", "SGDClassifier"))
    for rate in (0.01, 10.0):
        a, b = (
            feedback.from_feedback(one.new("logistic", rate), cancer, 5.0) for one in (plain, peer)
        )
        np.testing.assert_array_equal(a, b)


def test_scores_are_those_of_their_definitions() -> None:
    labels, answers = np.array([1, 1, 1, 1, 0, 0, 0, 0]), np.array([1, 1, 0, 0, 1, 0, 0, 0])
    found = feedback.scores(labels, answers, "binary")
    assert found == pytest.approx(
        {"accuracy": 5 / 8, "precision": 2 / 3, "recall": 2 / 4, "F1": 4 / 7}
    )
    found = feedback.scores(labels, answers, "macro")
    assert found["precision"] == pytest.approx((2 / 3 + 3 / 5) / 2)
    assert feedback.scores(labels, 0 * labels, "binary")["precision"] == 0


def test_scores_of_parts_are_those_of_each_part() -> None:
    labels = np.array([1, 1, 1, 0, 0, 0])
    stream = feedback.Stream(np.zeros((6, 1)), labels, labels > 0)
    found = feedback.in_parts([stream], [np.array([1, 1, 1, 1, 1, 0])], "macro", 2)
    np.testing.assert_allclose(found["accuracy"], [[1, 1 / 3]])


def test_means_have_their_deviations() -> None:
    assert feedback.mean_and_deviation([0.9, 0.92]) == "91.0 ±1.4"
    assert feedback.mean_and_deviation([0.9]) == "90.0"


def test_the_learning_rate_is_chosen_on_other_streams() -> None:
    def learn(rate: float, stream: Any, weight: float) -> Any:
        is_right = rate == (0.03 if len(stream.labels) == 569 else 100)
        return stream.labels if is_right else 1 - stream.labels

    cancer = feedback.KINDS["breast cancer"]
    labels = np.array([0, 1])
    streams = [feedback.Stream(np.zeros((2, 1)), labels, labels > 0)]
    contender = feedback.Contender(lambda loss, rate: rate, learn=learn)
    outcome = feedback.compete(contender, cancer, streams, feedback.QUICK, 5.0)
    assert outcome.rate == 0.03
    assert feedback.accuracies(streams, outcome.answers) == [0]
    assert feedback.accuracies(streams, outcome.by_rate[100]) == [1]
    assert list(outcome.by_weight) == [5, 1000]


# ---- feedback.py: the results ------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What a quick run on one seed has written, and what it has printed."""
    directory = tmp_path_factory.mktemp("quick")
    plot, printed = directory / "plot.png", io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = run(directory, "--quick", "--seeds", "1", "--plot", str(plot), program=feedback)
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return found, printed.getvalue()


def test_all_metrics_of_whole_streams_and_windows(quick: tuple[dict[str, Any], str]) -> None:
    results, printed = quick
    lines = [line.split() for line in printed.splitlines()]
    for kind in feedback.KINDS:
        assert list(results[kind]) == list(feedback.EVERYBODY)
        for contender, found in results[kind].items():
            for metric in feedback.METRICS:
                assert np.shape(found["whole"][metric]) == (1,)
                assert np.shape(found["windows"][metric]) == (1, feedback.WINDOWS)
            accuracy = found["whole"]["accuracy"]
            assert accuracy == found["by_rate"][str(found["rate"])] == found["by_weight"]["5.0"]
            numbers = [f"{100 * value:.1f}" for (value,) in found["whole"].values()]
            assert [*contender.split(), f"{found['rate']:g}", *numbers] in lines


def test_importance_aware_steps_are_no_worse_than_scikit_learns(
    quick: tuple[dict[str, Any], str],
) -> None:
    for kind, gain in (("breast cancer", 0), ("digits", 0.01)):
        ours, peer = (
            accuracy_of(quick[0][kind], name) for name in ("importance-aware SGD", "SGDClassifier")
        )
        assert ours >= peer + gain


def test_a_learning_rate_far_too_large_costs_importance_aware_sgd_little(
    quick: tuple[dict[str, Any], str],
) -> None:
    def lost(contender: str) -> float:
        by_rate = quick[0]["digits"][contender]["by_rate"]
        return by_rate["0.003"][0] - by_rate["100.0"][0]

    assert lost("importance-aware SGD") < 0.02
    assert lost("SGDClassifier") > 0.05


@pytest.mark.parametrize(
    "arguments", [["--seeds", "0"], ["--correction", "0"], ["--correction", "nan"]]
)
def test_a_wrong_option_of_feedback_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        feedback.main(arguments)
    assert exit_.value.code == 2


@pytest.mark.slow
def test_what_the_page_of_feedback_promises(tmp_path: Path, thorough: bool) -> None:
    found = run(tmp_path, *([] if thorough else ["--seeds", "2"]), program=feedback)
    for kind in feedback.KINDS:
        peer = accuracy_of(found[kind], "SGDClassifier")
        for ours in ("importance-aware SGD", "importance-aware Adagrad", "plain SGD"):
            assert accuracy_of(found[kind], ours) >= peer
