"""Linear models that learn from one sample after another, as scikit-learn estimators.

>>> import numpy as np
>>> from fusestep.linear import Classifier
>>> model = Classifier()
>>> X, y = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array(["left", "right"])
>>> model.partial_fit(X, y, classes=["left", "right"]).predict(X).tolist()
['left', 'right']
"""

from __future__ import annotations

try:
    from .classifier import Classifier
    from .regressor import Regressor
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("sklearn", "scipy"):
        raise
    raise ModuleNotFoundError(
        "fusestep.linear needs scikit-learn 1.6 or later: pip install scikit-learn",
        name=error.name,
    ) from error

__all__ = ["Classifier", "Regressor"]
