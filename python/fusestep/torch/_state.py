"""The state of torch parameters: allocated, completed and widened, never rounded."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.dlpack import from_dlpack

from .. import _cpu
from .._state import check_state_dtype
from ._tensors import DLPACK_DTYPES, is_plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def checked_dtype(value: Any) -> str | None:
    """Return None, "float32" or "float64" for what a user gave as ``state_dtype``."""
    return check_state_dtype(str(value)[6:] if isinstance(value, torch.dtype) else value)


def dtype_for(state_dtype: str | None, parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state: complex where the parameter is."""
    is_double = parameter.dtype in (torch.float64, torch.complex128)
    default = torch.float64 if is_double else torch.float32
    real: torch.dtype = default if state_dtype is None else getattr(torch, state_dtype)
    return _COMPLEX[real] if parameter.is_complex() else real


def new(parameter: Tensor, dtype: torch.dtype, fill: float) -> Tensor:
    """Return state of a parameter's shape, strides, device and (for a DTensor) placements."""
    value = complex(fill, fill) if dtype.is_complex else fill
    return _empty_like(parameter, dtype).fill_(value)


def _empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor like `tensor`, in memory of our own if it can be.

    A step need not ask where that is; see ``csrc/arrays/state_memory.h``.
    """
    like = functools.partial(torch.empty_like, dtype=dtype, requires_grad=False)
    if not is_plain(tensor) or tensor.device.type != "cpu":
        with torch.no_grad():
            return like(tensor)
    strides = like(tensor, device="meta").stride()
    code, bits = DLPACK_DTYPES[dtype]
    return from_dlpack(_cpu.allocate_state(tensor.shape, strides, code, bits))


def fitted(value: Any, label: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `value` on the parameter's device, widened to `dtype` if it is narrower.

    Raises
    ------
    TypeError
        It is not a tensor of floats, or complex where the parameter is not.
    ValueError
        It has another shape than the parameter.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{label} is a {type(value).__name__}; expected a tensor")
    if value.shape != parameter.shape:
        raise ValueError(
            f"{label} has shape {tuple(value.shape)}; expected {tuple(parameter.shape)}"
        )
    if value.is_complex() != parameter.is_complex() or not (
        value.is_floating_point() or value.is_complex()
    ):
        raise TypeError(f"{label} has dtype {value.dtype}; expected {dtype}")
    return value.to(device=parameter.device, dtype=torch.promote_types(value.dtype, dtype))


def copied(tensor: Tensor) -> Tensor:
    """Return a copy that shares no memory, and carries no gradient."""
    return _empty_like(tensor, tensor.dtype).copy_(tensor.detach())


def scalar_dtype(values: Iterable[Any] = ()) -> torch.dtype:
    """Return torch.optim's dtype of a step count, or float64 if one of these tensors has it."""
    dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    is_double = torch.get_default_dtype() == torch.float64 or torch.float64 in dtypes
    return torch.float64 if is_double else torch.float32


class Scalars:
    """The scalars of all parameters (``step`` and the like): one tensor for each name.

    In the state of a parameter each is a tensor of no dimensions, as in torch, and a view of one of
    these: so a step finds the scalars of all parameters with a single look.

    Parameters
    ----------
    names
        The rule's scalars.
    entries
        The state of each parameter, or an empty dict.
    """

    def __init__(self, names: Sequence[str], entries: Sequence[dict[str, Any]]) -> None:
        self.tensors = {
            name: torch.zeros(
                len(entries), dtype=scalar_dtype(entry.get(name) for entry in entries)
            )
            for name in names
        }

    def have_a_place_for(self, names: Sequence[str], entries: Sequence[dict[str, Any]]) -> bool:
        """Return whether these are the scalars that such an object would hold."""
        return list(names) == list(self.tensors) and all(
            len(tensor) == len(entries)
            and tensor.dtype == scalar_dtype(entry.get(name) for entry in entries)
            for name, tensor in self.tensors.items()
        )

    def adopt(self, entry: dict[str, Any], column: int, label: str) -> None:
        """Make the scalars in a parameter's state, new ones included, views of our tensors."""
        for name, tensor in self.tensors.items():
            value, place = entry.get(name), tensor[column]
            if isinstance(value, torch.Tensor) and _is_same_memory(value, place):
                continue
            if value is None or getattr(value, "is_meta", False):
                value = 1.0 if name == "mu_product" else 0.0
            place.fill_(number(value, f"the {name} of {label}"))
            entry[name] = place


def _is_same_memory(value: Tensor, place: Tensor) -> bool:
    return (
        value.data_ptr() == place.data_ptr()
        and value.dtype == place.dtype
        and value.shape == place.shape
    )


def number(value: Any, label: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{label} is {value!r}; expected a number") from None
