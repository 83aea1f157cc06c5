"""Small trainings: what state and parameters of low precision do to the loss that is reached.

Two tasks: a perceptron on scikit-learn's digits, over NumPy arrays, and a transformer on the bytes
of the standard library's documentation, in PyTorch. A seed decides on the first parameters and on
the order of the samples, which are the same in all configurations: losses are compared in pairs.

A loss counts as reached where the mean of the paired differences is at most two of its standard
errors, and a quarter of the standard deviation that the reference has over the seeds, above 0.

`quality.py` prints what comes out; `tests/test_quality.py` asserts it.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits  # comes with scikit-learn
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

import fusestep as fs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Array: TypeAlias = npt.NDArray[np.float32]
Arrays: TypeAlias = dict[str, Array]
Labels: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Configuration:
    """How a model is kept and trained.

    Parameters
    ----------
    options
        Of Adam, besides its parameters and its learning rate.
    parameters
        Dtype of the parameters: "float32" or "bfloat16".
    pace
        The learning rate, as a part of the task's.
    after_step
        Called with the optimizer after each step; for a test, to spoil what it keeps.
    """

    options: dict[str, Any] = field(default_factory=dict)
    parameters: str = "float32"
    pace: float = 1.0
    after_step: Callable[[Any], object] | None = None


# For each group the reference comes first. Updates of a tenth of the usual length are less than
# half of what bfloat16 can tell apart, more often than not.
CONFIGURATIONS = {
    "state": {
        "float32": Configuration(),
        "bfloat16": Configuration({"state_dtype": "bfloat16"}),
        "int8": Configuration({"state_dtype": "int8"}),
    },
    "parameters": {
        "float32": Configuration(pace=0.1),
        "bfloat16": Configuration({"stochastic_rounding": True}, "bfloat16", pace=0.1),
        "bfloat16, to nearest": Configuration({}, "bfloat16", pace=0.1),
    },
}


# ---- what is compared ----------------------------------------------------------------------------

ERRORS, DEVIATIONS = 2.0, 0.25


@dataclass(frozen=True)
class Comparison:
    """Losses of the same seeds, in pairs.

    Parameters
    ----------
    difference
        Mean of the differences; below 0 where losses are lower than the reference's.
    error
        Its standard error.
    deviation
        Standard deviation of the reference over the seeds.
    """

    difference: float
    error: float
    deviation: float

    @property
    def margin(self) -> float:
        """How large a difference the seeds explain."""
        return ERRORS * self.error + DEVIATIONS * self.deviation

    @property
    def is_reached(self) -> bool:
        """Whether losses are no higher than the reference's, but for what the seeds explain."""
        return self.difference <= self.margin

    @property
    def is_lower(self) -> bool:
        """Whether losses are lower than the reference's by more than the seeds explain."""
        return self.difference < -self.margin


def compared(losses: Sequence[float], reference: Sequence[float]) -> Comparison:
    """Compare losses with those that a reference has with the same seeds."""
    differences = np.subtract(losses, reference)
    error = np.std(differences, ddof=1) / len(differences) ** 0.5
    deviation = np.std(reference, ddof=1)
    return Comparison(float(differences.mean()), float(error), float(deviation))


def final_losses(task: str, configuration: Configuration, seeds: Sequence[int]) -> list[float]:
    """Train on one thread with each seed, and return the losses that are reached.

    Parameters
    ----------
    task
        One of `TASKS`.
    configuration
        How.
    seeds
        One training each.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            return [TASKS[task](configuration, seed) for seed in seeds]
    finally:
        torch.set_num_threads(threads)


# ---- digits, in NumPy ----------------------------------------------------------------------------

PIXELS, HIDDEN, CLASSES = 64, 64, 10
DIGITS_BATCH, DIGITS_STEPS, DIGITS_LR = 32, 2000, 3e-3


def digits_loss(configuration: Configuration, seed: int) -> float:
    """Return the mean loss on all digits after training a perceptron on them."""
    images, labels = digits()
    start, order = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    params = initial_perceptron(start)
    if configuration.parameters == "bfloat16":
        params = {name: array.astype(ml_dtypes.bfloat16) for name, array in params.items()}
    lr = DIGITS_LR * configuration.pace
    opt = fs.Adam(
        params, lr=lambda step: lr * (1 - step / DIGITS_STEPS), seed=seed, **configuration.options
    )
    for _ in range(DIGITS_STEPS):
        batch = order.integers(0, len(labels), DIGITS_BATCH)
        opt.step(perceptron_gradients(widened(params), images[batch], labels[batch]))
        if configuration.after_step:
            configuration.after_step(opt)
    probabilities = perceptron(widened(params), images)[1]
    return float(-np.log(probabilities[np.arange(len(labels)), labels]).mean())


@cache
def digits() -> tuple[Array, Labels]:
    """Return 1,797 images, with values from 0 to 1, and the digits they show."""
    pixels, labels = load_digits(return_X_y=True)
    return (pixels / 16).astype(np.float32), labels.astype(np.int64)


def widened(params: Arrays) -> Arrays:
    """Return the parameters in float32, in which the network computes."""
    return {name: array.astype(np.float32) for name, array in params.items()}


def initial_perceptron(rng: np.random.Generator) -> Arrays:
    """Draw weights as He et al. (2015), equation 10, do for ReLU; biases are zero."""

    def weights(inputs: int, outputs: int) -> Array:
        return rng.standard_normal((inputs, outputs), np.float32) * np.float32((2 / inputs) ** 0.5)

    return {
        "W1": weights(PIXELS, HIDDEN),
        "b1": np.zeros(HIDDEN, np.float32),
        "W2": weights(HIDDEN, CLASSES),
        "b2": np.zeros(CLASSES, np.float32),
    }


def perceptron(params: Arrays, images: Array) -> tuple[Array, Array]:
    """Return the hidden layer and the probability of each class."""
    hidden = np.maximum(images @ params["W1"] + params["b1"], 0)
    scores = hidden @ params["W2"] + params["b2"]
    # Shifted so that the largest exponent is 0: exp cannot overflow.
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return hidden, exponentials / exponentials.sum(axis=1, keepdims=True)


def perceptron_gradients(params: Arrays, images: Array, labels: Labels) -> Arrays:
    """Return the gradients of the mean cross-entropy of a batch, by backpropagation."""
    hidden, errors = perceptron(params, images)
    # Of softmax followed by cross-entropy, the derivative is: what was said minus what is true.
    errors[np.arange(len(labels)), labels] -= 1
    errors /= len(labels)
    hidden_errors = (errors @ params["W2"].T) * (hidden > 0)
    return {
        "W1": images.T @ hidden_errors,
        "b1": hidden_errors.sum(axis=0),
        "W2": hidden.T @ errors,
        "b2": errors.sum(axis=0),
    }


# ---- text, in PyTorch ----------------------------------------------------------------------------

# fmt: off
MODULES = (
    "argparse", "ast", "bisect", "collections", "configparser", "contextlib", "copy", "csv",
    "datetime", "decimal", "difflib", "functools", "heapq", "inspect", "itertools", "json",
    "logging", "math", "os", "pathlib", "random", "re", "shutil", "statistics", "string",
    "subprocess", "tempfile", "textwrap", "threading", "typing", "unittest", "urllib.parse",
    "zipfile",
)
# fmt: on
VOCABULARY = 128  # ASCII
CONTEXT, WIDTH, HEADS, LAYERS = 32, 64, 4, 2
TEXT_BATCH, TEXT_STEPS, TEXT_LR = 8, 250, 1e-2
WARM_UP = 20  # steps
HELD_OUT = 10  # one docstring of so many
EVALUATED = 512  # windows of what was held out


def text_loss(configuration: Configuration, seed: int) -> float:
    """Return the mean loss on held-out text, in nats a byte, after training a transformer."""
    known, held_out = texts()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer().to(getattr(torch, configuration.parameters))
    params = list(model.parameters())
    lr = TEXT_LR * configuration.pace
    # The arrays' class, which takes tensors: fusestep.torch has the same bits and no int8.
    opt = fs.Adam(
        [param.detach() for param in params],
        lr=lambda step: lr * min(1, (step + 1) / WARM_UP) * (1 - step / TEXT_STEPS),
        seed=seed,
        **configuration.options,
    )
    rng = np.random.default_rng(seed)
    for _ in range(TEXT_STEPS):
        model.loss(windows(known, TEXT_BATCH, rng)).backward()
        opt.step([param.grad for param in params], zero_grad=True)
        if configuration.after_step:
            configuration.after_step(opt)
    with torch.no_grad():
        return float(model.loss(windows(held_out, EVALUATED, np.random.default_rng(0))))


def docstrings() -> list[str]:
    """Return the documentation of the public classes, methods and functions of `MODULES`."""
    members = [
        member for name in MODULES for member in public_members(importlib.import_module(name))
    ]
    documented = [
        one
        for member in members
        for one in (member, *(public_members(member) if inspect.isclass(member) else ()))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of members that are about to go
        found = [getattr(one, "__doc__", None) for one in documented]
    return list(dict.fromkeys(inspect.cleandoc(text) for text in found if isinstance(text, str)))


def public_members(owner: Any) -> list[Any]:
    """Return the public classes and functions of a module, or of a class, by name."""
    return [
        member
        for name, member in sorted(vars(owner).items())
        if not name.startswith("_") and (inspect.isclass(member) or inspect.isroutine(member))
    ]


@cache
def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the text to learn from and that which is held out, as numbers of characters."""

    def encoded(parts: Sequence[str]) -> torch.Tensor:
        characters = "\n\n".join(parts).encode("ascii", "ignore")
        return torch.frombuffer(bytearray(characters), dtype=torch.uint8).long()

    everything = docstrings()
    known = [text for i, text in enumerate(everything) if i % HELD_OUT]
    return encoded(known), encoded(everything[::HELD_OUT])


def windows(text: torch.Tensor, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Return parts of a text, drawn at random: an array of int64, [count, CONTEXT + 1]."""
    starts = torch.from_numpy(rng.integers(0, len(text) - CONTEXT, count))
    return text[starts[:, None] + torch.arange(CONTEXT + 1)]


class Transformer(nn.Module):
    """A decoder with layer normalisation before each part (Radford et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """Return the scores of what may come next, [N, length, VOCABULARY]."""
        x = self.embedding(characters) + self.positions.weight[: characters.shape[1]]
        return self.output(self.norm(self.blocks(x)))

    def loss(self, text: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of each character, given those before it."""
        scores = self(text[:, :-1]).float()
        return cross_entropy(scores.flatten(0, 1), text[:, 1:].flatten())


class Block(nn.Module):
    """Causal self-attention, then a perceptron; each adds to what there was."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.merged = nn.Linear(WIDTH, WIDTH)
        self.hidden, self.output = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return activations of the shape of `x`, [N, length, WIDTH]."""
        heads = self.queries_keys_values(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))
        queries, keys, values = heads.transpose(1, 3).unbind(2)
        mixed = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.merged(mixed.transpose(1, 2).flatten(2))
        return x + self.output(gelu(self.hidden(self.perceptron_norm(x))))


TASKS: dict[str, Callable[[Configuration, int], float]] = {
    "digits": digits_loss,
    "text": text_loss,
}
