"""Pieces of a rule's state: a tensor each or, in 8 bits, codes and the powers that they share.

In the state of a parameter the powers are an entry beside that of the codes. Both are tensors of
uint8; codes are in C order, whatever the strides of the parameter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .. import _narrow
from .._narrow import Blocks, powers_name
from .._state import check_blocks, check_is_whole, entries, piece_of, taken
from . import _state, _tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Piece: TypeAlias = Tensor | Blocks

IN_BLOCKS = torch.int8
"""What stands for state in 8 bits where a dtype is expected."""


def check_parameter(parameter: Tensor, label: str, dtype: torch.dtype) -> None:
    """Raise ValueError for a parameter that cannot have state of a dtype."""
    if dtype == IN_BLOCKS and _tensors.is_sharded(parameter):
        raise ValueError(
            f"{label} is a DTensor, which state_dtype='int8' is not for: the blocks of its shards "
            "are not those of the whole; use state_dtype='bfloat16'"
        )


def without(entry: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the state of a parameter without these pieces, and their powers."""
    rest = {**entry}
    for name in names:
        taken(rest, name)
    return rest


def powers_of(entry: Mapping[str, Any], names: Mapping[str, bool], dtype: torch.dtype) -> list[Any]:
    """Return the powers of these pieces, of a state of this dtype."""
    return [entry[powers_name(name)] for name in names] if dtype == IN_BLOCKS else []


def is_there(piece: Any) -> bool:
    """Return whether a piece exists, and not only as a promise on the meta device."""
    return _state.is_there(piece.codes if isinstance(piece, Blocks) else piece)


def dtype_of(piece: Piece) -> torch.dtype:
    """Return the dtype of a piece of state."""
    return IN_BLOCKS if isinstance(piece, Blocks) else piece.dtype


def new(parameter: Tensor, dtype: torch.dtype, fill: float, *, is_signed: bool) -> Piece:
    """Return a new piece of state."""
    if dtype == IN_BLOCKS:
        return _as_tensors(_narrow.filled(tuple(parameter.shape), fill, is_signed), parameter)
    return _state.new(parameter, dtype, fill)


def completed(
    entry: Mapping[str, Any],
    parameter: Tensor,
    label: str,
    states: Mapping[str, bool],
    dtype: torch.dtype,
    fill: float,
) -> dict[str, Tensor]:
    """Return the entries for all pieces that a rule needs: those there are, fitted, or new ones.

    `states` has their names, and whether they are signed; new ones are filled with `fill`.
    """
    check_parameter(parameter, label, dtype)
    complete: dict[str, Tensor] = {}
    for name, is_signed in states.items():
        piece = piece_of(entry, name)
        if is_there(piece):
            piece = fitted(piece, name, label, parameter, dtype, is_signed=is_signed)
        else:
            piece = new(parameter, dtype, fill, is_signed=is_signed)
        complete.update(entries(name, piece))
    return complete


def fitted(
    piece: Any, name: str, label: str, parameter: Tensor, dtype: torch.dtype, *, is_signed: bool
) -> Piece:
    """Return a piece on the parameter's device, in 8 bits or at least as wide as `dtype`.

    From wider to 8 bits it is rounded to nearest. `label` is what error messages call the
    parameter.

    Raises
    ------
    TypeError
        It is not a tensor of floats, or complex where the parameter is not; or of codes and powers
        that are not both there, dense and of uint8.
    ValueError
        It has another shape than the parameter, or another number of powers than blocks.
    """
    check_is_whole(piece, name, label)
    what = f"the {name} of {label}"
    if isinstance(piece, Blocks):
        blocks = _checked(piece, what, parameter)
        if dtype == IN_BLOCKS:
            return blocks
        piece = _decoded(blocks, is_signed)
    if dtype != IN_BLOCKS:
        return _state.fitted(piece, what, parameter, dtype)
    return _encoded(_state.fitted(piece, what, parameter, torch.float32), is_signed)


def loaded(
    piece: Any, name: str, label: str, parameter: Tensor, dtype: torch.dtype, *, is_signed: bool
) -> Piece:
    """Return a copy of what is being loaded, :func:`fitted`, and rounded to bfloat16, too."""
    found = fitted(piece, name, label, parameter, dtype, is_signed=is_signed)
    if isinstance(found, Blocks):
        return Blocks(*map(_state.copied, found))
    return _state.loaded(found, f"the {name} of {label}", parameter, dtype)


def all_widened(
    entry: Mapping[str, Any], label: str, states: Mapping[str, bool], dtype: torch.dtype
) -> dict[str, Any]:
    """Return the state of a parameter with pieces that have at least this dtype.

    `states` has their names, and whether they are signed.
    """
    result = {**entry}
    for name, is_signed in states.items():
        piece = piece_of(entry, name)
        if is_there(piece):
            check_is_whole(piece, name, label)
            result.pop(powers_name(name), None)
            floats: Tensor = _decoded(piece, is_signed) if isinstance(piece, Blocks) else piece
            result[name] = floats.to(torch.promote_types(floats.dtype, dtype))
    return result


def grown(blocks: Blocks, n_rows: int, fill: float, *, is_signed: bool) -> Blocks:
    """Return state in 8 bits with `n_rows` rows: the old ones, and others filled with `fill`."""
    shape = tuple(blocks.codes.shape)
    rows = np.full((n_rows - shape[0], *shape[1:]), fill, np.float32)
    result = _narrow.grown(_as_arrays(blocks), rows, is_signed)
    return _as_tensors(result, blocks.codes)


def _checked(blocks: Blocks, label: str, parameter: Tensor) -> Blocks:
    for part in blocks:
        if not isinstance(part, Tensor):
            raise TypeError(f"{label} is a {type(part).__name__}; expected a tensor")
        if part.layout is not torch.strided:
            raise TypeError(f"{label} has layout {part.layout}; expected torch.strided")
        if part.is_meta and not parameter.is_meta:
            raise TypeError(f"{label} is, in part, on the meta device, which has no numbers")
    check_blocks(blocks, label, tuple(parameter.shape))
    return Blocks(*(_beside(parameter, part).contiguous() for part in blocks))


def _encoded(floats: Tensor, is_signed: bool) -> Blocks:
    array = floats.detach().to("cpu", torch.float32).numpy()
    return _as_tensors(_narrow.encode(array, is_signed), floats)


def _decoded(blocks: Blocks, is_signed: bool) -> Tensor:
    floats = _narrow.decode(_as_arrays(blocks), is_signed)
    return _beside(blocks.codes, torch.from_numpy(floats))


def _as_arrays(blocks: Blocks) -> Blocks:
    return Blocks(*(part.detach().cpu().numpy() for part in blocks))


def _as_tensors(blocks: Blocks, like: Tensor) -> Blocks:
    tensors = (_beside(like, torch.from_numpy(part)) for part in blocks)
    return Blocks(*map(_state.copied, tensors))


def _beside(like: Tensor, tensor: Tensor) -> Tensor:
    return _tensors.moved(tensor, _tensors.device_of(like))
