"""``python -m fusestep.demo`` and its parts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from fusestep.demo import network, stream
from fusestep.demo.contenders import RULES, copied
from fusestep.demo.learning import Accuracy, test_then_train

if TYPE_CHECKING:
    from pathlib import Path

test_then_train.__test__ = False  # the name is a term, not a test

PLAIN_TEXT = {"PYTHONIOENCODING": "utf-8", "COLUMNS": "100", "FORCE_COLOR": "", "TERM": "dumb"}


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **PLAIN_TEXT, **environment},
        timeout=120,
        check=False,
    )


def run_demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "fusestep.demo", *arguments, **environment)


# ---- the whole demo --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def needs_extras() -> None:
    for module in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(module)


@pytest.mark.usefixtures("needs_extras")
def test_learns_measures_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "picture [1].png"  # brackets: must not be read as markup
    demo = run_demo("--samples", "3000", "--output", str(picture))

    assert demo.returncode == 0, demo.stderr
    assert "Warning" not in demo.stderr
    final = re.search(r"Final accuracy: ([\d.]+)% of the last 500 samples", demo.stdout)
    assert final is not None, demo.stdout
    assert float(final[1]) > 85
    assert re.search(r"plain NumPy +[\d.]+ µs +[\d.]+ x", demo.stdout)
    said = " ".join(demo.stdout.split())  # however it was broken into lines
    assert re.search(r"parameters of fusestep and of plain NumPy are (identical|the same)", said)
    assert f"Picture: {picture}\n" in demo.stdout
    assert_is_picture(picture)


def assert_is_picture(path: Path) -> None:
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)  # decodes, so a truncated file raises
    height, width = pixels.shape[:2]
    assert min(height, width) > 300
    assert pixels[..., :3].std() > 0.05  # not blank


@pytest.mark.usefixtures("needs_extras")
def test_runs_where_output_is_ascii() -> None:
    demo = run_demo("--samples", "50", "--no-plot", PYTHONIOENCODING="ascii")
    assert demo.returncode == 0, demo.stderr
    assert demo.stdout.isascii()


@pytest.mark.usefixtures("needs_extras")
def test_says_so_when_the_learning_rate_is_far_too_high() -> None:
    demo = run_demo("--samples", "300", "--no-plot", "--optimizer", "sgd", "--lr", "1e30")
    assert demo.returncode == 1
    assert demo.stdout.endswith("this learning rate is far too high.\n")
    assert demo.stderr == ""


@pytest.mark.usefixtures("needs_extras")
def test_torch_is_not_needed() -> None:
    demo = run_without("torch", "--samples", "50", "--no-plot")
    assert demo.returncode == 0, demo.stderr
    assert "plain NumPy" in demo.stdout
    assert "torch" not in demo.stdout


@pytest.mark.parametrize(
    ("module", "distribution"),
    [("rich", "rich"), ("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")],
)
def test_a_missing_dependency_is_one_sentence(module: str, distribution: str) -> None:
    pytest.importorskip(module)
    demo = run_without(module)
    assert demo.returncode == 1
    assert demo.stdout == ""
    assert demo.stderr == (
        f'The demo needs {distribution}; install what it needs with: pip install "fusestep[demo]"\n'
    )


@pytest.mark.usefixtures("needs_extras")
def test_matplotlib_is_not_needed_without_a_picture() -> None:
    demo = run_without("matplotlib", "--samples", "50", "--no-plot")
    assert demo.returncode == 0, demo.stderr


def run_without(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the demo as if a module were not installed."""
    program = f"""
import runpy
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == {module!r} else find(name, *rest)
runpy.run_module("fusestep.demo", run_name="__main__", alter_sys=True)
"""
    return run_python("-c", program, *arguments)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--optimizer", "newton"], "invalid choice: 'newton'"),
        (["--lr", "nan"], "nan is not a positive number"),
        (["--samples", "many"], "many is not a positive whole number"),
        (["--threads", "0"], "0 is not a whole number from 1 to 1024"),
        (["--output", "picture.doc"], "picture.doc does not end in .png, .svg or .pdf"),
        (["--output", "no/such/directory/demo.png"], "there is no directory no/such/directory"),
    ],
)
def test_a_wrong_option_is_refused_at_once(arguments: list[str], complaint: str) -> None:
    demo = run_demo(*arguments)
    assert demo.returncode == 2
    assert complaint in demo.stderr
    assert "Traceback" not in demo.stderr


# ---- its parts -------------------------------------------------------------------------------


def some_digits(size: int = 100) -> stream.Digits:
    """Digits that are not scikit-learn's, so that these tests need NumPy alone."""
    rng = np.random.default_rng(1)
    return stream.Digits(rng.random((size, 64), np.float32), rng.integers(0, 10, size))


def test_a_stream_is_passes_in_orders_of_their_own() -> None:
    digits = stream.Digits(np.zeros((100, 64), np.float32), np.arange(100))
    batches = list(stream.batches(digits, 250, np.random.default_rng(0)))

    sizes = [len(batch) for batch in batches]
    assert min(sizes) >= 1
    assert max(sizes) <= 32
    labels = np.concatenate([batch.labels for batch in batches])
    assert len(labels) == 250
    assert sorted(labels[:100]) == sorted(labels[100:200]) == list(range(100))
    assert not np.array_equal(labels[:100], labels[100:200])


def test_a_stream_is_repeatable() -> None:
    first, second = (
        list(stream.batches(some_digits(), 250, np.random.default_rng(3))) for _ in range(2)
    )
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.images, b.images)


def test_gradients_are_those_of_the_cross_entropy() -> None:
    digits = some_digits(5)
    images = digits.images.astype(np.float64)
    rng = np.random.default_rng(0)
    parameters = {
        name: array.astype(np.float64) for name, array in network.initial_parameters(rng).items()
    }

    def loss() -> float:
        probabilities = network.forward(parameters, images).probabilities
        return -np.log(probabilities[np.arange(5), digits.labels]).mean()

    activations = network.forward(parameters, images)
    gradients = network.backward(parameters, images, digits.labels, activations)
    for name, array in parameters.items():
        assert gradients[name].shape == array.shape
        for index in rng.integers(0, array.size, 20):
            value = array.flat[index]
            array.flat[index] = value + 1e-6
            above = loss()
            array.flat[index] = value - 1e-6
            below = loss()
            array.flat[index] = value
            assert gradients[name].flat[index] == pytest.approx((above - below) / 2e-6, abs=1e-7)


@pytest.mark.parametrize("name", RULES)
def test_plain_numpy_ends_where_fusestep_does(name: str) -> None:
    rng = np.random.default_rng(0)
    parameters = network.initial_parameters(rng)
    start, plain = copied(parameters), copied(parameters)
    rule = RULES[name]
    optimizers = [rule.fusestep(parameters, lr=rule.lr), rule.plain(plain, lr=rule.lr)]
    for _ in test_then_train(parameters, stream.batches(some_digits(), 1000, rng), optimizers):
        pass
    for key in parameters:
        assert not np.array_equal(parameters[key], start[key])
        np.testing.assert_allclose(parameters[key], plain[key], rtol=1e-5, atol=1e-6)


def test_accuracy_rolls_over_the_last_500() -> None:
    accuracy = Accuracy()
    accuracy.add(np.zeros(500, bool))
    accuracy.add(np.ones(250, bool))
    assert accuracy.samples == [500, 750]
    assert accuracy.rolling == [0, 0.5]
    assert accuracy.overall == [0, pytest.approx(1 / 3)]
