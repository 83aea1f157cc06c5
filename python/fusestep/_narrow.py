"""State in 8 bits: small floats in blocks that share a power of two (``csrc/core/blocks.h``)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _cpu
from ._arrays import backend_of, on_host

if TYPE_CHECKING:
    import numpy.typing as npt

DTYPE = "int8"

_SUFFIX = "_powers"


class Blocks(NamedTuple):
    """Codes, of the parameter's shape and in C order, and the exponents of their powers of two.

    Arrays of bytes, of any library; in :mod:`fusestep.torch`, tensors.
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
    """Return the nearest codes of an array of floats, on the CPU."""
    floats = np.ascontiguousarray(values, np.float32)
    codes, powers = _cpu.encode_state(floats.reshape(-1), is_signed)
    return Blocks(codes.reshape(values.shape), powers)


def decode(blocks: Blocks, is_signed: bool) -> npt.NDArray[np.float32]:
    """Return what codes stand for, on the CPU."""
    codes, powers = map(np.ascontiguousarray, fetched(blocks))
    values: npt.NDArray[np.float32] = _cpu.decode_state(codes.reshape(-1), powers, is_signed)
    return values.reshape(blocks.codes.shape)


def fetched(blocks: Blocks) -> Blocks:
    """Return blocks on the CPU, which may share memory."""
    return Blocks(*map(on_host, blocks))


def placed(blocks: Blocks, like: Blocks) -> Blocks:
    """Return blocks, which are on the CPU, in arrays of the library of others and where these are.

    They may share memory.
    """
    return Blocks(*map(backend_of(like.codes).from_numpy, blocks, like))


def grown(blocks: Blocks, rows: npt.NDArray[Any], is_signed: bool) -> Blocks:
    """Return state with more rows: blocks that were full keep their bits."""
    old = fetched(blocks)
    result = encode(np.concatenate([decode(old, is_signed), rows]), is_signed)
    kept = old.codes.size // _cpu.elements_of_block
    elements = kept * _cpu.elements_of_block
    result.codes.reshape(-1)[:elements] = old.codes.reshape(-1)[:elements]
    result.powers[:kept] = old.powers[:kept]
    return placed(result, blocks)


def are_whole(block: int, *counts: npt.NDArray[Any], elements: int) -> bool:
    """Return whether all elements of each block of state belong to equal counts.

    There is a count for each `block` elements, as of updates.
    """
    if block % _cpu.elements_of_block == 0 or elements == 0:
        return True
    first = np.arange(0, elements, _cpu.elements_of_block)
    of_elements = [np.repeat(values, block)[:elements] for values in counts]
    return all(
        np.array_equal(np.minimum.reduceat(x, first), np.maximum.reduceat(x, first))
        for x in of_elements
    )


def blocks_of(elements: int) -> int:
    """Return how many blocks so many elements are in."""
    return -(-elements // _cpu.elements_of_block)


def bytes_of(elements: int) -> int:
    """Return how many bytes so many elements take."""
    return elements + blocks_of(elements)
