"""Tables that get more rows."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _anchors, _arrays, _averages, _narrow, _penalties
from ._arrays import backend_of, has_backend

if TYPE_CHECKING:
    import numpy.typing as npt

    from .optimizer import Optimizer

_GROWTH = 1.5
"""Room for so many times the rows that are needed now.

On the CPU, pages that nobody touches cost nothing.
"""


def resize(optimizer: Optimizer, name: str | int, n_rows: int, init: Any) -> Any:
    """Give a parameter, and its state, `n_rows` rows; see :meth:`Optimizer.resize`."""
    i = _index_of(optimizer, name)
    old, label = optimizer._parameters.arrays[i], optimizer._parameters.labels[i]
    if not has_backend(old):
        raise TypeError(
            f"{label} is a {type(old).__name__}; only arrays of NumPy, CuPy and PyTorch can be "
            "resized"
        )
    count = check_count(tuple(old.shape), label, n_rows)
    new_rows = (count - old.shape[0], *old.shape[1:])
    values = backend_of(old).from_numpy(check_init(init, new_rows, label), old)

    if i in optimizer._copies:
        raise ValueError(f"{label} has a copy, whose memory is not the optimizer's to resize")
    if i in optimizer._anchors:  # which is about to change: rows that are behind need the old one
        optimizer._native.flush()
    table = _grown(optimizer, (i, None), old, count)
    states = {
        state: _grown_state(optimizer, i, state, array, count)
        for state, array in optimizer._arrays[i].items()
    }
    backend_of(table).assign(table[old.shape[0] :], values)
    average = None
    if optimizer._averages:
        average = _grown(optimizer, (i, _averages.ENTRY), optimizer._averages[i], count)
        _arrays.write(average[old.shape[0] :], table[old.shape[0] :])

    anchor = optimizer._anchors.get(i)
    if anchor is not None:
        anchor = _anchors.stored(optimizer, i, _penalties.grown(anchor, new_rows), table)
        _anchors.release(optimizer, i)  # it has the old shape
    optimizer._native.move(i, table, list(states.values()))
    optimizer._arrays[i] = states
    optimizer._parameters.replace(i, table)
    if average is not None:
        optimizer._native.set_average(i, average)
        optimizer._averages[i] = average
    if anchor is not None:
        _anchors.attach(optimizer, i, anchor)
    return table


def _index_of(optimizer: Optimizer, name: str | int) -> int:
    keys = optimizer._parameters.keys
    if name not in keys or isinstance(name, bool):
        raise KeyError(f"{name!r} is not a parameter; parameters: {', '.join(map(repr, keys))}")
    return [*keys].index(name)


def check_count(shape: tuple[int, ...], label: str, n_rows: Any) -> int:
    """Return how many rows a table is to have, if it can."""
    if not shape:
        raise ValueError(f"{label} has no dimensions, and so no rows")
    count = operator.index(n_rows)
    if count < shape[0]:
        raise ValueError(f"{label} has {shape[0]} rows; it cannot be resized to {count}")
    return count


def check_init(init: Any, shape: tuple[int, ...], label: str) -> npt.NDArray[Any]:
    """Return what new rows of this shape are to be filled with; `init` may be a callable."""
    given = init(shape) if callable(init) else init
    values = np.asarray(backend_of(given).to_numpy(given))
    if values.dtype.kind not in "fiubV":
        raise TypeError(f"init is {given!r}; expected a number, an array or a callable")
    if values.ndim > 0 and values.shape != shape:
        raise ValueError(
            f"the new rows of {label} have shape {shape}; init has shape {values.shape}"
        )
    return values if values.dtype.kind == "f" else values.astype(np.float64)


def _grown_state(optimizer: Optimizer, i: int, name: str, old: Any, count: int) -> Any:
    """Return a piece of state with so many rows: the old ones, and new ones as they begin."""
    initial = optimizer._initial_state()
    if isinstance(old, _narrow.Blocks):
        rows = np.full((count - old.codes.shape[0], *old.codes.shape[1:]), initial, np.float32)
        return _narrow.grown(old, rows, optimizer._state_signs[name])
    table = _grown(optimizer, (i, name), old, count)
    backend_of(table).assign(table[old.shape[0] :], initial)
    return table


def _grown(optimizer: Optimizer, key: tuple[int, str | None], old: Any, count: int) -> Any:
    """Return an array of so many rows that begins with the old ones; the rest is to be filled."""
    room, table = optimizer._growing.get(key, (None, None))
    if room is None or old is not table or room.shape[0] < count:
        rows = max(count, int(old.shape[0] * _GROWTH))
        backend = backend_of(old)
        room = backend.empty((rows, *old.shape[1:]), old)
        backend.assign(room[: old.shape[0]], old)
    table = room[:count]
    optimizer._growing[key] = room, table
    return table
