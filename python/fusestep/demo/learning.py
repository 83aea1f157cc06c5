"""Test-then-train: every batch is a test before it is a lesson."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from . import network

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from .network import Arrays
    from .stream import Digits

WINDOW = 500


class Optimizer(Protocol):
    """What moves parameters; fusestep's optimizers and those of :mod:`.plain` do."""

    def step(self, grads: Arrays) -> None:
        """Update the parameters in place."""


@dataclass
class Accuracy:
    """Prequential accuracy: the share of samples predicted right before they were learned from.

    Attributes
    ----------
    samples
        Samples seen, after each batch.
    rolling
        Accuracy over the last 500 samples, or as many as there were, after each batch.
    overall
        Accuracy since the start, after each batch.
    """

    samples: list[int] = field(default_factory=list)
    rolling: list[float] = field(default_factory=list)
    overall: list[float] = field(default_factory=list)
    _window: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW), repr=False)
    _right: int = field(default=0, repr=False)

    @property
    def seen(self) -> int:
        """Samples seen so far."""
        return self.samples[-1] if self.samples else 0

    def add(self, right: npt.NDArray[np.bool_]) -> None:
        """Count a batch of predictions, each right or wrong."""
        self._window.extend(right.tolist())
        self._right += int(right.sum())
        seen = self.seen + len(right)
        self.samples.append(seen)
        self.rolling.append(sum(self._window) / len(self._window))
        self.overall.append(self._right / seen)


def test_then_train(
    parameters: Arrays, stream: Iterable[Digits], optimizers: Sequence[Optimizer]
) -> Iterator[npt.NDArray[np.bool_]]:
    """Learn from a stream.

    Parameters
    ----------
    parameters
        Of the network.
    stream
        Batches of samples.
    optimizers
        The first one moves `parameters`. All of them are given the same gradients, so one that
        moves a copy must end where the first one does.

    Yields
    ------
    array of bool
        After each batch: which predictions were right, made before the batch was learned from.
    """
    for batch in stream:
        activations = network.forward(parameters, batch.images)
        gradients = network.backward(parameters, batch.images, batch.labels, activations)
        for optimizer in optimizers:
            optimizer.step(gradients)
        yield activations.probabilities.argmax(axis=1) == batch.labels
