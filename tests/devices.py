"""Arrays on a GPU for tests: CuPy's, torch's, and CuPy's double in the host's memory.

Each library is a class with the same few methods. None is imported, and no GPU is looked for,
before a test asks for it.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import importlib.util
import os
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

bfloat16 = np.dtype(ml_dtypes.bfloat16)

_CYCLES = 200_000_000
_SPIN = """
extern "C" __global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {}
}
"""


class Library:
    """What is asked of a library of arrays. Devices are counted from 0."""

    name: str
    has_negative_strides = True
    dtypes = (np.dtype("f8"), np.dtype("f4"), np.dtype("f2"), bfloat16)

    def devices(self) -> int:
        """How many GPUs there are."""
        raise NotImplementedError

    def put(self, array: np.ndarray, device: int = 0) -> Any:
        """A copy on a device, in C's order."""
        raise NotImplementedError

    def get(self, array: Any) -> np.ndarray:
        """A copy on the host, once the current stream has got there."""
        raise NotImplementedError

    def set(self, array: Any, values: np.ndarray) -> None:
        """Overwrite a contiguous array, now."""
        raise NotImplementedError

    def full(self, shape: Any, value: float, dtype: str) -> Any:
        return self.put(np.full(shape, value, dtype))

    def huge(self, shape: Any, value: float, dtype: str) -> Any:
        """The same, without a copy on the host."""
        raise NotImplementedError

    def fill(self, array: Any, value: float) -> None:
        """Overwrite an array, in the current stream."""
        raise NotImplementedError

    def spin(self) -> None:
        """Keep the current stream busy for a tenth of a second or so."""
        raise NotImplementedError

    def view(self, memory: Any, shape: Any, strides: Any, offset: int) -> Any:
        """A view of one-dimensional memory; strides and offset in bytes."""
        raise NotImplementedError

    def on(self, device: int) -> Any:
        """A context in which a device is the current one."""
        raise NotImplementedError

    def new_stream(self) -> tuple[Any, int]:
        """A context in which a new stream is current, and the stream's number."""
        raise NotImplementedError

    @contextmanager
    def stream(self) -> Iterator[int]:
        """A new stream is current, which does not overlap with what is before and after."""
        context, number = self.new_stream()
        self.synchronize()
        with context:
            yield number
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for all devices."""
        raise NotImplementedError

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture what `work` puts into the current stream in a CUDA graph.

        Returns what replays it. Nothing has been done before the first replay; the simulation,
        which has no graphs, does it already when it is captured, and again with every further
        replay.
        """
        raise NotImplementedError

    def is_own(self, array: Any) -> bool:
        """Whether it is an array of this library."""
        raise NotImplementedError

    def device_of(self, array: Any) -> int:
        raise NotImplementedError

    def dlpack(self, array: Any, **arguments: Any) -> Any:
        """Call the array's ``__dlpack__``."""
        return array.__dlpack__(**arguments)


class CuPy(Library):
    name = "cupy"

    def __init__(self, module: Any) -> None:
        self.module = module
        self._streams: list[Any] = []  # fusestep may ask one for its progress long after
        try:
            module.asarray(np.zeros(1, bfloat16)).get()
        except (TypeError, ValueError):  # before CuPy 14
            self.dtypes = self.dtypes[:-1]

    def devices(self) -> int:
        return self.module.cuda.runtime.getDeviceCount()

    def put(self, array: np.ndarray, device: int = 0) -> Any:
        with self.module.cuda.Device(device):
            return self.module.array(np.ascontiguousarray(array).reshape(array.shape))

    def get(self, array: Any) -> np.ndarray:
        return array.get()

    def set(self, array: Any, values: np.ndarray) -> None:
        array.set(values)
        self.synchronize()

    def huge(self, shape: Any, value: float, dtype: str) -> Any:
        return self.module.full(shape, value, dtype)

    def fill(self, array: Any, value: float) -> None:
        array.fill(value)

    def spin(self) -> None:
        kernel = self.module.RawKernel(_SPIN, "spin")
        kernel((1,), (1,), (np.int64(_CYCLES),))

    def view(self, memory: Any, shape: Any, strides: Any, offset: int) -> Any:
        start = memory[offset // memory.dtype.itemsize :]
        return self.module.lib.stride_tricks.as_strided(start, shape, strides)

    def on(self, device: int) -> Any:
        return self.module.cuda.Device(device)

    def new_stream(self) -> tuple[Any, int]:
        stream = self.module.cuda.Stream(non_blocking=True)
        self._streams.append(stream)
        return stream, stream.ptr

    def synchronize(self) -> None:
        for device in range(self.devices()):
            with self.on(device):
                self.module.cuda.runtime.deviceSynchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        with self.stream():
            stream = self._streams[-1]
            stream.begin_capture()
            try:
                work()
            finally:
                graph = stream.end_capture()

        def replay() -> None:
            self.synchronize()
            graph.launch(stream)
            self.synchronize()

        return replay

    def is_own(self, array: Any) -> bool:
        return isinstance(array, self.module.ndarray)

    def device_of(self, array: Any) -> int:
        return array.device.id


class SimulatedCuPy(CuPy):
    name = "simulated"

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with self.stream(), simulate("capture"):
                work()

        run()
        done = True

        def replay() -> None:
            nonlocal done
            if not done:
                run()
            done = False

        return replay

    def dlpack(self, array: Any, **arguments: Any) -> Any:
        try:
            capsule = array._values.__dlpack__(max_version=(1, 0))
        except TypeError:
            pytest.skip("needs NumPy 2.1, whose capsules can say that memory is writable")
        return on_gpu(capsule, array.device.id)


class Torch(Library):
    name = "torch"
    has_negative_strides = False
    device = "cuda"

    def __init__(self, module: Any) -> None:
        self.module = module

    def devices(self) -> int:
        return self.module.cuda.device_count()

    def put(self, array: np.ndarray, device: int = 0) -> Any:
        # A copy in memory of torch's own, which does not change while it is under way.
        own = np.array(array, order="C")
        if own.dtype == bfloat16:
            tensor = self.module.from_numpy(own.view(np.int16)).view(self.module.bfloat16)
        else:
            tensor = self.module.from_numpy(own)
        return tensor.to(self.module.device(self.device, device))

    def get(self, array: Any) -> np.ndarray:
        tensor = array.detach().cpu()
        if tensor.dtype == self.module.bfloat16:
            return tensor.view(self.module.int16).numpy().view(bfloat16).copy()
        return tensor.numpy().copy()

    def set(self, array: Any, values: np.ndarray) -> None:
        array.copy_(self.put(values))
        self.synchronize()

    def huge(self, shape: Any, value: float, dtype: str) -> Any:
        dtype = getattr(self.module, dtype)
        return self.module.full(shape, value, dtype=dtype, device=self.device)

    def fill(self, array: Any, value: float) -> None:
        array.fill_(value)

    def spin(self) -> None:
        self.module.cuda._sleep(_CYCLES)

    def view(self, memory: Any, shape: Any, strides: Any, offset: int) -> Any:
        item = memory.element_size()
        return memory.as_strided(shape, [stride // item for stride in strides], offset // item)

    def on(self, device: int) -> Any:
        return self.module.cuda.device(device)

    def new_stream(self) -> tuple[Any, int]:
        stream = self.module.cuda.Stream()
        return self.module.cuda.stream(stream), stream.cuda_stream

    def synchronize(self) -> None:
        for device in range(self.devices()):
            self.module.cuda.synchronize(device)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = self.module.cuda.CUDAGraph()
        mark = self.module.zeros(1, device=self.device)
        self.synchronize()
        gc.collect()  # what is freed while a graph is captured would spoil it
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            with self.module.cuda.graph(graph):
                mark.add_(1)
                work()

        def replay() -> None:
            self.synchronize()
            graph.replay()
            self.synchronize()

        return replay

    def is_own(self, array: Any) -> bool:
        return isinstance(array, self.module.Tensor)

    def device_of(self, array: Any) -> int:
        return array.device.index


@contextmanager
def simulate(what: str) -> Iterator[None]:
    """Have the simulated CUDA runtime do something; see csrc/cuda/simulation/runtime.cpp."""
    os.environ["FUSESTEP_SIMULATE"] = what
    try:
        yield
    finally:
        del os.environ["FUSESTEP_SIMULATE"]


# ---- which there are ----------------------------------------------------------------------------


@functools.cache
def missing(name: str) -> str:
    """Why a library cannot be used here; empty if it can."""
    if importlib.util.find_spec("fusestep._cuda") is None:
        return "this build of fusestep has no CUDA kernels; build with cmake -DFUSESTEP_CUDA=" + (
            "SIMULATED" if name == "simulated" else "ON"
        )
    kernels = importlib.import_module("fusestep._cuda")
    if name == "simulated":
        return "" if kernels.is_simulated else "needs a build with cmake -DFUSESTEP_CUDA=SIMULATED"
    if kernels.is_simulated:
        return "needs a GPU; the kernels of this build are simulated"
    try:
        kernels.check_available()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
            if not module.cuda.is_available():
                return f"{name} cannot use a GPU"
    except Exception as error:  # a library may fail in any way where its driver is missing
        return f"{type(error).__name__}: {error}"
    return ""


def library(name: str) -> Library:
    """One of them; skips the test where it is not here."""
    if reason := missing(name):
        pytest.skip(f"{name}: {reason}")
    if name == "simulated":
        return SimulatedCuPy(importlib.import_module("simulated_cupy"))
    return {"cupy": CuPy, "torch": Torch}[name](importlib.import_module(name))


def in_use(name: str) -> Iterator[Library]:
    """The same, for as long as a fixture lasts, and what is left over is cleared away."""
    result = library(name)
    if name == "simulated":
        with importlib.import_module("simulated_cupy").installed():
            yield result
    else:
        yield result
        gc.collect()


# ---- equal memory on host and device ------------------------------------------------------------


class Mirror:
    """Copies NumPy arrays to a device as they lie in memory: views of one array stay so.

    With ``device=None`` the copies are NumPy arrays.
    """

    def __init__(self, lib: Library, device: int | None = 0) -> None:
        self.lib = lib
        self.device = device
        self._memory: dict[int, tuple[np.ndarray, Any]] = {}  # by the owner's identity

    def like(self, host: np.ndarray) -> Any:
        """A copy of an array, with its strides, in a copy of the memory that it is a view of."""
        owner = _owner(host)
        if id(owner) not in self._memory:
            flat = owner.reshape(-1, order="A").view(host.dtype)
            self._memory[id(owner)] = flat, self._copy(flat)
        _, memory = self._memory[id(owner)]
        offset = host.ctypes.data - owner.ctypes.data if host.size else 0
        if self.device is None:
            return np.ndarray(host.shape, host.dtype, memory, offset, host.strides)
        return self.lib.view(memory, host.shape, host.strides, offset)

    def _copy(self, flat: np.ndarray) -> Any:
        return flat.copy() if self.device is None else self.lib.put(flat, self.device)

    def check(self) -> None:
        """All memory, between and beside the arrays, too, is the same."""
        for flat, memory in self._memory.values():
            assert_same(on_host(memory), flat)


def _owner(array: np.ndarray) -> np.ndarray:
    while (base := getattr(array, "base", None)) is not None:
        array = base
    return array


def on_host(array: Any) -> np.ndarray:
    """A NumPy array of any library's array."""
    if isinstance(array, np.ndarray):
        return array
    if isinstance(array, (Interface, Capsule)):
        return on_host(array.array)
    return Torch(importlib.import_module("torch")).get(array) if is_torch(array) else array.get()


def is_torch(array: Any) -> bool:
    return type(array).__module__.startswith("torch")


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal bits. A NaN is a NaN on every device, but its payload and sign may differ."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    bits = [np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}") for x in (ours, theirs)]
    differ = bits[0] != bits[1]
    if differ.any():
        with np.errstate(invalid="ignore"):  # signalling NaNs
            differ &= ~(np.isnan(ours) & np.isnan(theirs)).reshape(differ.shape)
    assert not differ.any(), (
        f"{np.count_nonzero(differ)} of {differ.size} elements differ, the first at "
        f"{np.argwhere(differ)[0]}: {ours[differ.reshape(ours.shape)][0]} instead of "
        f"{theirs[differ.reshape(ours.shape)][0]}"
    )


def state_on_host(optimizer: Any) -> dict[str, Any]:
    """A state dict with NumPy arrays."""
    saved = copy.copy(optimizer.state_dict())
    saved["state"] = {
        key: {name: on_host(x) if hasattr(x, "shape") else x for name, x in entry.items()}
        for key, entry in saved["state"].items()
    }
    return saved


# ---- arrays of nobody's library -----------------------------------------------------------------


class Interface:
    """An array that only has ``__cuda_array_interface__``, of which entries may be changed.

    ``...`` removes an entry.
    """

    def __init__(self, array: Any, **changes: Any) -> None:
        self.array, self.changes = array, changes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        entries = {**self.array.__cuda_array_interface__, **self.changes}
        return {key: value for key, value in entries.items() if value is not ...}


class Capsule:
    """An array that only speaks DLPack."""

    def __init__(self, lib: Library, array: Any) -> None:
        self.lib, self.array = lib, array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.lib.dlpack(self.array, **arguments)


def on_gpu(capsule: Any, index: int) -> Any:
    """A versioned DLPack capsule of the host's memory that says it is a GPU's."""
    import ctypes

    class Managed(ctypes.Structure):
        _fields_ = (
            ("version", ctypes.c_uint32 * 2),
            ("context", ctypes.c_void_p),
            ("deleter", ctypes.c_void_p),
            ("flags", ctypes.c_uint64),
            ("data", ctypes.c_void_p),
            ("device", ctypes.c_int32 * 2),
        )

    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    address = get_pointer(capsule, b"dltensor_versioned")
    Managed.from_address(address).device[:] = (2, index)
    return capsule
