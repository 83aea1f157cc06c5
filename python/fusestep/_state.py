"""State arrays: which dtype they have, and what may be loaded into them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._arrays import backend_of

if TYPE_CHECKING:
    from ._arrays import ArrayDescription


_STATE_DTYPES = ("float32", "float64", "bfloat16")


def state_dtype_for(state_dtype: str | None, parameter: ArrayDescription) -> str:
    """Return the dtype of a parameter's state: float64 for float64, float32 for all others."""
    default = "float64" if parameter.dtype == "float64" else "float32"
    return default if state_dtype is None else state_dtype


def wide_dtype_for(state_dtype: str | None, parameter: ArrayDescription) -> str:
    """Return the dtype of what is kept besides the state, which is never narrower than float32."""
    wanted = state_dtype if state_dtype in ("float32", "float64") else None
    return state_dtype_for(wanted, parameter)


def check_state_dtype(value: Any) -> str | None:
    """Return None or the name of a supported dtype."""
    if value is None:
        return None
    name = value if isinstance(value, str) else str(value).rpartition(".")[2]  # torch's
    if name not in _STATE_DTYPES:
        try:
            name = np.dtype(value).name
        except TypeError:
            name = ""
    if name in _STATE_DTYPES:
        return name
    expected = ", ".join(map(repr, _STATE_DTYPES))
    raise ValueError(f"state_dtype is {value!r}; expected None, {expected}")


def as_state(value: Any, label: str, like: Any) -> Any:
    """Return a copy of a loaded value, where `like` is, that fits into it.

    It is rounded, to nearest, where `like` is of bfloat16; see :func:`conversion`.

    Raises
    ------
    TypeError
        If it is not an array of floats, or copying would round it to another dtype.
    ValueError
        If its shape is not that of `like`.
    """
    try:
        array = np.array(backend_of(value).to_numpy(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{label} is a {type(value).__name__}; expected a float array ({error})"
        ) from None
    if array.dtype.kind not in "fV" or array.dtype == object:
        raise TypeError(f"{label} has dtype {array.dtype}; expected floats")
    if array.shape != tuple(like.shape):
        raise ValueError(f"{label} has shape {array.shape}; expected {tuple(like.shape)}")
    if _name_of(like) == "bfloat16":
        return backend_of(like).from_numpy(array.astype(np.float32), like)
    dtype = np.dtype(_name_of(like))
    if not np.can_cast(array.dtype, dtype, "safe"):
        advice = "; create the optimizer with state_dtype='float64'"
        raise TypeError(
            f"{label} has dtype {array.dtype}, which would be rounded to {dtype}"
            + (advice if array.dtype == np.float64 else "")
        )
    return backend_of(like).from_numpy(array, like)


def conversion_of(value: Any, label: str, like: Any, parameter: ArrayDescription) -> str | None:
    """Say that a loaded value is not in the dtype of `like`; None where it need not be said.

    It need not where it is in the parameter's own, as torch keeps state.
    """
    if _name_of(value) in ("", _name_of(like), parameter.dtype):
        return None
    return conversion(label, _name_of(value), _name_of(like))


def conversion(label: str, old: Any, new: Any) -> str:
    """Say that state which is being loaded was in another dtype."""
    return f"{label} is loaded as {new}; it was saved as {old} (and so may other state)"


def _name_of(array: Any) -> str:
    """Return an array's dtype, of whatever library."""
    return str(getattr(array, "dtype", "")).rpartition(".")[2]
