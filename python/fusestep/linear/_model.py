"""The arrays of a linear model, and the native loop that moves them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import _cpu
from .._hyperparameters import betas, flag, non_negative, number, one_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

OPTIMIZERS = ("sgd", "nag", "adam", "adagrad")

_BINDING = threading.Lock()

_LINE = 64  # bytes of a cache line

# Rows as the native loop takes them: an array, or (values, columns, starts of rows).
Rows = Any


class Settings(NamedTuple):
    """The hyper-parameters of an estimator that its steps depend on, once they are checked."""

    loss: str
    optimizer: str
    fit_intercept: bool
    importance_aware: bool
    l2: float
    rule: str
    options: dict[str, float]

    @classmethod
    def of(cls, estimator: Any, losses: tuple[str, ...]) -> Settings:
        """Check the hyper-parameters of `estimator`."""
        optimizer = one_of("optimizer", estimator.optimizer, OPTIMIZERS)
        return cls(
            loss=one_of("loss", estimator.loss, losses),
            optimizer=optimizer,
            fit_intercept=flag("fit_intercept", estimator.fit_intercept),
            importance_aware=flag("importance_aware", estimator.importance_aware),
            l2=non_negative("l2", estimator.l2),
            rule="sgd" if optimizer == "nag" else optimizer,
            options=_options(optimizer, estimator),
        )


def _options(optimizer: str, estimator: Any) -> dict[str, float]:
    """Return the options of the rule, of which each optimizer has others."""
    momentum = number("momentum", estimator.momentum)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {estimator.momentum!r}; expected a number in [0, 1)")
    beta1, beta2 = betas("betas", estimator.betas)
    if optimizer == "nag":
        return {"momentum": momentum, "nesterov": 1.0}
    if optimizer == "sgd":
        return {}
    eps = {"adam": 1e-8, "adagrad": 1e-10}[optimizer]
    if estimator.eps is not None:
        eps = non_negative("eps", estimator.eps)
        if eps == 0:
            raise ValueError("eps is 0; expected a number greater than 0, or None")
    return {"eps": eps} | ({"beta1": beta1, "beta2": beta2} if optimizer == "adam" else {})


def _aligned(shape: tuple[int, int], value: float, dtype: Any) -> NDArray[Any]:
    """Return an array that begins at a cache line: no vector of it then lies in two of them."""
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    memory = np.empty(size + _LINE, np.uint8)
    begin = -memory.ctypes.data % _LINE
    array: NDArray[Any] = memory[begin : begin + size].view(dtype).reshape(shape)
    array.fill(value)
    return array


class Anchor(NamedTuple):
    """Where the weights are held: arrays of the shape [outputs, features]."""

    strength: float
    reference: NDArray[Any]
    importance: NDArray[Any]


class Model:
    """Weights and state of every output, and how many samples they have learnt from.

    Parameters
    ----------
    settings
        What the steps are.
    outputs, features
        How many there are.
    dtype
        float32 or float64: what the weights are and what is computed in.
    """

    def __init__(self, settings: Settings, outputs: int, features: int, dtype: Any) -> None:
        self.settings = settings
        self.features = features
        self._steps = 0
        self.anchor: Anchor | None = None
        blocks = -(-(features + settings.fit_intercept) // _cpu.LINEAR_COLUMNS)
        shape = outputs, blocks * _cpu.LINEAR_COLUMNS  # the rest are zeros
        names, _, initial = _cpu.describe_rule(settings.rule, settings.options)
        self.weights = _aligned(shape, 0, dtype)
        self.states = [_aligned(shape, initial, dtype) for _ in names]
        self._native: Any = None

    @property
    def steps(self) -> int:
        """How many samples have been learnt from."""
        steps: int = self._steps if self._native is None else self._native.steps
        return steps

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the weights."""
        dtype: np.dtype[Any] = self.weights.dtype
        return dtype

    @property
    def outputs(self) -> int:
        """How many predictions there are for a sample."""
        return len(self.weights)

    @property
    def coef(self) -> NDArray[Any]:
        """The weights without the intercepts: a view of shape [outputs, features]."""
        return self.weights[:, : self.features]

    @property
    def intercept(self) -> NDArray[Any]:
        """The intercepts: a view of shape [outputs], or zeros."""
        if self.settings.fit_intercept:
            return self.weights[:, self.features]
        return np.zeros(self.outputs, self.dtype)

    def use(self, settings: Settings) -> None:
        """Go on with other hyper-parameters, as far as the state allows."""
        for name in ("loss", "optimizer", "fit_intercept"):
            before, now = getattr(self.settings, name), getattr(settings, name)
            if before != now:
                raise ValueError(
                    f"{name} is {now!r} where this model has learnt with {before!r}: "
                    "call fit with warm_start=False to begin anew"
                )
        self._unbind()
        self.settings = settings

    def hold(self, anchor: Anchor | None) -> None:
        """Hold the weights at an anchor from now on, or release them."""
        self._unbind()
        self.anchor = anchor

    def remapped(self, select: Callable[[NDArray[Any], bool], NDArray[Any]]) -> Model:
        """Return a copy with other outputs.

        Parameters
        ----------
        select
            ``select(array, has_sign)`` returns the new outputs' rows of an array [outputs, ...];
            an array without sign, of squares or importances, is the same for a mirrored output.
        """
        copy = self.copied()
        squares = {"adagrad": (False,), "adam": (True, False)}.get(self.settings.optimizer, (True,))
        copy.weights = select(self.weights, True)
        copy.states = [
            select(s, sign)
            for s, sign in zip(self.states, squares[: len(self.states)], strict=True)
        ]
        if self.anchor:
            copy.anchor = Anchor(
                self.anchor.strength,
                select(self.anchor.reference, True),
                select(self.anchor.importance, False),
            )
        return copy

    def copied(self) -> Model:
        """Return a copy that shares no array which steps write."""
        copy = object.__new__(Model)
        copy.__dict__.update(self.__getstate__())
        copy.weights = self.weights.copy()
        copy.states = [state.copy() for state in self.states]
        return copy

    def learn(
        self,
        rows: Rows,
        targets: NDArray[np.float64],
        weights: NDArray[np.float64] | None,
        rates: Any,
        order: NDArray[np.int64] | None = None,
        predictions: NDArray[np.float64] | None = None,
    ) -> None:
        """Take one step for each sample whose weight is not 0; all of them, or none."""
        native = self._native or self._bound()
        native.learn(rows, targets, weights, rates, order, predictions)

    def predict(self, rows: Rows, count: int) -> NDArray[np.float64]:
        """Return predictions of shape [count, outputs]."""
        predictions = np.empty((count, self.outputs))
        (self._native or self._bound()).predict(rows, predictions)
        return predictions

    def _bound(self) -> Any:
        """Return the native model of these arrays, which are made writable where they are not."""
        with _BINDING:  # two threads must not have two native models of the same arrays
            return self._native or self._bind()

    def _bind(self) -> Any:
        self.weights, *self.states = (
            array if array.flags.writeable and array.flags.c_contiguous else array.copy("C")
            for array in (self.weights, *self.states)
        )
        settings = self.settings
        self._native = _cpu.LinearModel(
            settings.loss,
            settings.rule,
            settings.options,
            settings.importance_aware,
            settings.fit_intercept,
            settings.l2,
            self.features,
            self.weights,
            self.states,
            self.anchor,
            self._steps,
        )
        return self._native

    def _unbind(self) -> None:
        self._steps = self.steps
        self._native = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": self.steps, "_native": None}
