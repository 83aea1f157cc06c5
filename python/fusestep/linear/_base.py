"""What linear models have in common: hyper-parameters, samples, the passes of ``fit``, anchors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from .._hyperparameters import flag, non_negative, number, whole
from ._model import Anchor, Model, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ._model import Rows

_SETTINGS = (
    "loss",
    "optimizer",
    "fit_intercept",
    "importance_aware",
    "l2",
    "momentum",
    "betas",
    "eps",
)


class LinearModel(BaseEstimator):  # type: ignore[misc]
    """A linear model that learns from one sample after another: a `Classifier` or `Regressor`."""

    _losses: tuple[str, ...]
    _seen: tuple[Any, ...]  # the hyper-parameters that the model goes by

    # ---- samples ---------------------------------------------------------------------------------

    def _rows(self, X: Any, model: Model | None) -> tuple[Rows, int]:
        """Check samples; return them as the native loop takes them, and how many there are.

        The native loop reads dense arrays of the model's dtype as they are, and refuses what is not
        finite; whatever else there may be is scikit-learn's to check.
        """
        if (
            model is not None
            and type(X) is np.ndarray
            and X.dtype == model.weights.dtype
            and X.ndim == 2
            and X.shape[1] == model.features
            and len(X) > 0
            and "feature_names_in_" not in self.__dict__
        ):
            return X, len(X)
        X = validate_data(
            self,
            X,
            accept_sparse="csr",
            dtype=[np.float64, np.float32] if model is None else model.dtype,
            reset=model is None,
        )
        return _as_native(X), X.shape[0]

    def _weights_of(self, sample_weight: Any, count: int) -> Any:
        """Check the weights of samples; None where all are 1."""
        if sample_weight is None:
            return None
        if (
            type(sample_weight) is np.ndarray
            and sample_weight.dtype == np.float64
            and sample_weight.shape == (count,)
            and sample_weight.flags.c_contiguous
        ):
            return sample_weight
        weights = check_array(
            sample_weight,
            dtype=np.float64,
            order="C",
            ensure_2d=False,
            ensure_min_samples=0,
            input_name="sample_weight",
        )
        if weights.ndim == 0:
            return np.full(count, weights)
        if weights.shape != (count,):
            raise ValueError(f"sample_weight has shape {weights.shape}; expected ({count},)")
        return weights

    def _rates(self, model: Model, count: int) -> Any:
        """Return the learning rate, or those of the next `count` steps."""
        rate = self.learning_rate
        if type(rate) is float and 0 <= rate < np.inf:
            return rate
        if not callable(rate):
            return non_negative("learning_rate", rate)
        rates = [number("learning_rate(step)", rate(model.steps + i)) for i in range(count)]
        if not all(0 <= value < np.inf for value in rates):
            raise ValueError(
                "learning_rate(step) is negative or not finite; expected a finite number"
            )
        return np.array(rates)

    # ---- steps -----------------------------------------------------------------------------------

    def _settings_in_use(self) -> tuple[Any, ...]:
        values = self.__dict__
        return tuple([values[name] for name in _SETTINGS])

    def _current_model(self) -> Model | None:
        """Return the model so far, with the hyper-parameters as they are now."""
        model: Model | None = self.__dict__.get("_model")
        if model is not None:
            seen = self._settings_in_use()
            if seen != self._seen:
                model.use(Settings.of(self, self._losses))
                self._seen = seen
        return model

    def _new_model(self, outputs: int, rows: Rows) -> Model:
        values = rows[0] if isinstance(rows, tuple) else rows
        return Model(Settings.of(self, self._losses), outputs, self.n_features_in_, values.dtype)

    def _keep(self, model: Model) -> None:
        self._model = model
        self._seen = self._settings_in_use()

    def _take_passes(
        self, model: Model, rows: Rows, targets: NDArray[np.float64], weights: Any
    ) -> None:
        """Learn from the samples `epochs` times, in another order each time."""
        if weights is not None and not weights.any():
            raise ValueError("sample_weight is zero for every sample; expected a weight above 0")
        epochs = whole("epochs", self.epochs, least=1)
        is_shuffled = flag("shuffle", self.shuffle)
        random = check_random_state(self.random_state)
        for _ in range(epochs):
            order = random.permutation(len(targets)).astype(np.int64) if is_shuffled else None
            model.learn(rows, targets, weights, self._rates(model, len(targets)), order)

    def _all_or_nothing(self, function: Callable[[], None]) -> None:
        """Call `function`; if it raises, the estimator is as it was."""
        before = dict(self.__dict__)
        try:
            function()
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _fitted(self) -> Model:
        model: Model | None = self.__dict__.get("_model")
        if model is None:
            check_is_fitted(self)
            raise AssertionError  # check_is_fitted has raised
        return model

    def _outputs(self, X: Any) -> NDArray[np.float64]:
        """Return predictions of shape [samples, outputs]."""
        model = self._fitted()
        return model.predict(*self._rows(X, model))

    # ---- anchors ---------------------------------------------------------------------------------

    def anchor(self, strength: float, reference: Any = None, importance: Any = None) -> Any:
        """Hold the weights near where they are now, so that new samples do not undo the past.

        Every step is followed by ``w <- (w + k r) / (1 + k)``, with ``k`` the learning rate times
        `strength` times the importance: the proximal step of a quadratic penalty, stable for every
        strength. The intercept is free. ``fit`` with ``warm_start=False`` releases the anchor.

        Parameters
        ----------
        strength
            Of the pull, >= 0.
        reference
            Where to: of the shape of ``coef_``. None: the weights as they are now.
        importance
            Of each weight, >= 0, of the shape of ``coef_``: the diagonal of the Fisher information,
            say. None: 1.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            A shape is wrong, or a value not finite or negative. Nothing has changed then.
        NotFittedError
            There are no weights yet.
        """
        model = self._fitted()
        strength = non_negative("strength", strength)
        to = model.coef if reference is None else _like(model.coef, reference, "reference")
        by = np.ones_like(model.coef)
        if importance is not None:
            by = _like(model.coef, importance, "importance")
            if (by < 0).any():
                raise ValueError("importance has negative numbers; expected none below 0")
        model.hold(Anchor(strength, np.array(to, order="C"), np.ascontiguousarray(by)))
        return self

    def release_anchor(self) -> Any:
        """Let the weights go where the samples lead."""
        self._fitted().hold(None)
        return self

    # ---- scikit-learn's protocols ----------------------------------------------------------------

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    @property
    def intercept_(self) -> NDArray[Any]:
        """The intercepts, of shape [outputs]: a view of what steps move, or zeros."""
        return self._of_fitted().intercept

    @property
    def t_(self) -> int:
        """How many samples have been learnt from: what a callable ``learning_rate`` is given."""
        return self._of_fitted().steps

    def _of_fitted(self) -> Model:
        """Return the model for an attribute, which does not exist before there is one."""
        model: Model | None = self.__dict__.get("_model")
        if model is None:
            raise AttributeError(f"this {type(self).__name__} has not learnt from any sample yet")
        return model

    def __sklearn_is_fitted__(self) -> bool:
        return "_model" in self.__dict__


def _as_native(X: Any) -> Rows:
    """Return checked samples as the native loop takes them."""
    if not sparse.issparse(X):
        return X
    if not X.has_canonical_format:
        X = X.copy()
        X.sum_duplicates()
    kinds = (np.int32, np.int64)
    columns, starts = (
        np.ascontiguousarray(a) if a.dtype in kinds else a.astype(np.int64)
        for a in (X.indices, X.indptr)
    )
    return np.ascontiguousarray(X.data), columns, starts


def _like(coef: NDArray[Any], value: Any, name: str) -> NDArray[Any]:
    """Return `value` as an array like `coef`, which a single output may lack the first axis of."""
    array = np.asarray(value, dtype=coef.dtype)
    if array.shape not in (coef.shape, coef.shape[1:] if len(coef) == 1 else coef.shape):
        raise ValueError(f"{name} has shape {array.shape}; expected {coef.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has numbers that are not finite")
    return array.reshape(coef.shape)
