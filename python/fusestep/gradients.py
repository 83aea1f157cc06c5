"""Gradients that are not one dense array."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _cpu

if TYPE_CHECKING:
    from ._parameters import Array


class Rows:
    """A gradient that is zero but for some rows of its parameter.

    A row is what one index along the first axis picks: the embedding of one user, say. A step costs
    as much as the rows that are listed, however large the table. What becomes of the others is the
    optimizer's choice (see ``rows`` in :class:`fusestep.Optimizer`).

    Parameters
    ----------
    indices
        Which rows: int32 or int64, of shape [N], in any order; N may be 0. An array of NumPy, or of
        another library in the CPU's memory; a list of int. For a parameter on a GPU also an array
        on a GPU, which is fetched and therefore waited for. The gradients of a row that is listed
        several times are added up, in the order of the list.
    values
        Their gradients: a float array of shape [N, *rest], where the parameter's is [rows, *rest],
        on the parameter's device.

    Raises
    ------
    TypeError
        A list of indices holds something that is not an int.

    Notes
    -----
    The arrays are kept, not copied. ``step`` raises ``IndexError`` for an index that is not a row
    (negative ones are not), and has changed nothing then; and ``TypeError`` or ``ValueError`` for
    arrays of the wrong dtype or shape. With ``zero_grad=True`` it sets `values` to zero.

    While a CUDA graph is captured, indices on a GPU raise ``RuntimeError``; those on the CPU become
    part of the graph, and every replay moves these rows.

    Examples
    --------
    >>> import numpy as np, fusestep as fs
    >>> table = np.zeros((1000, 2), np.float32)
    >>> opt = fs.SGD(table, lr=1.0)
    >>> opt.step(fs.Rows([3, 7, 3], np.ones((3, 2), np.float32)))
    >>> table[[3, 7]]
    array([[-2., -2.],
           [-1., -1.]], dtype=float32)
    """

    __slots__ = ("indices", "values")

    def __init__(self, indices: Array, values: Array) -> None:
        self.indices: Any = as_indices(indices)
        self.values: Any = values

    def __repr__(self) -> str:
        count = getattr(self.indices, "shape", "?")
        return f"Rows({count} indices, values of shape {getattr(self.values, 'shape', '?')})"


def as_indices(indices: Any) -> Any:
    """Return an array of row numbers: the one that was given, or one of the ints in a list."""
    if not isinstance(indices, (list, tuple)):
        return indices
    array = np.asarray(indices)
    if array.size and array.dtype.kind != "i":
        raise TypeError(f"indices are {indices!r}; expected a list of int")
    return array.astype(np.int64)


_cpu.set_rows_type(Rows)
