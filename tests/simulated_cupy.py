"""CuPy as far as fusestep and its tests use it, in the host's memory: for tests without a GPU.

With the extension built by ``cmake -DFUSESTEP_CUDA=SIMULATED``, whose kernels are loops over the
grid. What CuPy does is taken from its sources (version 14); the same tests run with the real one
where there is a GPU. There are two devices.

What costs users of the real one most is refused here: NumPy never reads an array unasked, and
kernels of CuPy's own run on the current device, whatever device an array is on.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import sys
import threading
import types
from contextlib import contextmanager
from typing import Any

import numpy as np

__name__ = "cupy"  # by which fusestep knows its arrays

DEVICES = 2


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
    nbytes = property(lambda self: self._values.nbytes)
    ndim = property(lambda self: self._values.ndim)
    T = property(lambda self: self.transpose())

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # The current stream of the current device, whatever device the array is on.
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
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to "
            "construct a NumPy array explicitly."
        )

    def _for_kernels(self) -> np.ndarray:
        """The values, as a kernel of CuPy's own meets them."""
        if self.device.id != _here.device:
            raise ValueError(
                f"The device where the array resides ({self.device.id}) is different from the "
                f"current device ({_here.device}). "
                "Peer access is unavailable between these devices."
            )
        return self._values

    def __getitem__(self, key: Any) -> ndarray:
        view = self._values[key]
        if not isinstance(view, np.ndarray):  # CuPy has no scalars
            view = self._values[(*(key if isinstance(key, tuple) else (key,)), ...)]
        return ndarray(view, self.device.id)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError(f"Unsupported type {type(value)}")
        if isinstance(value, ndarray):
            value = value._for_kernels()
        self._for_kernels()[key] = value

    def get(self, stream: Any = None, order: str = "C") -> np.ndarray:
        # Of what is not contiguous, CuPy makes a copy first: on the array's device.
        return self._values.copy(order)

    def set(self, values: np.ndarray) -> None:
        if values.dtype != self.dtype:
            raise TypeError(f"{values.dtype} array cannot be set to {self.dtype} array")
        if values.shape != self.shape:
            raise ValueError("Shape mismatch")
        if not (self._values.flags.c_contiguous or self._values.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        self._values[...] = values

    def copy(self, order: str = "C") -> ndarray:
        flags = self._values.flags
        if self.device.id != _here.device and not (flags.c_contiguous or flags.f_contiguous):
            raise NotImplementedError("CuPy cannot copy non-contiguous array between devices.")
        return ndarray(self._values.copy(order), _here.device)

    def astype(self, dtype: Any) -> ndarray:
        return ndarray(self._for_kernels().astype(dtype), self.device.id)

    def reshape(self, *shape: Any) -> ndarray:
        return ndarray(self._values.reshape(*shape), self.device.id)

    def transpose(self, *axes: Any) -> ndarray:
        return ndarray(self._values.transpose(*axes), self.device.id)

    def fill(self, value: Any) -> None:
        self._for_kernels().fill(value)

    def item(self) -> Any:
        return self._values.item()

    def __reduce__(self) -> Any:  # which forgets the device, and strides but for Fortran's order
        return array, (self.get(order="A"),)

    def __deepcopy__(self, memo: Any) -> ndarray:
        with self.device:
            return self.copy()


ndarray.__module__ = "cupy"


class Device:
    """A device, and the context in which it is the current one of this thread."""

    def __init__(self, index: int | None = None) -> None:
        self.id = _here.device if index is None else int(index)
        if not 0 <= self.id < DEVICES:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def __enter__(self) -> Device:
        _here.devices_before.append(_here.device)
        _here.device = self.id
        return self

    def __exit__(self, *error: Any) -> None:
        _here.device = _here.devices_before.pop()

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return self.id

    def synchronize(self) -> None: ...


class Stream:
    """A stream, of which nothing is simulated but its number, and which is current where."""

    null: Stream
    _numbers = itertools.count(0x5000, 8)

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.ptr = 0 if null else next(self._numbers)
        self.device_id = -1 if null else _here.device

    def __enter__(self) -> Stream:
        device = _here.device
        if self.device_id not in (-1, device):
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id}) does not match with "
                f"the current device ({device})"
            )
        _here.streams_before.append((device, _here.streams[device]))
        _here.streams[device] = self
        return self

    def __exit__(self, *error: Any) -> None:
        device, stream = _here.streams_before.pop()
        _here.streams[device] = stream

    def synchronize(self) -> None: ...


class _Thread(threading.local):
    """What is current in a thread."""

    def __init__(self) -> None:
        self.device = 0
        self.devices_before: list[int] = []
        self.streams = [Stream.null] * DEVICES
        self.streams_before: list[tuple[int, Stream]] = []


Stream.null = Stream.__new__(Stream)
Stream.null.ptr, Stream.null.device_id = 0, -1
_here = _Thread()


def get_current_stream(device_id: int = -1) -> Stream:
    return _here.streams[_here.device if device_id == -1 else device_id]


def _as_strided(x: ndarray, shape: Any = None, strides: Any = None) -> ndarray:
    return ndarray(np.lib.stride_tricks.as_strided(x._values, shape, strides), x.device.id)


cuda = types.SimpleNamespace(
    Device=Device,
    Stream=Stream,
    get_current_stream=get_current_stream,
    runtime=types.SimpleNamespace(getDeviceCount=lambda: DEVICES, deviceSynchronize=lambda: None),
)
lib = types.SimpleNamespace(stride_tricks=types.SimpleNamespace(as_strided=_as_strided))


def array(values: Any, dtype: Any = None) -> ndarray:
    """Return a copy on the current device, in C's or Fortran's order."""
    if isinstance(values, ndarray):
        values = values.copy("K")._values
    values = np.asarray(values, dtype)
    return ndarray(values.copy("F" if values.flags.fnc else "C"), _here.device)


def asarray(values: Any, dtype: Any = None) -> ndarray:
    if hasattr(values, "__cuda_array_interface__") and not isinstance(values, ndarray):
        values = _view(values.__cuda_array_interface__)
    if isinstance(values, ndarray) and dtype in (None, values.dtype):
        return values
    return array(values, dtype)


def from_dlpack(values: Any) -> ndarray:
    """Return a view of an array of the tests that only speaks DLPack."""
    return values.array


def _view(interface: dict[str, Any]) -> ndarray:
    """Return a view of memory that is described by an interface."""
    shape, strides = interface["shape"], interface.get("strides")
    dtype = np.dtype(interface["typestr"])
    steps = strides or np.empty(shape, dtype).strides
    reach = [step * (extent - 1) for step, extent in zip(steps, shape, strict=True) if extent]
    before = -sum(min(0, step) for step in reach)
    nbytes = before + sum(max(0, step) for step in reach) + dtype.itemsize
    start = interface["data"][0] - before
    memory = (ctypes.c_byte * nbytes).from_address(start) if math.prod(shape) else b""
    return ndarray(np.ndarray(shape, dtype, memory, before if memory else 0, strides), 0)


def asnumpy(array: ndarray) -> np.ndarray:
    return array.get()


def full(shape: Any, fill: Any, dtype: Any = float) -> ndarray:
    return ndarray(np.full(shape, fill, dtype), _here.device)


def empty(shape: Any, dtype: Any = float) -> ndarray:
    return full(shape, 99, dtype)  # whatever was there before


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    return full(shape, 0, dtype)


@contextmanager
def installed() -> Any:
    """Have ``import cupy`` find this."""
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = sys.modules["simulated_cupy"]
    try:
        yield sys.modules["cupy"]
    finally:
        if before is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = before
