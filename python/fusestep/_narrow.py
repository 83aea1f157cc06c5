"""State in 8 bits: small floats in blocks that share a power of two (``csrc/core/blocks.h``)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _cpu

if TYPE_CHECKING:
    import numpy.typing as npt

DTYPE = "int8"

_SUFFIX = "_powers"


class Blocks(NamedTuple):
    """Codes, of the parameter's shape and in C order, and the exponents of their powers of two.

    Arrays of uint8; in :mod:`fusestep.torch`, tensors.
    """

    codes: Any
    powers: Any


def powers_name(state: str) -> str:
    """Return how the powers of a piece of state are called in a state dict."""
    return state + _SUFFIX


def filled(shape: tuple[int, ...], fill: float, is_signed: bool) -> Blocks:
    """Return the codes of an array of one number."""
    if fill == 0:
        powers = np.zeros(blocks_of(math.prod(shape)), np.uint8)
        return Blocks(np.zeros(shape, np.uint8), powers)
    return encode(np.full(shape, fill, np.float32), is_signed)


def encode(values: npt.NDArray[Any], is_signed: bool) -> Blocks:
    """Return the nearest codes of an array of floats."""
    floats = np.ascontiguousarray(values, np.float32)
    codes, powers = _cpu.encode_state(floats.reshape(-1), is_signed)
    return Blocks(codes.reshape(values.shape), powers)


def decode(blocks: Blocks, is_signed: bool) -> npt.NDArray[np.float32]:
    """Return what codes stand for."""
    codes = np.ascontiguousarray(blocks.codes).reshape(-1)
    values: npt.NDArray[np.float32] = _cpu.decode_state(
        codes, np.ascontiguousarray(blocks.powers), is_signed
    )
    return values.reshape(blocks.codes.shape)


def grown(blocks: Blocks, rows: npt.NDArray[Any], is_signed: bool) -> Blocks:
    """Return state with more rows: blocks that were full keep their bits."""
    result = encode(np.concatenate([decode(blocks, is_signed), rows]), is_signed)
    kept = blocks.codes.size // _cpu.elements_of_block
    elements = kept * _cpu.elements_of_block
    result.codes.reshape(-1)[:elements] = blocks.codes.reshape(-1)[:elements]
    result.powers[:kept] = blocks.powers[:kept]
    return result


def blocks_of(elements: int) -> int:
    """Return how many blocks so many elements are in."""
    return -(-elements // _cpu.elements_of_block)


def bytes_of(elements: int) -> int:
    """Return how many bytes so many elements take."""
    return elements + blocks_of(elements)
