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
    reference: Any  # arrays, where the parameter is
    importance: Any  # None: 1 everywhere


def add(optimizer: Optimizer, strength: Any, reference: Any, importance: Any) -> None:
    """Check all arguments, then anchor each parameter that they name."""
    strengths = _spread(optimizer, strength, "strength")
    references = _spread(optimizer, reference, "reference")
    importances = _spread(optimizer, importance, "importance")
    tasks: dict[int, tuple[float, Any, Any]] = {}
    for i in range(len(strengths)):
        left_out = (
            strengths[i] is None
            or (reference is not None and references[i] is None)
            or (importance is not None and importances[i] is None)
        )
        if not left_out:
            tasks[i] = checked(optimizer, i, strengths[i], references[i], importances[i])
    optimizer._native.flush()  # the present values are those of rows that are up to date
    new = {
        i: Anchor(lambda_, _present(optimizer, i) if given is None else given, weights)
        for i, (lambda_, given, weights) in tasks.items()
    }
    merged = {
        i: _merged(optimizer._anchors[i], task) if i in optimizer._anchors else task
        for i, task in new.items()
    }
    ready = {i: stored(optimizer, i, anchor) for i, anchor in merged.items()}
    for i, anchor in ready.items():
        attach(optimizer, i, anchor)


def stored(optimizer: Optimizer, i: int, anchor: Anchor, parameter: Any = None) -> Anchor:
    """Return a copy whose arrays a kernel can walk in step with a parameter.

    It is the i-th one, or what is to take its place.
    """
    array = optimizer._parameters.arrays[i] if parameter is None else parameter
    importance = anchor.importance
    return Anchor(
        anchor.strength,
        _stored(optimizer, i, array, anchor.reference),
        None if importance is None else _stored(optimizer, i, array, importance),
    )


def attach(optimizer: Optimizer, i: int, anchor: Anchor) -> None:
    """Make a stored anchor that of a parameter, whatever there was."""
    optimizer._native.set_anchor(i, *anchor)
    optimizer._anchors[i] = anchor


def release(optimizer: Optimizer, i: int) -> None:
    """Drop the anchor of a parameter, if it has one."""
    if optimizer._anchors.pop(i, None) is not None:
        optimizer._native.release_anchor(i)


def release_all(optimizer: Optimizer) -> None:
    """Drop all anchors."""
    for i in list(optimizer._anchors):
        release(optimizer, i)


def grown(anchor: Anchor, new_rows: tuple[int, ...]) -> Anchor:
    """Return the anchor of a table with more rows, to which the new ones are not tied."""
    old = anchor.importance
    importance = np.ones_like(anchor.reference) if old is None else old
    nothing = np.zeros(new_rows, importance.dtype)
    return Anchor(
        anchor.strength,
        np.concatenate([anchor.reference, nothing]),
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
    optimizer: Optimizer, i: int, strength: Any, reference: Any, importance: Any
) -> tuple[float, npt.NDArray[Any] | None, npt.NDArray[Any] | None]:
    """Return the strength, reference and importance for a parameter, if they are possible."""
    label = optimizer._parameters.labels[i]
    parameter = described(optimizer, i)
    if reference is not None:
        reference = _check(reference, parameter, f"the anchor of {label}")
        if (np.abs(reference) > np.finfo(_dtype(optimizer, parameter)).max).any():
            raise ValueError(f"the anchor of {label} has numbers that float32 cannot hold")
    if importance is not None:
        importance = _check(importance, parameter, f"the importance of {label}")
        if (importance < 0).any():
            raise ValueError(f"the importance of {label} is negative somewhere")
    return non_negative(f"the strength for {label}", strength), reference, importance


def _check(value: Any, parameter: _arrays.ArrayDescription, label: str) -> npt.NDArray[np.float64]:
    """Return finite numbers of the parameter's shape."""
    array = _as_array(value)
    if array.dtype.kind not in "fiuV" or array.dtype.names is not None:
        raise TypeError(f"{label} has dtype {array.dtype}; expected floats")
    if array.shape != parameter.shape:
        raise ValueError(f"{label} has shape {array.shape}; expected {parameter.shape}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{label} is not finite everywhere")
    return array


def _present(optimizer: Optimizer, i: int) -> npt.NDArray[np.float64]:
    label = f"the present value of {optimizer._parameters.labels[i]}"
    return _check(optimizer._parameters.arrays[i], described(optimizer, i), label)


def _as_array(value: Any) -> npt.NDArray[Any]:
    return _arrays.on_host(value)


def _as_floats(value: Any) -> npt.NDArray[np.float64]:
    return _as_array(value).astype(np.float64)


def _finite(weights: Any) -> Any:
    """Return weights of which those that are infinite are as large as can be."""
    return np.minimum(weights, np.finfo(np.float64).max)


def _weight(anchor: Anchor) -> Any:
    if anchor.importance is None:
        return np.float64(anchor.strength)
    return _finite(anchor.strength * _as_floats(anchor.importance))


@np.errstate(over="ignore")
def _merged(present: Anchor, task: Anchor) -> Anchor:
    """Return the one anchor that pulls as both do."""
    weights = [_weight(anchor) for anchor in (present, task)]
    total = _finite(weights[0] + weights[1])
    old, new = _as_floats(present.reference), _as_floats(task.reference)
    ratio = np.divide(weights[1], total, out=np.ones_like(total), where=total > 0)
    share = np.minimum(ratio, 1)
    reference = (1 - share) * old + share * new
    if present.importance is None and task.importance is None:
        return Anchor(float(total), reference, None)
    return Anchor(1.0, reference, np.broadcast_to(total, reference.shape))


def described(optimizer: Optimizer, i: int, array: Any = None) -> _arrays.ArrayDescription:
    """Return where a parameter lies and how, or what is to take its place."""
    label = optimizer._parameters.labels[i]
    if array is None:
        array = optimizer._parameters.arrays[i]
    return _arrays.ArrayDescription(*_cpu.describe_array(array, label))


def _dtype(optimizer: Optimizer, parameter: _arrays.ArrayDescription) -> str:
    return _state.state_dtype_for(optimizer._state_dtype, parameter)


def _stored(optimizer: Optimizer, i: int, array: Any, values: npt.NDArray[Any]) -> Any:
    """Return a copy that a kernel can walk in step with the parameter, in the state's dtype.

    An importance that the dtype cannot hold becomes the largest that it can, which pulls as hard.
    """
    parameter = described(optimizer, i, array)
    dtype = _dtype(optimizer, parameter)
    most = np.finfo(dtype).max
    fitting = np.clip(values.astype(np.float64), -most, most).astype(dtype)
    backend = _arrays.backend_for_state(array, parameter)
    copy = backend.new(parameter, dtype, 0)
    backend.assign(copy, backend.from_numpy(fitting, copy))
    return copy
