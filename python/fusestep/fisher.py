"""The diagonal of the Fisher information: which weights a task depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arrays import backend_of
from ._hyperparameters import number
from ._parameters import Parameters
from .gradients import OfSamples, Outer, Samples, as_weights

if TYPE_CHECKING:
    import numpy.typing as npt

    from ._parameters import Gradients, Params


@dataclass(frozen=True)
class _OfLayer:
    """Gradients of a linear layer's weight, each made when it is asked for."""

    x: npt.NDArray[np.float64]  # [N, positions, in]
    error: npt.NDArray[np.float64]  # [N, positions, out]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.error), self.error.shape[2], self.x.shape[2])

    def __getitem__(self, i: int) -> npt.NDArray[np.float64]:
        return np.asarray(self.error[i].T @ self.x[i])


def _sum_of_squares(
    gradients: npt.NDArray[np.float64] | _OfLayer, weight: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    there = weight != 0
    if isinstance(gradients, np.ndarray):
        of_these = gradients[there]
        return np.asarray(np.einsum("i,i...,i...->...", weight[there], of_these, of_these))
    total = np.zeros(gradients.shape[1:])
    for i in np.flatnonzero(there).tolist():
        total += weight[i] * gradients[i] ** 2
    return total


class Fisher:
    r"""The diagonal of the Fisher information, estimated from per-sample gradients.

    .. math:: F = \frac{1}{N} \sum_i (\nabla_w \log p(y_i | x_i))^2

    of each parameter, for :meth:`fusestep.Optimizer.anchor`. Gradients of labels that are drawn
    from the model's own predictions give the Fisher information; those of the labels in the data
    the "empirical" one, which is cheaper to get and often used in its place.

    Parameters
    ----------
    params
        Arrays, of which the shapes count: as they were given to the optimizer.
    decay
        In [0, 1]: how much :meth:`next_task` keeps of the tasks before (online EWC).

    Raises
    ------
    TypeError, ValueError
        As for the optimizer; `decay` is not a number from 0 to 1.

    References
    ----------
    Kirkpatrick et al. (2017), "Overcoming catastrophic forgetting in neural networks", equation 3;
    Schwarz et al. (2018), "Progress & compress: a scalable framework for continual learning",
    section 4 (online EWC); Kunstner, Balles & Hennig (2019), "Limitations of the empirical Fisher
    approximation for natural gradient descent".

    Examples
    --------
    >>> import numpy as np, fusestep as fs
    >>> w = np.zeros(2)
    >>> fisher = fs.Fisher(w)
    >>> fisher.add(np.array([[1.0, 0.0], [3.0, 0.0]]))
    >>> fisher.importance
    array([5., 0.])
    """

    def __init__(self, params: Params, *, decay: float = 1.0) -> None:
        self._parameters = Parameters(params)
        self._decay = number("decay", decay)
        if not 0 <= self._decay <= 1:
            raise ValueError(f"decay is {decay!r}; expected a number from 0 to 1")
        self._past = [np.zeros(tuple(p.shape)) for p in self._parameters.arrays]
        self._start_task()

    def _start_task(self) -> None:
        self._samples: float = 0
        self._sums = [np.zeros_like(past) for past in self._past]

    @property
    def samples(self) -> float:
        """Samples of the present task; where they have weights, the sum of these."""
        return self._samples

    def add(self, grads: Gradients) -> None:
        """Take a batch of per-sample gradients into account.

        Parameters
        ----------
        grads
            In the form that `params` had: for each parameter a float array [N, *shape], one
            gradient of the log likelihood (or of its negative) for each sample; or
            :class:`fusestep.Samples` of such, where a sample with weight 2 counts as two of them;
            or :class:`fusestep.Outer`, whose gradients are then made one at a time.

        Raises
        ------
        TypeError
            They are not arrays, or in another form.
        ValueError
            A shape is not [N, *shape], with the same N for all parameters; a gradient is missing
            or not finite; or samples are bounded, or have weights that differ between parameters.
            Nothing has been added then.
        """
        in_order = list(self._parameters.in_order(grads))
        if len(in_order) != len(self._sums):
            raise ValueError(f"got {len(in_order)} gradients for {len(self._sums)} parameters")
        gradients = [
            self._checked(gradient, i, label)
            for i, (gradient, label) in enumerate(
                zip(in_order, self._parameters.labels, strict=True)
            )
        ]
        counts = {of_samples.shape[0] for of_samples in gradients}
        if len(counts) != 1:
            raise ValueError(f"gradients of {sorted(counts)} samples; expected as many for all")
        weight = self._weights(in_order, counts.pop())
        with np.errstate(over="ignore", invalid="ignore"):
            sums = [
                total + _sum_of_squares(of_samples, weight)
                for total, of_samples in zip(self._sums, gradients, strict=True)
            ]
        if not all(np.isfinite(total).all() for total in sums):
            raise ValueError("a gradient is not finite, or too large to be squared and added up")
        self._sums = [np.asarray(total) for total in sums]
        self._samples += float(weight.sum())

    def _weights(self, grads: list[Any], count: int) -> npt.NDArray[np.float64]:
        """Return how much each sample counts, for all parameters alike."""
        weights = []
        for gradient, label in zip(grads, self._parameters.labels, strict=True):
            weight = np.ones(count)
            if isinstance(gradient, OfSamples) and gradient.weight is not None:
                weight = as_weights(gradient.weight, f"the weights of the samples for {label}")
            if weight.shape != (count,) or not (np.isfinite(weight) & (weight >= 0)).all():
                raise ValueError(
                    f"the weights of the samples for {label} are {weight!r}; expected {count} "
                    "finite numbers that are not negative"
                )
            weights.append(weight)
        if any((weight != weights[0]).any() for weight in weights):
            raise ValueError("samples have other weights for one parameter than for another")
        return weights[0]

    def _checked(self, gradient: Any, i: int, label: str) -> npt.NDArray[np.float64] | _OfLayer:
        if gradient is None:
            raise ValueError(f"the gradients of {label} are missing")
        if isinstance(gradient, OfSamples) and gradient.max_norm is not None:
            raise ValueError(f"the samples for {label} have max_norm; the Fisher takes them all")
        found = (
            self._of_layer(gradient, label)
            if isinstance(gradient, Outer)
            else self._array(gradient.values if isinstance(gradient, Samples) else gradient, label)
        )
        shape = self._past[i].shape
        if not found.shape or found.shape[1:] != shape:
            raise ValueError(
                f"the gradients of {label} have shape {found.shape}; expected (N, "
                f"{', '.join(map(str, shape))})"
            )
        return found

    def _of_layer(self, outer: Outer, label: str) -> npt.NDArray[np.float64] | _OfLayer:
        """Return gradients that are made of factors, which have positions from now on."""
        error = self._array(outer.error, label)
        x = None if outer.x is None else self._array(outer.x, label)
        if not 1 <= error.ndim <= 3 or (x is not None and x.shape[:-1] != error.shape[:-1]):
            raise ValueError(
                f"the gradients of {label} are outer products of error {error.shape} and "
                f"x {x if x is None else x.shape}; expected the same but for the last axis"
            )
        count = 1 if error.ndim == 1 else len(error)
        positions = 1 if error.ndim < 3 else error.shape[1]
        error = error.reshape(count, positions, error.shape[-1])
        if x is None:
            return np.asarray(error.sum(1))
        return _OfLayer(x.reshape(count, positions, x.shape[-1]), error)

    @staticmethod
    def _array(gradient: Any, label: str) -> npt.NDArray[np.float64]:
        if not hasattr(gradient, "shape"):
            raise TypeError(f"the gradients of {label} are a {type(gradient).__name__}")
        array = np.asarray(backend_of(gradient).to_numpy(gradient))
        if array.dtype.kind not in "fiuV":
            raise TypeError(f"the gradients of {label} have dtype {array.dtype}; expected floats")
        return array.astype(np.float64)

    def next_task(self) -> None:
        """Put the present task among those of the past, and start another.

        What there was of the past is multiplied by `decay` first. Nothing happens where the present
        task has no samples. :attr:`importance` has all tasks in it from then on: where an anchor
        has those of the past already, release it first, or leave this out.
        """
        self._past = self._in_all()
        self._start_task()

    @property
    def importance(self) -> Any:
        """F of the present task plus the decayed sum of those of the past, as float64 arrays.

        In the form that `params` had.
        """
        arrays = self._in_all()
        given = self._parameters.given
        if isinstance(given, dict):
            return dict(zip(self._parameters.keys, arrays, strict=True))
        return arrays if isinstance(given, list) else arrays[0]

    def _in_all(self) -> list[npt.NDArray[np.float64]]:
        if self._samples == 0:
            return [past.copy() for past in self._past]
        return [
            np.asarray(self._decay * past + total / self._samples)
            for past, total in zip(self._past, self._sums, strict=True)
        ]
