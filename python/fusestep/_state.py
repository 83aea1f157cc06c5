"""State arrays: which dtype they have, and what may be loaded into them."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _narrow
from ._arrays import backend_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._arrays import ArrayDescription, Backend


NARROW = ("bfloat16", _narrow.DTYPE)
"""Dtypes of state that is rounded at random."""

_WIDE = ("float32", "float64")


def state_dtype_for(state_dtype: str | None, parameter: ArrayDescription) -> str:
    """Return the dtype of a parameter's state: float64 for float64, float32 for all others."""
    default = "float64" if parameter.dtype == "float64" else "float32"
    return default if state_dtype is None else state_dtype


def wide_dtype_for(state_dtype: str | None, parameter: ArrayDescription) -> str:
    """Return the dtype of what is kept besides the state, which is never narrower than float32."""
    wanted = state_dtype if state_dtype in _WIDE else None
    return state_dtype_for(wanted, parameter)


def check_state_dtype(value: Any) -> str | None:
    """Return None or the name of a supported dtype."""
    return _checked_dtype(value, (*_WIDE, *NARROW))


def check_wide_dtype(value: Any) -> str | None:
    """Return None or the name of a dtype that state of less than 32 bits may be widened to."""
    return _checked_dtype(value, _WIDE)


def _checked_dtype(value: Any, choices: tuple[str, ...]) -> str | None:
    if value is None:
        return None
    name = value if isinstance(value, str) else str(value).rpartition(".")[2]  # torch's
    if name not in choices:
        try:
            name = np.dtype(value).name
        except TypeError:
            name = ""
    if name in choices:
        return name
    expected = ", ".join(map(repr, choices))
    raise ValueError(f"state_dtype is {value!r}; expected None, {expected}")


def check_rows(state_dtype: str | None, rows: str) -> None:
    """Raise ValueError for state that does not go with what is done about rows."""
    if state_dtype == _narrow.DTYPE and rows == "exact":
        raise ValueError(
            "rows='exact' rounds state whenever rows are read, which 8 bits are too few for: "
            "use state_dtype='bfloat16'"
        )


def new(
    parameter: ArrayDescription, backend: Backend, dtype: str, fill: float, *, is_signed: bool
) -> Any:
    """Return a new piece of state: an array, or blocks of 8 bits."""
    if dtype != _narrow.DTYPE:
        return backend.new(parameter, dtype, fill)
    shapes = parameter.shape, (_narrow.blocks_of(math.prod(parameter.shape)),)
    zeros = _narrow.Blocks(*(backend.new(parameter.of_bytes(x), "uint8", 0) for x in shapes))
    if fill == 0:
        return zeros
    return _narrow.placed(_narrow.filled(parameter.shape, fill, is_signed), zeros)


def entries(name: str, value: Any) -> dict[str, Any]:
    """Return a piece of state as a state dict has it."""
    if isinstance(value, _narrow.Blocks):
        return {name: value.codes, _narrow.powers_name(name): value.powers}
    return {name: value}


def piece_of(entry: Mapping[Any, Any], name: str) -> Any:
    """Return a piece of state in an entry of a state dict; None where there is none."""
    value, powers = (entry.get(key) for key in (name, _narrow.powers_name(name)))
    return value if powers is None else _narrow.Blocks(value, powers)


def taken(entry: dict[Any, Any], name: str) -> Any:
    """Take a piece of state, and its powers, from an entry; None where there is none."""
    piece = piece_of(entry, name)
    for key in (name, _narrow.powers_name(name)):
        entry.pop(key, None)
    return piece


def check_is_whole(piece: Any, name: str, label: str) -> None:
    """Raise TypeError for codes without powers, or powers without codes, of a parameter."""
    if isinstance(piece, _narrow.Blocks):
        if piece.codes is None:
            raise TypeError(
                f"the {name} of {label} is missing; its {_narrow.powers_name(name)!r} is there"
            )
    elif _name(getattr(piece, "dtype", "")) == "uint8":
        raise TypeError(
            f"the {name} of {label} has dtype {piece.dtype}, as codes of state in 8 bits have; "
            f"{_narrow.powers_name(name)!r} is missing"
        )


def are_in_blocks(states: Mapping[str, Any]) -> bool:
    """Return whether a parameter's state, which there may be none of, is in 8 bits."""
    return any(isinstance(value, _narrow.Blocks) for value in states.values())


def copied(value: Any) -> Any:
    """Return a copy of a piece of state."""
    if isinstance(value, _narrow.Blocks):
        return _narrow.Blocks(*(backend_of(array).copy(array) for array in value))
    return backend_of(value).copy(value)


def widened(value: Any, dtype: str, *, is_signed: bool) -> Any:
    """Return a copy of a piece of state that has at least this dtype."""
    if isinstance(value, _narrow.Blocks):
        return _narrow.decode(value, is_signed).astype(dtype)
    like = backend_of(value).empty((), value)
    if np.dtype(_name(like.dtype)).itemsize >= np.dtype(dtype).itemsize:
        return copied(value)
    return np.asarray(backend_of(value).to_numpy(value)).astype(dtype)


def assign(target: Any, value: Any) -> None:
    """Write a piece of state, or a number, to another."""
    pairs = [(target, value)]
    if isinstance(target, _narrow.Blocks):
        source = value
        if not isinstance(value, _narrow.Blocks):
            floats = np.full(tuple(target.codes.shape), value, np.float32)
            source = _narrow.placed(_narrow.encode(floats, is_signed=False), target)
        pairs = list(zip(target, source, strict=True))
    for array, source in pairs:
        backend_of(array).assign(array, source)


class Conversions(set[tuple[str, str]]):
    """From which dtypes state that is loaded is converted, and to which."""

    def note(self, found: Any, wanted: Any, own: Any) -> None:
        """Add one, if it rounds, or widens state that is narrower than torch would keep it.

        torch keeps state in the parameter's `own` dtype.
        """
        old, new = _name(found), _name(wanted)
        if old not in ("", new) and (new in NARROW or (old in NARROW and old != _name(own))):
            self.add((old, new))

    def warn(self, stacklevel: int) -> None:
        """Say so, once, to the caller so many frames up."""
        if self:
            text = ", ".join(f"from {one} to {other}" for one, other in sorted(self))
            warnings.warn(f"state is converted {text}", UserWarning, stacklevel=stacklevel)


def fitting(
    value: Any, label: str, like: Any, own: str, conversions: Conversions, *, is_signed: bool
) -> Any:
    """Return a copy of a loaded piece of state that fits into `like`: an array, or blocks.

    State of 8 or 16 bits is converted to and from other dtypes, rounded to nearest. That is noted,
    unless it is to a wider dtype from the parameter's `own`, in which torch keeps its state.

    Raises
    ------
    TypeError
        If it is not an array of floats, or copying would round it to float32.
    ValueError
        If its shape is not that of `like`.
    """
    is_narrow = isinstance(like, _narrow.Blocks)
    if isinstance(value, _narrow.Blocks):
        blocks = _copied_blocks(value, label, like.codes if is_narrow else like)
        if is_narrow:
            return _narrow.placed(blocks, like)
        conversions.note(_narrow.DTYPE, like.dtype, own)
        floats = _narrow.decode(blocks, is_signed)
        return as_state(floats, label, like, narrows=_name(like.dtype) == "bfloat16")
    if is_narrow:
        shape = np.empty(tuple(like.codes.shape), np.float32)
        floats = as_state(value, label, shape, narrows=True)
        conversions.note(value.dtype, _narrow.DTYPE, own)
        return _narrow.placed(_narrow.encode(floats, is_signed), like)
    conversions.note(getattr(value, "dtype", ""), like.dtype, own)
    return as_state(value, label, like, narrows=_name(like.dtype) == "bfloat16")


def _name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


def _copied_blocks(blocks: _narrow.Blocks, label: str, like: Any) -> _narrow.Blocks:
    copies = _narrow.Blocks(*(np.array(backend_of(array).to_numpy(array)) for array in blocks))
    check_blocks(copies, label, tuple(like.shape))
    return copies


def check_blocks(blocks: _narrow.Blocks, label: str, shape: tuple[int, ...]) -> None:
    """Check that state in 8 bits is that of a parameter of this shape.

    Raises
    ------
    TypeError
        Codes or powers are not of uint8.
    ValueError
        Codes have another shape; or there are not as many powers as blocks.
    """
    dtypes = [_name(array.dtype) for array in blocks]
    if dtypes != ["uint8", "uint8"]:
        raise TypeError(
            f"{label} has dtypes {dtypes[0]} and {dtypes[1]}; expected uint8 for state in 8 bits"
        )
    expected = (shape, (_narrow.blocks_of(math.prod(shape)),))
    found = tuple(tuple(array.shape) for array in blocks)
    if found != expected:
        raise ValueError(
            f"{label} has shapes {found[0]} and {found[1]}; expected {expected[0]} and "
            f"{expected[1]}"
        )


def as_state(value: Any, label: str, like: Any, *, narrows: bool = False) -> Any:
    """Return a copy of a loaded value, where `like` is, that fits into it without loss.

    With `narrows`, rounded where need be.

    Raises
    ------
    TypeError
        If it is not an array of floats, or copying would round it.
    ValueError
        If its shape is not that of `like`.
    """
    try:
        array = np.array(backend_of(value).to_numpy(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{label} is a {type(value).__name__}; expected a float array ({error})"
        ) from None
    if array.dtype.kind not in "fV" or array.dtype == object:
        raise TypeError(f"{label} has dtype {array.dtype}; expected floats")
    if array.shape != tuple(like.shape):
        raise ValueError(f"{label} has shape {array.shape}; expected {tuple(like.shape)}")
    dtype = np.dtype(_name(like.dtype))
    if not narrows and not np.can_cast(array.dtype, dtype, "safe"):
        advice = "; create the optimizer with state_dtype='float64'"
        raise TypeError(
            f"{label} has dtype {array.dtype}, which would be rounded to {dtype}"
            + (advice if array.dtype == np.float64 else "")
        )
    return backend_of(like).from_numpy(array, like)
