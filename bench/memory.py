"""Arrays for the benchmarks: the same alignment for every peer, the same gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shapes import Shape, Workload

FloatArray: TypeAlias = npt.NDArray[np.float32]

_CACHE_LINE = 64  # bytes


def aligned(shape: Shape) -> FloatArray:
    """Return an uninitialised array that starts at a cache line.

    PyTorch's and XLA's allocators align so, NumPy's does not; with this no peer gains or loses by
    where its arrays happen to lie.
    """
    size = math.prod(shape) * np.dtype(np.float32).itemsize
    memory = np.empty(size + _CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    return memory[start : start + size].view(np.float32).reshape(shape)


def aligned_like(array: FloatArray) -> FloatArray:
    """Return an uninitialised array of the shape of `array`."""
    return aligned(array.shape)


def copies(arrays: Sequence[FloatArray]) -> list[FloatArray]:
    """Return a copy of each array."""
    results = [aligned_like(array) for array in arrays]
    for result, array in zip(results, arrays, strict=True):
        np.copyto(result, array)
    return results


def zeros(arrays: Sequence[FloatArray]) -> list[FloatArray]:
    """Return an array of zeros for each array, written rather than left to the kernel."""
    results = [aligned_like(array) for array in arrays]
    for result in results:
        result.fill(0)
    return results


def flat_copy(arrays: Sequence[FloatArray]) -> FloatArray:
    """Return all arrays, one after the other, as one."""
    result = aligned((sum(array.size for array in arrays),))
    np.concatenate([array.reshape(-1) for array in arrays], out=result)
    return result


def gradients(workload: Workload) -> list[FloatArray]:
    """Return the gradients every peer gets: standard normal, times 0.01, always the same."""
    random = np.random.default_rng(0)
    results = [aligned(shape) for shape in workload.shapes]
    for result in results:
        random.standard_normal(out=result, dtype=np.float32)
        result *= np.float32(1e-2)
    return results
