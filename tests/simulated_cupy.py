"""CuPy as far as fusestep uses it, in the host's memory: for tests without a GPU.

With the extension built by ``cmake -DFUSESTEP_CUDA=SIMULATED``, whose kernels are loops over the
grid. What CuPy does is modelled on its documentation; the same tests run with the real one where
there is a GPU.
"""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager
from typing import Any

import numpy as np

__name__ = "cupy"  # by which fusestep knows its arrays


class ndarray:  # noqa: N801
    """An array on a device."""

    __array_priority__ = 100

    def __init__(self, values: np.ndarray, index: int) -> None:
        self._values = values
        self.device = Device(index)

    shape = property(lambda self: self._values.shape)
    dtype = property(lambda self: self._values.dtype)
    strides = property(lambda self: self._values.strides)
    size = property(lambda self: self._values.size)
    ndim = property(lambda self: self._values.ndim)
    T = property(lambda self: ndarray(self._values.T, self.device.id))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        stream = cuda.get_current_stream().ptr
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "data": (self._values.ctypes.data if self.size else 0, False),
            "strides": None if self._values.flags.c_contiguous else self.strides,
            "version": 3,
            "stream": stream if stream else 1,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device.id

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __getitem__(self, key: Any) -> ndarray:
        return ndarray(np.asarray(self._values[key]), self.device.id)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(value, np.ndarray):
            raise TypeError("a NumPy array cannot be assigned")
        self._values[key] = value._values if isinstance(value, ndarray) else value

    def get(self) -> np.ndarray:
        return self._values.copy()

    def copy(self, order: str = "C") -> ndarray:
        return ndarray(self._values.copy(order=order), self.device.id)

    def astype(self, dtype: Any) -> ndarray:
        return ndarray(self._values.astype(dtype), self.device.id)

    def reshape(self, *shape: Any) -> ndarray:
        return ndarray(self._values.reshape(*shape), self.device.id)

    def transpose(self, *axes: Any) -> ndarray:
        return ndarray(self._values.transpose(*axes), self.device.id)

    def fill(self, value: Any) -> None:
        self._values.fill(value)

    def __reduce__(self) -> Any:
        return asarray, (self._values,)

    def __deepcopy__(self, memo: Any) -> ndarray:
        return self.copy("K")


ndarray.__module__ = "cupy"


class Device:
    """A device, and the context in which it is the current one."""

    _current = 0

    def __init__(self, index: int) -> None:
        self.id = index

    def __enter__(self) -> Device:
        self._before, Device._current = Device._current, self.id
        return self

    def __exit__(self, *error: Any) -> None:
        Device._current = self._before

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return self.id

    def synchronize(self) -> None: ...


class Stream:
    """A stream, of which nothing is simulated but its number."""

    _current: Stream

    def __init__(self, ptr: int = 0) -> None:
        self.ptr = ptr

    def __enter__(self) -> Stream:
        self._before, Stream._current = Stream._current, self
        return self

    def __exit__(self, *error: Any) -> None:
        Stream._current = self._before


Stream._current = Stream()
cuda = types.SimpleNamespace(
    Device=Device, Stream=Stream, get_current_stream=lambda: Stream._current
)


def asarray(values: Any, dtype: Any = None) -> ndarray:
    """Return a copy on the current device."""
    values = values._values if isinstance(values, ndarray) else values
    return ndarray(np.array(values, dtype, order="K"), Device._current)


def asnumpy(array: ndarray) -> np.ndarray:
    return array.get()


def full(shape: Any, fill: Any, dtype: Any = float) -> ndarray:
    return ndarray(np.full(shape, fill, dtype), Device._current)


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    return full(shape, 0, dtype)


@contextmanager
def installed() -> Any:
    """Have ``import cupy`` find this."""
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = sys.modules[installed.__globals__["_own_name"]]
    try:
        yield sys.modules["cupy"]
    finally:
        if before is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = before


_own_name = "simulated_cupy"
