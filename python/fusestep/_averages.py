"""Averages of parameters, and copies of them in other dtypes: what a step writes besides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _anchors, _arrays, _state
from ._arrays import backend_of
from ._hyperparameters import non_negative, number, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .optimizer import Optimizer

ENTRY = "average"
"""The average's name in a parameter's state."""


@dataclass(frozen=True)
class EmaWarmup:
    r"""A decay for ``ema_decay`` that begins small, and grows with the number of steps.

    .. math:: d_t = 1 - (1 + t / gamma)^{-power}, \qquad t = steps - after

    kept between `min_decay` and `decay`; before the first step that is averaged it is 0, so that
    the average is the parameter itself. The same as timm's ``ModelEmaV3`` with ``use_warmup``,
    whose ``update`` counts from 1.

    Parameters
    ----------
    decay
        The largest decay, in [0, 1].
    min_decay
        The smallest one, in [0, 1].
    update_after_step
        Steps before averaging begins.
    warmup_gamma
        How many steps the warm-up is stretched by.
    warmup_power
        2/3 for a long training (1 million steps), 3/4 for a shorter one.

    Raises
    ------
    TypeError, ValueError
        A value is not a number, or is out of range.

    Examples
    --------
    >>> import numpy as np, fusestep as fs
    >>> opt = fs.Adam(np.zeros(3, np.float32), ema_decay=fs.EmaWarmup(0.9999))
    """

    decay: float = 0.9999
    min_decay: float = 0.0
    update_after_step: int = 0
    warmup_gamma: float = 1.0
    warmup_power: float = 2 / 3

    def __post_init__(self) -> None:
        _share("decay", self.decay)
        _share("min_decay", self.min_decay)
        whole("update_after_step", self.update_after_step)
        for name in ("warmup_gamma", "warmup_power"):
            if non_negative(name, getattr(self, name)) == 0:
                raise ValueError(f"{name} is 0; expected a number greater than 0")

    def __call__(self, steps: int) -> float:
        """Return the decay of the step after so many."""
        averaged = steps - self.update_after_step
        if averaged <= 0:
            return 0.0
        decay: float = 1 - (1 + averaged / self.warmup_gamma) ** -self.warmup_power
        return max(min(decay, self.decay), self.min_decay)


def _share(name: str, value: Any) -> float:
    result = number(name, value)
    if not 0 <= result <= 1:
        raise ValueError(f"{name} is {value!r}; expected a number in [0, 1]")
    return result


def check_decay(name: str, value: Any) -> float | Callable[[int], float] | None:
    """Return a number in [0, 1], a callable from the number of past steps to one, or None."""
    if value is None or callable(value):
        return value  # type: ignore[no-any-return]
    return _share(name, value)


def decay_of(schedule: Callable[[int], float], steps: int) -> float:
    """Return the decay of the step after so many."""
    return _share("ema_decay(step)", schedule(steps))


# ---- the averages of an optimizer ----------------------------------------------------------------


def start(optimizer: Optimizer) -> None:
    """Begin to average each parameter: from what it is now."""
    averages = [fresh(optimizer, i) for i in range(len(optimizer._parameters.arrays))]
    for i, average in enumerate(averages):
        optimizer._native.set_average(i, average)
    optimizer._averages = averages


def fresh(optimizer: Optimizer, i: int) -> Any:
    """Return an array like a parameter, with its present values, in the dtype of averages."""
    array = optimizer._parameters.arrays[i]
    parameter = _anchors.described(optimizer, i)
    backend = _arrays.backend_for_state(array, parameter)
    average = backend.new(parameter, _state.state_dtype_for(None, parameter), 0)
    _arrays.write(average, array)
    return average


# ---- copies --------------------------------------------------------------------------------------


def attach_copies(optimizer: Optimizer, copies: Sequence[Any]) -> None:
    """Have each step keep these arrays, or None, up to date; from now on they are."""
    for i, copy in enumerate(copies):
        if copy is not None:
            optimizer._native.set_copy(i, copy)
    optimizer._native.check_memory()
    optimizer._copies = {i: copy for i, copy in enumerate(copies) if copy is not None}
    for i, copy in optimizer._copies.items():
        _arrays.write(copy, optimizer._parameters.arrays[i])


# ---- evaluating with the averages ----------------------------------------------------------------


def swap_in(optimizer: Optimizer) -> list[Any]:
    """Put the averages in the parameters' place; return what was there."""
    arrays = optimizer._parameters.arrays
    for array, label in optimizer._parameters.labelled():
        if not _arrays.has_backend(array):
            raise TypeError(
                f"{label} is a {type(array).__name__}; only arrays of NumPy, CuPy and PyTorch can "
                "be swapped with their averages"
            )
    kept = [backend_of(array).copy(array) for array in arrays]
    optimizer._native.is_swapped = True
    try:
        _put(optimizer, optimizer._averages)
    except BaseException:
        swap_out(optimizer, kept)
        raise
    return kept


def swap_out(optimizer: Optimizer, kept: Sequence[Any]) -> None:
    """Put back what was in the parameters' place, wherever that can be done."""
    optimizer._native.is_swapped = False
    _put(optimizer, kept)


def _put(optimizer: Optimizer, values: Sequence[Any]) -> None:
    """Write to the parameters and their copies: to all that can be written to."""
    errors = []
    arrays = optimizer._parameters.arrays
    targets = list(zip(arrays, values, strict=True))
    targets += [(copy, arrays[i]) for i, copy in optimizer._copies.items()]
    for array, value in targets:
        try:
            _arrays.write(array, value)
        except Exception as error:  # noqa: PERF203 - raised once the others have been written to
            errors.append(error)
    if errors:
        raise errors[0]
