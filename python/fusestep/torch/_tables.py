"""Tables that get more rows, in the same ``nn.Parameter``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import _penalties
from .._averages import ENTRY as AVERAGE
from .._narrow import Blocks
from .._state import entries, taken
from .._tables import check_count, check_init
from . import _anchors, _averages, _masters, _pieces, _state, _tensors

if TYPE_CHECKING:
    from torch import Tensor

    from ._pieces import Piece
    from .optimizer import Optimizer


def resize(optimizer: Optimizer, parameter: Tensor, n_rows: int, init: Any) -> None:
    """Give a parameter, and its state, `n_rows` rows; see :meth:`Optimizer.resize`."""
    label = _find(optimizer, parameter)
    count = check_count(tuple(parameter.shape), label, n_rows)
    new_rows = (count - parameter.shape[0], *parameter.shape[1:])
    values = torch.from_numpy(check_init(init, new_rows, label).astype("float64"))

    anchor = _anchors.of(optimizer.state.get(parameter, {}))
    if anchor is not None:  # it is about to change: rows that are behind need the old one
        optimizer.flush()
    table = _grown(parameter.detach(), parameter.detach().new_empty((count, *new_rows[1:])))
    table[parameter.shape[0] :] = values
    entry = {**optimizer.state.get(parameter, {})}
    for name in (_masters.WIDE, _masters.LOWER_HALF):
        if _state.is_there(entry.get(name)):
            entry[name] = _grown(entry[name], _masters.fresh(table, name))
    if _state.is_there(entry.get(AVERAGE)):
        entry[AVERAGE] = _grown(entry[AVERAGE], _averages.fresh(table, table))
    dtype = _state.dtype_for(optimizer._state_dtype, parameter)
    fill = optimizer._initial_state()
    for name, is_signed in optimizer._all_states().items():
        piece = taken(entry, name)
        if _pieces.is_there(piece):
            old = _pieces.fitted(piece, name, label, parameter, dtype, is_signed=is_signed)
            entry.update(entries(name, _grown_piece(old, table, fill, is_signed=is_signed)))
    if anchor is not None:
        grown = _penalties.grown(anchor, new_rows)
        entry.update(_anchors.entries(grown, table, optimizer._state_dtype))
    gradient = _grown_gradient(parameter.grad, table)

    _give_memory(parameter, table)
    parameter.grad = gradient
    if entry:
        optimizer.state[parameter] = entry
    if history := optimizer._history_of(parameter):
        history.resize(count)
    if (blocks := optimizer._blocks.get(parameter)) and blocks.is_split:
        blocks.resize(parameter.numel())


def _find(optimizer: Optimizer, parameter: Tensor) -> str:
    """Return what error messages call a parameter, if it can be resized.

    Raises
    ------
    KeyError
        It is not a parameter of this optimizer.
    TypeError
        It is not a plain tensor on the CPU or an NVIDIA GPU.
    """
    label = optimizer._label_of(parameter)
    device = _tensors.device_of(parameter)
    if device.type not in ("cpu", "cuda"):
        raise TypeError(
            f"{label} is on {device}; only parameters on the CPU and on NVIDIA GPUs can be resized"
        )
    if not _tensors.is_plain(parameter):
        raise TypeError(
            f"{label} is a {type(parameter).__name__}; only plain parameters can be resized"
        )
    return label


def _grown(old: Tensor, new: Tensor) -> Tensor:
    """Return `new`, which has more rows, with the old ones at its beginning."""
    new[: old.shape[0]] = old
    return new


def _grown_piece(old: Piece, table: Tensor, fill: float, *, is_signed: bool) -> Piece:
    """Return a piece of state with as many rows as a table: the old ones, and new ones."""
    if isinstance(old, Blocks):
        return _pieces.grown(old, len(table), fill, is_signed=is_signed)
    return _grown(old, _state.new(table, old.dtype, fill))


def _grown_gradient(gradient: Tensor | None, table: Tensor) -> Tensor | None:
    """Return a gradient of a table with more rows, none of which have had a part in the loss."""
    if gradient is None:
        return None
    if not gradient.is_sparse:
        zeros = torch.zeros_like(table, dtype=gradient.dtype)
        return _grown(gradient.detach(), zeros)
    shape = (len(table), *gradient.shape[1:])
    return torch.sparse_coo_tensor(
        gradient._indices(),
        gradient._values(),
        shape,
        is_coalesced=gradient.is_coalesced(),
        check_invariants=False,
    )


def _give_memory(parameter: Tensor, table: Tensor) -> None:
    """Have a parameter lie elsewhere, with another shape.

    As long as anything holds the graph of an earlier loss, autograd goes on expecting gradients of
    the shape that the parameter had then; unless it has had another dtype in between.
    """
    with torch.no_grad():
        parameter.grad = None
        other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
        parameter.data = table.new_empty(0, dtype=other)
        parameter.data = table
    _tensors.increment_versions([parameter])
