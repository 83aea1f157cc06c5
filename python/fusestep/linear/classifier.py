"""Linear classification on a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit, softmax
from sklearn.base import ClassifierMixin
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, column_or_1d

from .._hyperparameters import flag
from ._base import LinearModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ._model import Model, Rows

_FEW = 32  # labels that are looked up one by one


def _has_probabilities(estimator: Classifier) -> bool:
    if estimator.loss in ("logistic", "softmax"):
        return True
    raise AttributeError(
        f"probabilities need loss='logistic' or loss='softmax'; this is {estimator.loss!r}"
    )


class Classifier(ClassifierMixin, LinearModel):  # type: ignore[misc]
    """Linear classification that learns from one sample after another.

    Two classes have one output, several classes one each, which tells the class from all others;
    with ``loss="softmax"`` every class has one, and they compete.

    Parameters
    ----------
    loss
        ``"logistic"``, ``"hinge"``, ``"squared"`` (of the labels 1 and -1) or ``"softmax"``.
    optimizer
        ``"adagrad"``, ``"sgd"``, ``"nag"`` or ``"adam"``.
    learning_rate
        A number >= 0, or a callable from the number of past samples to one.
    importance_aware
        Whether a sample moves the weights as infinitely many small steps would, so that no weight
        of a sample, however large, overshoots the label; else by the gradient times its weight.
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
    allow_new_classes
        Whether ``partial_fit`` takes labels that it has not been told of: the model then has one
        class more from the first sample of that class on.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels, sorted.
    coef_ : ndarray of shape (n_outputs, n_features)
        The weights: a view of the memory that steps move. float32 where the first samples were,
        else float64. When a class is added, the model moves to other memory.
    intercept_ : ndarray of shape (n_outputs,)
        The intercepts.
    t_ : int
        How many samples have been learnt from; those of weight 0 do not count.
    n_features_in_ : int
        Number of features.

    Examples
    --------
    >>> import numpy as np
    >>> from fusestep.linear import Classifier
    >>> model = Classifier(allow_new_classes=True)
    >>> for x, label in [([1.0, 0.0], "a"), ([0.0, 1.0], "b"), ([-1.0, -1.0], "c")]:
    ...     _ = model.partial_fit([x], [label])
    >>> model.classes_.tolist()
    ['a', 'b', 'c']
    """

    _losses = ("logistic", "hinge", "squared", "softmax")

    def __init__(
        self,
        loss: str = "logistic",
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
        allow_new_classes: bool = False,
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
        self.allow_new_classes = allow_new_classes

    # ---- learning --------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Classifier:
        """Learn from samples, several times over.

        Parameters
        ----------
        X
            Samples: an array or a SciPy sparse matrix of shape [n_samples, n_features].
        y
            Labels, of shape [n_samples].
        sample_weight
            Weights >= 0, of shape [n_samples]; None: 1.

        Returns
        -------
        self
        """

        def fit() -> None:
            present = self._current_model() if flag("warm_start", self.warm_start) else None
            rows, count = self._rows(X, present)
            labels = _labels(y, count)
            check_classification_targets(labels)
            weights = self._weights_of(sample_weight, count)
            if present:
                model = self._grown(present.copied(), labels)
            else:
                model = self._begun(np.unique(labels), rows)
            self._take_passes(model, rows, self._targets(labels, model), weights)
            self._keep(model)

        self._all_or_nothing(fit)
        return self

    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> Classifier:
        """Learn from each sample once, in the order given.

        Parameters
        ----------
        X, y, sample_weight
            As for :meth:`fit`.
        classes
            All labels there will be: needed in the first call, unless ``allow_new_classes``.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            A value is not finite, a shape is wrong, or a label is unknown. Nothing has changed
            then.
        """
        self._learn(X, y, classes, sample_weight, wants_predictions=False)
        return self

    def partial_fit_predict(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> NDArray[Any]:
        """As :meth:`partial_fit`; return what was predicted for each sample before learning it.

        Parameters
        ----------
        X, y, classes, sample_weight
            As for :meth:`partial_fit`.

        Returns
        -------
        ndarray of shape (n_samples,)
            The label predicted for each sample by the model that has learnt from those before it.
            The sample that a new class comes with is predicted by a model which has that class,
            with weights of zero.
        """
        parts = self._learn(X, y, classes, sample_weight, wants_predictions=True)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _learn(
        self, X: Any, y: Any, classes: Any, sample_weight: Any, wants_predictions: bool
    ) -> list[NDArray[Any]]:
        model = self._current_model()
        if model is not None and classes is None:
            rows, count = self._rows(X, model)
            labels = _labels(y, count)
            targets = self._known_targets(labels, model)
            if targets is not None:
                weights = self._weights_of(sample_weight, count)
                return [self._step(model, rows, targets, weights, wants_predictions)]
        parts: list[NDArray[Any]] = []
        self._all_or_nothing(
            lambda: self._learn_with_new(X, y, classes, sample_weight, wants_predictions, parts)
        )
        return parts

    def _step(
        self, model: Model, rows: Rows, targets: NDArray[np.float64], weights: Any, wanted: bool
    ) -> Any:
        predictions = np.empty((len(targets), model.outputs)) if wanted else None
        model.learn(rows, targets, weights, self._rates(model, len(targets)), None, predictions)
        return self._decided(predictions) if predictions is not None else None

    def _learn_with_new(
        self,
        X: Any,
        y: Any,
        classes: Any,
        sample_weight: Any,
        wants_predictions: bool,
        parts: list[NDArray[Any]],
    ) -> None:
        """Learn where the model is new, or some of the labels may be."""
        present = self._current_model()
        model = present.copied() if present else None
        rows, count = self._rows(X, model)
        labels = _labels(y, count)
        check_classification_targets(labels)
        weights = self._weights_of(sample_weight, count)
        if classes is not None:
            classes = np.unique(np.asarray(classes))
            if model is None:
                model = self._begun(classes, rows)
            elif flag("allow_new_classes", self.allow_new_classes):
                model = self._grown(model, classes)
            elif not np.array_equal(classes, self.classes_):
                raise ValueError(
                    f"classes is {classes!r} where the first call had {self.classes_!r}; "
                    "expected the same, or allow_new_classes=True"
                )
        elif model is None and not flag("allow_new_classes", self.allow_new_classes):
            raise ValueError("classes must be passed on the first call to partial_fit.")

        # A class is there from its first sample on, in whichever call that comes.
        for begin, end in _runs(labels, () if model is None else self.classes_):
            model = (
                self._begun(labels[:1], rows)
                if model is None
                else self._grown(model, labels[begin : begin + 1])
            )
            part = _slice(rows, begin, end)
            targets = self._targets(labels[begin:end], model)
            share = None if weights is None else weights[begin:end]
            parts.append(self._step(model, part, targets, share, wants_predictions))
        assert model is not None
        self._keep(model)

    # ---- classes ---------------------------------------------------------------------------------

    def _begun(self, classes: NDArray[Any], rows: Rows) -> Model:
        """Return a model of these classes that has not learnt anything."""
        if len(classes) < 2 and not flag("allow_new_classes", self.allow_new_classes):
            raise ValueError(
                f"there is one class, {classes.tolist()!r}; expected two or more classes, "
                "or allow_new_classes=True"
            )
        self._set_classes(classes)
        return self._new_model(self._outputs_for(len(classes)), rows)

    def _grown(self, model: Model, labels: NDArray[Any]) -> Model:
        """Return the model with those of the labels as classes that are not yet, if it may."""
        before = self.classes_
        classes = np.union1d(before, labels)
        if len(classes) == len(before):
            return model
        if not flag("allow_new_classes", self.allow_new_classes):
            new = np.setdiff1d(labels, before).tolist()
            raise ValueError(
                f"y has labels {new!r} that are not in classes_ {before!r}; "
                "pass all classes to the first partial_fit, or set allow_new_classes=True"
            )
        places = np.searchsorted(classes, before)
        outputs = self._outputs_for(len(classes))
        is_softmax = model.settings.loss == "softmax"

        def select(array: NDArray[Any], has_sign: bool) -> NDArray[Any]:
            if outputs == len(array):  # from one class to two: the output is that of the second
                return 0 - array if has_sign and places[0] == 0 else array.copy()
            new = np.zeros((outputs, *array.shape[1:]), array.dtype)
            if len(before) == 2 and not is_softmax:  # what speaks for one class, against the other
                new[places[1]] = array[0]
                new[places[0]] = 0 - array[0] if has_sign else array[0]
            else:
                new[places] = array
            return new

        self._set_classes(classes)
        return model.remapped(select)

    def _outputs_for(self, classes: int) -> int:
        return 1 if classes <= 2 and self.loss != "softmax" else classes

    def _set_classes(self, classes: NDArray[Any]) -> None:
        self.classes_ = classes
        self._numbers = {label: number for number, label in enumerate(classes.tolist())}

    def _known_targets(self, labels: Any, model: Model) -> NDArray[np.float64] | None:
        """Return what the native loop is to learn, or None where a label is not a class."""
        is_binary = model.outputs == 1 and len(self.classes_) == 2
        if len(labels) <= _FEW:
            numbers = self._numbers
            found = [numbers.get(label, -1) for label in labels.tolist()]
            if -1 in found:
                return None
            targets = np.array(found, np.float64)
        elif is_binary and labels.dtype == self.classes_.dtype != object:
            return _signs(labels, *self.classes_)
        else:
            at = np.searchsorted(self.classes_, labels)
            at[at == len(self.classes_)] = 0
            if not (self.classes_[at] == labels).all():
                return None
            targets = at.astype(np.float64)
        if model.outputs > 1 or model.settings.loss == "softmax":
            return targets
        return 2 * targets - 1 if is_binary else np.ones(len(labels))

    def _targets(self, labels: NDArray[Any], model: Model) -> NDArray[np.float64]:
        targets = self._known_targets(labels, model)
        if targets is None:
            unknown = np.setdiff1d(labels, self.classes_).tolist()
            raise ValueError(
                f"y has labels {unknown!r} that are not in classes_ {self.classes_!r}; "
                "pass all classes to the first partial_fit, or set allow_new_classes=True"
            )
        return targets

    # ---- predictions -----------------------------------------------------------------------------

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Return how much speaks for each class.

        Parameters
        ----------
        X
            Samples, as for :meth:`fit`.

        Returns
        -------
        ndarray of shape (n_samples,) or (n_samples, n_classes)
            Of two classes: for the second, where it is positive.
        """
        return self._scores(self._outputs(X))

    def predict(self, X: Any) -> NDArray[Any]:
        """Return a label for each sample.

        Parameters
        ----------
        X
            Samples, as for :meth:`fit`.

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        return self._decided(self._outputs(X))

    @available_if(_has_probabilities)  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return the probability of each class; of losses ``"logistic"`` and ``"softmax"``.

        Parameters
        ----------
        X
            Samples, as for :meth:`fit`.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            With several classes and ``"logistic"``, each against all others, then scaled so that
            they add up to 1.
        """
        outputs = self._outputs(X)
        if self._model.settings.loss == "softmax":
            return softmax(outputs, axis=1)  # type: ignore[no-any-return]
        if len(self.classes_) == 1:
            return np.ones_like(outputs)
        if len(self.classes_) == 2:
            return np.hstack((expit(-outputs), expit(outputs)))
        # Where each is too small to be told from 0, their logarithms are not.
        logs = -np.logaddexp(0, -outputs)
        return softmax(logs, axis=1)  # type: ignore[no-any-return]

    @available_if(_has_probabilities)  # type: ignore[untyped-decorator]
    def predict_log_proba(self, X: Any) -> NDArray[np.float64]:
        """Return the logarithm of :meth:`predict_proba`.

        Parameters
        ----------
        X
            Samples, as for :meth:`fit`.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
        """
        with np.errstate(divide="ignore"):
            logs: NDArray[np.float64] = np.log(self.predict_proba(X))
        return logs

    def _scores(self, outputs: NDArray[np.float64]) -> NDArray[np.float64]:
        if len(self.classes_) > 2:
            return outputs
        return outputs[:, 1] - outputs[:, 0] if outputs.shape[1] == 2 else outputs[:, 0]

    def _decided(self, outputs: NDArray[np.float64]) -> NDArray[Any]:
        if len(self.classes_) == 1:
            return np.repeat(self.classes_, len(outputs))
        scores = self._scores(outputs)
        best = (scores > 0).astype(np.intp) if scores.ndim == 1 else scores.argmax(axis=1)
        labels: NDArray[Any] = self.classes_[best]
        return labels

    @property
    def coef_(self) -> NDArray[Any]:
        """The weights, of shape [outputs, n_features]: a view of what steps move."""
        return self._of_fitted().coef


def _labels(y: Any, count: int) -> NDArray[Any]:
    """Return labels as an array of shape [count]."""
    if type(y) is not np.ndarray or y.ndim != 1:
        if y is None:
            raise ValueError("this estimator requires y to be passed, but the target y is None")
        y = column_or_1d(y, warn=True)
    if len(y) != count:
        check_consistent_length(np.empty(count), y)
    return y  # type: ignore[no-any-return]


def _signs(labels: NDArray[Any], first: Any, second: Any) -> NDArray[np.float64] | None:
    """Return -1 for the first label and 1 for the second, or None where there are others."""
    is_second = labels == second
    others = len(labels) - np.count_nonzero(is_second)
    if others != np.count_nonzero(labels == first):
        return None
    signs = is_second.view(np.int8)
    signs += signs
    signs -= 1
    targets: NDArray[np.float64] = signs.astype(np.float64)
    return targets


def _runs(labels: NDArray[Any], classes: Any) -> list[tuple[int, int]]:
    """Return the runs of samples, each but the first of which begins with a new class."""
    _, first = np.unique(labels, return_index=True)
    new = first[~np.isin(labels[first], classes)] if len(classes) else first
    starts = sorted({0, *new.tolist()})
    return list(zip(starts, [*starts[1:], len(labels)], strict=True))


def _slice(rows: Rows, begin: int, end: int) -> Rows:
    """Return some of the rows."""
    if not isinstance(rows, tuple):
        return rows[begin:end]
    values, columns, starts = rows
    stored = slice(starts[begin], starts[end])
    return values[stored], columns[stored], starts[begin : end + 1] - starts[begin]
