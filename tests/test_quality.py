"""Real training: smaller state and parameters reach the loss that float32 reaches.

The models, and what counts as the same loss, are in `bench/training.py`.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ml_dtypes = pytest.importorskip("ml_dtypes")
pytest.importorskip("sklearn")

if TYPE_CHECKING:
    from types import ModuleType

SEEDS = range(5)
LONG_MEMORY = {"betas": (0.9, 0.9999)}


def load() -> ModuleType:
    source = Path(__file__).parent.parent / "bench" / "training.py"
    if not source.exists():
        pytest.skip("not in a source tree", allow_module_level=True)
    spec = importlib.util.spec_from_file_location("training", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look types up
    spec.loader.exec_module(module)
    return module


training = load()
Configuration = training.Configuration


@cache
def losses(task: str, group: str, name: str) -> list[float]:
    return training.final_losses(task, training.CONFIGURATIONS[group][name], SEEDS)


def compared(task: str, group: str, name: str, reference: str = "float32") -> Any:
    return training.compared(losses(task, group, name), losses(task, group, reference))


def bfloat16_state_to_nearest(opt: Any) -> None:
    for state in opt.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name][...] = state[name].astype(ml_dtypes.bfloat16)


# ---- the promise ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("task", training.TASKS)
def test_smaller_state_reaches_the_same_loss(task: str, dtype: str) -> None:
    comparison = compared(task, "state", dtype)
    assert comparison.is_same, comparison


@pytest.mark.parametrize("task", ["digits", pytest.param("text", marks=pytest.mark.slow)])
def test_stochastic_rounding_saves_small_updates(task: str) -> None:
    comparison = compared(task, "parameters", "bfloat16", "bfloat16, to nearest")
    assert comparison.is_lower, comparison
    comparison = compared(task, "parameters", "bfloat16")
    assert comparison.is_same, comparison


# ---- that the promise can be broken --------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, LONG_MEMORY], ids=["usual", "long memory"])
def test_second_moments_that_stand_still_are_noticed(options: dict[str, Any]) -> None:
    """To nearest, bfloat16 loses changes below 1/512: v neither grows nor fades as it should."""
    reference, spoiled = (
        training.final_losses("digits", Configuration(options, after_step=after_step), SEEDS)
        for after_step in (None, bfloat16_state_to_nearest)
    )
    comparison = training.compared(spoiled, reference)
    assert not comparison.is_same, comparison


@pytest.mark.parametrize("task", ["digits", pytest.param("text", marks=pytest.mark.slow)])
def test_updates_that_vanish_are_noticed(task: str) -> None:
    comparison = compared(task, "parameters", "bfloat16, to nearest")
    assert comparison.difference > comparison.margin, comparison


def test_what_counts_as_the_same() -> None:
    reference = [1.0, 2.0, 3.0]
    shifted = [value + 0.24 for value in reference]
    assert training.compared(shifted, reference) == training.Comparison(
        pytest.approx(0.24), pytest.approx(0, abs=1e-9), 1.0
    )
    assert training.compared(shifted, reference).is_same
    for shift in (0.26, -0.26):
        moved = training.compared([value + shift for value in reference], reference)
        assert not moved.is_same
        assert moved.is_lower == (shift < 0)
    # The differences 0, 1 and 2 have the standard error 1/√3: 1 is less than two of them.
    assert training.compared([1.0, 3.0, 5.0], reference).is_same
    assert not training.compared([float("nan")] * 3, reference).is_same


# ---- the models and what they learn from ---------------------------------------------------------


@pytest.mark.parametrize("task", training.TASKS)
def test_a_seed_repeats_a_training(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "DIGITS_STEPS", 20)
    monkeypatch.setattr(training, "TEXT_STEPS", 5)
    found = training.final_losses(task, Configuration(), [3, 3, 4])
    assert found[0] == found[1] != found[2]


def test_gradients_are_those_of_the_cross_entropy() -> None:
    rng = np.random.default_rng(0)
    images, labels = (part[:8] for part in training.digits())
    params = {
        name: array + rng.normal(0, 0.1, array.shape)
        for name, array in training.initial_perceptron(rng).items()
    }
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in params.items()}
    inputs = torch.from_numpy(images.astype(np.float64))
    hidden = torch.relu(inputs @ tensors["W1"] + tensors["b1"])
    scores = hidden @ tensors["W2"] + tensors["b2"]
    torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels)).backward()
    for name, gradient in training.perceptron_gradients(params, images, labels).items():
        np.testing.assert_allclose(gradient, tensors[name].grad.numpy(), atol=1e-12)


def test_the_transformer_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    model = training.Transformer()
    text = torch.randint(training.VOCABULARY, (2, training.CONTEXT))
    changed = text.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % training.VOCABULARY
    with torch.no_grad():
        a, b = model(text), model(changed)
    torch.testing.assert_close(a[:, :20], b[:, :20])
    assert not torch.allclose(a[:, 20:], b[:, 20:])


def test_the_text_is_prose_in_ascii() -> None:
    known, held_out = training.texts()
    assert len(known) > 200_000
    assert 20_000 < len(held_out) < len(known) / 5
    assert int(torch.cat([known, held_out]).max()) < training.VOCABULARY
    text = bytes(known.tolist()).decode("ascii")
    assert text.count(" the ") > 1_000
    documented = training.docstrings()
    assert len(documented) == len(set(documented))
    assert documented == training.docstrings()
