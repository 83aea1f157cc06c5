"""The limit: a native read-modify-write loop over the bytes of a step, compiled when needed."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import threads
from memory import copies, flat_copy, zeros

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memory import FloatArray

_SOURCE = Path(__file__).with_name("limit.cpp")
_FACTOR = 1e-6  # so small that the arrays keep ordinary values however often the loop runs

STATES = {"adam": 2, "nag": 1, "adagrad": 1}
"""State arrays of each rule."""

# The function of a loop, and the types of what it has beside parameter and gradient.
_LOOPS: dict[str, tuple[str, list[Any]]] = {
    "adam": ("limit_adam", [np.float32] * 2),
    "adam, bfloat16": ("limit_adam_16", [np.uint16] * 2),
    "adam, int8": ("limit_adam_8", [np.uint8] * 2),
    "whole step": ("limit_whole_step", [np.float32] * 3),
    "nag": ("limit_one_state", [np.float32]),
    "adagrad": ("limit_one_state", [np.float32]),
}


def compiler() -> list[str]:
    """Return the C++ compiler as a command: what CXX says, or c++."""
    return shlex.split(os.environ.get("CXX", "c++"))


def flags() -> list[str]:
    """Return the flags the loop is compiled with: the machine's widest vectors."""
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    return ["-std=c++20", "-O3", "-march=native", *wide]


@cache
def _library() -> ctypes.CDLL:
    # Compiled anew in every process: it takes a second, and a cached file might be another
    # machine's. A loaded library needs its file no more.
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "limit.so")
        command = [*compiler(), *flags(), "-shared", "-fPIC", "-pthread", str(_SOURCE)]
        subprocess.run([*command, "-o", target], check=True, capture_output=True, text=True)
        return ctypes.CDLL(target)


@cache
def why_not() -> str | None:
    """Return None where the loop can be compiled, else the reason."""
    try:
        _library()
    except FileNotFoundError as error:
        return f"no C++ compiler: {error}"
    except subprocess.CalledProcessError as error:
        return f"the C++ compiler failed: {error.stderr.strip()}"
    return None


class Reading:
    """Reads, when called, all of an array of float32."""

    def __init__(self, array: FloatArray) -> None:
        self._array, self._sums = array, zeros([array.reshape(-1)[:1024]])[0]
        self._function = _library().limit_read
        self._function.restype = None
        self._function.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]

    def __call__(self) -> None:
        """Read it with as many threads as everybody has at present."""
        addresses = self._array.ctypes.data, self._sums.ctypes.data
        self._function(self._array.size, threads.current(), *addresses)


class Loop:
    """Reads and writes, when called, what one step of a rule reads and writes.

    A list of tensors is one long array here: the limit has nothing to do between tensors.

    Parameters
    ----------
    rule
        Its name; "adam, bfloat16" and "adam, int8" for state of that type, and "whole step" for
        Adam with an average of the parameter, which clears the gradient.
    gradients
        One a parameter.
    """

    def __init__(self, rule: str, gradients: Sequence[FloatArray]) -> None:
        one = len(gradients) == 1
        gradient = gradients[0].reshape(-1) if one else flat_copy(gradients)
        name, dtypes = _LOOPS[rule]
        new = zeros([gradient] * len(dtypes))
        others = [array.view(t) for array, t in zip(new, dtypes, strict=True)]
        self._arrays = [*copies([gradient]), gradient, *others]  # keeps them alive
        self._addresses = [array.ctypes.data for array in self._arrays]
        self._size = gradient.size
        self.gradient: FloatArray = gradient

        self._function = getattr(_library(), name)
        self._function.restype = None
        self._function.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_float]
        self._function.argtypes += [ctypes.c_void_p] * len(self._addresses)

    def __call__(self) -> None:
        """Run the loop with as many threads as everybody has at present."""
        self._function(self._size, threads.current(), _FACTOR, *self._addresses)
