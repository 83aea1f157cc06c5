"""Arrays of more than 2^31 elements."""

from __future__ import annotations

import numpy as np
import pytest

import fusestep as fs

BEYOND = 2**31 + 12_345


def bits(array: np.ndarray) -> np.ndarray:
    """Of float16, which NumPy compares one by one."""
    return array.view(np.uint16)


def memory_available() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
        lines = dict(line.split(":") for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_one_array_beyond_31_bits(threads: int) -> None:
    """float16, SGD without momentum: 8.6 GB. Every element must move, and only once."""
    if memory_available() < 10 * 2**30:
        pytest.skip("needs 10 GB of memory")
    fs.set_num_threads(threads)
    w, g = np.zeros(BEYOND, np.float16), np.ones(BEYOND, np.float16)
    g[[0, 2**31 - 1, 2**31, -1]] = [2, 3, 4, 5]
    fs.SGD([w], lr=1.0, skip_nonfinite=True).step([g])
    np.testing.assert_array_equal(w[[0, 2**31 - 1, 2**31, -1]], [-2, -3, -4, -5])
    w[[0, 2**31 - 1, 2**31, -1]] = -1
    for part in np.array_split(bits(w), 64):
        assert (part == bits(np.float16(-1))).all()


@pytest.mark.slow
def test_a_strided_view_beyond_31_bits() -> None:
    """Two columns of a wide array: offsets beyond 31 bits on the strided path."""
    if memory_available() < 10 * 2**30:
        pytest.skip("needs 10 GB of memory")
    rows = 2**21 + 17
    wide = np.zeros((rows, 2048), np.float16)
    w = wide[:, ::1024]
    g = (np.arange(rows * 2) % 1000).reshape(2, rows).T.astype(np.float16)
    fs.SGD([w], lr=1.0).step([g])
    np.testing.assert_array_equal(w, 0 - g)
    assert np.count_nonzero(bits(wide)) == np.count_nonzero(g)
