"""Handwritten digits, one small batch after the other."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

MAX_BATCH = 32


@dataclass(frozen=True)
class Digits:
    """Images of digits, and which digits they are.

    Attributes
    ----------
    images
        One row of 64 pixels, from 0 to 1, for each sample.
    labels
        From 0 to 9.
    """

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: npt.NDArray[np.int64]) -> Digits:
        return Digits(self.images[indices], self.labels[indices])


def load_digits() -> Digits:
    """Return the 1,797 digits of 8 x 8 pixels that come with scikit-learn."""
    # scikit-learn has no type hints: imported by name, it is plainly Any to a type checker.
    datasets: Any = importlib.import_module("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    return Digits((pixels / 16).astype(np.float32), labels.astype(np.int64))


def batches(digits: Digits, samples: int, rng: np.random.Generator) -> Iterator[Digits]:
    """Draw a stream from a data set, in passes of which each has an order of its own.

    Parameters
    ----------
    digits
        The data set.
    samples
        Length of the stream; beyond ``len(digits)`` samples come again.
    rng
        Decides the orders and the sizes of the batches.

    Yields
    ------
    Digits
        From 1 to 32 samples.
    """
    order = _order(len(digits), samples, rng)
    start = 0
    while start < samples:
        stop = start + int(rng.integers(1, MAX_BATCH, endpoint=True))
        yield digits[order[start:stop]]
        start = stop


def _order(size: int, samples: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    passes = -(-samples // size)
    return np.concatenate([rng.permutation(size) for _ in range(passes)])[:samples]
