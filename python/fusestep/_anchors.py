"""Anchors of an array optimizer: what its parameters are pulled back to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _arrays, _cpu, _penalties, _state
from ._penalties import Anchor

if TYPE_CHECKING:
    import numpy.typing as npt

    from .optimizer import Optimizer


def add(optimizer: Optimizer, strength: Any, reference: Any, importance: Any) -> None:
    """Check all arguments, then anchor each parameter that they name."""
    targets = [target_of(optimizer, i) for i in range(len(optimizer._parameters.arrays))]
    tasks = _penalties.tasks(
        targets,
        optimizer._parameters.spread(strength, "strength", one_for_all=True),
        None if reference is None else optimizer._parameters.spread(reference, "reference"),
        None if importance is None else optimizer._parameters.spread(importance, "importance"),
    )
    optimizer._native.flush()  # the present values are those of rows that are up to date
    added = _penalties.added(targets, optimizer._anchors, tasks)
    ready = {i: stored(optimizer, i, anchor) for i, anchor in added.items()}
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


def target_of(optimizer: Optimizer, i: int) -> _penalties.Target:
    """Return a parameter as something that can be anchored."""
    parameter = described(optimizer, i)
    return _penalties.Target(
        optimizer._parameters.labels[i],
        optimizer._parameters.arrays[i],
        parameter.shape,
        None,
        _state.wide_dtype_for(optimizer._state_dtype, parameter),
    )


def described(optimizer: Optimizer, i: int, array: Any = None) -> _arrays.ArrayDescription:
    """Return where a parameter lies and how, or what is to take its place."""
    label = optimizer._parameters.labels[i]
    if array is None:
        array = optimizer._parameters.arrays[i]
    return _arrays.ArrayDescription(*_cpu.describe_array(array, label))


def _stored(optimizer: Optimizer, i: int, array: Any, values: npt.NDArray[Any]) -> Any:
    """Return a copy that a kernel can walk in step with the parameter, in the state's dtype."""
    parameter = described(optimizer, i, array)
    dtype = _state.wide_dtype_for(optimizer._state_dtype, parameter)
    backend = _arrays.backend_for_state(array, parameter)
    copy = backend.new(parameter, dtype, 0)
    fitting = _penalties.storable(values, dtype).astype(dtype)
    backend.assign(copy, backend.from_numpy(fitting, copy))
    return copy
