"""State arrays: allocated like the parameter, checked when they come from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_CACHE_LINE = 64  # bytes


class ArrayDescription(NamedTuple):
    """Where an array lies and how; what ``_cpu.describe_array`` returns."""

    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes


def state_dtype_for(state_dtype: Any, parameter: ArrayDescription) -> np.dtype[Any]:
    """Return the dtype of a parameter's state: float64 for float64, float32 for all others."""
    default = "float64" if parameter.dtype == "float64" else "float32"
    dtype: np.dtype[Any] = np.dtype(default if state_dtype is None else state_dtype)
    return dtype


def check_state_dtype(value: Any) -> str | None:
    """Return None or the name of a supported dtype."""
    if value is None:
        return None
    try:
        dtype: np.dtype[Any] = np.dtype(value)
    except TypeError:
        dtype = np.dtype(object)
    for name in ("float32", "float64"):
        if dtype == name:
            return name
    raise ValueError(f"state_dtype is {value!r}; expected None, 'float32' or 'float64'")


def allocate(parameter: ArrayDescription, dtype: np.dtype[Any], fill: float) -> npt.NDArray[Any]:
    """Return an array of the parameter's shape that a kernel can walk in step with it.

    It has the parameter's order of axes in memory (a transposed parameter gets transposed state),
    so that both are one dense run, and starts at the same place in a cache line, so that vectors
    which are aligned in the one are aligned in the other.
    """
    axes = sorted(range(len(parameter.shape)), key=lambda axis: -abs(parameter.strides[axis]))
    shape_in_memory = [parameter.shape[axis] for axis in axes]
    nbytes = int(np.prod(shape_in_memory, dtype=np.int64)) * dtype.itemsize

    memory = np.empty(nbytes + _CACHE_LINE, np.uint8)
    start = (parameter.address - memory.ctypes.data) % _CACHE_LINE
    if (memory.ctypes.data + start) % dtype.itemsize:
        start = -memory.ctypes.data % _CACHE_LINE  # a parameter off its own alignment
    array: npt.NDArray[Any] = memory[start : start + nbytes].view(dtype)
    array.fill(fill)
    return array.reshape(shape_in_memory).transpose(np.argsort(axes))


def as_state(value: Any, label: str, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a copy of a loaded value that fits into `like` without loss.

    Raises
    ------
    TypeError
        If it is not an array of floats, or copying would round it.
    ValueError
        If its shape is not that of `like`.
    """
    if str(getattr(value, "dtype", None)) == "torch.bfloat16":
        value = value.float()  # NumPy cannot read it
    try:
        array = np.asarray(value).copy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{label} is a {type(value).__name__}; expected a float array ({error})"
        ) from None
    if array.dtype.kind not in "fV" or array.dtype == object:
        raise TypeError(f"{label} has dtype {array.dtype}; expected floats")
    if array.shape != like.shape:
        raise ValueError(f"{label} has shape {array.shape}; expected {like.shape}")
    if not np.can_cast(array.dtype, like.dtype, "safe"):
        advice = "; create the optimizer with state_dtype='float64'"
        raise TypeError(
            f"{label} has dtype {array.dtype}, which would be rounded to {like.dtype}"
            + (advice if array.dtype == np.float64 else "")
        )
    return array
