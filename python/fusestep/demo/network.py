"""A multi-layer perceptron 64-32-10 in plain NumPy: ReLU, softmax, cross-entropy."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float32]
Arrays: TypeAlias = dict[str, Array]

INPUTS, HIDDEN, CLASSES = 64, 32, 10


class Activations(NamedTuple):
    """What a forward pass leaves for the backward pass; one row a sample."""

    hidden: Array
    probabilities: Array


def initial_parameters(rng: np.random.Generator) -> Arrays:
    """Draw parameters as He et al. (2015), equation 10, do for ReLU; biases are zero."""
    return {
        "W1": _he_normal(rng, INPUTS, HIDDEN),
        "b1": np.zeros(HIDDEN, np.float32),
        "W2": _he_normal(rng, HIDDEN, CLASSES),
        "b2": np.zeros(CLASSES, np.float32),
    }


def forward(parameters: Arrays, images: Array) -> Activations:
    """Return the hidden layer and the probability of each class."""
    hidden = np.maximum(images @ parameters["W1"] + parameters["b1"], 0)
    return Activations(hidden, _softmax(hidden @ parameters["W2"] + parameters["b2"]))


def backward(
    parameters: Arrays, images: Array, labels: npt.NDArray[np.int64], activations: Activations
) -> Arrays:
    """Return the gradient of the mean cross-entropy of a batch.

    Parameters
    ----------
    parameters, images
        As they were in the forward pass.
    labels
        The right classes.
    activations
        Result of the forward pass.

    Returns
    -------
    dict
        An array for each parameter, of its shape.
    """
    hidden, probabilities = activations
    # Of softmax followed by cross-entropy, the derivative is: what was said minus what is true.
    error = probabilities.copy()
    error[np.arange(len(labels)), labels] -= 1
    error /= len(labels)
    hidden_error = (error @ parameters["W2"].T) * (hidden > 0)
    return {
        "W1": images.T @ hidden_error,
        "b1": hidden_error.sum(axis=0),
        "W2": hidden.T @ error,
        "b2": error.sum(axis=0),
    }


def _he_normal(rng: np.random.Generator, inputs: int, outputs: int) -> Array:
    weights = rng.standard_normal((inputs, outputs), np.float32)
    weights *= np.sqrt(2 / inputs)
    return weights


def _softmax(scores: Array) -> Array:
    # Shifted so that the largest exponent is 0: exp cannot overflow.
    exponentials: Array = np.exp(scores - scores.max(axis=1, keepdims=True))
    exponentials /= exponentials.sum(axis=1, keepdims=True)
    return exponentials
