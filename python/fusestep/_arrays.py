"""How arrays of each library are made, copied and moved: what state is kept in.

State of a parameter on the CPU is a NumPy array, whatever the parameter is. State of a parameter on
a GPU is of the parameter's own library, CuPy or torch, and on its device.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from . import _cpu

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

_CACHE_LINE = 64  # bytes
_DLPACK_CUDA = (2, 13)  # memory of one GPU, and memory that moves between it and the CPU


class ArrayDescription(NamedTuple):
    """Where an array lies and how; what ``_cpu.describe_array`` returns."""

    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    device: str  # "cpu", "cuda:0", ...

    def rows(self) -> ArrayDescription:
        """Return the description of an array with one element for each row."""
        return self._replace(shape=self.shape[:1], strides=self.strides[:1])

    def of_bytes(self, shape: tuple[int, ...]) -> ArrayDescription:
        """Return the description of an array of bytes in C order."""
        return self._replace(shape=shape, strides=np.empty(shape, np.uint8).strides)


class Backend(Protocol):
    """What is asked of a library of arrays."""

    def new(self, parameter: ArrayDescription, dtype: str, fill: float) -> Any:
        """Return an array of the parameter's shape that a kernel can walk in step with it.

        It has the parameter's order of axes in memory (a transposed parameter gets transposed
        state), so that both are one dense run.
        """

    def empty(self, shape: tuple[int, ...], like: Any) -> Any:
        """Return an array to be filled, in C order, of the dtype and on the device of `like`."""

    def copy(self, array: Any) -> Any:
        """Return a copy with the same order of axes in memory."""

    def assign(self, target: Any, value: Any) -> None:
        """Write a number, or an array of the same dtype and device, to an array."""

    def to_numpy(self, array: Any) -> npt.NDArray[Any]:
        """Return an array on the CPU, which may share memory."""

    def from_numpy(self, array: npt.NDArray[Any], like: Any) -> Any:
        """Return an array of the dtype and on the device of `like`."""

    def adopt(self, array: Any) -> Any:
        """Return the library's view of an array of a library unknown."""


class _NumPy:
    def new(self, parameter: ArrayDescription, dtype: str, fill: float) -> npt.NDArray[Any]:
        # It starts at the same place in a cache line, so that vectors which are aligned in the one
        # are aligned in the other.
        kind = numpy_dtype(dtype)
        item = kind.itemsize
        shape, axes = _memory_order(parameter)
        nbytes = int(np.prod(shape, dtype=np.int64)) * item
        memory = np.empty(nbytes + _CACHE_LINE, np.uint8)
        start = (parameter.address - memory.ctypes.data) % _CACHE_LINE
        if (memory.ctypes.data + start) % item:
            start = -memory.ctypes.data % _CACHE_LINE  # a parameter off its own alignment
        array: npt.NDArray[Any] = memory[start : start + nbytes].view(kind)
        array.fill(fill)
        return array.reshape(shape).transpose(axes)

    def empty(self, shape: tuple[int, ...], like: Any) -> npt.NDArray[Any]:
        return np.empty(shape, like.dtype)

    def copy(self, array: Any) -> npt.NDArray[Any]:
        result: npt.NDArray[Any] = array.copy(order="K")
        return result

    def assign(self, target: Any, value: Any) -> None:
        target[...] = value

    def to_numpy(self, array: Any) -> npt.NDArray[Any]:
        if hasattr(array, "__dlpack__") and not hasattr(array, "__array__"):
            return np.from_dlpack(array)
        return np.asarray(array)

    def from_numpy(self, array: npt.NDArray[Any], like: Any) -> npt.NDArray[Any]:
        return array.astype(like.dtype, copy=False)

    def adopt(self, array: Any) -> Any:
        return array


class _CuPy:
    def new(self, parameter: ArrayDescription, dtype: str, fill: float) -> Any:
        cupy = importlib.import_module("cupy")
        shape, axes = _memory_order(parameter)
        with cupy.cuda.Device(_index(parameter.device)):
            return cupy.full(shape, fill, numpy_dtype(dtype)).transpose(*axes)

    def empty(self, shape: tuple[int, ...], like: Any) -> Any:
        with like.device:
            return importlib.import_module("cupy").empty(shape, like.dtype)

    def copy(self, array: Any) -> Any:
        with array.device:
            return array.copy(order="K")

    def assign(self, target: Any, value: Any) -> None:
        with target.device:
            target[...] = value

    def to_numpy(self, array: Any) -> npt.NDArray[Any]:
        result: npt.NDArray[Any] = array.get()
        return result

    def from_numpy(self, array: npt.NDArray[Any], like: Any) -> Any:
        with like.device:
            return importlib.import_module("cupy").asarray(array, like.dtype)

    def adopt(self, array: Any) -> Any:
        cupy = importlib.import_module("cupy")
        return cupy.asarray(array) if _has_interface(array) else cupy.from_dlpack(array)


class _Torch:
    def new(self, parameter: ArrayDescription, dtype: str, fill: float) -> Any:
        torch = importlib.import_module("torch")
        shape, axes = _memory_order(parameter)
        options = {"dtype": getattr(torch, dtype), "device": parameter.device}
        return torch.full(shape, fill, **options).permute(*axes)

    def empty(self, shape: tuple[int, ...], like: Any) -> Any:
        torch = importlib.import_module("torch")
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def copy(self, array: Any) -> Any:
        return array.detach().clone()

    def assign(self, target: Any, value: Any) -> None:
        with importlib.import_module("torch").no_grad():
            target[...] = value

    def to_numpy(self, array: Any) -> npt.NDArray[Any]:
        torch = importlib.import_module("torch")
        tensor = array.detach().cpu()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()  # NumPy cannot read it
        result: npt.NDArray[Any] = tensor.numpy()
        return result

    def from_numpy(self, array: npt.NDArray[Any], like: Any) -> Any:
        torch = importlib.import_module("torch")
        return torch.from_numpy(np.ascontiguousarray(array)).to(like.device, like.dtype)

    def adopt(self, array: Any) -> Any:
        torch = importlib.import_module("torch")
        if _has_interface(array):
            return torch.as_tensor(array, device="cuda")
        return torch.from_dlpack(array)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype of this name, which knows bfloat16 only through ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise ImportError(
            "bfloat16 in NumPy and CuPy arrays needs ml_dtypes: pip install ml_dtypes"
        ) from error
    dtype: np.dtype[Any] = np.dtype(bfloat16)
    return dtype


_NUMPY = _NumPy()
_OTHERS: dict[str, Backend] = {"cupy": _CuPy(), "torch": _Torch()}


def backend_of(array: Any) -> Backend:
    """Return the library of an array, by the name of its type's module."""
    return _OTHERS.get(type(array).__module__.partition(".")[0], _NUMPY)


def has_backend(array: Any) -> bool:
    """Return whether an array is of a library that is known here: NumPy, CuPy or torch."""
    return isinstance(array, np.ndarray) or backend_of(array) is not _NUMPY


def backend_for_state(parameter: Any, description: ArrayDescription) -> Backend:
    """Return the library whose arrays a parameter's state is kept in."""
    if description.device == "cpu":
        return _NUMPY
    backend = _of_a_gpu(parameter)
    if backend is not None:
        return backend
    raise TypeError(
        f"a {type(parameter).__module__}.{type(parameter).__qualname__} on {description.device} "
        "needs CuPy or PyTorch for the optimizer's state: install one of them"
    )


def write(target: Any, source: Any) -> None:
    """Write the values of an array to another of the same shape, whatever dtypes they have.

    The other one is on the same device, or `source` is on the CPU.
    """
    backend, other = backend_of(target), backend_of(source)
    if "bfloat16" in str(target.dtype) and "float64" in str(source.dtype):
        # Libraries round to float32 first, and then once more.
        source, other = _cpu.round_to_odd(np.asarray(other.to_numpy(source))), _NUMPY
    if backend is not other:
        source = backend.from_numpy(np.asarray(other.to_numpy(source)), target)
    backend.assign(target, source)


def on_host(array: Any) -> npt.NDArray[Any]:
    """Return an array of any library, wherever it is, on the CPU; it may share memory."""
    backend = _of_a_gpu(array) if is_on_gpu(array) else None
    if backend is None:
        return backend_of(array).to_numpy(array)
    return backend.to_numpy(array if backend is backend_of(array) else backend.adopt(array))


def is_on_gpu(array: Any) -> bool:
    """Return whether an array says of itself that it is in the memory of a GPU."""
    if isinstance(array, np.ndarray):
        return False
    if hasattr(array, "__dlpack_device__"):
        return int(array.__dlpack_device__()[0]) in _DLPACK_CUDA
    return _has_interface(array)


def _has_interface(array: Any) -> bool:
    return hasattr(array, "__cuda_array_interface__")


def _of_a_gpu(array: Any) -> Backend | None:
    """Return the library of an array on a GPU, or one that can take part in its memory."""
    backend = backend_of(array)
    if backend is not _NUMPY:
        return backend
    installed = (x for name, x in _OTHERS.items() if importlib.util.find_spec(name) is not None)
    return next(installed, None)


def _memory_order(parameter: ArrayDescription) -> tuple[list[int], Sequence[int]]:
    """Return the extents in the order of memory, and the axes that undo that order."""
    axes = sorted(range(len(parameter.shape)), key=lambda axis: -abs(parameter.strides[axis]))
    inverse: list[int] = np.argsort(axes).tolist()
    return [parameter.shape[axis] for axis in axes], inverse


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)
