"""Anchors: what an optimizer's parameters are pulled back to.

An anchor is a quadratic penalty, ½ λ Σ F (w - w*)². The sum of two is one again, up to a constant,
with F̄ = Σ λ F and w̄ = Σ λ F w* / F̄: so any number of past tasks takes the memory of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _arrays, _cpu, _state
from ._hyperparameters import non_negative

if TYPE_CHECKING:
    import numpy.typing as npt

    from .optimizer import Optimizer


class Anchor(NamedTuple):
    """The anchor of one parameter."""

    strength: float
    reference: npt.NDArray[Any]
    importance: npt.NDArray[Any] | None  # None: 1 everywhere


def add(optimizer: Optimizer, strength: Any, reference: Any, importance: Any) -> None:
    """Check all arguments, then anchor each parameter that they name."""
    strengths = _spread(optimizer, strength, "strength")
    references = _spread(optimizer, reference, "reference")
    importances = _spread(optimizer, importance, "importance")
    new: dict[int, Anchor] = {}
    for i, label in enumerate(optimizer._parameters.labels):
        left_out = (
            strengths[i] is None
            or (reference is not None and references[i] is None)
            or (importance is not None and importances[i] is None)
        )
        if left_out:
            continue
        task = checked(optimizer, i, label, strengths[i], references[i], importances[i])
        present = optimizer._anchors.get(i)
        new[i] = task if present is None else _merged(present, task)
    for i, anchor in new.items():
        put(optimizer, i, anchor)


def put(optimizer: Optimizer, i: int, anchor: Anchor) -> None:
    """Make this the anchor of a parameter, whatever there was."""
    reference = _stored(optimizer, i, anchor.reference)
    importance = None if anchor.importance is None else _stored(optimizer, i, anchor.importance)
    optimizer._native.set_anchor(i, anchor.strength, reference, importance)
    optimizer._anchors[i] = Anchor(anchor.strength, reference, importance)


def release(optimizer: Optimizer, i: int) -> None:
    """Drop the anchor of a parameter, if it has one."""
    if optimizer._anchors.pop(i, None) is not None:
        optimizer._native.release_anchor(i)


def release_all(optimizer: Optimizer) -> None:
    """Drop all anchors."""
    for i in list(optimizer._anchors):
        release(optimizer, i)


def grown(anchor: Anchor, new_rows: npt.NDArray[Any]) -> Anchor:
    """Return the anchor of a table with more rows, to which the new ones are not tied."""
    old = anchor.importance
    importance = np.ones_like(anchor.reference) if old is None else old
    nothing = np.zeros(new_rows.shape, importance.dtype)
    return Anchor(
        anchor.strength,
        np.concatenate([anchor.reference, new_rows.astype(anchor.reference.dtype)]),
        np.concatenate([importance, nothing]),
    )


def _spread(optimizer: Optimizer, value: Any, what: str) -> list[Any]:
    """Return one value for each parameter, from one for all or from the form that `params` has."""
    parameters = optimizer._parameters
    count = len(parameters.arrays)
    if isinstance(parameters.given, dict) and isinstance(value, Mapping):
        if unknown := value.keys() - parameters.given.keys():
            raise ValueError(f"{what} has {sorted(unknown)}, which are not parameters")
        return [value.get(key) for key in parameters.keys]
    if isinstance(parameters.given, list) and isinstance(value, Sequence):
        if len(value) != count:
            raise ValueError(f"{what} has {len(value)} entries for {count} parameters")
        return list(value)
    if value is not None and what != "strength" and isinstance(parameters.given, (dict, list)):
        form = "dict" if isinstance(parameters.given, dict) else "list"
        raise TypeError(f"{what} is a {type(value).__name__}; expected a {form}, as params was")
    return [value] * count


def checked(
    optimizer: Optimizer, i: int, label: str, strength: Any, reference: Any, importance: Any
) -> Anchor:
    """Return the anchor of one parameter that is described so."""
    array = optimizer._parameters.arrays[i]
    device = _cpu.describe_array(array, label)[-1]
    if device != "cpu":
        raise TypeError(f"{label} is on {device}, where this version of fusestep has no anchors")
    return Anchor(
        non_negative(f"the strength for {label}", strength),
        _as_array(array if reference is None else reference, array, f"the anchor of {label}"),
        None
        if importance is None
        else _check_importance(_as_array(importance, array, f"the importance of {label}"), label),
    )


def _as_array(value: Any, parameter: Any, label: str) -> npt.NDArray[Any]:
    """Return finite numbers of the parameter's shape."""
    array = _arrays.backend_of(value).to_numpy(value)
    if array.dtype.kind not in "fiuV":
        raise TypeError(f"{label} has dtype {array.dtype}; expected floats")
    if array.shape != tuple(parameter.shape):
        raise ValueError(f"{label} has shape {array.shape}; expected {tuple(parameter.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{label} is not finite everywhere")
    return array


def _check_importance(importance: npt.NDArray[Any], label: str) -> npt.NDArray[Any]:
    if (importance < 0).any():
        raise ValueError(f"the importance of {label} is negative somewhere")
    return importance


def _merged(present: Anchor, task: Anchor) -> Anchor:
    """Return the one anchor that pulls as both do."""
    strength = max(present.strength, task.strength)
    if strength == 0:
        return task
    weights = [
        (anchor.strength / strength)
        * (1.0 if anchor.importance is None else anchor.importance.astype(np.float64))
        for anchor in (present, task)
    ]
    total = np.asarray(weights[0] + weights[1])
    old, new = present.reference.astype(np.float64), task.reference.astype(np.float64)
    share = np.divide(weights[1], total, out=np.ones_like(total), where=total > 0)
    reference = old + share * (new - old)
    if present.importance is None and task.importance is None:
        return Anchor(float(strength * total), reference, None)
    return Anchor(strength, reference, np.broadcast_to(total, reference.shape))


def _stored(optimizer: Optimizer, i: int, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a copy that a kernel can walk in step with the parameter, in the state's dtype."""
    array, label = optimizer._parameters.arrays[i], optimizer._parameters.labels[i]
    parameter = _arrays.ArrayDescription(*_cpu.describe_array(array, label))
    dtype = _state.state_dtype_for(optimizer._state_dtype, parameter)
    stored: npt.NDArray[Any] = _arrays.backend_for_state(array, parameter).new(parameter, dtype, 0)
    stored[...] = values
    return stored
