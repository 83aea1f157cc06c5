"""What hypothesis draws steps with clipping from, on the CPU and on GPUs.

By itself, because tests that do without hypothesis also run where it is not installed.
"""

from __future__ import annotations

import math

from hypothesis import strategies as st

SHAPE_LISTS = st.lists(
    st.sampled_from([(), (3,), (40, 50), (0,), (1024,), (1025,), (70_001,)]),
    min_size=1,
    max_size=4,
)
MAX_NORMS = [1e-3, 1.0, 30.0, 1e9, math.inf]
GRAD_SCALES = [1.0, -1.0, 1 / 128, 3.0]
ORDERS = st.sampled_from("CF")


def dtype_lists(count: int) -> st.SearchStrategy[list[str]]:
    """So many dtypes of NumPy's own."""
    return st.lists(st.sampled_from(["f4", "f8", "f2"]), min_size=count, max_size=count)
