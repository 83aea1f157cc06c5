"""The penalties that anchors stand for, whatever library the arrays are of.

An anchor is a quadratic penalty, ½ λ Σ F (w - w*)². The sum of two is one again, up to a constant,
with F̄ = Σ λ F and w̄ = Σ λ F w* / F̄: so any number of past tasks takes the memory of one.

What users give is checked here, and added up in float64. Where the result is kept, so that a kernel
can walk it, is for each kind of optimizer to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _arrays
from ._hyperparameters import non_negative

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

# What an anchor is called in a parameter's state.
STRENGTH, REFERENCE, IMPORTANCE = "anchor_strength", "anchor", "anchor_importance"
ENTRIES = (STRENGTH, REFERENCE, IMPORTANCE)


class Anchor(NamedTuple):
    """The anchor of one parameter."""

    strength: float
    reference: Any
    importance: Any  # None: 1 everywhere


class Target(NamedTuple):
    """A parameter that is to be anchored."""

    label: str
    array: Any
    shape: tuple[int, ...]
    refusal: str | None  # what it is that cannot be anchored: "is on cuda:0"
    dtype: str  # of its state, and so of its anchor


class Task(NamedTuple):
    """What users have given of a penalty, checked."""

    strength: float
    reference: npt.NDArray[np.float64] | None  # None: the parameter's present values
    importance: npt.NDArray[np.float64] | None


def check_target(target: Target) -> None:
    """Raise TypeError for a parameter that cannot be anchored."""
    if target.refusal is not None:
        raise TypeError(
            f"{target.label} {target.refusal}, where this version of fusestep has no anchors"
        )


def checked(target: Target, strength: Any, reference: Any, importance: Any) -> Task:
    """Return the strength, reference and importance for a parameter, if they are possible."""
    check_target(target)
    if reference is not None:
        reference = _check(reference, target, f"the anchor of {target.label}")
        if (np.abs(reference) > np.finfo(target.dtype).max).any():
            raise ValueError(f"the anchor of {target.label} has numbers that float32 cannot hold")
    if importance is not None:
        importance = _check(importance, target, f"the importance of {target.label}")
        if (importance < 0).any():
            raise ValueError(f"the importance of {target.label} is negative somewhere")
    return Task(non_negative(f"the strength for {target.label}", strength), reference, importance)


def tasks(
    targets: Sequence[Target],
    strengths: Sequence[Any],
    references: Sequence[Any] | None,
    importances: Sequence[Any] | None,
) -> dict[int, Task]:
    """Check all arguments; return what they say of each parameter that they do not leave out.

    None among them leaves a parameter out; None in their place leaves out nothing.
    """
    result = {}
    for i, target in enumerate(targets):
        given = [each[i] for each in (strengths, references, importances) if each is not None]
        if all(value is not None for value in given):
            reference = None if references is None else references[i]
            importance = None if importances is None else importances[i]
            result[i] = checked(target, strengths[i], reference, importance)
    return result


def added(
    targets: Sequence[Target], present: Mapping[int, Anchor], tasks: Mapping[int, Task]
) -> dict[int, Anchor]:
    """Return the anchors that parameters have after these tasks, in float64.

    Parameters must be up to date: a task may take their present values.
    """
    result = {}
    for i, task in tasks.items():
        reference = task.reference
        if reference is None:
            label = f"the present value of {targets[i].label}"
            reference = _check(targets[i].array, targets[i], label)
        anchor = Anchor(task.strength, reference, task.importance)
        result[i] = _merged(present[i], anchor) if i in present else anchor
    return result


def grown(anchor: Anchor, new_rows: tuple[int, ...]) -> Anchor:
    """Return the anchor of a table with more rows, to which the new ones are not tied."""
    reference = _as_array(anchor.reference)
    old = anchor.importance
    importance = np.ones_like(reference) if old is None else _as_array(old)
    nothing = np.zeros(new_rows, importance.dtype)
    return Anchor(
        anchor.strength,
        np.concatenate([reference, nothing]),
        np.concatenate([importance, nothing]),
    )


def storable(values: Any, dtype: str) -> npt.NDArray[np.float64]:
    """Return values that a dtype can hold.

    An importance that is too large becomes the largest that there is, which pulls as hard.
    """
    most = np.finfo(dtype).max
    return np.asarray(np.clip(_as_array(values).astype(np.float64), -most, most))


def taken(entry: dict[Any, Any], target: Target) -> Anchor | None:
    """Take an anchor from the state of a parameter that is being loaded, and return it."""
    strength, reference, importance = (entry.pop(name, None) for name in ENTRIES)
    if strength is None and reference is None and importance is None:
        return None
    check_is_whole(target, strength, reference)
    return Anchor(*checked(target, strength, reference, importance))


def check_is_whole(target: Target, strength: Any, reference: Any) -> None:
    """Raise ValueError for an anchor of which something is missing."""
    if strength is None or reference is None:
        raise ValueError(
            f"the state of {target.label} has an anchor without its strength or reference"
        )


def entries(anchor: Anchor) -> dict[str, Any]:
    """Return what an anchor adds to its parameter's state."""
    return {name: value for name, value in zip(ENTRIES, anchor, strict=True) if value is not None}


def _check(value: Any, target: Target, label: str) -> npt.NDArray[np.float64]:
    """Return finite numbers of the parameter's shape."""
    array = _as_array(value)
    if array.dtype.kind not in "fiuV" or array.dtype.names is not None:
        raise TypeError(f"{label} has dtype {array.dtype}; expected floats")
    if array.shape != target.shape:
        raise ValueError(f"{label} has shape {array.shape}; expected {target.shape}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{label} is not finite everywhere")
    return array


def _as_array(value: Any) -> npt.NDArray[Any]:
    return _arrays.on_host(value)


def _finite(weights: Any) -> Any:
    """Return weights of which those that are infinite are as large as can be."""
    return np.minimum(weights, np.finfo(np.float64).max)


def _weight(anchor: Anchor) -> Any:
    if anchor.importance is None:
        return np.float64(anchor.strength)
    return _finite(anchor.strength * _as_array(anchor.importance).astype(np.float64))


@np.errstate(over="ignore")
def _merged(present: Anchor, task: Anchor) -> Anchor:
    """Return the one anchor that pulls as both do."""
    weights = [_weight(anchor) for anchor in (present, task)]
    total = _finite(weights[0] + weights[1])
    old, new = (_as_array(anchor.reference).astype(np.float64) for anchor in (present, task))
    ratio = np.divide(weights[1], total, out=np.ones_like(total), where=total > 0)
    share = np.minimum(ratio, 1)
    reference = (1 - share) * old + share * new
    if present.importance is None and task.importance is None:
        return Anchor(float(total), reference, None)
    return Anchor(1.0, reference, np.broadcast_to(total, reference.shape))
