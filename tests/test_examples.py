"""docs/examples/continual_digits.py: its parts, and what its page claims."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from types import ModuleType

PROGRAM = Path(__file__).parent.parent / "docs" / "examples" / "continual_digits.py"


def load() -> ModuleType:
    if not PROGRAM.exists():
        pytest.skip("not in a source tree", allow_module_level=True)
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("continual_digits", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look types up
    spec.loader.exec_module(module)
    return module


digits = load()


def run(directory: Path, *arguments: str) -> dict[str, Any]:
    results = directory / "results.json"
    assert digits.main([*arguments, "--json", str(results)]) == 0
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


# ---- the parts ----------------------------------------------------------------------------------


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


# ---- the results --------------------------------------------------------------------------------


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
def test_what_the_page_promises(tmp_path: Path) -> None:
    found = run(tmp_path)["accuracy"]
    kept, learned = digits.earlier_and_last(found["plain"])
    kept_ewc, learned_ewc = digits.earlier_and_last(found["EWC"])
    assert kept_ewc >= kept + 0.15
    assert learned_ewc >= learned - 0.05
