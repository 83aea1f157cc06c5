"""Linear regression on a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.utils.validation import _check_y, check_consistent_length

from .._hyperparameters import flag
from ._base import LinearModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ._model import Model


class Regressor(RegressorMixin, LinearModel):  # type: ignore[misc]
    """Linear regression that learns from one sample after another.

    Parameters
    ----------
    loss
        ``"squared"``: (p - y)^2 / 2.
    optimizer
        ``"adagrad"``, ``"sgd"``, ``"nag"`` or ``"adam"``.
    learning_rate
        A number >= 0, or a callable from the number of past samples to one.
    importance_aware
        Whether a sample moves the weights as infinitely many small steps would, so that no weight
        of a sample, however large, overshoots the target; else by the gradient times its weight.
    fit_intercept
        Whether there is an intercept.
    l2
        Strength of the L2 penalty, l2 / 2 times the squared norm of ``coef_``, for every sample.
    momentum
        Of ``"nag"``, in [0, 1).
    betas
        Of ``"adam"``, each in [0, 1).
    eps
        Of ``"adam"`` (None: 1e-8) and ``"adagrad"`` (None: 1e-10); greater than 0.
    epochs
        How often ``fit`` goes through the samples.
    shuffle
        Whether ``fit`` does so in another order each time.
    random_state
        Of the order: an int, a RandomState or None.
    warm_start
        Whether ``fit`` goes on from the present weights.

    Attributes
    ----------
    coef_ : ndarray of shape (n_features,)
        The weights: a view of the memory that steps move. float32 where the first samples were,
        else float64.
    intercept_ : ndarray of shape (1,)
        The intercept.
    t_ : int
        How many samples have been learnt from; those of weight 0 do not count.
    n_features_in_ : int
        Number of features.

    Examples
    --------
    >>> import numpy as np
    >>> from fusestep.linear import Regressor
    >>> X = np.array([[0.0], [1.0], [2.0]])
    >>> Regressor(epochs=200, random_state=0).fit(X, [1.0, 3.0, 5.0]).predict([[3.0]]).round(1)
    array([7.])
    """

    _losses = ("squared",)

    def __init__(
        self,
        loss: str = "squared",
        *,
        optimizer: str = "adagrad",
        learning_rate: float | Callable[[int], float] = 0.1,
        importance_aware: bool = True,
        fit_intercept: bool = True,
        l2: float = 0.0,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        epochs: int = 10,
        shuffle: bool = True,
        random_state: Any = None,
        warm_start: bool = False,
    ) -> None:
        self.loss = loss
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.importance_aware = importance_aware
        self.fit_intercept = fit_intercept
        self.l2 = l2
        self.momentum = momentum
        self.betas = betas
        self.eps = eps
        self.epochs = epochs
        self.shuffle = shuffle
        self.random_state = random_state
        self.warm_start = warm_start

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Regressor:
        """Learn from samples, several times over.

        Parameters
        ----------
        X
            Samples: an array or a SciPy sparse matrix of shape [n_samples, n_features].
        y
            Targets, of shape [n_samples].
        sample_weight
            Weights >= 0, of shape [n_samples]; None: 1.

        Returns
        -------
        self
        """

        def fit() -> None:
            present = self._current_model() if flag("warm_start", self.warm_start) else None
            rows, count = self._rows(X, present)
            targets = _targets(y, count)
            weights = self._weights_of(sample_weight, count)
            model = present.copied() if present else self._new_model(1, rows)
            self._take_passes(model, rows, targets, weights)
            self._keep(model)

        self._all_or_nothing(fit)
        return self

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Regressor:
        """Learn from each sample once, in the order given.

        Parameters
        ----------
        X, y, sample_weight
            As for :meth:`fit`.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            A value is not finite, or a shape is wrong. Nothing has changed then.
        """
        self._learn(X, y, sample_weight, wants_predictions=False)
        return self

    def partial_fit_predict(self, X: Any, y: Any, sample_weight: Any = None) -> NDArray[np.float64]:
        """As :meth:`partial_fit`; return what was predicted for each sample before learning it.

        Parameters
        ----------
        X, y, sample_weight
            As for :meth:`fit`.

        Returns
        -------
        ndarray of shape (n_samples,)
            The prediction for each sample by the model that has learnt from those before it.
        """
        predictions: NDArray[np.float64] = self._learn(X, y, sample_weight, wants_predictions=True)
        return predictions[:, 0]

    def _learn(self, X: Any, y: Any, sample_weight: Any, wants_predictions: bool) -> Any:
        predictions: NDArray[np.float64] | None = None

        def learn(model: Model | None) -> None:
            nonlocal predictions
            rows, count = self._rows(X, model)
            targets = _targets(y, count)
            weights = self._weights_of(sample_weight, count)
            is_new = model is None
            model = model or self._new_model(1, rows)
            if wants_predictions:
                predictions = np.empty((count, 1))
            model.learn(rows, targets, weights, self._rates(model, count), None, predictions)
            if is_new:
                self._keep(model)

        model = self._current_model()
        if model is None:
            self._all_or_nothing(lambda: learn(None))
        else:
            learn(model)
        return predictions

    def predict(self, X: Any) -> NDArray[np.float64]:
        """Return a prediction for each sample.

        Parameters
        ----------
        X
            Samples, as for :meth:`fit`.

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        predictions: NDArray[np.float64] = self._outputs(X)[:, 0]
        return predictions

    @property
    def coef_(self) -> NDArray[Any]:
        """The weights, of shape [n_features]: a view of what steps move."""
        coef: NDArray[Any] = self._of_fitted().coef[0]
        return coef


def _targets(y: Any, count: int) -> NDArray[np.float64]:
    """Return checked targets."""
    if type(y) is np.ndarray and y.dtype == np.float64 and y.shape == (count,):
        return np.ascontiguousarray(y, np.float64)
    if y is None:
        raise ValueError("this estimator requires y to be passed, but the target y is None")
    targets: NDArray[np.float64] = np.ascontiguousarray(_check_y(y, y_numeric=True), np.float64)
    if len(targets) != count:
        check_consistent_length(np.empty(count), targets)
    return targets
